"""Load a requested backbone, and remember what it resolved to, so that a warm run needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from featx import __version__
from featx.backbones import zoos
from featx.backbones.request import MISSING, BackboneInfo, BackboneRequest
from featx.backbones.table import names, table, unknown
from featx.errors import BackboneError, WeightsError
from featx.files import read_plain, stat_row
from featx.records import convert, unsealed, write_sealed
from featx.state import one_at_a_time, ordinary
from featx.text import near

if TYPE_CHECKING:
    from featx.backbones.backbone import Backbone

RESOLVED_VERSION = 3  # raised when `BackboneInfo` or how it is found changes; old memos are then misses


def zoo_names() -> list[str]:
    """The sources of backbones: the names of the files in `featx/backbones/zoos`."""
    return sorted(m.name for m in pkgutil.iter_modules(zoos.__path__) if not m.name.startswith("_"))


def locate(name: str) -> tuple[str, str]:
    """Split a backbone's name into its source and its name there; imports neither.

    `resnet18` and `torchvision/resnet18` -> `("torchvision", "resnet18")`; `package.module:factory` ->
    `("custom", "package.module:factory")`. Raises `BackboneError` for an unknown source.
    """
    head, slash, rest = name.partition("/")
    if slash and head in zoo_names():
        return head, rest
    if ":" in name and not slash:
        return "custom", name
    if slash or not name:
        raise BackboneError(
            f"unknown backbone {name!r}; expected a torchvision network's name, "
            f"timm/NAME or package.module:factory.{near(head, zoo_names())}"
        )
    return "torchvision", name


def check(request: BackboneRequest, cache: Path) -> None:
    """Raise `BackboneError` or `WeightsError` for a name or a file that cannot be, without torch where it is known."""
    source, name = _quick(request)
    if source == "timm" and _remembered(_memo(request, cache)) is None:
        importlib.import_module(f"{zoos.__name__}.timm").find(name)


def _quick(request: BackboneRequest) -> tuple[str, str]:
    """`locate`, after what can be refused at once: a file that is not there, a name that this torchvision lacks."""
    source, name = locate(request.name)
    if request.file and not request.file.exists():
        raise WeightsError(MISSING.format(request.file))
    same = (_version("torchvision") or "").partition("+")[0] == table()["torchvision"]
    if source == "torchvision" and same and name not in names():
        raise unknown(name, names())
    return source, name


@one_at_a_time()
@ordinary()
def load_backbone(request: BackboneRequest) -> Backbone:
    """Load the requested network, in eval mode on the CPU. Imports torch; its random generators stay as they were.

    Raises `BackboneError` for an unknown name, layer or factory and `WeightsError` for weights that are
    missing or do not fit.
    """
    source, name = _quick(request)
    module: ModuleType = importlib.import_module(f"{zoos.__name__}.{source}")
    backbone: Backbone = module.load(request, name)
    return backbone


def resolve(request: BackboneRequest, cache: Path | None) -> BackboneInfo:
    """`load_backbone(request).info`, remembered in `cache/resolved/`, so that a warm run needs no torch.

    A memo is valid while the library versions and the weights file's size, times and inode stay the same;
    a damaged one is ignored. Custom factories are always loaded: their code may change.
    """
    if cache is None or locate(request.name)[0] == "custom":
        return load_backbone(request).info

    memo = _memo(request, cache)
    if info := _remembered(memo):
        return info
    backbone = load_backbone(request)
    if backbone.files is not None:
        with contextlib.suppress(OSError):  # without a memo the next run loads the network again
            write_sealed(memo, {"info": backbone.info.to_dict(), "files": backbone.files})
    return backbone.info


def loaded(request: BackboneRequest, info: BackboneInfo) -> Backbone:
    """Load the backbone, and check that it is still what was resolved: a file may have been replaced since."""
    backbone = load_backbone(request)
    if backbone.info.spec() != info.spec():
        raise WeightsError(
            f"{info.name} was {info.weights_note} with weights {info.weights_digest[:12]}, "
            f"but {backbone.info.weights_note} has {backbone.info.weights_digest[:12]} now; start again"
        )
    return backbone


def _remembered(memo: Path) -> BackboneInfo | None:
    """What a memo says, where it is there, undamaged, and still true of the weights files."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = unsealed(read_plain(memo))
        files = convert(values["files"], dict[str, list[int]])
        if all(list(stat_row(os.stat(path))) == stats for path, stats in files.items()):
            return BackboneInfo.from_dict(values["info"])
    return None


def _memo(request: BackboneRequest, cache: Path) -> Path:
    """Where the answer is remembered: by a hash of all that it depends on and that is known without torch."""
    source, name = locate(request.name)
    weights = request.file
    file = [str(weights.absolute()), *stat_row(os.stat(weights))] if weights and weights.exists() else None
    versions = [_version(package) for package in ("torch", "torchvision", "timm")]
    places = [os.environ.get(k) for k in ("TORCH_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")]
    asked = [source, name, request.to_dict(), file, versions, places, __version__, RESOLVED_VERSION]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return Path(cache) / "resolved" / f"{digest}.json"


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
