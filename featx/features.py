"""What a feature is: its identity (`FeatureSpec`, content keys), its table (`Features`) and its splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np

from featx.errors import FeatxError, SourceError
from featx.identity import ADDED, Identity
from featx.options import Precision, Split, StoredDtype
from featx.pixels.preprocess import Preprocess
from featx.text import near

if TYPE_CHECKING:
    from featx.extraction.report import ExtractionReport

FORMAT_VERSION = 1
VALIDATION_SHARE = 0.2
# The largest `difference` of a row in fp32 from torch's eager one on the CPU, whichever engine, batch or number of
# threads computed it. In less than fp32 that depends on the network: a run states it (`extraction/fidelity.py`).
TOLERANCE = 1e-5


class Rows(Protocol):
    """A table that is read by slices: an array, a memory map, an HDF5 data set, or rows in the cache."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class LazyRows(Rows, Protocol):
    """A table that can be narrowed down without reading it."""

    def take(self, which: np.ndarray, /) -> LazyRows: ...


def gathered(X: Rows, which: np.ndarray) -> np.ndarray:
    """The rows of a table with these numbers, `int [M]`, in memory: in one go where the table can `take`."""
    if isinstance(X, np.ndarray):
        return np.asarray(X[which])
    if hasattr(X, "take"):
        return np.asarray(X.take(which)[0 : len(which)])
    return np.concatenate([X[i : i + 1] for i in which.tolist()])


def taken(X: np.ndarray | LazyRows, which: np.ndarray) -> np.ndarray | LazyRows:
    """The rows with these numbers, `int [M]`: of an array a copy, of a stored table one that is read later."""
    return X[which] if isinstance(X, np.ndarray) else X.take(which)


def joined(
    labels: Sequence[str], several: bool, keys: np.ndarray, given: np.ndarray
) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """N labels, content keys and given splits -> `y`, `class_names` and `splits` of `Features`, and
    `assign_splits`' sentences. several: `cat|indoor` is two classes.
    """
    y, class_names = labelled(labels, several)
    splits, notes = assign_splits(keys, y, given, class_names)
    return y, class_names, splits, notes


def labelled(labels: Sequence[str], several: bool) -> tuple[np.ndarray, list[str]]:
    """Labels -> `y` and `class_names` of `Features`; an empty text is no label. several: `cat|indoor` is two classes.

    Raises `SourceError` where several labels are allowed and none is given.
    """
    if not several:
        class_names = sorted(set(labels) - {""})
        number = {"": -1} | {name: i for i, name in enumerate(class_names)}
        return np.array([number[label] for label in labels], np.int64), class_names
    sets = [set(label.split("|")) - {""} for label in labels]
    class_names = sorted(set().union(*sets))
    if not class_names:
        raise SourceError("no image has a class: every label is empty")
    number = {name: i for i, name in enumerate(class_names)}
    y = np.zeros((len(labels), len(class_names)), np.int64)
    for row, names in enumerate(sets):
        y[row, [number[name] for name in names]] = 1
    y[[label == "" for label in labels]] = -1
    return y, class_names


