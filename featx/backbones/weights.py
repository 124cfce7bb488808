"""Read weights files without running code from them, find a network's tensors in them, and say why one does not fit."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._weights_only_unpickler import _get_allowed_globals

from featx.backbones.backbone import replace_module
from featx.backbones.request import MISSING
from featx.backbones.table import AUXILIARY, fingerprint, table
from featx.errors import WeightsError
from featx.files import open_plain, read_plain, stat_row
from featx.records import convert
from featx.state import FILTERS
from featx.text import from_json, near, some

# What wrappers put into tensors' names, at any place: DataParallel, torch.compile, FSDP, activation checkpoints.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow)(?![a-z])", re.I)
_SHARD = re.compile(r"(.*-)\d{5}(-of-(\d{5})\.\w+)")


class _Inert(dict[Any, Any]):
    """What stands in for an object of any class that a file holds beside its tensors: nothing of that class is run."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    dump_patches = False  # torch asks the class of a module

    def __init__(self, *_args: object, **_named: object) -> None: ...

    def __call__(self, *_args: object, **_named: object) -> _Inert:
        return _Inert()

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})

    def append(self, item: object) -> None:
        self[len(self)] = item

    add = append


class _Unpickler(pickle._Unpickler):
    """Makes tensors and plain containers, and something inert of all else."""

    def find_class(self, module: str, name: str) -> Any:
        return _get_allowed_globals().get(f"{module}.{name}", _Inert)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type) or hasattr(self.stack[-2], "__globals__"):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("changes a class or a function")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _load_inert(file: IO[bytes], **options: Any) -> Any:
    return _Unpickler(file, **options).load()


@dataclass(eq=False)
class Tensors:
    """What a weights file holds."""

    path: Path
    part: str
    """The part of it that is asked for, `state_dict_ema`; empty for featx's own choice."""
    files: dict[str, list[int]]
    """The `stat_row` of each file that was read."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their places in the file without the names of wrappers, joined by dots: `state_dict.features.0.weight`."""
    groups: dict[str, str] = field(default_factory=dict)
    """The place of the mapping, or of the module, that holds each tensor."""
    versions: dict[str, Any] = field(default_factory=dict)
    """torch's `_metadata`, by place: old files tell their network by it how to read them."""

    def below(self, place: str) -> dict[str, Tensor]:
        """The tensors at a place, named from there on."""
        start = f"{place}." if place else ""
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    def unwrapped(self) -> dict[str, Tensor]:
        """The tensors of the mapping that holds most of them, without a prefix that all of them have."""
        state = self.below(self.part or Counter(self.groups.values()).most_common(1)[0][0])
        while state and any(all(name.startswith(start) for name in state) for start in ("model.", "network.", "net.")):
            state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        return state

    def add(self, value: Any) -> None:
        """Take in all tensors of what was read. Each container is looked into once, however it is referred to."""
        waiting, seen = [("", "", value)], set[int]()
        while waiting:
            place, group, value = waiting.pop()
            if isinstance(value, Tensor):
                if place in self.tensors and not _equal(self.tensors[place], value):
                    raise WeightsError(f"{self.path} holds two tensors called {place}, one with `module.` before it")
                self.tensors[place], self.groups[place] = value, group
                continue
            children = {} if id(value) in seen else dict(_children(value))
            seen.add(id(value))
            if value or not isinstance(value, _Inert):
                group = place
            versions = getattr(value, "_metadata", None)
            for module, known in versions.items() if isinstance(versions, Mapping) else ():
                self.versions[_plain(f"{place}.{module}")] = known
            named = [(_plain(f"{place}.{name}"), group, child) for name, child in children.items()]
            waiting += reversed(named)


def read_state(path: Path, part: str = "") -> Tensors:
    """The tensors of a file, or of the files of which it is one, or the index, or the folder. Runs no code from them.

    part: see `Tensors`. Raises `WeightsError` for what cannot be read.
    """
    found = Tensors(path, _plain(part), {})
    for file in _shards(path):
        loaded, found.files[str(file.absolute())] = _load(file)
        found.add(loaded)
    if not found.tensors:
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    return found


