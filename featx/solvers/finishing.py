"""What is measured on held-out rows and folded into a head: a calibration temperature, a reject threshold."""

from __future__ import annotations

from typing import Any

import numpy as np

from featx import metrics
from featx.errors import HeadError
from featx.head import Head
from featx.solvers.training import Task

LEAST_REJECT = 0.5
"""Nobody asks for answers that are wrong more often than right: a smaller `reject` means something else."""


def finish(
    head: Head,
    task: Task,
    info: dict[str, Any],
    held_out: np.ndarray | None,
    counted: np.ndarray,
    *,
    measured_on: str = "held-out folds of the training images",
    calibrate: bool,
    threshold: float | None,
    reject: float | None,
) -> Head:
    """Apply what is measured on held-out rows: a calibration temperature, then a reject threshold.

    held_out: logits `[M, C]` of the rows `counted`, `bool [N]`, each by the fold that left it out; None without
    such rows. threshold: the probability below which an answer is rejected; reject: an accuracy in [0.5, 1), which
    takes the lowest threshold that reaches it on held-out rows. Writes its figures to `info`. Raises `HeadError`
    for both at once, numbers out of range, `reject` with several labels per image, and held-out rows that are missing.
    """
    _check_reject(reject, threshold, task.several)
    if not (calibrate or threshold is not None or reject is not None):
        return head
    if held_out is None:
        if calibrate or reject is not None:
            raise HeadError("calibration and reject need held-out folds; there are too few training images")
        return _with(head, 1.0, threshold)

    y, temperature = task.y[counted], 1.0
    weights = np.ones(len(y)) if task.weights is None else task.weights[counted]
    if calibrate:
        temperature = _temperature(held_out, y, weights)
        info["calibration"] = {
            "temperature": temperature,
            "ece_before": _ece(head, held_out, y),
            "ece_after": _ece(head, held_out / temperature, y),
            "measured_on": measured_on,
        }

    if not task.several and (threshold is not None or reject is not None):
        probabilities = head.probabilities(held_out / temperature)
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
        if reject is not None:
            threshold = _threshold(confidence, right, weights, reject)
        answered = confidence >= threshold
        info["rejection"] = {
            "threshold": threshold,
            "coverage": float(np.average(answered, weights=weights)),
            "accuracy": float(np.average(right[answered], weights=weights[answered])) if answered.any() else 0.0,
            "accuracy_without": float(np.average(right, weights=weights)),
            "measured_on": measured_on,
        }
    return _with(head, temperature, threshold)


def _check_reject(reject: float | None, threshold: float | None, several: bool) -> None:
    if reject is None:
        return
    if not LEAST_REJECT <= reject < 1:
        meant = f"reject={reject / 100:g}" if 50 <= reject < 100 else "reject=0.95"
        raise HeadError(
            f"reject is the accuracy that answers must reach, at least {LEAST_REJECT} and below 1, not {reject}: with "
            f"{meant} the images of whose class the head is not sure enough are rejected, as many as that takes"
        )
    if threshold is not None:
        raise HeadError("give threshold (a probability) or reject (an accuracy to reach), not both")
    if several:
        raise HeadError("reject needs one label per image")


def _with(head: Head, temperature: float, threshold: float | None) -> Head:
    if threshold is not None and not 0 <= threshold <= 1:
        raise HeadError(f"a threshold is a probability in [0, 1], not {threshold}")
    weight, bias = head.weight / np.float32(temperature), head.bias / np.float32(temperature)
    return Head(weight, bias, head.class_names, head.activation, threshold)


def _ece(head: Head, logits: np.ndarray, y: np.ndarray) -> float:
    p = head.probabilities(logits)
    if y.ndim == 2:
        said = head.answers(p)
        return metrics.calibration_error(np.where(said, p, 1 - p).ravel(), (said == (y > 0)).ravel())
    return metrics.calibration_error(p.max(axis=1), p.argmax(axis=1) == y)


def _temperature(logits: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """The most probable temperature in [1/1000, 1000]: least log-loss, summed over weighted rows, plus `(log T)^2 / 2`.

    That term is a standard normal prior on log T. Few rows are often all answered right; their log-loss falls
    for ever as T goes to 0, and the first mistake on a new image then costs all that was gained. A weak prior
    is the remedy of Gelman, Jakulin, Pittau and Su (2008, Annals of Applied Statistics 2, 1360-1383) for
    logistic regression on linearly separable rows. At T = 1/5 or 5 it weighs as much as two rows answered blindly, so
    it hardly affects hundreds of images with some mistakes among them. T = 1 is a natural centre: probabilities
    of a logistic fit, ridge's scores of -1 and 1, distances over sqrt(D). Platt's smoothed targets (1999), the
    other usual remedy, give new rows a higher log-loss, except for logistic fits to fewer than a hundred images.

    Newton's method over `-log T`; a step out of the bracket is replaced by a bisection.
    """
    z = np.asarray(logits, np.float64)
    low, high, u = -np.log(1e3), np.log(1e3), 0.0
    for _ in range(60):
        scale = np.exp(u)
        if y.ndim == 2:
            p, pull = 0.5 * (1 + np.tanh(0.5 * scale * z)), z * weights[:, None]
            slope, curve = (pull * (p - y)).sum(), (pull * z * p * (1 - p)).sum()
        else:
            p = np.exp(scale * (z - z.max(axis=1, keepdims=True)))
            p /= p.sum(axis=1, keepdims=True)
            mean = np.einsum("nc,nc->n", p, z)
            slope = (weights * (mean - z[np.arange(len(y)), y])).sum()
            curve = np.einsum("nc,nc,nc->", p * weights[:, None], z, z) - (weights * mean**2).sum()
        # from derivatives over 1 / T to those over its logarithm, and the prior's
        slope, curve = scale * slope + u, scale**2 * curve + scale * slope + 1
        low, high = (u, high) if slope < 0 else (low, u)
        step = u - slope / curve if curve > 0 else np.inf
        if abs(step - u) < 1e-6:
            break
        u = float(step) if low < step < high else float(low + high) / 2
    return float(np.exp(-u))


def _threshold(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray, accuracy: float) -> float:
    """The lowest confidence from which on the answers reach `accuracy`; HeadError where none does."""
    order = np.argsort(-confidence, kind="stable")
    reached = np.cumsum((weights * right)[order]) / np.cumsum(weights[order])
    last = np.append(np.diff(confidence[order]) != 0, True)  # equal confidences are answered together
    good = np.flatnonzero((reached >= accuracy) & last)
    if not len(good):
        raise HeadError(f"no threshold reaches an accuracy of {accuracy:.3g} on held-out images")
    return float(confidence[order[good[-1]]])
