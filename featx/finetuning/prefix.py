"""The cached prefix: cuts a network before its first trained layer, and caches the activations there."""

from __future__ import annotations

import math
import operator
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from featx.cache.store import FeatureStore
from featx.errors import BackboneError, TrainingError
from featx.extraction.embedding import embed, keep
from featx.extraction.loader import Loaded, Loader
from featx.extraction.result import Extraction
from featx.features import FeatureSpec
from featx.finetuning.augment import Draws
from featx.finetuning.layers import Tuned
from featx.finetuning.pixels import Material
from featx.pixels.views import view_names

BATCH = 32
_RANDOM = ("StochasticDepth", "DropPath", "DropBlock2d")


@dataclass(frozen=True, eq=False)
class Cut:
    """A trunk in two: `suffix(prefix(images))` is `trunk(images)`. Both share its modules."""

    prefix: nn.Module
    """`uint8 [B, 3, H, W]` -> activations `[B, *row_shape]`; nothing in it is trained or random."""
    suffix: Suffix
    """activations -> features `[B, D]`."""
    row_shape: tuple[int, ...]


class Suffix(nn.Module):
    """The trained part, traced in both modes: a trace records the mode that a network passes to a function."""

    def __init__(self, training: nn.Module, measuring: nn.Module) -> None:
        super().__init__()
        self.parts = {True: training, False: measuring}  # not registered: their modules are the trunk's

    def forward(self, activations: Tensor) -> Tensor:
        """activations `[B, *row_shape]` -> features `[B, D]`."""
        result: Tensor = self.parts[self.training](activations)
        return result


class _Tracer(fx.Tracer):
    """Does not trace into modules without children: what they compute may depend on their mode."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not any(True for _ in m.children())


def cut(network: Tuned, side: int) -> Cut:
    """Split the trunk at the last tensor that all trained and all random layers depend on.

    `requires_grad` says what is trained. Leaves the network in training mode. Raises `BackboneError` for a
    network that cannot be traced or cut, and `TrainingError` where nothing is frozen.
    """
    trunk = network.trunk
    measuring, graph = _trace(network)
    node, last = _find_cut(trunk, graph), list(graph.nodes)[-1]
    frozen = [trunk.get_submodule(str(n.target)) for n in _find_inputs(node) if n.op == "call_module"]
    if not any(True for module in frozen for _ in module.parameters()):
        raise TrainingError(
            "nothing before the first trained layer is frozen, so there is nothing to cache; freeze more, or "
            "train without the cached prefix"
        )

    twins = dict(zip(graph.nodes, measuring.nodes, strict=True))
    prefix = _copy_part(trunk, graph, _find_inputs(node), result=node)
    after = _find_inputs(last, stop=node)
    suffix = Suffix(
        _copy_part(trunk, graph, after, entry=node),
        _copy_part(trunk, measuring, {twins[n] for n in after}, entry=twins[node]),
    )
    with torch.no_grad():
        row = prefix(torch.zeros((2, 3, side, side), dtype=torch.uint8))
    if not isinstance(row, Tensor) or row.shape[0] != 2:
        raise BackboneError(
            f"the network cannot be cut before its first trained layer: {node.name} is not one row per image; "
            "train without the cached prefix"
        )
    return Cut(prefix, suffix, tuple(row.shape[1:]))


def _trace(network: Tuned) -> tuple[fx.Graph, fx.Graph]:
    """The trunk's graphs in use and in training, which have the same nodes. Raises `BackboneError`."""
    try:
        measuring, training = (_Tracer().trace(network.train(mode).trunk) for mode in (False, True))
    except Exception as error:  # symbolic tracing runs the network's own code
        raise BackboneError(
            f"the network cannot be traced, so its frozen part cannot be cached ({type(error).__name__}: {error}); "
            "train without the cached prefix"
        ) from error
    if [(n.op, n.target) for n in training.nodes] != [(n.op, n.target) for n in measuring.nodes]:
        raise BackboneError("the network takes another path in training than in use; train without the cached prefix")
    return measuring, training


def _find_cut(trunk: nn.Module, graph: fx.Graph) -> fx.Node:
    """The last node that training does not change and that cuts all paths from the images to the features."""
    modules, moving = dict(trunk.named_modules()), set[fx.Node]()
    for node in graph.nodes:
        if _changes(node, trunk, modules) or any(i in moving for i in node.all_input_nodes):
            moving.add(node)

    nodes: list[fx.Node] = list(graph.nodes)
    start, last = nodes[0], nodes[-1]
    for node in reversed(nodes):
        if node not in moving and node.op not in ("get_attr", "output") and start not in _find_inputs(last, stop=node):
            return node
    return start


def _changes(node: fx.Node, trunk: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether training changes a node's result: it is trained or random, or updates statistics."""
    if node.op == "get_attr":
        return bool(getattr(operator.attrgetter(str(node.target))(trunk), "requires_grad", False))
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    random = isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm)
    random |= type(module).__name__ in _RANDOM
    return (module.training and random) or any(p.requires_grad for p in module.parameters())


