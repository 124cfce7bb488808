"""`Extraction`: a data set whose features are all in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.extraction.report import ExtractionReport
from featx.features import Features, joined
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
        given = np.array([source.splits[i] if source.splits else "" for i in numbers], dtype="U5")
        y, class_names, splits, notes = joined(labels, source.multilabel, self.keys, given)

        return Features(
            rows=StoredRows(store, self.keys) if self.exceeds(memory, len(self.keys)) else store.read(self.keys),
            y=y,
            ids=[source.ids[i] for i in numbers],
            class_names=class_names,
            splits=splits,
            keys=self.keys,
            spec=store.spec,
            report=replace(self.report, notes=[*self.report.notes, *notes]),
            given=given,
        )

    def views(self, keys: np.ndarray, *, memory: float = float("inf")) -> Sequence[np.ndarray | StoredRows]:
        """The rows of these keys, `uint8 [M, 32]`, in every view: in memory, or read by slices where the rows of
        all views together take more than `memory` bytes.
        """
        if self.exceeds(memory, len(keys) * len(self.stores)):
            return [StoredRows(store, keys) for store in self.stores]
        return [store.read(keys, mapped=False) for store in self.stores]

    def exceeds(self, memory: float, count: int) -> bool:
        """Whether so many rows of features take more than `memory` bytes."""
        row_bytes = math.prod(self.info.row_shape) * np.dtype(self.stores[0].spec.dtype).itemsize
        return count * row_bytes > memory
