"""`Backbone`: a loaded network, cut at its layer, from `uint8` pixels to `float32` rows."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.errors import BackboneError, WeightsError
from featx.pixels.preprocess import Preprocess
from featx.text import near

# Containers whose children are groups of their own; others, such as ResNet's layer1, are one group.
_SPLIT = ("features", "layers", "blocks", "trunk_output", "encoder", "stages")


@dataclass(frozen=True)
class Origin:
    """What a zoo knows about a network that it made."""

    name: str
    """As in `BackboneInfo`."""
    preprocess: Preprocess
    """With the fields that the request overrides."""
    class_names: tuple[str, ...] | None
    note: str
    """`BackboneInfo.weights_note`."""
    files: dict[str, list[int]] | None
    """As in `Backbone`."""
    digest: str = ""
    """`BackboneInfo.weights_digest`; by default that of the network's tensors."""
    license: str = ""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded network and what is known about it."""

    info: BackboneInfo
    network: nn.Module
    """The whole network with its classifier, in eval mode on the CPU."""
    module: Trunk
    """`uint8 [B, 3, H, W]` -> `float32 [B, *row_shape]`. It shares its tensors with `network` while both
    stay on the CPU; fine-tuning trains and saves `module`."""
    classifier: tuple[np.ndarray, np.ndarray] | None
    """The network's own last Linear, `float32 [C, D]` and `[C]`; None where `info.affine` is False."""
    groups: list[tuple[str, list[str]]]
    """Layer groups from the input on, without the classifier: a name, and prefixes of parameter names in
    `module.network` (a parameter belongs to a prefix if its name is the prefix, or goes on with a dot)."""
    files: dict[str, list[int]] | None
    """Weights files and the `stat_row` they had when they were read; None where `info` must not be remembered."""


class Trunk(nn.Module):
    """Scale, normalise, run the network up to its layer, pool to one row per image."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess, tap: str | None = None) -> None:
        """tap: the dotted name of the module whose output is taken; None for the network's own output."""
        super().__init__()
        self.network = network
        self.tap = tap
        self.pool: tuple[int, ...] = ()
        """The axes of the output that are averaged."""
        self.dtype = torch.float32
        """What the network computes in; pixels are normalised and rows returned in float32."""
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`uint8 [B, 3, H, W]` -> `float32 [B, *row_shape]`."""
        pixels = images.to(torch.float32) / 255
        return self.pooled(self.output(((pixels - self.mean) / self.std).to(self.dtype)).float())

    def output(self, pixels: Tensor) -> Tensor:
        """The layer's output for normalised pixels, before pooling."""
        if self.tap is None:
            whole: Tensor = self.network(pixels)
            return whole
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
        return output.mean(self.pool) if self.pool else output


def build(request: BackboneRequest, origin: Origin, network: nn.Module, cut: nn.Module, head: str | None) -> Backbone:
    """Cut a loaded network at the requested layer, and run one image to learn the shape of a row.

    cut: the network that gives `features`, sharing its tensors with `network`. head: the dotted name of the
    last Linear, where the classifier consists of it alone.
    Raises `BackboneError` for an unknown layer and `WeightsError` for weights that hold NaN.
    """
    layer = request.layer
    known = [path for path, _ in network.named_modules() if path]
    if layer not in ("features", "logits", *known):
        raise BackboneError(
            f"{origin.name} has no layer {layer!r}; expected features, logits or a module's dotted name."
            f"{near(layer, known)}"
        )

    network.eval()
    tap = None if layer in ("features", "logits") else layer
    trunk = Trunk(cut if layer == "features" else network, origin.preprocess, tap).eval()
    row_shape = _probe(trunk, origin.preprocess.crop, f"{origin.name}, layer {layer}")
    classifier = None
    if head:
        last = network.get_submodule(head)
        assert isinstance(last, nn.Linear)
        bias = torch.zeros(last.out_features) if last.bias is None else last.bias.detach()
        classifier = (last.weight.detach().float().numpy().copy(), bias.float().numpy().copy())

    info = BackboneInfo(
        origin.name,
        origin.digest or tensors_digest(network.state_dict()),
        layer,
        origin.preprocess,
        row_shape,
        origin.class_names,
        affine=classifier is not None,
        parameters=sum(p.numel() for p in network.parameters()),
        weights_note=origin.note,
        license=origin.license,
    )
    return Backbone(info, network, trunk, classifier, groups(trunk.network, head), origin.files)


def without(network: nn.Module, path: str | None = None, instead: nn.Module | None = None) -> nn.Module:
    """A copy of the network that shares its tensors; at `path` it has `instead`, or an Identity."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    trunk = copy.deepcopy(network, shared)
    if path is not None:
        replace_module(trunk, path, nn.Identity() if instead is None else instead)
    return trunk


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the module with this dotted name."""
    parent, _, child = path.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def is_affine(network: nn.Module, cut: nn.Module, head: str, crop: int) -> bool:
    """Whether the Linear at `head`, applied to the features that `cut` gives, gives the network's own logits."""
    last = network.get_submodule(head)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, crop, crop)).astype(np.float32))
    with torch.inference_mode():
        logits, features = network(noise), cut(noise)
        fits = (features.shape[1:], logits.shape[1:]) == ((last.in_features,), (last.out_features,))
        return fits and torch.allclose(last(features), logits, rtol=1e-4, atol=1e-4)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over the sorted names, dtypes, shapes and bytes (little-endian) of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _probe(trunk: Trunk, crop: int, what: str) -> tuple[int, ...]:
    """Run one image, choose how the layer's output is pooled, and return the shape of a row."""
    # any image will do; noise from numpy leaves torch's generator as it is
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, crop, crop), dtype=np.uint8)
    with torch.inference_mode():
        try:
            output = trunk.output((torch.from_numpy(noise).float() / 255 - trunk.mean) / trunk.std)
        except (RuntimeError, AssertionError, IndexError) as error:
            raise BackboneError(f"{what}: the network cannot run on {crop} x {crop} pixels ({error})") from error
    if not isinstance(output, Tensor):
        raise BackboneError(f"{what}: gives {type(output).__name__}, not one tensor; choose another layer")

    trunk.pool = _pooled_axes(list(output.shape), what)
    row = trunk.pooled(output.float())
    if not torch.isfinite(row).all():
        raise WeightsError(f"{what}: gives NaN or infinity; these weights do not cover it, choose another layer")

    return tuple(row.shape[1:])


def _pooled_axes(shape: list[int], what: str) -> tuple[int, ...]:
    """The axes of an output to average. Crops are square, so the two equal sides are height and width."""
    match shape:
        case [_, _]:
            return ()
        case [_, _tokens, _]:
            return (1,)
        case [_, _, height, width] if height == width:
            return (2, 3)
        case [_, height, width, _] if height == width:
            return (1, 2)
    raise BackboneError(f"{what}: gives {shape} for one image; expected a row, a map or a sequence of tokens")


def groups(network: nn.Module, head: str | None = None) -> list[tuple[str, list[str]]]:
    """Split a network's parameters into layer groups, in the order of its modules, without those of `head`.

    Blocks are groups of their own; single convolutions, norms and parameters before the first block form
    the `stem`. VGG's and AlexNet's `features` are one group, as tutorials treat them.
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
