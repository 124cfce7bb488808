"""The numbers that say how good answers are. numpy only: heads are calibrated by them where nothing slow may load."""

from __future__ import annotations

import numpy as np

BINS = 15  # of the calibration error, as in Guo et al. 2017
Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval
# Below this a log-loss would say infinity for one image; scikit-learn clips float64 at its epsilon too.
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
    """Each row's cross-entropy, `float64 [N]`, in nats; logits `[N, C]`, y `int [N]` in [0, C)."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    picked = z[np.arange(len(y)), y]
    return np.asarray(np.minimum(np.log(np.exp(z).sum(axis=1)) - picked, -np.log(SMALLEST)))


def binary_losses(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each row's and label's cross-entropy, `float64 [N, C]`, in nats; logits and 0/1 targets `[N, C]`."""
    z = np.asarray(logits, np.float64)
    return np.asarray(np.minimum(np.logaddexp(0.0, z) - z * y, -np.log(SMALLEST)))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """What a reliability diagram shows: for each non-empty of 15 equal bins of confidence, its mean
    `confidence`, its `accuracy` and its `count`. confidence: `[N]` in [0, 1]; right: `bool [N]`.
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
    """Per class, `float64` of the arguments' shape, 0 where undefined: of `answered` answers and `support` images
    of a class, `hits` are the same.
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
