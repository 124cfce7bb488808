"""Accuracy and other scores of answers, and their 95 % intervals. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # the calibration error's bins are as many as in Guo et al. 2017
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
RESAMPLES = 1000
# The bootstrap of a mean is its normal interval long before this many rows.
MANY_ROWS = 20_000
# Probabilities are clipped here, or one image could make a log-loss infinite; scikit-learn clips there too.
SMALLEST = float(np.finfo(np.float64).eps)
SCORES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "top5_accuracy": "Top-5 accuracy",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "Micro F1",
    "macro_f1": "Macro F1",
    "log_loss": "Log-loss",
}
"""The numbers of an evaluation that come first, on a page and on a model card."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, `right` of `count` (E. B. Wilson, 1927).

    Unlike `p +- 1.96 s`, it stays inside [0, 1] and has a width at 0 and 1.
    """
    if count == 0:
        return 0.0, 1.0
    p, z2 = right / count, Z95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * np.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row's cross-entropy, `float64 [N]`, in nats, clipped at 36; logits `[N, C]`, y `int [N]` in [0, C)."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    picked = z[np.arange(len(y)), y]
    return np.asarray(np.minimum(np.log(np.exp(z).sum(axis=1)) - picked, -np.log(SMALLEST)))


def binary_losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row's and label's cross-entropy, `float64 [N, C]`, in nats, 36 at most; logits and targets `[N, C]`."""
    z = np.asarray(logits, np.float64)
    return np.asarray(np.minimum(np.logaddexp(0.0, z) - z * y, -np.log(SMALLEST)))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """The points of a reliability diagram: the mean `confidence`, the `accuracy` and the `count` of each of 15
    equal bins of confidence that is not empty. confidence: `[N]` in [0, 1]; right: `bool [N]`.
    """
    index = np.minimum((np.asarray(confidence, np.float64) * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    sure = np.bincount(index, weights=confidence, minlength=BINS)
    hits = np.bincount(index, weights=right, minlength=BINS)
    return [
        {"confidence": float(s / n), "accuracy": float(h / n), "count": int(n)}
        for n, s, h in zip(count, sure, hits, strict=True)
        if n
    ]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: the mean distance of accuracy from confidence over 15
    equal bins, weighted by their counts (Guo et al. 2017). 0 for no rows.
    """
    bins = reliability(confidence, right)
    return sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / max(1, len(confidence))


def precision_recall_f1(
    hits: np.ndarray, answered: np.ndarray, support: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per class, `float64` of the arguments' shape, 0 where undefined. hits: right answers; answered: all answers;
    support: images.
    """
    precision, recall = hits / np.maximum(answered, 1), hits / np.maximum(support, 1)
    return precision, recall, 2 * hits / np.maximum(answered + support, 1)


def average_precision(scores: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall steps, as scikit-learn's `average_precision_score`, `float64 [B]`.

    scores `[N]`; y `0/1 [N]`; weights `[B, N]`, how often each row counts. NaN where no positive row counts.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(y) - 1)  # ties count together
    hits = np.cumsum(weights[:, order] * y[order], axis=1)[:, last]
    seen = np.cumsum(weights[:, order], axis=1)[:, last]

    total = np.where(hits[:, -1] > 0, hits[:, -1], np.nan)
    areas = hits / np.maximum(seen, 1e-300) * np.diff(hits, axis=1, prepend=0.0)
    return np.asarray(areas.sum(axis=1) / total)


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
    low, high = wilson(int(right.sum()), len(right))
    return Estimate(float(right.mean()), low, high, "wilson")


def bootstrapped(value: float, drawn: np.ndarray) -> Estimate:
    """A number with the middle 95 % of its resamples `[R]`."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(value, float(low), float(high), "bootstrap")


def average(found: np.ndarray, sizes: np.ndarray) -> Estimate:
    """An average over classes. found: `[1 + R]`, the average itself, then its resamples; sizes: `[C]`, images.

    Where all answers are right, they are right in every resample, and the bootstrap would claim certainty. The
    lower limit is then the least average recall at which this still happens once in 40 times: 1 - the largest
    mean of error rates e with sum(n log(1 - e)) >= log(1/40), found by its Lagrange multiplier. For one class it
    is Clopper and Pearson's limit; for F1 it is about the same. Where all are wrong, the upper limit mirrors it.
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
    """The average over classes of their scores `[1 + R, C]`, those of the data itself in the first row.

    support: images of each class, `[1 + R, C]`; a row's average leaves out classes without images in it.
    """
    there = support.any(axis=1)
    return average(np.nanmean(np.where(support > 0, found, np.nan)[there], axis=1), support[0])


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of `float [N]`, by the bootstrap, or for many rows by the normal interval."""
    mean, count = float(values.mean()), len(values)
    if count > MANY_ROWS:
        half = Z95 * float(values.std()) / count**0.5
        return Estimate(mean, mean - half, mean + half, "normal")
    return bootstrapped(mean, resampled_means(values, RESAMPLES))


def resampled_means(values: np.ndarray, resamples: int) -> np.ndarray:
    """The means of seeded bootstrap resamples of `float [N]`, `float64 [resamples]`."""
    rng, count = np.random.default_rng(0), len(values)
    share = max(1, 2_000_000 // count)  # resamples at a time, so that 16 MB of indices suffice
    return np.concatenate(
        [
            values[rng.integers(0, count, (min(share, resamples - done), count))].mean(axis=1)
            for done in range(0, resamples, share)
        ]
    )


def class_averages(table: np.ndarray) -> dict[str, Estimate]:
    """Balanced accuracy and macro-F1 over the classes that have images, of a confusion matrix
    `int [L, L or more]`.

    Both depend on the matrix alone, and resampling images is a multinomial draw over its cells: the same
    bootstrap, without touching a row.
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

    _, recall, f1 = precision_recall_f1(hits, answered, support)
    return {"balanced_accuracy": over_classes(recall, support), "macro_f1": over_classes(f1, support)}
