"""Owns multinomial logistic regression: standardised features, its strength chosen by cross-validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from featx.errors import HeadError
from featx.heads import Fitted, _training
from featx.heads._training import Rows, Task

# scikit-learn's C, from all prior to almost none; the grid of DINOv3's linear evaluation
STRENGTHS = tuple(np.logspace(-6, 5, 45))
# Where nothing can be cross-validated: N * C = 1 for standardised features is a strong prior.
UNMEASURED = 1.0


def fit(
    X: Rows,
    y: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    class_weight: str | None = None,
    calibrate: bool = False,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """Minimise `sum of cross-entropies + ||W||^2 / (2 C)`, scikit-learn's objective, bias not penalised.

    X: float `[N, D]`; y: `int [N]`, or 0/1 `[N, C]` for several labels per image (one sigmoid each).
    strengths: scikit-learn's C, the inverse of the regularisation; the one with the least log-loss over
    `folds` stratified folds of these rows is taken, and equal `groups` (`int [N]`) share a fold. One
    strength: no cross-validation, unless calibration or reject need it. Columns are standardised once, over
    all rows. Raises `HeadError`.
    """
    started = time.perf_counter()
    task = _training.check(X, y, class_names)
    grid = np.unique(np.asarray(strengths, np.float64))
    if not len(grid) or grid[0] <= 0 or not np.isfinite(grid).all():
        raise HeadError(f"strengths are positive numbers (scikit-learn's C), not {list(strengths)}")
    weights = _training.class_weights(task, class_weight)
    fold, notes = _training.folds(task.y, folds, groups=groups, seed=seed)
    held = np.flatnonzero(fold >= 0)
    Z = task.standard()
    info: dict[str, Any] = {"notes": [*task.notes, *notes]}
    chosen, held_out = float(grid[0]), None
    if not len(held) and len(grid) > 1:
        chosen = UNMEASURED
        info["notes"].append(f"strength {chosen} was taken without measuring")
    elif len(held) and (len(grid) > 1 or calibrate or reject is not None or threshold is not None):
        logits, losses = _cross_validate(task, Z, grid, fold, weights)
        best = int(np.argmin(losses))
        chosen, held_out = float(grid[best]), logits[best]
        info["cross_validation"] = {
            "strengths": grid.tolist(),
            "log_loss": losses.tolist(),
            "folds": int(fold.max()) + 1,
        }
        if len(grid) > 1 and best in (0, len(grid) - 1):
            info["notes"].append(f"the best strength, {chosen:g}, is at the end of the grid")
    weight, bias, converged = _sklearn(task, Z, np.arange(len(Z)), chosen, weights)
    if not converged:
        info["notes"].append("scikit-learn's lbfgs did not converge")
    head = task.head(weight, bias)
    head = _training.finish(head, task, info, held_out, held, calibrate=calibrate, threshold=threshold, reject=reject)
    info |= {"strength": chosen, "converged": converged, "seconds": time.perf_counter() - started}
    return Fitted(head, info)


def _cross_validate(
    task: Task, Z: np.ndarray, grid: np.ndarray, fold: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out logits `[S, M, C]` and mean log-losses `[S]`."""
    from featx import metrics

    held = np.flatnonzero(fold >= 0)
    logits = np.zeros((len(grid), len(Z), len(task.class_names)))
    for k in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        for s, strength in enumerate(grid):
            weight, bias, _ = _sklearn(task, Z, train, strength, weights)
            logits[s, test] = Z[test] @ weight.T + bias
    each = metrics.binary_losses if task.several else metrics.losses
    return logits[:, held], np.array([each(part[held], task.y[held]).mean() for part in logits])


def _sklearn(
    task: Task, Z: np.ndarray, rows: np.ndarray, strength: float, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, bool]:
    """scikit-learn's optimum as `[C, D]`, `[C]`, and whether it converged; a binary one gets two rows."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = len(task.class_names)
    targets = [task.y[rows, c] for c in range(classes)] if task.several else [task.y[rows]]
    weight, bias = np.zeros((classes, Z.shape[1])), np.zeros(classes)
    sample_weight = None if weights is None else weights[rows]
    converged = True
    for c, target in enumerate(targets):
        model = LogisticRegression(C=strength, max_iter=5000, tol=1e-5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(np.asarray(Z[rows], np.float64), target, sample_weight)
        converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        if task.several:
            weight[c], bias[c] = model.coef_[0], model.intercept_[0]
        elif len(model.classes_) == 2 == classes:
            # softmax of (-z/2, z/2) is the sigmoid of z
            weight[:], bias[:] = np.outer([-0.5, 0.5], model.coef_[0]), [-0.5, 0.5] * model.intercept_
        else:
            weight[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
    return weight, bias, converged
