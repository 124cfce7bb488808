"""One read of a table: the moments of its columns, the sums of its classes, and some of its rows.

All that a head needs before it is fitted, or, for one that knows no more than means and covariances, all it needs.
Every block is centred on its own mean before anything is squared, and blocks are joined in double precision (Chan,
Golub and LeVeque 1983), so that nothing cancels, whatever the columns' offsets and the order of the rows.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featx.devices import available_threads, single_thread
from featx.errors import HeadError
from featx.features import Rows

SCRATCH = 1 << 20  # numbers per block: a block stays in a core's cache between two products
# Below this many multiplications a pass is over before threads have started.
THREADED = 1 << 26
GATHERED = 1 << 28

T = TypeVar("T")


def spread(
    work: Callable[[slice, T], None], count: int, step: int, empty: Callable[[], T], flops: float, own: int = 1
) -> list[T]:
    """Run `work` on every block of `step` of `count` rows, in one thread or as many as there are cores;
    returns what each thread has gathered. own: bytes that each thread gathers, of which there are `GATHERED` at most.
    """
    most = min(available_threads(), -(-count // step), max(1, GATHERED // own))
    threads = 1 if flops < THREADED else most
    starts = iter(range(0, count, step))

    def run(gathered: T) -> T:
        for start in starts:  # the threads share the iterator, which hands out each number once
            work(slice(start, min(start + step, count)), gathered)
        return gathered

    if threads == 1:
        return [run(empty())]
    with single_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, [empty() for _ in range(threads)]))


@dataclass
class Moments:
    """Of some rows, each counted by its share."""

    weight: float
    """The sum of their shares."""
    mean: np.ndarray
    """`float64 [D]`."""
    squares: np.ndarray
    """Summed about the mean: of each column, `float64 [D]`, or the products of all pairs, `[D, D]`."""
    sums: np.ndarray
    """The summed rows of each kind and target, less a fixed row, `float64 [kinds, targets, D]`."""
    totals: np.ndarray
    """The summed shares of each kind and target, `float64 [kinds, targets]`."""

    def join(self, weight: float, mean: np.ndarray, squares: np.ndarray) -> None:
        """Take in the moments of other rows."""
        total, step = self.weight + weight, mean - self.mean
        between = np.outer(step, step) if squares.ndim == 2 else step**2
        share = weight / max(total, 1e-300)
        self.squares += squares + between * (self.weight * share)
        self.mean, self.weight = self.mean + step * share, total

    def __iadd__(self, other: Moments) -> Moments:
        with np.errstate(invalid="ignore"):
            self.join(other.weight, other.mean, other.squares)
        self.sums += other.sums
        self.totals += other.totals
        return self


@dataclass(frozen=True)
class Asked:
    """What one read gathers besides means and squares."""

    gram: bool = False
    """The products of all pairs of columns."""
    kind: np.ndarray | None = None
    """`int [N]` in [0, kinds): rows of each kind are summed apart."""
    kinds: int = 0
    targets: np.ndarray | None = None
    """0/1 `float32 [N, C]`: the rows of each target are summed apart, too. None: one target, all rows'."""
    kept: np.ndarray | None = None
    """`int [n]`, ascending: the rows to keep as they are."""


def moments(X: Rows, shares: np.ndarray | None, asked: Asked) -> tuple[Moments, np.ndarray]:
    """The moments of a table, `[N, D]`, its sums less the mean, and the rows to keep, `float32 [n, D]`.

    shares: `float32 [N]`, None for 1 each. Raises `HeadError` for rows that are not finite, or that float32 cannot
    square; the first is named.
    """
    count, width = X.shape
    kept = np.empty((0 if asked.kept is None else len(asked.kept), width), np.float32)
    origin = np.nan_to_num(np.asarray(X[0:1], np.float32)[0].astype(np.float64))
    kinds = (asked.kinds, 1 if asked.targets is None else asked.targets.shape[1])

    def empty() -> Moments:
        squares = np.zeros((width, width) if asked.gram else width)
        return Moments(0.0, np.zeros(width), squares, np.zeros((*kinds, width)), np.zeros(kinds))

    def work(rows: slice, found: Moments) -> None:
        part = np.asarray(X[rows], np.float32)
        share = np.ones(len(part), np.float32) if shares is None else shares[rows]
        if asked.kept is not None:
            first, last = np.searchsorted(asked.kept, [rows.start, rows.stop])
            kept[first:last] = part[asked.kept[first:last] - rows.start]

        with np.errstate(over="ignore", invalid="ignore"):
            weight = float(share.sum(dtype=np.float64))
            centre = (share / np.float32(weight)) @ part
            centred = part - centre
            weighted = centred if shares is None else centred * share[:, None]
            off = weighted.sum(axis=0, dtype=np.float64) / weight
            squares = (weighted.T @ centred if asked.gram else _squares(weighted, centred)).astype(np.float64)
            squares -= weight * (np.outer(off, off) if asked.gram else off**2)
            found.join(weight, centre + off, squares)
            if asked.kind is not None:
                _add_sums(found, weighted, share, centre - origin, asked, rows)

    step, flops = max(64, 4 * SCRATCH // width), float(count) * width * (width if asked.gram else 16)
    own = 8 * width * (math.prod(kinds) + (width if asked.gram else 1))
    found = functools.reduce(operator.iadd, spread(work, count, step, empty, flops, own))
    if not (np.isfinite(found.mean).all() and np.isfinite(found.squares).all()):
        bad = _first_bad(X, step)
        raise HeadError(
            f"the features hold NaN, infinity or numbers beyond float32 ({bad}); extract these images again, in fp32"
        )
    found.sums -= found.totals[..., None] * (found.mean - origin)
    return found, kept


def _first_bad(X: Rows, step: int) -> str:
    for start in range(0, X.shape[0], step):
        part = np.asarray(X[start : start + step], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            bad = np.flatnonzero(~np.isfinite(np.einsum("nd,nd->n", part, part)))
        if len(bad):
            return f"row {start + bad[0]}"
    return f"rows 0 to {X.shape[0]}"


def _squares(weighted: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Each column's summed squares, a few rows at a time, which stay in the cache and lose no digits."""
    parts = (slice(i, i + 512) for i in range(0, len(centred), 512))
    return np.asarray(np.sum([np.einsum("nd,nd->d", weighted[p], centred[p]) for p in parts], axis=0, dtype=np.float64))


def _add_sums(
    found: Moments, weighted: np.ndarray, share: np.ndarray, centre: np.ndarray, asked: Asked, rows: slice
) -> None:
    """Add a block's rows, less their `centre`, to the sums of their kinds and targets."""
    assert asked.kind is not None
    order = np.argsort(asked.kind[rows], kind="stable")
    kinds, starts = np.unique(asked.kind[rows][order], return_index=True)
    if asked.targets is None:
        sums = np.add.reduceat(weighted[order], starts, axis=0, dtype=np.float64)[:, None]
        totals = np.add.reduceat(share[order], starts, dtype=np.float64)[:, None]
    else:
        parts = np.split(order, starts[1:])
        sums = np.stack([asked.targets[rows][p].T @ weighted[p] for p in parts]).astype(np.float64)
        totals = np.stack([share[p].astype(np.float64) @ asked.targets[rows][p] for p in parts])
    found.sums[kinds] += sums + totals[..., None] * centre
    found.totals[kinds] += totals