@dataclass(frozen=True)
class FeatureSpec(Identity):
    """All that changes a feature, and nothing else. Two specs with one digest have the same features."""

    backbone: str
    """`torchvision/resnet18`, `timm/vit_small_patch14_dinov2.lvd142m`, `custom/package.module:factory`."""
    weights: str
    """SHA-256, in hex, of the network's tensors (`featx.backbones.backbone.tensors_digest`)."""
    layer: str = "features"
    """`features` (the input of the last Linear), `logits`, or a module's dotted name."""
    preprocess: Preprocess = field(default_factory=Preprocess)
    view: str = "center"
    """`center`, or a seeded augmented view such as `crop-flip/seed=0/3/pixels=2`."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass: `fp32`, `bf16`, `fp16` or `int8`."""
    dtype: StoredDtype = "float32"
    """What is stored: `float32`, or `float16`, which refuses what it cannot hold."""
    version: int = FORMAT_VERSION
    calibration: str = field(default="", metadata=ADDED)
    """For `int8`: the SHA-256, in hex, of the calibrated backbone."""
    engine: str = field(default="", metadata=ADDED)
    """For `int8`: what computes the rows, since engines round differently: `onnxruntime` or `openvino`."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise FeatxError(f"features are stored as float32 or float16, not {self.dtype!r}")
        if self.precision not in get_args(Precision):
            raise FeatxError(f"precision is one of {', '.join(get_args(Precision))}, not {self.precision!r}")
        if (self.precision == "int8") != bool(self.calibration and self.engine):
            raise FeatxError("int8 features, and no others, name their calibration and their engine")

    @cached_property
    def canonical(self) -> bytes:
        """The spec as JSON with sorted keys, ASCII."""
        return json.dumps(self.to_dict(), sort_keys=True).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of the spec's canonical JSON."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def folder_name(self) -> str:
        """`resnet18-0123456789abcdef`: the backbone's own name, for people, and the start of the digest."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", self.backbone.rpartition("/")[2])[:60].lstrip(".")
        return f"{name}-{self.digest[:16]}"

    @property
    def asked(self) -> dict[str, Any]:
        """The options of an extraction that gives features of this arithmetic again."""
        own = {"calibration": self.calibration, "runtime": self.engine} if self.precision == "int8" else {}
        return {"precision": self.precision, "dtype": self.dtype, **own}

    @property
    def tolerance(self) -> float | None:
        """How far two rows of one image may lie apart, as computed; a store records it beside the spec."""
        return TOLERANCE if self.precision == "fp32" else None


