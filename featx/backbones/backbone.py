"""Owns `Backbone`: a loaded network, cut at its layer, from `uint8` pixels to `float32` rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from featx.backbones.request import BackboneInfo, BackboneRequest, tensors_digest
from featx.errors import BackboneError, WeightsError
from featx.pixels.preprocess import Preprocess
from featx.text import near

# containers whose children are groups of their own; others, such as ResNet's layer1, are one group
_SPLIT = ("features", "layers", "blocks", "trunk_output", "encoder", "stages")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded network and what is known about it."""

    info: BackboneInfo
    network: nn.Module
    """The whole network, its classifier included, in eval mode on the CPU."""
    module: Trunk
    """`uint8 [B, 3, H, W]` -> `float32 [B, *row_shape]`. It shares its tensors with `network` while both
    stay on the CPU; fine-tuning trains and saves `module`."""
    classifier: tuple[np.ndarray, np.ndarray] | None
    """The network's own last Linear, `float32 [C, D]` and `[C]`; None where `info.affine` is False."""
    groups: list[tuple[str, list[str]]]
    """Layer groups from the input on, the classifier left out: a name, and the prefixes of the parameters'
    names in `module.network` (a name belongs to a prefix that it equals, or starts with before a dot)."""
    files: dict[str, list[int]] | None
    """The weights files, with the `file_stats` they had; None where `info` must not be remembered."""


class Trunk(nn.Module):
    """Scale, normalise, run the network up to its layer, pool to one row an image."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess, tap: str | None = None) -> None:
        """tap: the dotted name of the module whose output is taken; None for the network's own."""
        super().__init__()
        self.network = network
        self.tap = tap
        self.pool = "rows"
        self.dtype = torch.float32
        """What the network computes in; pixels are normalised and rows returned in float32."""
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`uint8 [B, 3, H, W]` -> `float32 [B, *row_shape]`."""
        pixels = images.to(torch.float32) / 255
        return self.pooled(self.output(((pixels - self.mean) / self.std).to(self.dtype)).float())

    def output(self, pixels: Tensor) -> Tensor:
        """What the layer gives for normalised pixels, before pooling."""
        if self.tap is None:
            return self.network(pixels)
        taken: list[Tensor] = []  # a local, so that torch.export sees no state change
        layer = self.network.get_submodule(self.tap)
        handle = layer.register_forward_hook(lambda _module, _inputs, output: taken.append(output))
        try:
            self.network(pixels)
        finally:
            handle.remove()
        return taken[-1]

    def pooled(self, output: Tensor) -> Tensor:
        """Average maps over height and width, and token sequences over the tokens."""
        if self.pool == "rows":
            return output
        return output.mean({"nchw": (2, 3), "nhwc": (1, 2), "tokens": (1,)}[self.pool])


def build(
    request: BackboneRequest,
    network: nn.Module,
    *,
    name: str,
    preprocess: Preprocess,
    cut: nn.Module | None,
    head: str | None,
    class_names: tuple[str, ...] | None,
    note: str,
    files: dict[str, list[int]] | None,
    digest: str | None = None,
    license: str = "",
) -> Backbone:
    """Put a loaded network together with its trunk, and look at what the trunk gives for one image.

    cut: the network that gives `features`, sharing its tensors with `network`; None where the network
    itself does. head: the dotted name of the last Linear, where the classifier is that alone.
    Raises `BackboneError` for an unknown layer and `WeightsError` for weights that hold NaN.
    """
    preprocess = request.override(preprocess)
    network.eval()
    if request.layer == "features":
        trunk = Trunk(cut if cut is not None else network, preprocess)
    elif request.layer == "logits":
        trunk = Trunk(network, preprocess)
    else:
        known = [n for n, _ in network.named_modules() if n]
        if request.layer not in known:
            raise BackboneError(
                f"{name} has no layer {request.layer!r}; expected features, logits or a module's dotted name."
                f"{near(request.layer, known)}"
            )
        trunk = Trunk(network, preprocess, tap=request.layer)
    trunk.eval()
    row_shape = _probe(trunk, preprocess.crop, f"{name}, layer {request.layer}")
    last = network.get_submodule(head) if head else None
    classifier = None
    if isinstance(last, nn.Linear):
        weight = last.weight.detach().float().numpy().copy()
        bias = np.zeros(len(weight), np.float32) if last.bias is None else last.bias.detach().float().numpy()
        classifier = (weight, bias.copy())
    info = BackboneInfo(
        name=name,
        weights_digest=digest or tensors_digest(network.state_dict()),
        layer=request.layer,
        preprocess=preprocess,
        row_shape=row_shape,
        class_names=class_names,
        affine=classifier is not None,
        parameters=sum(p.numel() for p in network.parameters()),
        weights_note=note,
        license=license,
    )
    return Backbone(info, network, trunk, classifier, groups(trunk.network, head), files)


def without(network: nn.Module, path: str | None = None, instead: nn.Module | None = None) -> nn.Module:
    """A copy of the network that shares its tensors, the module at `path` replaced by `instead` or an Identity."""
    shared = {id(t): t for t in [*network.parameters(), *network.buffers()]}
    trunk = copy.deepcopy(network, shared)
    if path is not None:
        replace_module(trunk, path, instead if instead is not None else nn.Identity())
    return trunk


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where the module with this dotted name is."""
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _probe(trunk: Trunk, crop: int, what: str) -> tuple[int, ...]:
    """Run one image, settle how the layer's output is pooled, and give the shape of a row."""
    # any image will do; noise drawn apart from torch's generator touches no one's seed
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, crop, crop), dtype=np.uint8)
    with torch.inference_mode():
        try:
            pixels = (torch.from_numpy(noise).float() / 255 - trunk.mean) / trunk.std
            output = trunk.output(pixels)
        except (RuntimeError, AssertionError, IndexError) as error:
            raise BackboneError(f"{what}: the network cannot run on {crop} x {crop} pixels ({error})") from error
    if not isinstance(output, Tensor):
        raise BackboneError(f"{what}: gives {type(output).__name__}, not one tensor; choose another layer")
    trunk.pool = _pooling(output, what)
    row = trunk.pooled(output.float())
    if not torch.isfinite(row).all():
        raise WeightsError(f"{what}: gives NaN or infinity; these weights do not cover it, choose another layer")
    return tuple(row.shape[1:])


