"""A stratified part of a large table: small enough for memory, and large enough to say where the optimum is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from featx.errors import HeadError
from featx.solvers.design import Design
from featx.solvers.training import EMPTY, Task, units

FEWEST = 4  # a table of fewer times as many rows as its part is solved without one
LARGEST = 1 << 26  # numbers in a part, 256 MB


@dataclass(frozen=True)
class Some:
    """Some rows of a table."""

    rows: np.ndarray
    """`int [n]`, ascending."""
    worth: np.ndarray
    """How many rows of the table each stands for, `float [n]`."""

    def design(
        self, all: Design, task: Task, fold: np.ndarray, weights: np.ndarray | None, scored: np.ndarray | None
    ) -> Design:
        """These rows, which `task` has kept, in the coordinates of all rows, with weights that make their objective an
        estimate of the whole one: that is scikit-learn's with C times N / n. The others: what `all` was made of.
        """
        of, own = self.rows, self.worth if weights is None else self.worth * weights[self.rows]
        few = replace(task, X=task.kept, y=task.y[of], weights=None, gram=None, kept=EMPTY)
        scored = None if scored is None else scored[of]
        return Design(few, fold[of], own, scored=scored, torch_device=all.place.get("device", ""), like=all)


def stratified(
    y: np.ndarray, groups: np.ndarray | None, fold: np.ndarray, size: int, width: int, seed: int
) -> Some | None:
    """About `size` of N rows with `width` columns.

    Groups come whole. Each class keeps its share of each fold, and at least a group of it. None where the table is
    smaller than four parts, or so many classes make the part too large. y, groups, fold: as for `folds`, which gave
    the folds. The same seed takes the same groups, whatever the order of the rows. Raises `HeadError` for a `size`
    below 0.
    """
    if size < 0:
        raise HeadError(f"part is a number of rows, 0 for none, not {size}")
    count, size = len(y), min(size, LARGEST // width)
    if not size or count < FEWEST * size:
        return None
    unit, many, label, _, _ = units(y, groups)
    group_fold = np.empty(len(many), np.int64)
    group_fold[unit] = fold
    _, stratum = np.unique(np.stack([label, group_fold]), axis=1, return_inverse=True)

    order = np.random.default_rng(seed).permutation(len(many))
    order = order[np.argsort(stratum[order], kind="stable")]
    there = np.bincount(stratum, many)
    ends = np.cumsum(many[order])
    before = ends - many[order] - (np.cumsum(there) - there)[stratum[order]]
    taken = np.zeros(len(many), bool)
    taken[order] = before < there[stratum[order]] * (size / count)
    worth = there / np.bincount(stratum, many * taken)

    rows = np.flatnonzero(taken[unit])
    return Some(rows, worth[stratum[unit[rows]]]) if len(rows) <= min(2 * size, count // 2) else None
