"""Owns what a backbone is asked for and known by (`BackboneRequest`, `BackboneInfo`), without torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from featx import __version__
from featx.errors import BackboneError, near
from featx.features import FeatureSpec
from featx.files import write_atomic
from featx.preprocess import Preprocess

if TYPE_CHECKING:
    from featx.backbones._module import Backbone

RESOLVED_VERSION = 1  # raised when `BackboneInfo` or how it is found changes; old memos are then misses


@dataclass(frozen=True)
class BackboneRequest:
    """What the user asked for. Nothing here is checked before the network is loaded."""

    name: str
    """`resnet18`, `timm/vit_small_patch14_dinov2.lvd142m`, `package.module:factory`."""
    weights: str = "pretrained"
    """`pretrained`, an enum name (`IMAGENET1K_V2`), `random`, or the path of a .pth / .safetensors file."""
    layer: str = "features"
    """`features` (the input of the last Linear), `logits`, or a module's dotted name."""
    seed: int = 0
    """Of `random` weights."""
    preprocess: tuple[tuple[str, Any], ...] = ()
    """Fields of `Preprocess` to override, such as `(("resize", 232),)`."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "preprocess": dict(self.preprocess)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneRequest:
        overrides = tuple((k, _tuple(v)) for k, v in dict(values.get("preprocess", {})).items())
        return cls(**{**values, "preprocess": overrides})

    def override(self, preprocess: Preprocess) -> Preprocess:
        """`preprocess` with the request's own fields. Raises `BackboneError` for an unknown field."""
        known = [field.name for field in fields(Preprocess)]
        for name, _ in self.preprocess:
            if name not in known:
                raise BackboneError(
                    f"unknown preprocessing field {name!r}; there are {', '.join(known)}.{near(name, known)}"
                )
        return Preprocess.from_dict({**preprocess.to_dict(), **dict(self.preprocess)})


