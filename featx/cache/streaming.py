"""Tables that read features from the cache slice by slice, for data sets larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from featx.features import Rows, gathered

if TYPE_CHECKING:
    from featx.cache.store import FeatureStore


class StoredRows:
    """The rows of some keys, `[N, *row_shape]`, read from the store slice by slice."""

    def __init__(self, store: FeatureStore, keys: np.ndarray) -> None:
        assert store.form is not None
        self.store, self.keys = store, keys
        self.shape = (len(keys), *store.form.row_shape)

    @property
    def places(self) -> np.ndarray:
        """`int64 [N]`: where each row is in the store. Rows are read fastest by ascending places."""
        return self.store._table.index.locate(self.keys)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.store.read(self.keys[rows], mapped=False)  # mapped files would count as memory in use

    def take(self, which: np.ndarray) -> StoredRows:
        """The rows with these numbers, `int [M]`; nothing is read."""
        return StoredRows(self.store, self.keys[which])


class Stacked:
    """Several tables of one width, one below the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self.starts = np.concatenate([[0], np.cumsum([part.shape[0] for part in parts])])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        found = [
            part[max(0, start - at) : stop - at]
            for part, at in zip(self.parts, self.starts.tolist(), strict=False)
            if start < at + part.shape[0] and stop > at
        ]
        return np.concatenate(found) if found else self.parts[0][0:0]

    def take(self, which: np.ndarray) -> np.ndarray:
        """A copy of the rows with these numbers, `int [M]`."""
        of = np.searchsorted(self.starts, which, "right") - 1
        order = np.argsort(of, kind="stable")  # part by part
        found = [gathered(self.parts[k], which[of == k] - self.starts[k]) for k in np.unique(of)]
        return np.concatenate(found)[np.argsort(order)] if found else self.parts[0][0:0]