def content_key(data: bytes) -> bytes:
    """A row's key: the SHA-256 of the image file's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one data set, joined with the labels and splits its source gives today.

    Only images with a feature are in it; `report` names the others.
    """

    rows: np.ndarray | LazyRows
    """`float32 | float16 [N, D]`, in the source's order: an array, or, where it would exceed the memory
    limit, a table that is read by slices."""
    y: np.ndarray
    """`int64 [N]`, index into `class_names`; or, where an image may have several labels, 0/1 `int64 [N, C]`.
    -1 where the source gives no label, which is not the same as several labels of which none applies."""
    ids: list[str]
    """Paths under the source's root, with `/`; unique."""
    class_names: list[str]
    """Sorted."""
    splits: np.ndarray
    """`str [N]`: `train`, `val`, `test`, or an empty string for an image without a label."""
    keys: np.ndarray
    """`uint8 [N, 32]`: `content_key` of each image."""
    spec: FeatureSpec
    report: ExtractionReport | None = None
    """How their extraction went."""
    given: np.ndarray | None = None
    """`str [N]`: the splits that the source gives, empty where it gives none; None where `splits` were all given."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def X(self) -> np.ndarray:
        """`float32 | float16 [N, D]`, in the source's order, in memory (or memory-mapped)."""
        return self.rows if isinstance(self.rows, np.ndarray) else self.rows[0 : len(self.ids)]

    @property
    def labelled(self) -> np.ndarray:
        """`bool [N]`: which images have a label, or several."""
        return (self.y if self.y.ndim == 1 else self.y[:, 0]) >= 0

    def split(self, name: str) -> Features:
        """The rows of `train`, `val` or `test`, and of "" for images in none. Raises `FeatxError` for another name."""
        if name not in ("", *get_args(Split)):
            raise FeatxError(f"splits are {', '.join(get_args(Split))}, not {name!r}.{near(name, get_args(Split))}")
        return self.take(np.flatnonzero(self.splits == name))

    def parts(self) -> tuple[Features, Features, Features]:
        """The rows of `train`, `val` and `test`."""
        return self.split("train"), self.split("val"), self.split("test")

    def take(self, numbers: np.ndarray) -> Features:
        """The rows with these numbers, `int [M]`."""
        return replace(
            self,
            rows=taken(self.rows, numbers),
            y=self.y[numbers],
            ids=[self.ids[i] for i in numbers],
            splits=self.splits[numbers],
            keys=self.keys[numbers],
            given=None if self.given is None else self.given[numbers],
        )

    @property
    def labels(self) -> list[str]:
        """N labels as a source writes them: `cat`, `cat|indoor`, `|` where no class applies, empty for none."""
        if self.y.ndim == 1:
            names = [*self.class_names, ""]
            return [names[i] for i in self.y]
        applies = [[self.class_names[i] for i in np.flatnonzero(row > 0)] for row in self.y]
        return [("|".join(names) or "|") if row[0] >= 0 else "" for names, row in zip(applies, self.y, strict=True)]

    def relabel(self, labels: Mapping[str, str | None] | Sequence[str | None]) -> Features:
        """The same images with other labels: `{id: label}` for some of them, or N labels; None or "" takes one away.

        Classes and splits become what the source would give with these labels: splits that it gives stay, the
        others follow from the images' content, and an image without a label is in none. No row is read or
        copied. Raises `FeatxError` for an id that is not here, or another number of labels.
        """
        if isinstance(labels, Mapping):
            new = dict(zip(self.ids, self.labels, strict=True))
            for id in labels:
                if id not in new:
                    raise FeatxError(f"there is no image {id!r} to label.{near(id, new)}")
            labels = list((new | dict(labels)).values())
        if len(labels) != len(self):
            raise FeatxError(f"{len(labels)} labels were given for {len(self)} images")
        given = self.splits if self.given is None else self.given

        new_labels = [label or "" for label in labels]
        y, class_names, splits, notes = joined(new_labels, self.y.ndim == 2, self.keys, given)
        former = assign_splits(self.keys, self.y, given, self.class_names)[1]
        report = self.report
        if report is not None:
            report = replace(report, notes=[*(note for note in report.notes if note not in former), *notes])
        return replace(self, y=y, class_names=class_names, splits=splits, given=given, report=report)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of what was learned from: keys, labels, splits and class names; not file names."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        labels = self.y[:, None] if self.y.ndim == 1 else self.y
        order = np.lexsort([self.splits, *labels.T[::-1], *self.keys.T[::-1]])
        for start in range(0, len(order), 1 << 16):  # a million images are not a million tuples at once
            numbers = order[start : start + (1 << 16)]
            values = self.keys[numbers].tobytes(), np.ascontiguousarray(labels[numbers], "<i8").tobytes()
            digest.update(b"".join(values) + "\0".join(self.splits[numbers].tolist()).encode())
        return digest.hexdigest()


def groups(keys: np.ndarray) -> np.ndarray:
    """`int64 [N]`: rows with equal keys (`uint8 [N, 32]`) share a number, so that no fold separates duplicates."""
    flat = np.ascontiguousarray(keys).view("V32").ravel()
    return np.unique(flat, return_inverse=True)[1].astype(np.int64)


def short_keys(keys: np.ndarray) -> np.ndarray:
    """`uint64 [N]`: the first 8 bytes of each key (`uint8 [N, 32]`), which are enough to tell SHA-256s apart."""
    return np.ascontiguousarray(keys[:, :8]).view("<u8").ravel()


def repeated(features: Features) -> list[str]:
    """One sentence each for `val` and `test` where they hold training images, byte for byte."""
    keys, notes = short_keys(features.keys), []
    for name in ("val", "test"):
        mine = keys[features.splits == name]
        seen = int(np.isin(mine, keys[features.splits == "train"]).sum())
        if seen:
            notes.append(
                f"{seen} of {len(mine)} {name} images are training images too, byte for byte: "
                f"the scores on {name} are too optimistic"
            )
    return notes