def _find_inputs(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """`node` and what it is computed from; the search does not go beyond `stop`."""
    found, waiting = {node}, [node]
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                if before is not stop:
                    waiting.append(before)
    return found


def _copy_part(
    trunk: nn.Module, graph: fx.Graph, kept: set[fx.Node], entry: fx.Node | None = None, result: fx.Node | None = None
) -> fx.GraphModule:
    """The part of a graph in `kept`, from `entry` (instead of the images) to `result` (instead of the features)."""
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    if entry is not None:
        copies[entry] = part.placeholder("activations")
    for node in graph.nodes:
        if node in kept and node is not entry:
            copies[node] = part.node_copy(node, lambda n: copies[n])
    if result is not None:
        part.output(copies[result])
    return fx.GraphModule(trunk, part)


class PrefixEngine:
    """Runs the frozen part of a network as an engine runs a backbone."""

    name = "prefix"
    batch_size = BATCH

    def __init__(self, prefix: nn.Module, device: torch.device) -> None:
        self.prefix, self.device = prefix.to(device).eval(), device

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]` -> `float32 [B, *row_shape]`."""
        return self.submit(images)()

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        with torch.inference_mode():
            rows = self.prefix(torch.from_numpy(images).to(self.device)).float().cpu()
        return lambda: rows.numpy()

    def close(self) -> None:
        pass


def _fill(
    extraction: Extraction, stores: list[FeatureStore], numbers: np.ndarray, engine: PrefixEngine, workers: int
) -> None:
    """Decode each image once and run the frozen part on the views that are not stored yet."""
    source, wanted = extraction.source, extraction.numbers[numbers]
    loader = Loader(source, extraction.info.preprocess, stores, workers)
    with ExitStack() as stack:  # leaving a store commits what it buffers
        for store in stores:
            stack.enter_context(store)
        bar = tqdm(loader(wanted), "cache prefix", len(wanted), unit=" images", disable=None)
        for batch in embed(_check_readable(bar), engine):
            keep(batch, stores, source)


def _check_readable(images: Iterable[Loaded]) -> Iterator[Loaded]:
    for image in images:
        if image.error:
            raise TrainingError(f"an image could be read before and cannot now: {image.error}")
        yield image


class Activations:
    """Inputs of a cut network: activations of a few fixed views, read from the feature cache.

    Says on standard error how much disk they need. Where that is more than `settings.prefix_gb` or than is
    free, computes nothing and raises `TrainingError`.
    """

    def __init__(self, material: Material, part: Cut, spec: FeatureSpec) -> None:
        """spec: identity of the activations of the centre crops."""
        extraction, settings, train, held = material.extraction, material.settings, material.train, material.held
        self.device, self.row_shape = material.device, part.row_shape
        self.train_keys, self.held_keys = extraction.keys[train], extraction.keys[held]
        self.views = settings.views if settings.steps.geometry == "views" else 0
        """0 trains on centre crops."""
        names = view_names(extraction.request.seed, self.views)
        self.stores = [FeatureStore(extraction.cache, replace(spec, view=name)) for name in names]
        center = held if self.views else np.concatenate([train, held])
        wanted = zip(self.stores, [center, *[train] * self.views], strict=True)
        todo = [numbers[~store.contains(extraction.keys[numbers])] for store, numbers in wanted]
        if any(map(len, todo)):
            self._check_disk(extraction, sum(map(len, todo)), settings.prefix_gb * 1e9)
            engine = PrefixEngine(part.prefix, self.device)
            for stores, missing in ((self.stores[:1], todo[:1]), (self.stores[1:], todo[1:])):
                if any(map(len, missing)):
                    _fill(extraction, stores, np.unique(np.concatenate(missing)), engine, material.workers)

    def _check_disk(self, extraction: Extraction, count: int, limit: float) -> None:
        need, free = count * 2 * math.prod(self.row_shape), shutil.disk_usage(extraction.cache).free
        shown = f"{count:,} activations of {list(self.row_shape)} as float16 need {need / 1e9:.2f} GB"
        tqdm.write(f"cached prefix: {shown} in {extraction.cache}, {free / 1e9:.1f} GB are free", file=sys.stderr)
        if need > min(limit, free):
            what = f"the limit of {limit / 1e9:g} GB" if need > limit else f"the {free / 1e9:.1f} GB free"
            raise TrainingError(f"{shown}, more than {what}; use fewer views, freeze more, or raise the limit")

    def train(self, numbers: np.ndarray, draws: Draws, then: np.ndarray | None = None) -> Tensor:
        """Activations of training images `numbers`, `int [B]`, in this epoch's views -> `float32`, on the device."""
        if not self.views:
            return self._read(0, self.train_keys[numbers])
        views = draws.choose_views(numbers, self.views) + 1
        out = torch.empty((len(numbers), *self.row_shape), device=self.device)
        for view in np.unique(views).tolist():
            where = np.flatnonzero(views == view)
            out[torch.from_numpy(where).to(self.device)] = self._read(view, self.train_keys[numbers[where]])
        return out

    def held(self, numbers: np.ndarray, then: np.ndarray | None = None) -> Tensor:
        """Activations of the centre crops of the images that select, `int [B]`."""
        return self._read(0, self.held_keys[numbers])

    def close(self) -> None:
        self.stores = []

    def _read(self, view: int, keys: np.ndarray) -> Tensor:
        rows = np.array(self.stores[view].read(keys))  # a copy: the store may give a read-only map
        return torch.from_numpy(rows).to(self.device).float()
