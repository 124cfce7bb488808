"""`Extraction`: a data set whose features are all in the cache, and how its labels become numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.errors import SourceError
from featx.extraction.report import ExtractionReport
from featx.features import Features, assign_splits
from featx.sources.source import Source


@dataclass(frozen=True, eq=False)
class Extraction:
    """A data set whose features are all in the cache. No feature is read before `features` is called."""

    source: Source
    request: BackboneRequest
    info: BackboneInfo
    cache: Path
    stores: list[FeatureStore]
    """One for the centre crop, then one for each augmented view."""
    numbers: np.ndarray
    """`int64 [N]`: the images that have features, by their numbers in `source`."""
    keys: np.ndarray
    """`uint8 [N, 32]`: their content keys."""
    report: ExtractionReport

    def features(self, view: int = 0, *, memory: float = float("inf")) -> Features:
        """The features of one view (0: the centre crop), with today's labels and splits.

        memory: bytes; features that take more stay in the cache, and are read by slices. By default none do.
        """
        source, store, numbers = self.source, self.stores[view], self.numbers.tolist()
        labels = [source.labels[i] if source.labels else "" for i in numbers]
        y, class_names = (several_labels if source.multilabel else one_label)(labels)
        given = np.array([source.splits[i] if source.splits else "" for i in numbers], dtype="U5")
        one = y if y.ndim == 1 else np.minimum(y[:, 0], 0)  # of several labels, whether there are any
        splits, notes = assign_splits(self.keys, one, given, class_names)

        return Features(
            rows=StoredRows(store, self.keys) if self.exceeds(memory, len(self.keys)) else store.read(self.keys),
            y=y,
            ids=[source.ids[i] for i in numbers],
            class_names=class_names,
            splits=splits,
            keys=self.keys,
            spec=store.spec,
            report=replace(self.report, notes=[*self.report.notes, *notes]),
        )

    def exceeds(self, memory: float, rows: int) -> bool:
        """Whether so many rows of features take more than `memory` bytes."""
        row_bytes = math.prod(self.info.row_shape) * np.dtype(self.stores[0].spec.dtype).itemsize
        return rows * row_bytes > memory


def one_label(labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels -> `int64 [N]` and the sorted class names they index; -1 for an empty label."""
    class_names = sorted(set(labels) - {""})
    number = {"": -1} | {name: i for i, name in enumerate(class_names)}
    return np.array([number[label] for label in labels], dtype=np.int64), class_names


def several_labels(labels: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels such as `cat|indoor` -> 0/1 `int64 [N, C]`, -1 for an empty label, and the columns' sorted class names."""
    sets = [set(label.split("|")) - {""} for label in labels]
    class_names = sorted(set().union(*sets))
    if not class_names:
        raise SourceError("no image has a class: every label is empty")
    number = {name: i for i, name in enumerate(class_names)}
    y = np.zeros((len(labels), len(class_names)), dtype=np.int64)
    for row, names in enumerate(sets):
        y[row, [number[name] for name in names]] = 1
    y[[label == "" for label in labels]] = -1
    return y, class_names
