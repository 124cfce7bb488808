"""`Examples`: what a head learns from, one row per image or, with augmented views, several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featx.cache.streaming import Stacked, StoredRows
from featx.features import Rows


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows with their labels. Nothing is checked here; `labelled` and `measured` of `featx.solvers.training` do."""

    X: Rows
    """Float `[N, D]`: an array, or a table that is read by slices."""
    y: np.ndarray
    """`int [N]` in [0, C), or 0/1 `[N, C]` for several labels per image."""
    groups: np.ndarray | None = None
    """`int [N]`: rows that share a number share a fold, and are left out together. None: each row is alone."""
    scored: np.ndarray | None = None
    """`bool [N]`: the held-out rows that count when a head chooses. None: all of them."""
    weights: np.ndarray | None = None
    """`float [N]` above 0: a row counts as so many equal rows of its group. None: 1 each."""

    @classmethod
    def of_views(cls, views: Sequence[Rows], y: np.ndarray, groups: np.ndarray | None = None) -> Examples:
        """Every view, `[M, D]`, of the same M images, one below the other.

        The views of an image share its label and its group. The first view alone is scored: it is the centre
        crop, which is what the head will see. Views in memory are copied into one array, others stay unread; rows in
        the cache come in the order in which they are stored.
        """
        tables, orders = zip(*map(in_stored_order, views), strict=True)
        arrays = [table for table in tables if isinstance(table, np.ndarray)]
        order = np.concatenate(orders)
        if len(tables) == 1:
            return cls(tables[0], y[order], None if groups is None else groups[order])
        return cls(
            X=np.concatenate(arrays) if len(arrays) == len(tables) else Stacked(tables),
            y=y[order],
            groups=(np.arange(len(y)) if groups is None else groups)[order],
            scored=np.arange(len(order)) < len(y),
        )


def in_stored_order(X: Rows) -> tuple[Rows, np.ndarray]:
    """A table with its rows in the order in which they are stored, so that a pass reads every file from its first row
    to its last; and their numbers in X, `int [N]`. A table that is not in the cache stays as it is.
    """
    if not isinstance(X, StoredRows):
        return X, np.arange(X.shape[0])
    order = np.argsort(X.places, kind="stable")
    return X.take(order), order
