"""`Extraction`: a data set whose features are all in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.extraction.findings import Findings
from featx.extraction.report import ExtractionReport
from featx.features import Features, joined
from featx.sources.columns import Names, Texts
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
    findings: Findings
    """All images that were found odd, of which `report` names the first; `write` puts them into a file."""

    def features(self, view: int = 0, *, memory: float = float("inf")) -> Features:
        """The features of one view (0: the centre crop), with today's labels and splits.

        memory: bytes; features that take more stay in the cache, and are read by slices. By default none do.
        """
        source, store, none = self.source, self.stores[view], [""] * len(self.source)
        labels, given = (Names.of(column or none).take(self.numbers) for column in (source.labels, source.splits))
        parts = np.array(given, dtype="U5")
        y, class_names, splits, notes = joined(labels, source.multilabel, self.keys, parts)

        return Features(
            rows=StoredRows(store, self.keys) if self.exceeds(memory, len(self.keys)) else store.read(self.keys),
            y=y,
            ids=list(Texts.of(source.ids).take(self.numbers)),
            class_names=class_names,
            splits=splits,
            keys=self.keys,
            spec=store.spec,
            report=replace(self.report, notes=[*self.report.notes, *notes]),
            given=parts,
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
        form = self.stores[0].form
        assert form is not None
        return count * form.row_bytes > memory
