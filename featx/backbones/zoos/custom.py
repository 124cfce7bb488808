"""Backbones of your own: `package.module:factory`, a function that makes a network.

    def factory() -> nn.Module | tuple[nn.Module, Preprocess] | tuple[nn.Module, Preprocess, list[str]]

- The network takes `float32 [B, 3, crop, crop]`, normalised, and is put into eval mode.
- `Preprocess` says how images become such pixels; without one, ImageNet's 256 / 224 and mean / std.
- With class names the network is a classifier: `features` are the input of its last Linear, whose
  output must be the network's own, and `--head pretrained` can use it. Without them, `features` are
  the network's output. Maps are averaged over height and width, sequences over their tokens.
- `--weights FILE` is loaded into the network; `--weights pretrained` keeps what the factory made. The
  factory runs with torch's generator seeded by `--seed`, and the generator is restored afterwards.
- Modules are searched for as Python does, and in the current folder.

The weights digest covers the tensors and the source file that holds the factory, so editing that file
recomputes features. Code that it imports is not covered: rename the factory when that changes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featx.backbones.backbone import Backbone, Origin, build, is_affine, tensors_digest, without
from featx.backbones.request import BackboneRequest
from featx.backbones.weights import load_state, read_state
from featx.errors import BackboneError, WeightsError
from featx.pixels.preprocess import Preprocess
from featx.text import near


def load(request: BackboneRequest, name: str) -> Backbone:
    """Call the factory `package.module:function` and wrap what it makes. Raises `BackboneError`."""
    factory = _find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        made = factory()
    network, preprocess, class_names = _parts(made, name)
    preprocess = request.override(preprocess)
    network.eval()

    note = f"as {name} makes them"
    if request.file:
        taken = load_state(network, read_state(request.file, request.part), f"{request.file} as {name}")
        note = f"local file {request.file.name}{taken.note}"
    elif request.weights == "random":
        note += f", seed {request.seed}"
    elif request.weights != "pretrained":
        raise WeightsError(
            f"{name} is your own factory, which has no weights {request.weights!r}; "
            "expected pretrained (as it makes them), random, or the path of a .pth or .safetensors file"
        )

    cut, head = network, None
    if class_names is not None:
        head = _classifier(network, name, preprocess.crop, len(class_names))
        cut = without(network, head)
    digest = hashlib.sha256(tensors_digest(network.state_dict()).encode() + _source(factory)).hexdigest()
    origin = Origin(f"custom/{name}", preprocess, class_names, note, files=None, digest=digest)
    return build(request, origin, network, cut, head)


def _find(name: str) -> Callable[[], Any]:
    path, _, function = name.partition(":")
    if not path or not function.isidentifier():
        raise BackboneError(f"{name!r} is not a factory; expected package.module:function")

    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file here hides no installed package
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise BackboneError(f"{path} cannot be imported: it needs {error.name}, which is not installed") from error
        raise BackboneError(f"there is no module {path!r} on Python's search path or in {folder}") from error
    except Exception as error:
        raise BackboneError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error

    factory: Callable[[], Any] | None = getattr(module, function, None)
    if not callable(factory):
        known = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise BackboneError(f"{path} has no function {function!r}.{near(function, known)}")
    return factory


def _parts(made: Any, name: str) -> tuple[nn.Module, Preprocess, tuple[str, ...] | None]:
    parts = made if isinstance(made, tuple) else (made,)
    network, preprocess, class_names = (*parts, None, None)[:3]
    fits = (
        len(parts) <= 3
        and isinstance(network, nn.Module)
        and isinstance(preprocess, Preprocess | None)
        and not isinstance(class_names, str)
    )
    if not fits:
        raise BackboneError(
            f"{name} returned {', '.join(type(part).__name__ for part in parts)}; expected a torch module, "
            "(module, featx Preprocess) or (module, Preprocess, class names)"
        )
    names = None if class_names is None else tuple(str(c) for c in class_names)
    return network, preprocess or Preprocess(), names


def _classifier(network: nn.Module, name: str, crop: int, classes: int) -> str:
    """The dotted name of the last Linear, after a check that the network ends in it."""
    linears = [path for path, module in network.named_modules() if isinstance(module, nn.Linear) and path]
    if linears:
        head: str = linears[-1]
        as_many = network.get_submodule(head).out_features == classes
        if as_many and is_affine(network, without(network, head), head, crop):
            return head
    raise BackboneError(
        f"{name} gives {classes} class names, but its network does not end in a Linear with that many outputs; "
        "return no class names to have its output as the features"
    )


def _source(factory: Callable[[], Any]) -> bytes:
    """The content of the file that holds the factory."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(factory))
        return Path(file).read_bytes() if file else b""
    except (TypeError, OSError):
        return b""  # a partial, or compiled code