@dataclass(frozen=True)
class BackboneInfo:
    """All that is known about a loaded backbone without loading it again."""

    name: str
    """`torchvision/resnet18`, `timm/...`, `custom/package.module:factory`."""
    weights_digest: str
    """`tensors_digest` of the network's state, in hex; a custom factory's source is hashed with it."""
    layer: str
    """As in the request."""
    preprocess: Preprocess
    row_shape: tuple[int, ...]
    """Of one image's row: `(D,)`."""
    class_names: tuple[str, ...] | None
    """Of the network's own classifier, in its order; None where they are not known."""
    affine: bool
    """The network's own classifier is one Linear on `features`, whatever `layer` is."""
    parameters: int
    """Of the whole network, its classifier included."""
    weights_note: str
    """For people: `pretrained IMAGENET1K_V1`, `random, seed 0`, `local file squeezenet.pth`."""
    license: str = ""
    """Of the weights, where their publisher says so."""

    def spec(self, *, view: str = "center", precision: str = "fp32", dtype: str = "float32") -> FeatureSpec:
        """The identity of the features that this backbone gives."""
        return FeatureSpec(
            backbone=self.name,
            weights=self.weights_digest,
            layer=self.layer,
            preprocess=self.preprocess,
            view=view,
            precision=precision,
            dtype=dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneInfo:
        names = values["class_names"]
        return cls(
            **{
                **values,
                "preprocess": Preprocess.from_dict(values["preprocess"]),
                "row_shape": tuple(values["row_shape"]),
                "class_names": None if names is None else tuple(names),
            }
        )


def sources() -> list[str]:
    """Where backbones come from: the names of the files in this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def locate(name: str) -> tuple[str, str]:
    """Split a backbone's name into its source and its name there, without importing either.

    `resnet18` and `torchvision/resnet18` -> `("torchvision", "resnet18")`; `package.module:factory` ->
    `("custom", "package.module:factory")`. Raises `BackboneError` for an unknown source.
    """
    head, slash, rest = name.partition("/")
    if slash and head in sources():
        return head, rest
    if ":" in name and not slash:
        return "custom", name
    if slash or not name:
        raise BackboneError(
            f"unknown backbone {name!r}; expected a torchvision network's name, "
            f"timm/NAME or package.module:factory.{near(head, sources())}"
        )
    return "torchvision", name


def load_backbone(request: BackboneRequest) -> Backbone:
    """Load the network that was asked for, in eval mode on the CPU. Imports torch.

    The state of torch's random generators is left as it was. Raises `BackboneError` for an unknown
    name, layer or factory and `WeightsError` for weights that are not at hand or do not fit.
    """
    source, name = locate(request.name)
    module: ModuleType = importlib.import_module(f"{__name__}.{source}")
    backbone: Backbone = module.load(request, name)
    return backbone


def resolve(request: BackboneRequest, cache: Path | None) -> BackboneInfo:
    """What `load_backbone(request).info` is, remembered in `cache/resolved/`, so that a warm run needs no torch.

    The memo answers only while the library versions and the weights file's size, times and inode are
    what they were; a damaged one is a miss. Custom factories are always loaded: their code may change.
    """
    source, name = locate(request.name)
    if cache is None or source == "custom":
        return load_backbone(request).info
    memo = Path(cache) / "resolved" / f"{_memo_key(request, source, name)}.json"
    info = _remembered(memo)
    if info is None:
        backbone = load_backbone(request)
        info = backbone.info
        if backbone.files is not None:
            _remember(memo, info, backbone.files)
    return info


def listing() -> list[dict[str, Any]]:
    """The torchvision networks, from a packaged table, for `featx backbones`: no network is built.

    Each has `name`, `features` (the size of a row), `parameters`, `crop` (input side, pixels),
    `weights` (enum names) and `default` (the enum name that `pretrained` stands for).
    """
    from featx.backbones._table import table

    keys = ("name", "features", "parameters", "crop", "weights", "default")
    return [{key: row[key] for key in keys} for row in table()["networks"]]


def names() -> list[str]:
    """The torchvision networks' names; timm networks and factories come on top."""
    return [row["name"] for row in listing()]


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over the sorted names, dtypes, shapes and bytes (little-endian) of torch or numpy tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        if hasattr(tensor, "detach"):
            import torch  # imported already, by whoever made the tensor

            flat = tensor.detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy()
        else:
            data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        digest.update(data)
    return digest.hexdigest()


def file_stats(path: Path) -> list[int]:
    """What must stay the same for a file's content to be taken as unchanged."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def __getattr__(name: str) -> Any:
    if name == "Backbone":  # imports torch
        from featx.backbones._module import Backbone

        return Backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _memo_key(request: BackboneRequest, source: str, name: str) -> str:
    """What the answer depends on and can be known without torch, hashed."""
    weights = Path(request.weights)
    file = [str(weights.absolute()), *file_stats(weights)] if weights.is_file() else None
    packages = ("torch", "torchvision", "timm") if source == "timm" else ("torch", "torchvision")
    versions = [_version(package) for package in packages]
    places = [os.environ.get(k) for k in ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")]
    asked = [source, name, request.to_dict(), file, versions, places, __version__, RESOLVED_VERSION]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _remembered(memo: Path) -> BackboneInfo | None:
    try:
        values = json.loads(memo.read_bytes())
        text = json.dumps(values["info"], sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != values["sha256"]:
            return None
        if any(file_stats(Path(path)) != stats for path, stats in values["files"].items()):
            return None
        return BackboneInfo.from_dict(values["info"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: the network is loaded and the memo written anew


def _remember(memo: Path, info: BackboneInfo, files: Mapping[str, list[int]]) -> None:
    values = json.loads(json.dumps(info.to_dict()))
    text = json.dumps(values, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    data = json.dumps({"info": values, "files": files, "sha256": digest}, indent=1)
    # a cache that cannot be written costs the next run its head start, and nothing else here
    with contextlib.suppress(OSError):
        write_atomic(memo, data.encode())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