def hash_fraction(keys: np.ndarray) -> np.ndarray:
    """`float64 [N]` in [0, 1): the first 8 bytes of each key (`uint8 [N, 32]`), big-endian, over 2**64."""
    first = np.ascontiguousarray(keys[:, :8]).view(">u8").ravel()
    return np.minimum(first.astype(np.float64) / 2.0**64, np.nextafter(1.0, 0.0))


def assign_splits(
    keys: np.ndarray, y: np.ndarray, given: np.ndarray, class_names: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Fill in the splits that a source does not give, from the images' content alone.

    An image is validation where its `hash_fraction` is below 0.2, so the answer never changes when
    other files come, go, or are renamed, and duplicates never straddle it. A class left empty on one
    side borrows its image with the hash nearest to 0.2 from the other side.

    keys: `uint8 [N, 32]`; y: `int64 [N]` or `[N, C]`, -1 for no label; given: `str [N]`, empty where unknown.
    Where the source gives a `val` split, its rows without one become `train`; where it gives `train`
    but no `val`, validation is taken out of `train`. Images without a label are in no split: nothing can be
    learned from or measured on them. Returns the splits, `str [N]`, and one sentence for these and for each
    class that had to borrow or could not.
    """
    y = y if y.ndim == 1 else np.minimum(y[:, 0], 0)  # of several labels, whether there are any
    splits = given.astype("U5")
    unlabelled = (splits != "") & (y < 0)
    splits[unlabelled] = ""
    notes = [f"{unlabelled.sum()} images have a split and no label, and take part in none"] if unlabelled.any() else []

    if (splits == "val").any():
        splits[(splits == "") & (y >= 0)] = "train"
        return splits, notes

    pool = np.isin(splits, ["", "train"]) & (y >= 0)
    fraction = hash_fraction(keys)
    splits[pool] = np.where(fraction[pool] < VALIDATION_SHARE, "val", "train")

    validating = splits == "val"
    sides = [np.bincount(y[pool & side], minlength=len(class_names)) > 0 for side in (~validating, validating)]
    for label in np.flatnonzero(sides[0] ^ sides[1]):
        full, empty = ("train", "val") if sides[0][label] else ("val", "train")
        name = class_names[label]
        mine = np.unique(fraction[pool & (y == label)])
        if len(mine) == 1:  # learned from, or it could never be answered
            splits[pool & (fraction == mine[0])] = "train"
            notes.append(f"class {name!r} has one distinct image, in train: its val side stays empty")
            continue
        # an image with two labels moves only if it must: it would take its other class along
        alone = mine[~np.isin(mine, fraction[pool & (y != label)])]
        choice = alone if len(alone) else mine
        nearest = choice[np.argmin(np.abs(choice - VALIDATION_SHARE))]
        splits[pool & (fraction == nearest)] = empty  # its duplicates too, whatever their label
        notes.append(f"class {name!r} had no image in {empty} and borrows its nearest hash from {full}")
    return splits, notes


def difference(rows: np.ndarray, reference: np.ndarray) -> float:
    """The worst image's largest deviation, relative to the largest entry of its reference row; `[N, ...]` each."""
    if rows.shape != reference.shape or not len(rows):
        raise FeatxError(f"rows {list(rows.shape)} cannot be compared with {list(reference.shape)}")
    a, b = (np.asarray(x, np.float64).reshape(len(rows), -1) for x in (rows, reference))
    scale = np.maximum(np.abs(b).max(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(a - b).max(axis=1) / scale).max())


def distances(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Each image's distance between its two rows, `[N, D]` each, relative to the length of its reference: `[N]`.

    A reference shorter than the median one (an almost black image's, say) counts as long as that.
    """
    lengths = np.linalg.norm(reference, axis=1)
    scale = np.maximum(np.maximum(lengths, np.median(lengths)), np.finfo(np.float32).tiny)
    return np.asarray(np.linalg.norm(rows - reference, axis=1) / scale)


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The cosine between each row and its other, `[N, ...]` each -> `float64 [N]`; 1 for two rows of zeros."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (rows, others))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))
