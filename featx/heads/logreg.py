"""Owns multinomial logistic regression: standardised features, its strength chosen by cross-validation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from featx.devices import choose_device
from featx.errors import HeadError
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.design import Design, single_thread
from featx.solvers.examples import Examples
from featx.solvers.lbfgs import Path, Solution, minimise
from featx.solvers.training import Task

LEARNS = STREAMS = True

# scikit-learn's C, from all prior to almost none; the grid of DINOv3's linear evaluation
STRENGTHS = tuple(float(s) for s in np.logspace(-6, 5, 45))
# Where nothing can be cross-validated, a middle of what is chosen where it can.
UNMEASURED = 0.01
# Of the objective: what the optimum may be above scikit-learn's, and what is asked of the last solve.
GAP, ASKED = 1e-4, 1e-7
# Multiplications of one pass from which on a GPU is asked for by itself: importing torch takes seconds.
GPU_WORTH = 1 << 28


def fit(
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    class_weight: str | None = None,
    calibrate: bool = False,
    threshold: float | None = None,
    reject: float | None = None,
    solver: str = "featx",
) -> Fitted:
    """Minimise `sum of cross-entropies + ||W||^2 / (2 C)`, scikit-learn's objective, bias not penalised.

    A memory map, or anything else with row slices, is read in blocks and never held. Several labels per image
    have one sigmoid each, and one strength for all.
    strengths: scikit-learn's C, the inverse of the regularisation. The one with the least log-loss over
    `folds` stratified folds of these rows is taken; scored rows count, also for calibration and rejection.
    With one strength there is no cross-validation, unless calibration or a threshold needs it. Columns are
    standardised once, over all rows, labels unseen.
    class_weight: None or `balanced`. calibrate: fold in the temperature that held-out rows ask for.
    threshold, reject: see `_training.finish`. solver: `featx`, or `scikit-learn`, which fits the chosen
    strength with its lbfgs; it is also the fall-back where featx's does not converge, and a note says so.
    device: a GPU, where there is one, makes the passes of a fit that is large enough to gain by it; `cuda`
    asks for it, `cpu` forgoes it.
    Raises `HeadError`.
    """
    started = time.perf_counter()
    if solver not in ("featx", "scikit-learn"):
        raise HeadError(f"solver is featx or scikit-learn, not {solver!r}")
    grid = np.unique(np.asarray(strengths, np.float64))
    if not len(grid) or not grid[0] > 0 or not np.isfinite(grid).all():
        raise HeadError(f"strengths are positive numbers (scikit-learn's C), not {list(strengths)}")
    with single_thread():  # passes over many rows bring their own threads
        task = _training.check(examples.X, examples.y, class_names)
        weights = _training.class_weights(task, class_weight)
        fold, notes = _training.folds(task.y, folds, groups=examples.groups, seed=seed)
        counted = _training.counted(fold >= 0, examples.scored)
        info: dict[str, Any] = {"notes": [*task.notes, *notes]}
        design = Design(task, fold, weights, scored=examples.scored, torch_device=_gpu(task, device))
        chosen, held_out, start = float(grid[0]), None, None
        if not counted.any():
            if len(grid) > 1:
                chosen = UNMEASURED
                info["notes"].append(f"strength {chosen} was taken without measuring")
        elif len(grid) > 1 or calibrate or reject is not None or threshold is not None:
            # losses to four digits are enough to choose by
            path = Path(design, grid, np.arange(fold.max() + 1), tolerance=GAP)
            best = path.search()
            chosen, start = float(grid[best]), path.solved[best].A.mean(axis=1, keepdims=True)
            held_out = _held_out(design, path.solved[best], fold, counted)
            info["cross_validation"] = _measured(path, counted, weights, held_out, task, fold)
            if len(grid) > 1 and best in (0, len(grid) - 1):
                info["notes"].append(f"the best strength, {chosen:g}, is at the end of the grid")
            loose = [i for i, found in path.solved.items() if not found.converged.all()]
            if loose:
                listed = ", ".join(f"{grid[i]:.3g}" for i in sorted(loose))
                info["notes"].append(f"not converged in cross-validation at strengths {listed}")
        if start is None:
            start = np.zeros((design.columns, 1, design.size))
        weight, bias = _last(task, design, chosen, weights, start, solver, info)
        head = task.head(weight, bias)
        head = _training.finish(
            head,
            task,
            info,
            held_out,
            np.flatnonzero(counted),
            calibrate=calibrate,
            threshold=threshold,
            reject=reject,
        )
    info |= {"strength": chosen, "seconds": time.perf_counter() - started}
    return Fitted(head, info)


def _gpu(task: Task, device: str) -> str:
    """The GPU to work on, or nothing."""
    small = task.X.shape[0] * task.X.shape[1] * len(task.class_names) < GPU_WORTH
    place = "cpu" if device == "auto" and small else choose_device(device)
    return "" if place == "cpu" else place


def _held_out(design: Design, found: Solution, fold: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Logits `[M, C]` of the counted rows, each by the fold that had not seen it."""
    place = np.cumsum(counted) - 1
    parts = []
    for k in range(fold.max() + 1):
        rows = np.flatnonzero(counted & (fold == k))
        parts.append((place[rows], design.logits(found.A[:, k], rows)))
    out = np.empty((int(counted.sum()), parts[0][1].shape[1]), np.float32)
    for rows, logits in parts:
        out[rows] = logits
    return out