def _shards(path: Path) -> list[Path]:
    """The files that hold the weights: of a folder, an index (`*.index.json`), or a shard `NAME-00001-of-00003.*`."""
    if path.is_dir():
        inside = sorted(each for each in path.iterdir() if each.is_file())
        chosen = [each for each in inside if each.name.endswith(".index.json")]
        chosen = chosen or [each for each in inside if each.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt")]
        if len({_SHARD.sub(r"\1\2", each.name) for each in chosen}) != 1:
            names = some([each.name for each in chosen or inside], 10)
            raise WeightsError(f"the folder {path} holds not one set of weights but {names or 'nothing'}; name a file")
        return _shards(chosen[0])
    if shard := _SHARD.fullmatch(path.name):
        parts = {f"{shard[1]}{i:05}{shard[2]}" for i in range(1, int(shard[3]) + 1)}
    elif path.suffix == ".json":
        try:
            index = convert(from_json(read_plain(path)), dict[str, Any])
            parts = set(convert(index.get("weight_map"), dict[str, str]).values())
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is not an index of weights files ({error})") from error
    else:
        return [path]
    if outside := sorted(name for name in parts if Path(name).name != name):
        raise WeightsError(f"{path} names {some(outside)}, and a part of the weights lies beside it")
    return [path.with_name(name) for name in sorted(parts)]


def _load(path: Path) -> tuple[Any, list[int]]:
    """What a file holds, and its `stat_row`."""
    try:
        with open_plain(path) as file:  # a pipe would wait for ever, a device never end
            stats = list(stat_row(os.fstat(file.fileno())))
        with FILTERS, warnings.catch_warnings(action="ignore"):  # of torch's, on how the file was pickled
            return _read(path), stats
    except FileNotFoundError:
        raise WeightsError(MISSING.format(path)) from None
    except (pickle.UnpicklingError, LookupError, EOFError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path} is damaged, or not a weights file") from error
    except Exception as error:  # zip, pickle and safetensors each raise their own
        if "weights_only" in str(error):
            raise WeightsError(
                f"{path} is TorchScript, or in torch's old tar format; save its state dict alone: "
                "torch.save(model.state_dict(), path)"
            ) from error
        raise WeightsError(f"{path} cannot be read as {path.suffix or 'weights'} ({first_line(error)})") from error


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # settings, counters or the module itself beside the tensors: each object of a class becomes an inert one
        inert = SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=_load_inert)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), child) for name, child in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(i), child) for i, child in enumerate(value))
    if isinstance(value, _Inert):  # a whole module, as `torch.save(model)` writes it
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from _children(vars(value).get(kind, {}))


def _plain(name: str) -> str:
    return ".".join(word for word in name.split(".") if word and word not in _WRAPPERS)


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a, b)


def first_line(error: Exception) -> str:
    """An error's first line, or its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Taken:
    """What a network was given of a file."""

    note: str
    """For people, after the file's name: which part where there was a choice, and what was left out."""
    whole: bool
    """Whether the classifier is the network's own, whose classes are known."""


def load_state(network: nn.Module, found: Tensors, what: str, head: str | None = None) -> Taken:
    """Load each of a network's tensors from the one place of a file where all of them are, whatever its name.

    Tensors that are no part of the network are left out, and named in the note. Where several places fit, averaged
    weights yield to plain ones. head: the dotted name of the classifier's last layer. Where the file has another number
    of classes, a layer of that size replaces it; where the file has none under this name, an Identity does.
    Raises `WeightsError`, which names what is missing, unexpected or of another shape, or the places to choose from.
    """
    own = {_plain(name): tensor for name, tensor in network.state_dict().items()}
    ends = f"{_plain(head)}." if head else "\0"
    near_by = Counter(start for name in found.tensors for start, end in _cuts(name) if end in own)
    fitting = [place for place, _ in near_by.most_common() if _fits(own, found.below(place), ends)]
    place = _chosen(found, fitting, own, ends, what)
    if place is None:
        closest = None if found.part or not near_by else near_by.most_common(1)[0][0]
        raise _misfit(network, found.unwrapped() if closest is None else found.below(closest), what)

    given = found.below(place)
    start = f"{place}." if place else ""
    versions = {name[len(start) :]: v for name, v in found.versions.items() if f"{name}.".startswith(start)}
    remark = _fill(network, given, versions, what, head)

    others = [other for other in fitting if other != place and not _same(own, found, other, place)]
    used = {start + name for name in given if name in own or name.startswith((ends, *AUXILIARY))}
    groups, elsewhere = {found.groups[name] for name in used}, tuple(f"{p}." for p in fitting if p not in ("", place))
    beside = [name for name in found.tensors if found.groups[name] in groups and not name.startswith(elsewhere)]
    foreign = [name for name in beside if name not in used]
    note = f"#{place}" if place and (others or found.part) else ""
    note += f" (also there: {', '.join(f'#{other}' for other in others)})" if others and not found.part else ""
    note += f", {remark}" if remark else ""
    return Taken(note + (f", leaving out {some(foreign)}" if foreign else ""), not remark)


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A tensor's name cut at each dot: its place, and its name from there on."""
    words = name.split(".")
    yield from ((".".join(words[:i]), ".".join(words[i:])) for i in range(len(words)))


