"""The nearest class mean, for few images per class: nothing to choose, nothing to overfit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.examples import Examples
from featx.solvers.finishing import finish

LEARNS = STREAMS = True


def fit(
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    folds: int = 5,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """`logit_c = -|x - mean_c|^2 / (2 t)` on standardised columns, which is affine up to a common term.

    The rows are read in blocks, twice. With several labels per image, the mean of each label's rows competes with the
    mean of all others. Answers do not depend on t; probabilities do: t has the least log-loss over held-out
    folds, drawn towards sqrt(D) while their rows are few; without folds it is sqrt(D).
    threshold, reject: see `featx.solvers.finishing.finish`. device: unused. Raises `HeadError`.
    """
    task, fold, counted = _training.prepared(examples, class_names, folds, seed)
    task, sums, counts = _training.summed(task, fold)
    info: dict[str, Any] = {"notes": task.notes}
    total, count, spread = sums.sum(axis=0), counts.sum(axis=0), float(np.sqrt(task.X.shape[1]))
    weight, bias = _affine(total, count, task.several)
    head, held_out = task.head(weight / spread, bias / spread), None

    if counted.any():
        maps = [_affine(total - s, count - c, task.several) for s, c in zip(sums[:-1], counts[:-1], strict=True)]
        logits = np.empty((len(fold), len(task.class_names)), np.float32)
        for rows, part in _training.blocks(task.X):
            Z = task.standardise(part)
            for k, (w, b) in enumerate(maps):
                mine = fold[rows] == k
                logits[rows][mine] = (Z[mine] @ w.T + b) / spread
        held_out = logits[counted]
    else:
        info["notes"].append("probabilities are not calibrated: no image could be held out")

    calibrate = held_out is not None
    head = finish(head, task, info, held_out, counted, calibrate=calibrate, threshold=threshold, reject=reject)
    return Fitted(head, info)


def _affine(sums: np.ndarray, counts: np.ndarray, several: bool) -> tuple[np.ndarray, np.ndarray]:
    means = sums / np.where(counts > 0, counts, 1)[:, None]
    weight, bias = means, -0.5 * (means**2).sum(axis=1)
    if several:
        (here, absent), (here_bias, absent_bias) = np.split(weight, 2), np.split(bias, 2)
        return here - absent, here_bias - absent_bias
    return weight, bias
