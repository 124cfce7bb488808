"""Owns how sure a number is: scores with the 95 % interval that their images leave them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featx import metrics

RESAMPLES = 1000
# The bootstrap of a mean is its normal interval long before this many rows.
MANY_ROWS = 20_000


@dataclass(frozen=True)
class Estimate:
    """One number in a report, with the 95 % interval that its data leaves it."""

    value: float
    low: float
    high: float
    method: str
    """`wilson` (proportions), `bootstrap` (1,000 resamples of the images, seeded), `normal`, or, for averages over
    classes where every answer is right or every one wrong, `exact`: no resample would differ."""

    def __str__(self) -> str:
        return f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def proportion(right: np.ndarray) -> Estimate:
    """The share of True in `bool [N]`, with Wilson's interval."""
    low, high = metrics.wilson(int(right.sum()), len(right))
    return Estimate(float(right.mean()), low, high, "wilson")


def bootstrapped(value: float, drawn: np.ndarray) -> Estimate:
    """A number with the middle 95 % of what its resamples `[R]` gave."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), "bootstrap")


def average(value: float, drawn: np.ndarray, sizes: np.ndarray) -> Estimate:
    """An average over classes of so many images (`int [C]`), with the interval of its resamples `[R]`.

    Where all answers are right, so they are in each resample, which would claim certainty. Then the least
    average recall at which this still happens once in 40 times: 1 - the largest mean of error rates e with
    sum(n log(1 - e)) >= log(1/40), found by its Lagrange multiplier; for one class it is Clopper and Pearson's
    limit. The F1's is about the same. Where all are wrong, the same from below.
    """
    if value not in (0.0, 1.0) or np.ptp(drawn):
        return bootstrapped(value, drawn)
    n, room = np.sort(sizes.ravel()[sizes.ravel() > 0]).astype(np.float64), np.log(40)
    if not len(n):  # no image has any of the labels: nothing bounds it
        return Estimate(value, 0.0, 1.0, "exact")
    low, high = np.exp(-room / n[0]) / n[-1] / 2, 1 / n[0]  # of the multiplier
    for _ in range(100):
        middle = (low + high) / 2
        spent = -n * np.log(np.minimum(1, middle * n))
        low, high = (middle, high) if spent.sum() > room else (low, middle)
    worst = float((1 - np.exp(-spent / n)).mean())
    return Estimate(value, *((1 - worst, 1.0) if value else (0.0, worst)), "exact")


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of `float [N]`, by the bootstrap, or for many rows by the normal interval."""
    mean, count = float(values.mean()), len(values)
    if count > MANY_ROWS:
        half = metrics.Z95 * float(values.std()) / count**0.5
        return Estimate(mean, mean - half, mean + half, "normal")
    rng = np.random.default_rng(0)
    share = max(1, 2_000_000 // count)  # resamples at a time, so that 16 MB of indices suffice
    drawn = [
        values[rng.integers(0, count, (min(share, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, share)
    ]
    return bootstrapped(mean, np.concatenate(drawn))


def class_averages(table: np.ndarray) -> dict[str, Estimate]:
    """Balanced accuracy and macro-F1 over the classes that have images.

    Both depend on the confusion alone, and resampling images is a multinomial draw over its cells:
    the same bootstrap, without touching a row.
    """
    cells = np.flatnonzero(table)
    count = int(table.sum())
    counts = np.random.default_rng(0).multinomial(count, table.ravel()[cells] / count, RESAMPLES)
    here = table.sum(axis=1) > 0
    _, recall, f1 = metrics.precision_recall_f1(table)
    recalls, f1s = np.empty(RESAMPLES), np.empty(RESAMPLES)
    share = max(1, 2_000_000 // table.size)
    for start in range(0, RESAMPLES, share):
        part = counts[start : start + share]
        drawn = np.zeros((len(part), table.size), np.int64)
        drawn[:, cells] = part
        shaped = drawn.reshape(len(part), *table.shape)
        _, each_recall, each_f1 = metrics.precision_recall_f1(shaped)
        alive = shaped.sum(axis=2) > 0  # a class that a resample leaves out has no recall in it
        recalls[start : start + share] = (each_recall * alive).sum(axis=1) / alive.sum(axis=1)
        f1s[start : start + share] = (each_f1 * alive).sum(axis=1) / alive.sum(axis=1)
    return {
        "balanced_accuracy": average(float(recall[here].mean()), recalls, table.sum(axis=1)),
        "macro_f1": average(float(f1[here].mean()), f1s, table.sum(axis=1)),
    }