def _pooling(output: Tensor, what: str) -> str:
    """How to make a row of this output. Crops are square, so the two equal sides are height and width."""
    shape = list(output.shape)
    if len(shape) == 2:
        return "rows"
    if len(shape) == 3:
        return "tokens"
    if len(shape) == 4 and shape[2] == shape[3]:
        return "nchw"
    if len(shape) == 4 and shape[1] == shape[2]:
        return "nhwc"
    raise BackboneError(f"{what}: gives {shape} for one image, which is no row, map or sequence of tokens")


def groups(network: nn.Module, head: str | None = None) -> list[tuple[str, list[str]]]:
    """Split a network's parameters into layer groups, in the order of its modules.

    Blocks are groups of their own; loose convolutions, norms and parameters before the first block are
    the `stem`. VGG's and AlexNet's `features` are one group, as tutorials treat them. Parameters of
    `head` are left out.
    """
    found: list[tuple[str, list[str]]] = []
    stem: list[str] = []
    for path, module in _parts(network, "", head):
        loose = module is None or not any(True for c in module.children() for _ in c.parameters())
        if loose and not path.startswith("classifier") and (not found or module is None):
            stem.append(path)
        else:
            found.append((path, [path]))
    return [("stem", stem), *found] if stem else found


def _parts(module: nn.Module, prefix: str, head: str | None) -> Iterator[tuple[str, nn.Module | None]]:
    """The paths to group by, with their modules; None for a parameter held by a container itself."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, None
    for name, child in module.named_children():
        path = prefix + name
        if path == head or not any(True for _ in child.parameters()):
            continue
        contains_head = head is not None and head.startswith(path + ".")
        blocks = name in _SPLIT and any(any(True for _ in c.children()) for c in child.children())
        if contains_head or blocks or name == "classifier":
            yield from _parts(child, path + ".", head)
        else:
            yield path, child