def _measured(
    path: Path,
    counted: np.ndarray,
    weights: np.ndarray | None,
    held_out: np.ndarray,
    task: Task,
    fold: np.ndarray,
) -> dict[str, Any]:
    total = float(counted.sum() if weights is None else weights[counted].sum())
    solved = sorted(path.solved)
    y = task.y[counted]
    right = ((held_out >= 0) == (y > 0)).all(axis=1) if task.several else held_out.argmax(axis=1) == y
    return {
        "folds": int(fold.max()) + 1,
        "strengths": [float(path.strengths[i]) for i in solved],
        "log_loss": [path.held(i) / total for i in solved],
        "best_log_loss": path.held(path.best) / total,
        "accuracy": float(right.mean()),
        "passes": path.passes,
    }


def _last(
    task: Task,
    design: Design,
    strength: float,
    weights: np.ndarray | None,
    start: np.ndarray,
    solver: str,
    info: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """The optimum over all rows as `[C, D]` and `[C]`, in double precision, and in `info` how near it is."""
    if solver == "featx":
        # single precision goes most of the way at half the cost
        near = minimise(design, np.array([strength]), np.array([-1]), start.astype(np.float32), tolerance=1e-5)
        found = minimise(design, np.array([strength]), np.array([-1]), near.A.astype(np.float64), tolerance=ASKED)
        gap = float(found.gap[0])
        info |= {
            "solver": "featx",
            "converged": gap <= GAP,
            "relative_gap": gap,
            "gap_bound": float(found.bound[0]),
            "passes": near.passes + found.passes,
        }
        if gap <= GAP or design.streamed:
            if gap > GAP:
                info["notes"].append(f"the solver stopped at a relative gap of {gap:.1e}: not converged")
            return design.features_space(found.A[:, 0])
        info["notes"].append(f"featx's solver stopped at a relative gap of {gap:.1e}; scikit-learn's was used")
    weight, bias, converged = reference(task, strength, weights)
    info |= {"solver": "scikit-learn", "converged": converged}
    if not converged:
        info["notes"].append("scikit-learn's lbfgs did not converge")
    return weight, bias


def reference(
    task: Task, strength: float, weights: np.ndarray | None = None, *, tol: float = 1e-6
) -> tuple[np.ndarray, np.ndarray, bool]:
    """scikit-learn's optimum as `[C, D]`, `[C]`, and whether it converged; a binary one gets two rows."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    Z = task.standard().astype(np.float64)
    classes = len(task.class_names)
    weight, bias = np.zeros((classes, Z.shape[1])), np.zeros(classes)
    converged = True
    for c, target in enumerate(task.y.T if task.several else [task.y]):
        model = LogisticRegression(C=strength, max_iter=5000, tol=tol)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(Z, target, weights)
        converged &= not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        if task.several:
            weight[c], bias[c] = model.coef_[0], model.intercept_[0]
        elif classes == 2:
            # softmax of (-z/2, z/2) is the sigmoid of z
            weight[:], bias[:] = np.outer([-0.5, 0.5], model.coef_[0]), [-0.5, 0.5] * model.intercept_
        else:
            weight[:], bias[:] = model.coef_, model.intercept_
    return weight, bias, converged
