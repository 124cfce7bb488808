"""Multinomial logistic regression on standardised features; cross-validation chooses its regularisation strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from featx.devices import choose_device, single_thread
from featx.head import Fitted, right
from featx.solvers import training as _training
from featx.solvers.coarse import stratified
from featx.solvers.design import Design
from featx.solvers.examples import Examples
from featx.solvers.finishing import finish
from featx.solvers.moments import Asked
from featx.solvers.path import Path, climb, minimise
from featx.solvers.training import Task

LEARNS = STREAMS = True

# scikit-learn's C, from very strong regularisation to almost none; the grid of DINOv3's linear evaluation
STRENGTHS = tuple(float(s) for s in np.logspace(-6, 5, 45))
# The strength where nothing can be cross-validated: a typical choice of cross-validation.
UNMEASURED = 0.01
# Rows of the part that a large table is solved from.
PART = 1 << 16
# Relative gaps of the objective: the largest that counts as converged, and the aim of the last solve.
GAP, ASKED = 1e-4, 1e-7
# `auto` takes a GPU from this many multiplications per pass on: importing torch takes seconds.
GPU_WORTH = 1 << 28


def fit(
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 5,
    part: int = PART,
    class_weight: str | Mapping[str, float] | None = None,
    calibrate: bool = False,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """Minimise `sum of cross-entropies + ||W||^2 / (2 C)`, scikit-learn's objective, bias not penalised.

    A memory map, or anything else with row slices, is read in blocks and never held. Several labels per image
    have one sigmoid each, and one strength for all.
    strengths: scikit-learn's C, the inverse of the regularisation. The one with the least log-loss over
    `folds` stratified folds of these rows is taken; only scored rows count, also for calibration and rejection.
    With one strength there is no cross-validation, unless calibration or a threshold needs it. Columns are
    standardised once, over all rows, without their labels.
    part: a table of at least four times as many rows is solved from a stratified part of this size: what it says is
    only where to begin, and the same strength and the same optimum are found in fewer passes. 0: no part.
    class_weight: None, `balanced` or weights by class name. calibrate: fold in the temperature that
    is best on held-out rows.
    threshold, reject: see `featx.solvers.finishing.finish`.
    device: `auto` takes a GPU, where there is one, for a fit that is large enough to gain by it; `cuda`
    requires one, `cpu` takes none.
    Raises `HeadError`.
    """
    grid = _training.ascending(strengths, "strengths are positive numbers (scikit-learn's C)")
    with single_thread():  # passes over many rows bring their own threads
        task, fold, counted = _training.prepared(examples, class_names, folds, seed)
        measures = counted.any() and (len(grid) > 1 or calibrate or {reject, threshold} != {None})
        size = part if measures and _training.spanned(task.X) else 0  # a part shares the table's coordinates
        some = stratified(task.y, examples.groups, fold, size, task.X.shape[1], seed)
        task = _training.measured(task, Asked(gram=True, kept=some.rows if some else None))
        weights = _training.class_weights(task, class_weight)
        info: dict[str, Any] = {"notes": task.notes}
        design = Design(task, fold, weights, scored=examples.scored, torch_device=_gpu(task, device))

        chosen, held_out, start, near = float(grid[0]), None, None, None
        if len(grid) > 1 and not measures:
            chosen = UNMEASURED
            info["notes"].append(f"strength {chosen} was taken without measuring")
        if measures:
            path = Path(design, grid, np.arange(fold.max() + 1), tolerance=GAP)
            if some:
                near = some.design(design, task, fold, weights, examples.scored)
                info["coarse_start"] = path.begin(near)
            best = path.search()
            chosen, start = float(grid[best]), path.solved[best].A.mean(axis=1, keepdims=True)
            held_out = design.logits(path.solved[best].A, counted)
            info["cross_validation"] = _measured(path, counted, weights, held_out, task, fold)
            info["notes"] += _remarks(path)

        head = task.head(*_last(design, chosen, start, info, near))
        head = finish(head, task, info, held_out, counted, calibrate=calibrate, threshold=threshold, reject=reject)
    return Fitted(head, info | {"strength": chosen})


def _gpu(task: Task, device: str) -> str:
    """The GPU to work on, or an empty string."""
    small = task.X.shape[0] * task.X.shape[1] * len(task.class_names) < GPU_WORTH
    place = "cpu" if device == "auto" and small else choose_device(device)
    return "" if place == "cpu" else place


def _measured(
    path: Path, counted: np.ndarray, weights: np.ndarray | None, held_out: np.ndarray, task: Task, fold: np.ndarray
) -> dict[str, Any]:
    total = float(counted.sum() if weights is None else weights[counted].sum() / weights.mean())
    share = None if task.weights is None else task.weights[counted]
    solved = sorted(i for i, found in path.solved.items() if found.converged.all() or i == path.best)
    return {
        "folds": int(fold.max()) + 1,
        "strengths": [float(path.strengths[i]) for i in solved],
        "log_loss": [path.held(i) / total for i in solved],
        "best_log_loss": path.held(path.best) / total,
        "accuracy": float(np.average(right(held_out, task.y[counted]), weights=share)),
        "passes": path.passes,
    }


def _remarks(path: Path) -> list[str]:
    notes, last = [], len(path.strengths) - 1
    if last and path.best in (0, last):
        notes.append(f"the best strength, {path.strengths[path.best]:g}, is at the end of the grid")
    lost = sorted(i for i, found in path.solved.items() if not found.converged.all())
    if lost:
        listed = ", ".join(f"{path.strengths[i]:.3g}" for i in lost)
        gap = max(float(path.solved[i].gap.max()) for i in lost)
        notes.append(f"cross-validation: not solved, taken to be worse: strengths {listed} (relative gap {gap:.1e})")
    return notes


def _last(
    design: Design,
    strength: float,
    start: np.ndarray | None,
    info: dict[str, Any],
    part: Design | None = None,
    most: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """The optimum over all rows as `[C, D]` and `[C]`, in at most `most` steps; writes the gap to `info`."""
    whole = np.array([-1])  # no fold is left out
    if start is None:
        start = climb(design, strength, whole)
    before = design.passes
    found = minimise(design, np.array([strength]), whole, start, tolerance=ASKED, most=most, part=part)
    gap = float(found.gap[0])
    info |= {
        "solver": "featx",
        "converged": gap <= GAP,
        "relative_gap": gap,
        "gap_bound": float(found.bound[0]),
        "passes": design.passes - before,
    }
    if gap > GAP:
        info["notes"].append(f"the solver stopped at a relative gap of {gap:.1e}: not converged")
    return design.features_space(found.A[:, 0])
