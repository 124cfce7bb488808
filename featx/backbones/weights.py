"""Owns weights files: reading them without running code, and telling why they do not fit a network."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featx.backbones.backbone import replace_module
from featx.backbones.table import AUXILIARY, fingerprint, table
from featx.errors import WeightsError
from featx.files import file_stats

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# what training scripts wrap a state dict in, and what they put before its names
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")


def is_file(weights: str) -> bool:
    """Whether a request's `weights` means a file, there or not, rather than a name."""
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights or Path(weights).is_file()


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a .pth or .safetensors file, and the `file_stats` it had. Runs no code from the file.

    Wrappers such as `{"state_dict": ...}` and prefixes such as `module.` are taken off. Raises `WeightsError`.
    """
    try:
        stats = file_stats(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"the weights file {path} is not there") from None
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported operand" in text or ("weights_only" not in text and "Unsupported" not in text):
            raise WeightsError(f"{path} is damaged or no weights file") from error
        raise WeightsError(
            f"{path} holds pickled objects beside tensors, which could run code and are not loaded; "
            "save its state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # zip, pickle and safetensors each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} cannot be read as {path.suffix or 'weights'} ({reason})") from error
    return unwrap(loaded, path), {str(path.absolute()): stats}


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The innermost state dict, its names as the network's own."""
    while isinstance(loaded, Mapping):
        inner = next((loaded[k] for k in _WRAPPERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    # the versions that old files carry tell their network how to read them
    versions: Any = getattr(loaded, "_metadata", None)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
                stripped, versions = True, None
    state = _State(tensors)
    if versions is not None:
        state._metadata = versions
    return state


class _State(dict[str, Tensor]):
    """A state dict that can carry `_metadata`, as torch's own do."""

    _metadata: Any


def load_state(network: nn.Module, state: dict[str, Tensor], what: str, head: str | None = None) -> str:
    """Load `state` into `network`, all of it or an error; return what is worth noting about its classifier.

    head: the dotted name of the classifier's last layer. Where the file has another number of classes,
    that layer is replaced by one of its size; where it has none under this name, by an Identity.
    Raises `WeightsError` that names what is missing, unexpected and of another shape.
    """
    own = network.state_dict()
    # auxiliary classifiers only help training, and counters do not change what a network computes
    given = _State({k: v for k, v in state.items() if k in own or not k.startswith(AUXILIARY)})
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, tensor)
    note = ""
    if head is not None:
        weight, ours = given.get(f"{head}.weight"), own[f"{head}.weight"]
        inside = {k for k in given if k.startswith(f"{head}.")}
        if weight is None or {f"{head}.weight", f"{head}.bias"} & own.keys() != inside:
            replace_module(network, head, nn.Identity())
            given = _State({k: v for k, v in given.items() if k not in inside})
            note = "without the network's own classifier"
        elif weight.ndim == ours.ndim and weight.shape[0] != ours.shape[0] and weight.shape[1:] == ours.shape[1:]:
            replace_module(network, head, _sized(network.get_submodule(head), len(weight)))
            note = f"its own classifier has {len(weight)} classes, whose names are not known"
        own = network.state_dict()
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    shapes = [
        f"{name} is {list(given[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if given[name].shape != own[name].shape
    ]
    # files of torch's first years lack versions; what the network would write today is then assumed
    given._metadata = getattr(state, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
    problems = [
        f"{len(found)} {label}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
        for label, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if not problems:
        try:
            network.load_state_dict(given, strict=True)
        except RuntimeError as error:
            problems = [str(error).splitlines()[-1].strip()]
    if problems:
        raise WeightsError(f"{what} does not fit: {'; '.join(problems)}.{_looks_like(state)}")
    return note


def _looks_like(state: Mapping[str, Tensor]) -> str:
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    rows = table()["networks"]
    prints = {head: fingerprint(shapes, head) for head in {row["head"] for row in rows}}
    like = [row["name"] for row in rows if row["fingerprint"] == prints[row["head"]]]
    return f" The file looks like {' or '.join(like)}; pass that as the backbone." if like else ""


def _sized(layer: nn.Module, classes: int) -> nn.Module:
    """A layer like this one, Linear or 1x1 convolution, for another number of classes."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, classes, kernel_size=1, bias=bias)
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, classes, bias=bias)
