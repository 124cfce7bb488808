"""Read weights files without running code from them, and say why one does not fit a network."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featx.backbones.backbone import replace_module
from featx.backbones.table import AUXILIARY, fingerprint, table
from featx.errors import WeightsError
from featx.files import open_plain, stat_row
from featx.text import some

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
# Keys under which training scripts save a state dict, and prefixes that they add to its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.")


def is_file(weights: str) -> bool:
    """Whether a request's `weights` names a file, which may be missing, and not a set of published weights."""
    return weights.endswith(SUFFIXES) or "/" in weights or "\\" in weights or Path(weights).is_file()


def first_line(error: Exception) -> str:
    """An error's first line, or its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a .pth or .safetensors file, and its `stat_row` by path. Runs no code from the file.

    Removes wrappers such as `{"state_dict": ...}` and prefixes such as `module.`. Raises `WeightsError`.
    """
    try:
        with open_plain(path) as file:  # a pipe would wait for ever, a device never end
            stats = list(stat_row(os.fstat(file.fileno())))
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
            raise WeightsError(f"{path} is damaged, or not a weights file") from error
        raise WeightsError(
            f"{path} holds pickled objects beside tensors, which could run code and are not loaded; "
            "save its state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # zip, pickle and safetensors each raise their own
        raise WeightsError(f"{path} cannot be read as {path.suffix or 'weights'} ({first_line(error)})") from error
    return unwrap(loaded, path), {str(path.absolute()): stats}


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The innermost state dict, with the network's own names."""
    given = loaded if isinstance(loaded, Mapping) else {}
    for key in _WRAPPERS:
        if isinstance(given.get(key), Mapping):
            return unwrap(given[key], path)
    tensors = {str(name): value for name, value in given.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")

    # old files carry versions, which tell their network how to read them
    versions: Any = getattr(loaded, "_metadata", None)
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors, versions = {name.removeprefix(prefix): t for name, t in tensors.items()}, None
    state = _State(tensors)
    if versions is not None:
        state._metadata = versions
    return state


class _State(dict[str, Tensor]):
    """A state dict that can carry `_metadata`, as torch's own do."""

    _metadata: Any


def load_state(network: nn.Module, state: dict[str, Tensor], what: str, head: str | None = None) -> str:
    """Load all of `state` into `network`; return a note about its classifier, empty where that is the network's own.

    head: the dotted name of the classifier's last layer. Where the file has another number of classes,
    a layer of that size replaces it; where the file has none under this name, an Identity does.
    Raises `WeightsError`, which names what is missing, unexpected or of another shape.
    """
    own = network.state_dict()
    # a file may have auxiliary classifiers, which only help training; counters may be missing, as no output needs them
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

    shapes = [
        f"{name} is {list(given[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    differences = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another shape": shapes,
    }
    problems = [f"{len(names)} {label}: {some(sorted(names))}" for label, names in differences.items() if names]
    # files of torch's first years lack versions; then those that the network would write today are assumed
    given._metadata = getattr(state, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
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
    """A layer like this Linear or 1x1 convolution for another number of classes, its values not set."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, classes, kernel_size=1, bias=bias, device="meta").to_empty(device="cpu")
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, classes, bias=bias, device="meta").to_empty(device="cpu")
