"""The options of an extraction, once: names, types, defaults, checks, help; and the types of settings.

Public functions take them as `**options: Unpack[Options]` (PEP 692), so that mypy and editors know them; `complete`
fills in the defaults and refuses what is misspelt or out of range, whoever calls.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from featx.errors import FeatxError
from featx.text import near

Precision = Literal["fp32", "bf16", "fp16", "int8"]
StoredDtype = Literal["float32", "float16"]
Decode = Literal["exact", "fast", "gpu"]
Split = Literal["train", "val", "test"]
Input = Literal["pixels", "tensor", "features"]
Reduced = Literal["int8", "fp16"]
Runtime = Literal["auto", "onnxruntime", "openvino"]
Criterion = Literal["accuracy", "log_loss"]
Cluster = Literal["ray"]
Interpolation = Literal["bilinear", "bicubic"]
CropMode = Literal["center", "squash", "border", "pad"]


@dataclass(frozen=True)
class Option:
    """An option's default, help and limits."""

    default: Any
    help: str
    least: float | None = None
    """The smallest number allowed."""
    pattern: str = ""
    """A regular expression that a text must match, which `help` puts into words."""


DEVICE = Option("auto", "auto, cpu, cuda or cuda:N.", pattern=r"auto|cpu|cuda(:\d+)?")


class Clustered(TypedDict, total=False):
    """Where an extraction runs."""

    on: Annotated[
        Cluster | None, Option(None, "ray: compute on a Ray cluster, --workers cores a task (docs/scale.md).")
    ]
    address: Annotated[
        str | None, Option(None, "HOST:PORT of the Ray cluster; by default one is started here.", pattern=r".+:\d{1,5}")
    ]


class Running(Clustered, total=False):
    """How an extraction runs; no feature depends on it."""

    device: Annotated[str, DEVICE]
    batch_size: Annotated[int | None, Option(None, "By default the engine's own choice.", least=1)]
    workers: Annotated[int | None, Option(None, "Decoding threads; by default one per core.", least=1)]


class Preprocessing(TypedDict, total=False):
    """What the network sees of an image, in place of what its weights were trained with."""

    size: Annotated[int | None, Option(None, "Side of the square that the network sees, in pixels.", least=1)]
    crop_pct: Annotated[float | None, Option(None, "SIZE as a share of the resize: 0.875.", least=0.1)]
    crop_mode: Annotated[
        CropMode | None, Option(None, "Crop the centre, squash it all, add a border or black (docs/weights.md).")
    ]
    interpolation: Annotated[Interpolation | None, Option(None, "Of the resize, antialiased.")]
    mean: Annotated[Sequence[float] | None, Option(None, "Of red, green and blue, from 0 to 1: 0.485,0.456,0.406.")]
    std: Annotated[Sequence[float] | None, Option(None, "As --mean.")]


class Shared(Running, Preprocessing, total=False):
    """What all points of a sweep have in common."""

    weights: Annotated[
        str, Option("pretrained", "pretrained, random, a name (IMAGENET1K_V2), a file, FILE#PART (docs/weights.md).")
    ]
    seed: Annotated[int, Option(0, "Random seed: of random weights, views and heads.", least=0)]
    cache: Annotated[str | Path, Option("cache", "Cache folder.")]
    precision: Annotated[Precision, Option("fp32", "Arithmetic of the backbone; each has features of its own.")]
    dtype: Annotated[StoredDtype, Option("float32", "How features are stored.")]
    calibration: Annotated[
        str,
        Option(
            "auto",
            "int8: auto (the cache's newest for this backbone, else a new one), new, or 8 or more hex digits of one.",
            pattern=r"auto|new|[0-9a-f]{8,64}",
        ),
    ]
    runtime: Annotated[
        Runtime, Option("auto", "int8: what computes the features; by default openvino where it is installed.")
    ]
    decode: Annotated[
        Decode,
        Option(
            "exact",
            "fast decodes large JPEGs at a smaller scale, gpu decodes them on the GPU; "
            "their features differ a little and are cached apart.",
        ),
    ]


class Options(Shared, total=False):
    """All options of an extraction."""

    layer: Annotated[str, Option("features", "features, logits, or a module's dotted name.")]
    views: Annotated[int, Option(0, "Augmented views to cache.", least=0)]


