"""Owns ridge regression on class targets: every penalty's exact leave-one-out from one eigendecomposition."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from featx.errors import HeadError
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.design import SCRATCH, Design, single_thread, spread
from featx.solvers.examples import Examples

LEARNS = STREAMS = True
# Per image, so that they mean the same whatever N: the penalty on ||W||^2 is N times these.
PENALTIES = tuple(float(p) for p in np.logspace(-6, 3, 37))
# Where nothing can be left out, a middle of what is chosen where it can.
UNMEASURED = 0.5
# Numbers in X up to which everything is done in double precision.
EXACT = 1 << 23


def fit(
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    penalties: Sequence[float] = PENALTIES,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """Minimise `|T - Z W^T - b|^2 + N p |W|^2`, T being +1 for an image's class and -1 for others.

    Z: the rows, standardised, read in blocks. The penalty p with the least squared error of rows left out is
    taken (every fourth is tried, then those around the best). That error is exact and
    takes no second fit: a left-out residual is `r / (1 - h)`, with h the row's own share of its fit (Allen's
    PRESS, 1974), and rows of one group are left out together, `(I - H_GG)^-1 r_G`. Rows that count are
    the scored ones whose class has another group to be learned from; without any,
    the penalty is `UNMEASURED`. The scores become logits by the temperature with the least log-loss on left-out
    scores, or as they are. threshold, reject: see `_training.finish`. seed, device: unused. Raises `HeadError`.
    """
    started = time.perf_counter()
    grid = np.unique(np.asarray(penalties, np.float64))
    if not len(grid) or not grid[0] > 0 or not np.isfinite(grid).all():
        raise HeadError(f"penalties are positive numbers, not {list(penalties)}")
    with single_thread():
        task = _training.check(examples.X, examples.y, class_names)
        able, notes = _training.measurable(task.y, examples.groups)
        counted = _training.counted(able, examples.scored)
        info: dict[str, Any] = {"notes": [*task.notes, *notes]}

        design = Design(task, np.full(task.X.shape[0], -1))
        targets = (2 * task.one_hot() - 1)[design.order]
        coefficients, centre = shared_product(design, targets)

        scores = None
        if counted.any():
            groups = None if examples.groups is None else np.asarray(examples.groups)[design.order]
            penalty = _choose(design, targets, grid, coefficients, centre, groups, counted[design.order], info)
            every = _left_out_scores(design, targets, penalty * design.count, coefficients, centre, groups)
            scores = every[np.argsort(design.order)][counted]
        else:
            penalty = float(grid[0]) if len(grid) == 1 else UNMEASURED
            if len(grid) > 1:
                info["notes"].append(f"penalty {UNMEASURED:g} was taken without measuring")
            info["notes"].append("probabilities are not calibrated: no image could be left out")

        A = np.concatenate([coefficients / (design.eigenvalues + penalty * design.count), centre[:, None]], 1)
        head = _training.finish(
            task.head(*design.affine(A)),
            task,
            info,
            scores,
            np.flatnonzero(counted),
            measured_on="training rows, each left out once",
            calibrate=scores is not None,
            threshold=threshold,
            reject=reject,
        )
    return Fitted(head, info | {"penalty": penalty, "seconds": time.perf_counter() - started})


def _choose(
    design: Design,
    targets: np.ndarray,
    grid: np.ndarray,
    coefficients: np.ndarray,
    centre: np.ndarray,
    groups: np.ndarray | None,
    counted: np.ndarray,
    info: dict[str, Any],
) -> float:
    """The penalty of `grid` with the least error of rows left out; `info` gets the errors of those tried."""
    errors: dict[int, float] = {}
    level = list(range(0, len(grid), 4))
    for stride in (2, 1, 0):  # every fourth penalty, then half-way around the best, twice
        level = [i for i in level if 0 <= i < len(grid) and i not in errors]
        if level:
            found = leave_out(design, targets, grid[level] * design.count, coefficients, centre, groups, counted)
            errors |= dict(zip(level, found.tolist(), strict=True))
        best = min(errors, key=lambda i: (errors[i], i))
        level = [best - stride, best + stride]

    info["leave_one_out"] = {
        "penalties": [float(grid[i]) for i in sorted(errors)],
        "mean_squared_error": [errors[i] for i in sorted(errors)],
    }
    if len(grid) > 1 and best in (0, len(grid) - 1):
        info["notes"].append(f"the best penalty, {grid[best]:g}, is at the end of the grid")
    return float(grid[best])


def _precision(design: Design) -> Any:
    return np.float64 if design.count * design.size < EXACT else np.float32


def shared_product(design: Design, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What all penalties share: `Z^T T` in the eigenbasis, `[C, rank]`, and the targets' means `[C]`.

    targets `[N, C]` in `design`'s order, whose rows are rotated here, once.
    """
    dtype, C = _precision(design), targets.shape[1]
    design.rotate(dtype)
    centre = targets.mean(axis=0, dtype=np.float64)
    T, width = (targets - centre).astype(dtype), design.rows.shape[1] - 1

    def product(rows: slice, into: np.ndarray) -> None:
        into += T[rows].T @ np.asarray(design.rows[rows], dtype)[:, :-1]

    step, flops = max(64, SCRATCH // width), float(design.count * width * C)
    shared = np.sum(spread(product, design.count, step, lambda: np.zeros((C, width)), flops), axis=0)
    return shared if design.rotation is None else shared @ design.rotation, centre


def leave_out(
    design: Design,
    targets: np.ndarray,
    penalties: np.ndarray,
    coefficients: np.ndarray,
    centre: np.ndarray,
    groups: np.ndarray | None = None,
    counted: np.ndarray | None = None,
) -> np.ndarray:
    """Mean squared left-out errors `float64 [S]` of every penalty, by `shared_product`'s answer.

    targets `[N, C]`, groups `int [N]` and the rows that count, `bool [N]`, in `design`'s order.
    """
    dtype = _precision(design)
    T = (targets - centre).astype(dtype)
    C, size, S = T.shape[1], design.size - 1, len(penalties)
    step, flops = max(64, SCRATCH // max(size, S * C)), float(design.count * size)
    inverse = 1 / (design.eigenvalues[:, None] + penalties)  # [rank, S]
    shrunk = inverse.astype(dtype)
    solve = (coefficients.T[:, None, :] * inverse[:, :, None]).reshape(size, S * C).astype(dtype)
    alone, blocks = _shared_groups(groups, design.count, size)
    counted = np.ones(design.count, bool) if counted is None else counted
    alone &= counted

    def left_out(rows: slice, into: np.ndarray) -> None:
        Q = design.rotated(rows, dtype)
        own = (Q * Q) @ shrunk + 1 / design.count
        residual = (Q @ solve).reshape(len(Q), S, C)
        np.subtract(T[rows][:, None, :], residual, out=residual)
        squares = np.einsum("nsc,nsc->ns", residual, residual)
        squares /= np.maximum(1 - own, 1e-9) ** 2
        into += squares[alone[rows]].sum(axis=0)

    errors = np.sum(spread(left_out, design.count, step, lambda: np.zeros(S), flops * (size + S * C)), axis=0)
    for members in blocks:
        Q = design.rotated(members.ravel(), np.float64).reshape(*members.shape, size)
        for s, penalty in enumerate(penalties):
            residual = _without(Q, T[members], coefficients, design.eigenvalues + penalty, design.count)
            errors[s] += (residual[counted[members]] ** 2).sum()
    return errors / (counted.sum() * C)


def _left_out_scores(
    design: Design,
    targets: np.ndarray,
    penalty: float,
    coefficients: np.ndarray,
    centre: np.ndarray,
    groups: np.ndarray | None,
) -> np.ndarray:
    """What each row is scored when it is left out, `float32 [N, C]`, in `design`'s order."""
    dtype = _precision(design)
    scores = np.empty(targets.shape, np.float32)
    _, blocks = _shared_groups(groups, design.count, design.size)
    values = design.eigenvalues + penalty
    solve, shrunk = (coefficients / values).T.astype(dtype), (1 / values).astype(dtype)

    def left_out(rows: slice, _: None) -> None:
        Q = design.rotated(rows, dtype)
        residual = targets[rows] - centre.astype(dtype) - Q @ solve
        own = (Q * Q) @ shrunk + 1 / design.count
        scores[rows] = targets[rows] - residual / np.maximum(1 - own, 1e-9)[:, None]

    step = max(64, SCRATCH // (design.size + targets.shape[1]))
    spread(left_out, design.count, step, lambda: None, float(design.count) * design.size**2)
    T = targets - centre
    for members in blocks:
        Q = design.rotated(members.ravel(), np.float64).reshape(*members.shape, -1)
        scores[members] = targets[members] - _without(Q, T[members], coefficients, values, design.count)
    return scores


def _shared_groups(groups: np.ndarray | None, count: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which rows are alone in their group, `bool [N]`, and the others as `int [G, k]`, by group size k, cut
    to four million numbers of the groups' rows, of `width`, and hat matrices.
    """
    if groups is None:
        return np.ones(count, bool), []
    _, inverse, size = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    first = np.cumsum(size) - size
    blocks = []
    for k in np.unique(size[size > 1]):
        members = order[first[size == k][:, None] + np.arange(k)]
        most = max(1, (1 << 22) // (int(k) * max(int(k), width)))
        blocks += [members[i : i + most] for i in range(0, len(members), most)]
    return size[inverse] == 1, blocks


def _without(Q: np.ndarray, T: np.ndarray, coefficients: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Left-out residuals `[G, k, C]` of groups whose rotated rows are Q `[G, k, rank]`."""
    Q = Q.astype(np.float64)
    residual = T - Q @ (coefficients / values).T
    hat = (Q / values) @ np.swapaxes(Q, 1, 2) + 1 / count
    return np.linalg.solve(np.eye(Q.shape[1]) - hat, residual)