def _fits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], ends: str) -> bool:
    """Whether all of a network but its classifier is there, and nothing more of its modules."""
    tops = {name.partition(".")[0] for name in own}
    body = {
        name: t for name, t in own.items() if not name.startswith(ends) and not name.endswith("num_batches_tracked")
    }
    return all(name in given and given[name].shape == t.shape for name, t in body.items()) and all(
        name in own or name.startswith((ends, *AUXILIARY)) or name.partition(".")[0] not in tops for name in given
    )


def _chosen(found: Tensors, fitting: list[str], own: Mapping[str, Tensor], ends: str, what: str) -> str | None:
    """The place to load from; None where nothing fits. Raises `WeightsError` for an unknown part, and for a choice."""
    asked = [place for place in fitting if f".{found.part}." in f".{place}."] if found.part else fitting
    if fitting and not asked:
        there = ", ".join(place or "(no name)" for place in fitting)
        raise WeightsError(
            f"{found.path} has no part {found.part!r} that fits; there is {there}.{near(found.part, fitting)}"
        )
    best = [place for place in asked if place == found.part] or asked
    best = [place for place in best if any(name.startswith(ends) for name in found.below(place))] or best
    best = [place for place in best if not _AVERAGED.search(place)] or best
    different = [place for i, place in enumerate(best) if not any(_same(own, found, place, b) for b in best[:i])]
    if len(different) > 1:
        raise WeightsError(
            f"{what}: the file holds {len(different)} networks that fit, {', '.join(sorted(different))}; choose one, "
            f"such as --weights {found.path}#{min(different)}"
        )
    return different[0] if different else None


def _same(own: Iterable[str], found: Tensors, a: str, b: str) -> bool:
    """Whether the network is the same at two places."""
    first, second = found.below(a), found.below(b)
    return all(name in first and name in second and _equal(first[name], second[name]) for name in own)


class _State(dict[str, Tensor]):
    """A state dict that can carry `_metadata`, as torch's own do."""

    _metadata: Any


def _fill(
    network: nn.Module, given: Mapping[str, Tensor], versions: dict[str, Any], what: str, head: str | None
) -> str:
    """Load a network from its tensors, by plain names; a remark on the classifier, empty where it is its own."""
    own, remark = network.state_dict(), ""
    if head is not None:
        weight, ours = given.get(_plain(f"{head}.weight")), own[f"{head}.weight"]
        inside = {name for name in given if name.startswith(f"{_plain(head)}.")}
        if weight is None or {_plain(n) for n in (f"{head}.weight", f"{head}.bias") if n in own} != inside:
            replace_module(network, head, nn.Identity())
            remark = "without the network's own classifier"
        elif weight.ndim == ours.ndim and weight.shape[0] != ours.shape[0] and weight.shape[1:] == ours.shape[1:]:
            replace_module(network, head, _sized(network.get_submodule(head), len(weight)))
            remark = f"its own classifier has {len(weight)} classes, whose names are not known"
        own = network.state_dict()

    # counters may be missing, as no output needs them
    state = _State({name: given.get(_plain(name), t) for name, t in own.items()})
    # files of torch's first years lack versions; then those that the network would write today are assumed
    state._metadata = versions or own._metadata  # type: ignore[attr-defined]
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{what} does not fit: {str(error).splitlines()[-1].strip()}.") from error
    return remark


def _misfit(network: nn.Module, given: Mapping[str, Tensor], what: str) -> WeightsError:
    own = {_plain(name): t for name, t in network.state_dict().items()}
    shapes = [
        f"{name} is {list(given[name].shape)}, expected {list(own[name].shape)}"
        for name in own.keys() & given.keys()
        if given[name].shape != own[name].shape
    ]
    differences: dict[str, Iterable[str]] = {
        "missing": [n for n in own.keys() - given.keys() if not n.endswith("num_batches_tracked")],
        "unexpected": [n for n in given.keys() - own.keys() if not n.startswith(AUXILIARY)],
        "of another shape": shapes,
    }
    problems = [
        f"{len(names)} {label}: {some(names)}" for label, each in differences.items() if (names := sorted(each))
    ]
    return WeightsError(f"{what} does not fit: {'; '.join(problems)}.{_looks_like(given)}")


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
