"""torchvision's classification networks: their weights, preprocessing, class names and last layer."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

from featx.backbones.backbone import Backbone, Origin, build, without
from featx.backbones.request import BackboneRequest
from featx.backbones.table import unknown
from featx.backbones.weights import load_state, read_state
from featx.errors import BackboneError, WeightsError
from featx.pixels.preprocess import Preprocess
from featx.text import near

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
# Trained with transform_input=True, which torchvision sets only when it loads its own weights.
_TRANSFORM_INPUT = ("googlenet", "inception_v3")


def load(request: BackboneRequest, name: str) -> Backbone:
    """Load a network by its torchvision name. Raises `BackboneError` and `WeightsError`."""
    known = models.list_models(module=models)
    if name not in known:
        raise unknown(name, known)

    chosen = first_weights(name)  # whose preprocessing `random` and local files get
    files: dict[str, list[int]] | None = {}
    found, whose = None, ""
    if request.weights == "random":
        note = f"random, seed {request.seed}"
    elif request.file:
        found, note = read_state(request.file, request.part), f"local file {request.file.name}"
        if known := published(models.get_model_weights(name), request.file):
            chosen, whose = known, f", torchvision's {known.name}"
        else:
            whose = request.assumed(chosen.name)
    else:
        chosen = _named(name, request.weights)
        found, note = read_state(_download(chosen)), f"pretrained {chosen.name}"

    preprocess = request.override(preprocessing(chosen))
    with contextlib.nullcontext() if found is None else _Undrawn():  # type: ignore[no-untyped-call]
        network = create(name, preprocess.crop, seed=request.seed)
    last = last_layer(name, network)
    class_names = chosen.meta.get("categories")
    if found is not None:
        if name.startswith("densenet"):
            found.tensors, found.groups = _renamed(found.tensors), _renamed(found.groups)
        taken = load_state(network, found, f"{found.path} as {name}", last)
        files, note, class_names = found.files, note + taken.note, class_names if taken.whole else None

    layer = network.get_submodule(last)
    if isinstance(layer, nn.Identity) and request.layer == "logits":
        raise BackboneError(f"{request.weights} holds no classifier, so {name} has no logits; use layer features")
    if name.startswith("squeezenet"):
        # its classifier is a convolution, a ReLU and a pool, not an affine map of the pooled features
        cut = without(network, "classifier", nn.AdaptiveAvgPool2d(1))
    else:
        cut = without(network, last)
    origin = Origin(f"torchvision/{name}", preprocess, tuple(class_names) if class_names else None, note + whose, files)
    return build(request, origin, network, cut, last if isinstance(layer, nn.Linear) else None)


class _Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Zeros for random weights, where a file's replace them; trunc_normal_ redraws what is out of range."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        return args[0].zero_() if drawn else func(*args, **(kwargs or {}))


def create(name: str, crop: int, seed: int = 0) -> nn.Module:
    """Build a network with random weights for `crop` x `crop` pixels, without auxiliary classifiers.

    The weights depend on `seed` alone; torch's global generator stays as it was.
    """
    options: dict[str, Any] = {}
    if name in _TRANSFORM_INPUT:
        options = {"transform_input": True, "aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": crop}
    elif name.startswith("maxvit"):
        options = {"input_size": (crop, crop)}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network: nn.Module = models.get_model(name, weights=None, **options)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise BackboneError(f"{name} cannot be built for {crop} x {crop} pixels ({error})") from error
    return network.eval()


def last_layer(name: str, network: nn.Module) -> str:
    """The dotted name of the classifier's last Linear, or of SqueezeNet's last convolution."""
    kind = nn.Conv2d if name.startswith("squeezenet") else nn.Linear
    paths: list[str] = [path for path, module in network.named_modules() if isinstance(module, kind)]
    return paths[-1]


def first_weights(name: str) -> Any:
    """`IMAGENET1K_V1`, or the first there is: a local file is preprocessed as these are."""
    members = models.get_model_weights(name).__members__
    return members.get("IMAGENET1K_V1") or next(iter(members.values()))


def preprocessing(weights: Any) -> Preprocess:
    """The resize, crop and normalisation that a weights enum's own transforms do."""
    preset = weights.transforms()
    return Preprocess(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def published(members: Iterable[Any], file: Path) -> Any:
    """The weights enum whose file this is, by its SHA-256, or else by its name; None for weights of somebody's own."""
    prefixes = {_prefix(member): member for member in members}
    with contextlib.suppress(OSError), open(file, "rb") as data:  # a folder
        digest = hashlib.file_digest(data, "sha256").hexdigest()
        own = [member for prefix, member in prefixes.items() if digest.startswith(prefix)]
        own += [member for prefix, member in prefixes.items() if f"-{prefix}." in file.name]
        return own[0] if own else None
    return None


def _prefix(weights: Any) -> str:
    """The start of the SHA-256 of the file of a weights enum, which torchvision puts into its name."""
    return Path(urlparse(weights.url).path).stem.rpartition("-")[2]


def _named(name: str, weights: str) -> Any:
    known = models.get_model_weights(name)
    if weights == "pretrained":
        return known.DEFAULT
    members = {member.name: member for member in known}
    if weights not in members:
        others = ["pretrained", "random", *members]
        raise WeightsError(
            f"{name} has no weights {weights!r}; there are {', '.join(others)}, "
            f"or the path of a .pth or .safetensors file.{near(weights, others)}"
        )
    return members[weights]


def _download(weights: Any) -> Path:
    """The file of a weights enum in torch's hub folder, downloaded where it is missing."""
    file = Path(urlparse(weights.url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path

    timeout = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch sets none, and would wait for ever
        torch.hub.download_url_to_file(weights.url, str(path), _prefix(weights), progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise WeightsError(
            f"the weights file {file} could not be downloaded ({error}). Fetch {weights.url} where there is a "
            f"network and put it at {path} (TORCH_HOME moves that folder), or pass --weights FILE or "
            "--weights random"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    """DenseNet files from before torch 0.4.1 say `norm.1` where the network says `norm1`."""
    return {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key): t for key, t in state.items()}
