"""Accuracy and other scores of answers, and their 95 % intervals. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15  # the calibration error's bins are as many as in Guo et al. 2017
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
# Probabilities are clipped here, or one image could make a log-loss infinite; scikit-learn clips there too.
SMALLEST = float(np.finfo(np.float64).eps)
LARGEST = float(-np.log(SMALLEST))  # an image's log-loss
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


def wilson(right: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, `right` of `count` (E. B. Wilson, 1927).

    Unlike `p +- 1.96 s`, it stays inside [0, 1] and has a width at 0 and 1. It holds `right / count` to the last bit.
    """
    if count == 0:
        return 0.0, 1.0
    p, z2 = right / count, Z95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * np.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return max(0.0, min(p, float(middle - half))), min(1.0, max(p, float(middle + half)))


def losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row's cross-entropy, `float64 [N]`, in nats, clipped at 36; logits `[N, C]`, y `int [N]` in [0, C)."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    picked = z[np.arange(len(y)), y]
    return np.asarray(np.minimum(np.log(np.exp(z).sum(axis=1)) - picked, LARGEST))


def binary_losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row's and label's cross-entropy, `float64 [N, C]`, in nats, 36 at most; logits and targets `[N, C]`."""
    z = np.asarray(logits, np.float64)
    return np.asarray(np.minimum(np.logaddexp(0.0, z) - z * y, LARGEST))


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


def average_precision(scores: np.ndarray, y: np.ndarray, typical: float = 0.0) -> tuple[float, np.ndarray, float]:
    """Area under the precision-recall steps, as scikit-learn's `average_precision_score`; what each row adds to it,
    `float64 [N]`; and how far it is too high on average.

    scores `[N]`; y `0/1 [N]`, not all 0; typical: the area of the average label, which counts as one more positive row.
    The area of few rows is too high: each positive row counts in its own precision, and 1 / seen is convex.
    """
    values, place = np.unique(-np.asarray(scores), return_inverse=True)  # ties count together
    found = np.bincount(place, weights=y, minlength=len(values))
    hits, seen = found.cumsum(), np.bincount(place).cumsum()
    precision, total = hits / seen, hits[-1]
    area = float((precision * found).sum() / total)

    # a row also changes the precision of all positive rows at or below it
    raised, lowered = (each[::-1].cumsum()[::-1] for each in (found / seen, found * precision / seen))
    others = area + (typical - precision) / total
    added = (y * (precision - others + raised)[place] - lowered[place]) / total
    likely = (hits + typical) / (seen + 1)
    excess = ((1 - likely) * (1 - hits / (total + 1) + likely) * found / seen).sum() / total
    return area, np.asarray(added), float(excess)


@dataclass(frozen=True)
class Estimate:
    """One number in a report, with its 95 % interval."""

    value: float
    low: float
    high: float
    method: str
    """`wilson` (proportions), `effective` (averages over classes: Wilson's for an effective number of images) or
    `student` (means)."""

    def __str__(self) -> str:
        return f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def proportion(right: np.ndarray) -> Estimate:
    """The share of True in `bool [N]`, with Wilson's interval."""
    low, high = wilson(int(right.sum()), len(right))
    return Estimate(float(right.mean()), low, high, "wilson")


def average(value: float, added: np.ndarray, counts: np.ndarray | int, worth: float, bias: float = 0.0) -> Estimate:
    """An average in [0, 1] with Wilson's interval of as many images as give a proportion its variance: the effective
    sample size of surveys (Kott and Carr 1997; Franco et al. 2019).

    added: what images add to the value; the variance is the sum of `counts * added ** 2` (the delta method). worth: the
    effective images where all answers are right or all wrong, and the variance is 0. bias: the value less the truth, on
    average; the interval then holds Wilson's interval of `value - bias`, too.
    """
    variance, limits = float((counts * added**2).sum()), [value]
    for p in (value, min(1.0, max(0.0, value - bias))):
        images = p * (1 - p) / variance if 0 < p < 1 and variance > 0 else worth
        limits += wilson(p * images, images)
    return Estimate(value, min(limits), max(limits), "effective")


def one_answer(hits: np.ndarray, size: np.ndarray, weight: int) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean of scores `weight * hits / size` `[L]`, what a right answer of each label adds to it, and what a wrong
    one takes from it. Recall has weight 1 and the label's images; F1 has weight 2 and its answers and images.

    An answer is compared with the score of the label's other images and one of the average label. So it is compared
    with something it had no part in, even where the label has one image; surveys centre strata of one unit like this.
    """
    mean = float((weight * hits / size).mean())
    right = 1 - weight * (hits - 1 + mean) / size
    wrong = weight * (hits + mean) / (size - 1 + weight)
    return mean, weight * right / size / len(hits), wrong / size / len(hits)


def f1_bias(hits: np.ndarray, size: np.ndarray, mean: float) -> float:
    """How far the mean F1 is from that of many images, on average, at most: answers are random, and 1 / size is convex.
    Each label has one more image, of the average F1. hits, size: as for `one_answer`.
    """
    f1 = 2 * (hits + mean) / (size + 2)
    return -float((f1 * (1 - f1) / (size + 2)).mean())


def effective(support: np.ndarray) -> float:
    """The images whose proportion varies as the mean of proportions of `support [L]` images each; 0 for no label."""
    return float(len(support) ** 2 / np.sum(1 / support)) if len(support) else 0.0


def student(freedom: int) -> float:
    """The quantile of a two-sided 95 % interval of Student's t (Wallace 1959); 4 % too large for 2 degrees, less for
    more.
    """
    normal = Z95 * (8 * freedom + 3) / (8 * freedom + 1)
    return float((freedom * np.expm1(normal**2 / freedom)) ** 0.5)


def mean_of(values: np.ndarray, least: float = 0.0, most: float = LARGEST) -> Estimate:
    """The mean of `float [N]` in [least, most], with Student's interval, whose longer tail reaches further by Johnson's
    correction for skewness (1978). From one row it is [least, most].
    """
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Estimate(mean, least, most, "student")
    off = values - mean
    half = student(count - 1) * float(values.std(ddof=1)) / count**0.5
    skewed = (1 + 2 * Z95**2) * float((off**3).sum() / max((off**2).sum(), 1e-300)) / (6 * count)
    low, high = mean - half + min(0.0, skewed), mean + half + max(0.0, skewed)
    return Estimate(mean, min(mean, max(least, low)), max(mean, min(most, high)), "student")


def class_averages(table: np.ndarray) -> dict[str, Estimate]:
    """Balanced accuracy and macro-F1 over the classes that have images, of a confusion matrix
    `int [L, L or more]`.
    """
    row, column = np.nonzero(table)
    counts, right, support = table[row, column], row == column, table.sum(axis=1)
    there, worth = support > 0, effective(support[support > 0])
    hits, answered = np.diagonal(table)[there], table.sum(axis=0)[: len(table)][there]
    added, taken = np.zeros((2, max(table.shape)))  # of classes without images and other answers: nothing
    places = np.flatnonzero(there)

    recall, added[places], taken[places] = one_answer(hits, support[there], 1)
    balanced = average(recall, np.where(right, added[row], -taken[row]), counts, worth)
    size = answered + support[there]
    f1, added[places], taken[places] = one_answer(hits, size, 2)
    moved = np.where(right, added[row], -taken[row] - taken[column])
    return {"balanced_accuracy": balanced, "macro_f1": average(f1, moved, counts, worth, f1_bias(hits, size, f1))}


def label_averages(
    logits: np.ndarray, truth: np.ndarray, said: np.ndarray
) -> tuple[dict[str, Estimate], list[float | None]]:
    """Mean average precision and macro-F1 over the labels that have images, and micro-F1, of `[N, L]` each, the last
    two bool; and each label's average precision, None without images.
    """
    scores, support, (images, size) = {}, truth.sum(axis=0), truth.shape
    there = np.flatnonzero(support)
    worth = min(images, effective(support[there]))  # labels of one image may go together
    areas = [average_precision(logits[:, i], truth[:, i])[0] for i in there]
    if len(there):
        mean = float(np.mean(areas))
        added, bias = np.zeros(images), 0.0
        for i in there:
            _, moved, excess = average_precision(logits[:, i], truth[:, i], mean)
            added, bias = added + moved / len(there), bias + excess / len(there)
        scores["mean_average_precision"] = average(mean, added, 1, worth, bias)

    right, wrong = truth & said, truth ^ said
    hits, sizes = right.sum(axis=0), support + said.sum(axis=0)
    if len(there):
        f1, gained, lost = one_answer(hits[there], sizes[there], 2)
        moved, bias = right[:, there] @ gained - wrong[:, there] @ lost, f1_bias(hits[there], sizes[there], f1)
        scores["macro_f1"] = average(f1, moved, 1, worth, bias)
    f1, gained, lost = one_answer(hits.sum(keepdims=True), np.maximum(1, sizes.sum(keepdims=True)), 2)
    moved = gained * right.sum(axis=1) - lost * wrong.sum(axis=1)
    scores["micro_f1"] = average(f1, moved, 1, int(truth.any(axis=1).sum()))
    found = dict(zip(there.tolist(), areas, strict=True))
    return scores, [found.get(i) for i in range(size)]
