"""Scores with the 95 % interval that the number of images leaves them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featx import metrics

RESAMPLES = 1000
# The bootstrap of a mean is its normal interval long before this many rows.
MANY_ROWS = 20_000


@dataclass(frozen=True)
class Estimate:
    """One number in a report, with its 95 % interval."""

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
    """A number with the middle 95 % of its resamples `[R]`."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), "bootstrap")


def average(found: np.ndarray, sizes: np.ndarray) -> Estimate:
    """An average over classes of so many images, `[C]`. found: `[1 + R]`, the average itself, then its resamples.

    Where all answers are right, so they are in each resample, which would claim certainty. Then the least
    average recall at which this still happens once in 40 times: 1 - the largest mean of error rates e with
    sum(n log(1 - e)) >= log(1/40), found by its Lagrange multiplier; for one class it is Clopper and Pearson's
    limit. The F1's is about the same. Where all are wrong, the same from below.
    """
    value = float(found[0])
    if value not in (0.0, 1.0) or np.ptp(found):
        return bootstrapped(value, found[1:])
    n, room = np.sort(sizes[sizes > 0]).astype(np.float64), np.log(40)
    if not len(n):  # no image has any of the labels: nothing bounds it
        return Estimate(value, 0.0, 1.0, "exact")

    low, high = np.exp(-room / n[0]) / n[-1] / 2, 1 / n[0]  # of the multiplier
    for _ in range(100):
        middle = (low + high) / 2
        spent = -n * np.log(np.minimum(1, middle * n))
        low, high = (middle, high) if spent.sum() > room else (low, middle)
    worst = float((1 - np.exp(-spent / n)).mean())
    return Estimate(value, *((1 - worst, 1.0) if value else (0.0, worst)), "exact")


def over_classes(found: np.ndarray, support: np.ndarray) -> Estimate:
    """The average over classes of their numbers `[1 + R, C]`, those of the data itself in the first row.

    support: images of each class, `[1 + R, C]`; a class that a row leaves out has no number in it.
    """
    there = support.any(axis=1)
    return average(np.nanmean(np.where(support > 0, found, np.nan)[there], axis=1), support[0])


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of `float [N]`, by the bootstrap, or for many rows by the normal interval."""
    mean, count = float(values.mean()), len(values)
    if count > MANY_ROWS:
        half = metrics.Z95 * float(values.std()) / count**0.5
        return Estimate(mean, mean - half, mean + half, "normal")
    return bootstrapped(mean, resampled_means(values, RESAMPLES))


def resampled_means(values: np.ndarray, resamples: int) -> np.ndarray:
    """The means of so many seeded resamples of `float [N]`."""
    rng, count = np.random.default_rng(0), len(values)
    share = max(1, 2_000_000 // count)  # resamples at a time, so that 16 MB of indices suffice
    return np.concatenate(
        [
            values[rng.integers(0, count, (min(share, resamples - done), count))].mean(axis=1)
            for done in range(0, resamples, share)
        ]
    )


def class_averages(table: np.ndarray) -> dict[str, Estimate]:
    """Balanced accuracy and macro-F1 over the classes that have images, of a confusion `int [L, L or more]`.

    Both depend on the confusion alone, and resampling images is a multinomial draw over its cells:
    the same bootstrap, without touching a row.
    """
    cells, (labels, width) = np.flatnonzero(table), table.shape
    (row, column), counts, total = np.divmod(cells, width), table.ravel()[cells], int(table.sum())
    drawn = np.random.default_rng(0).multinomial(total, counts / total, RESAMPLES)
    counts, right = np.vstack([counts, drawn]).T, row == column

    hits, answered, support = outcomes = np.zeros((3, width, 1 + RESAMPLES), np.int64)
    hits[row[right]] = counts[right]
    np.add.at(answered, column, counts)
    np.add.at(support, row, counts)
    hits, answered, support = outcomes.transpose(0, 2, 1)[..., :labels].copy()

    _, recall, f1 = metrics.precision_recall_f1(hits, answered, support)
    return {"balanced_accuracy": over_classes(recall, support), "macro_f1": over_classes(f1, support)}
