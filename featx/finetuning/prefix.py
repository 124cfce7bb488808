"""Owns the cached prefix: where a network is cut before its first trained layer, and the activations there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

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
from featx.pixels.views import view_names

BATCH = 32
_RANDOM = ("StochasticDepth", "DropPath", "DropBlock2d")


@dataclass(frozen=True, eq=False)
class Cut:
    """A trunk in two: `suffix(prefix(images))` is `trunk(images)`. Both share its modules."""

    prefix: nn.Module
    """`uint8 [B, 3, H, W]` -> activations `[B, *row_shape]`; holds nothing that is trained or random."""
    suffix: Suffix
    """activations -> features `[B, D]`."""
    row_shape: tuple[int, ...]


class Suffix(nn.Module):
    """The trained part, traced in both modes: a trace holds fixed what a network passes on of its mode."""

    def __init__(self, training: nn.Module, measuring: nn.Module) -> None:
        super().__init__()
        self.parts = {True: training, False: measuring}  # not registered: their modules are the trunk's

    def forward(self, activations: Tensor) -> Tensor:
        """activations `[B, *row_shape]` -> features `[B, D]`."""
        result: Tensor = self.parts[self.training](activations)
        return result


class _Tracer(fx.Tracer):
    """Whatever holds no further modules is called, not looked into: it may decide by its mode when it runs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or not any(True for _ in m.children())


def cut(network: Tuned, set_mode: Callable[[], None], side: int) -> Cut:
    """Split the trunk at the last tensor that all trained and all random layers depend on.

    set_mode: puts the network into training mode (`layers.train_mode`); `requires_grad` says what is
    trained. Raises `BackboneError` for a network that cannot be traced or cut, and `TrainingError` where
    nothing is frozen.
    """
    trunk = network.trunk
    try:
        network.eval()
        measuring = _Tracer().trace(trunk)
        set_mode()
        graph = _Tracer().trace(trunk)
    except Exception as error:  # symbolic tracing runs the network's own code
        raise BackboneError(
            f"the network cannot be traced, so its frozen part cannot be cached ({type(error).__name__}: {error}); "
            "train without the cached prefix"
        ) from error
    twins = dict(zip(graph.nodes, measuring.nodes, strict=False))
    if [(n.op, n.target) for n in graph.nodes] != [(n.op, n.target) for n in measuring.nodes]:
        raise BackboneError("the network takes another path in training than in use; train without the cached prefix")
    modules = dict(trunk.named_modules())
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if _moves(node, trunk, modules) or any(i in moving for i in node.all_input_nodes):
            moving.add(node)
    start = next(node for node in graph.nodes if node.op == "placeholder")
    last = next(node for node in graph.nodes if node.op == "output")
    for node in reversed(list(graph.nodes)):
        if node in moving or node.op in ("get_attr", "output"):
            continue
        if start not in _needed(last, stop=node):
            break
    else:
        node = start
    frozen = [n for n in _needed(node) if n.op == "call_module"]
    if not any(True for n in frozen for _ in modules[str(n.target)].parameters()):
        raise TrainingError(
            "nothing before the first trained layer is frozen, so there is nothing to cache; freeze more, or "
            "train without the cached prefix"
        )
    prefix = _module(trunk, graph, _needed(node), result=node)
    after = _needed(last, stop=node)
    suffix = Suffix(
        _module(trunk, graph, after, entry=node),
        _module(trunk, measuring, {twins[n] for n in after}, entry=twins[node]),
    )
    set_mode()
    with torch.no_grad():
        row = prefix(torch.zeros((2, 3, side, side), dtype=torch.uint8))
    if not isinstance(row, Tensor) or row.shape[0] != 2:
        raise BackboneError(
            f"the network cannot be cut before its first trained layer: {node.name} is no row per image; "
            "train without the cached prefix"
        )
    return Cut(prefix, suffix, tuple(row.shape[1:]))


def _moves(node: fx.Node, trunk: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether a node's own result changes while training: trained, random, or updating statistics."""
    if node.op == "get_attr":
        value = trunk
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return bool(getattr(value, "requires_grad", False))
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    if any(p.requires_grad for p in module.parameters()):
        return True
    random = isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm)
    return module.training and (random or type(module).__name__ in _RANDOM)