@dataclass(frozen=True)
class Field:
    """An option as its annotation describes it."""

    name: str
    hint: Any
    """Its type, as in `Options`."""
    option: Option

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a closed set, without None; empty for an open one."""
        closed = (hint for hint in (self.hint, *get_args(self.hint)) if get_origin(hint) is Literal)
        return get_args(next(closed, None))

    def check(self, value: Any) -> None:
        """Raise `FeatxError` for a value that the option does not take."""
        if self.choices and value not in self.choices and not fits(value, self.hint):
            raise FeatxError(
                f"{self.name} is one of {', '.join(self.choices)}, not {value!r}.{near(str(value), self.choices)}"
            )
        if not fits(value, self.hint):
            raise FeatxError(f"{self.name} is {inspect.formatannotation(self.hint)}, not {value!r}")
        if value is None:
            return
        if self.option.least is not None and not value >= self.option.least:  # NaN is not
            raise FeatxError(f"{self.name} is {self.option.least} or more, not {value}")
        if self.option.pattern and not re.fullmatch(self.option.pattern, value):
            raise FeatxError(f"{self.name} is {self.option.help.removesuffix('.')}, not {value!r}")
        if fits(value, int) and value >= 2**63:  # what numpy and torch both take
            raise FeatxError(f"{self.name} is less than 2**63, not {value}")


def home(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A path that begins with `~` or `~name`, from that home folder; `./~` is a folder called so, and comes back whole,
    since `Path` forgets the dot. Raises `FeatxError` for the name of an unknown user, and for other values than paths.
    """
    if not isinstance(path, str | os.PathLike):
        raise FeatxError(f"expected a path, not {path!r}")
    text = os.fspath(path)
    full = os.path.expanduser(text) if text.startswith("~") else text
    if full.startswith("~") and not os.path.lexists(full):
        raise FeatxError(f"there is no user for {text!r}; write ./{text} for a file or folder of that name")
    return os.path.abspath(full) if text.startswith(("~", "./~")) else path


def count(name: str, value: Any) -> int:
    """A number of things, from 1. Raises `FeatxError`."""
    if not (fits(value, int) and value >= 1):
        raise FeatxError(f"{name} is a whole number from 1, not {value!r}")
    return int(value)


def listed(given: Any) -> Any:
    """Several values, of which one may come alone."""
    return given if isinstance(given, Iterable) and not isinstance(given, str) else [given]


@functools.cache
def fields_of(kind: Any = Options) -> dict[str, Field]:
    """The options of `Options`, `Shared` or `Running`, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: Field(name, *get_args(hint)) for name, hint in hints.items()}


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` has the type `hint`, as `typing.get_type_hints` gives it; items of containers are not checked.

    A whole number counts as a float, True and False do not count as numbers, and anything but text counts as a
    sequence, so that one number may stand for a sequence of one.
    """
    origin, given = get_origin(hint) or hint, value
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's numbers and arrays
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is Sequence:
        return not isinstance(value, str)
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    return origin is Any or isinstance(value, origin) or isinstance(given, origin)


def plain(value: Any) -> Any:
    """A setting as JSON gives it back: tuples, ranges, arrays and columns are lists, numpy's numbers are Python's,
    decimals are floats, paths and the names in a mapping are texts.
    """
    for name in ("tolist", "to_list"):  # numpy is not imported, which takes longer than `--help`
        if hasattr(value, name):
            return getattr(value, name)()
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "as_integer_ratio") and not isinstance(value, int):  # decimals and fractions
        return float(value)
    return value


def complete(
    given: Mapping[str, Any], kind: Any = Options, function: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """All options of a kind, those given checked and `plain`, the others at their defaults.

    Raises `FeatxError` for an unknown option, with near matches, and for a value out of range. function: the one that
    was called; near matches may be its own parameters, too.
    """
    fields = fields_of(kind)
    for name in given:
        if name not in fields:
            own = inspect.signature(function).parameters if function else {}
            known = [*fields, *(parameter for parameter in own if parameter != "options")]
            raise FeatxError(f"there is no option {name!r}; there are {', '.join(known)}.{near(name, known)}")
    values = {name: field.option.default for name, field in fields.items()}
    for name, value in given.items():
        values[name] = plain(value)
        fields[name].check(values[name])
    if "cache" in given:
        values["cache"] = home(values["cache"])
    return values