def _needed(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """What `node` is computed from, itself included; not looking beyond `stop`."""
    found, waiting = {node}, [node]
    while waiting:
        for before in waiting.pop().all_input_nodes:
            if before not in found:
                found.add(before)
                if before is not stop:
                    waiting.append(before)
    return found


def _module(
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


def specs(extraction: Extraction, spec: FeatureSpec, layer: str, views: int) -> list[FeatureSpec]:
    """The identities of the activations before `layer`: the centre crop's, then one for each view."""
    names = view_names(extraction.request.seed, views)
    return [replace(spec, layer=f"before {layer}", view=v, precision="fp32", dtype="float16") for v in names]


class PrefixEngine:
    """Runs the frozen part of a network as an engine runs a backbone."""

    name = "prefix"
    batch_size = BATCH

    def __init__(self, prefix: nn.Module, device: torch.device) -> None:
        self.prefix, self.device = prefix.to(device).eval(), device

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]` -> `float32 [B, *row_shape]`."""
        with torch.inference_mode():
            rows: np.ndarray = self.prefix(torch.from_numpy(images).to(self.device)).float().cpu().numpy()
        return rows

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        rows = self(images)
        return lambda: rows

    def close(self) -> None:
        pass


def _readable(images: Iterable[Loaded]) -> Iterator[Loaded]:
    for image in images:
        if image.error:
            raise TrainingError(f"an image could be read before and cannot now: {image.error}")
        yield image


class Activations:
    """What a cut network is trained on: activations of a few fixed views, read from the feature cache.

    Where the disk they need (said before) is more than `limit` bytes or than is free, nothing is computed
    and `TrainingError` says so.
    """

    def __init__(
        self,
        extraction: Extraction,
        train: np.ndarray,
        held: np.ndarray,
        part: Cut,
        layer: str,
        spec: FeatureSpec,
        *,
        views: int,
        limit: float,
        seed: int,
        device: torch.device,
        workers: int,
        fill: bool = True,
    ) -> None:
        """train, held: `int [N]`, `int [M]`, row numbers of `extraction`. views: 0 trains on centre crops.

        spec: of the features of the network that is trained. fill: False for all but one of several processes.
        """
        self.extraction, self.device, self.views, self.seed = extraction, device, views, seed
        self.train_keys, self.held_keys = extraction.keys[train], extraction.keys[held]
        self.stores = [FeatureStore(extraction.cache, s) for s in specs(extraction, spec, layer, views)]
        self._draws: tuple[int, Draws] | None = None
        wanted = np.concatenate([train, held]) if views == 0 else train
        todo = [wanted if views == 0 else held] + [train] * views
        todo = [rows[~store.contains(extraction.keys[rows])] for store, rows in zip(self.stores, todo, strict=True)]
        if fill and any(map(len, todo)):
            self._check_disk(sum(map(len, todo)), part.row_shape, limit)
            self._fill(todo, part, workers)

    def _check_disk(self, count: int, row_shape: tuple[int, ...], limit: float) -> None:
        size = 2 * int(np.prod(row_shape))
        need = count * size
        folder: Path = self.extraction.cache
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        shown = f"{count:,} activations of {list(row_shape)} as float16 need {need / 1e9:.2f} GB"
        said = f"cached prefix: {shown} in {self.extraction.cache}, {free / 1e9:.1f} GB are free"
        tqdm.write(said, file=sys.stderr)
        if need > min(limit, free):
            what = f"the limit of {limit / 1e9:g} GB" if need > limit else f"the {free / 1e9:.1f} GB free"
            raise TrainingError(f"{shown}, more than {what}; use fewer views, freeze more, or raise the limit")

    def _fill(self, todo: list[np.ndarray], part: Cut, workers: int) -> None:
        """Decode each image once and run the frozen part on the views that are not there yet."""
        source, engine = self.extraction.source, PrefixEngine(part.prefix, self.device)
        for first, last in ((0, 1), (1, len(self.stores))):  # the centre crops, then the views
            wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *todo[first:last]]))
            if not len(wanted):
                continue
            stores = self.stores[first:last]
            loader = Loader(source, self.extraction.info.preprocess, stores, workers)
            numbers = self.extraction.numbers[wanted]
            with ExitStack() as stack:  # what is buffered is committed on the way out
                for store in stores:
                    stack.enter_context(store)
                bar = tqdm(loader(numbers), "cache prefix", len(numbers), unit=" images", disable=None)
                for batch in embed(_readable(bar), engine):
                    keep(batch, stores, source)

    def train(self, rows: np.ndarray, epoch: int, then: np.ndarray | None = None) -> Tensor:
        """Activations of training images `rows`, `int [B]`, in the views of this epoch -> `float32`, on the device."""
        if self.views == 0:
            return self._read(0, self.train_keys[rows])
        if self._draws is None or self._draws[0] != epoch:
            self._draws = epoch, Draws.of(len(self.train_keys), self.seed, epoch)
        which = (self._draws[1].views[rows] * self.views).astype(np.int64) + 1
        out: Tensor | None = None
        for view in np.unique(which).tolist():
            mine = np.flatnonzero(which == view)
            part = self._read(view, self.train_keys[rows[mine]])
            out = part.new_empty((len(rows), *part.shape[1:])) if out is None else out
            out[torch.from_numpy(mine).to(out.device)] = part
        assert out is not None
        return out

    def held(self, rows: np.ndarray, then: np.ndarray | None = None) -> Tensor:
        """Activations of the centre crops of the images that select, `int [B]`."""
        return self._read(0, self.held_keys[rows])

    def close(self) -> None:
        self.stores = []

    def _read(self, view: int, keys: np.ndarray) -> Tensor:
        rows = np.array(self.stores[view].read(keys))  # a copy: the store may give a read-only map
        return torch.from_numpy(rows).to(self.device).float()
