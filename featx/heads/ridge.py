"""Ridge regression on class targets: the exact leave-one-out error of every penalty from one eigendecomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featx.devices import single_thread
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.design import SCRATCH, Design, spread
from featx.solvers.examples import Examples
from featx.solvers.finishing import finish
from featx.solvers.training import Task

LEARNS = STREAMS = True
# Per image, so that they mean the same whatever N: the penalty on ||W||^2 is N times these.
PENALTIES = tuple(float(p) for p in np.logspace(-6, 3, 37))
# The penalty where nothing can be left out: a typical choice where rows can.
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
    taken (every fourth is tried, then those around the best). That error is exact and takes no second fit: a
    left-out residual is `r / (1 - h)`, with h the row's own share of its fit (Allen's PRESS, 1974), and rows of
    one group are left out together, `(I - H_GG)^-1 r_G`. Rows that count are the scored ones whose class has
    another group to be learned from; without any, the penalty is `UNMEASURED`. The logits are the scores over
    the temperature with the least log-loss on left-out rows, or, without such rows, the scores.
    threshold, reject: see `featx.solvers.finishing.finish`. seed, device: unused. Raises `HeadError`.
    """
    grid = _training.ascending(penalties, "penalties are positive numbers")
    with single_thread():
        task = _training.check(examples.X, examples.y, class_names, examples.weights)
        weights = np.ones(task.X.shape[0]) if task.weights is None else task.weights / task.weights.mean()
        able, notes = _training.measurable(task.y, examples.groups)
        counted = _training.counted(able, examples.scored)
        info: dict[str, Any] = {"notes": [*task.notes, *notes]}

        design = Design(task if task.weights is None else _rooted(task, weights), np.full(task.X.shape[0], -1))
        groups = None if examples.groups is None else np.asarray(examples.groups)[design.order]
        targets = (2 * task.one_hot() - 1)[design.order]
        left_out = LeftOut(design, targets, groups, counted[design.order], weights[design.order])

        scores = None
        if counted.any():
            penalty = _choose(left_out, grid, info)
            scores = left_out.scores(penalty * design.count)[np.argsort(design.order)][counted]
        else:
            penalty = float(grid[0]) if len(grid) == 1 else UNMEASURED
            if len(grid) > 1:
                info["notes"].append(f"penalty {UNMEASURED:g} was taken without measuring")
            info["notes"].append("probabilities are not calibrated: no image could be left out")

        shrunk = left_out.coefficients / (design.eigenvalues + penalty * design.count)
        head = finish(
            task.head(*design.affine(np.concatenate([shrunk, left_out.centre[:, None]], 1))),
            task,
            info,
            scores,
            counted,
            measured_on="training rows, each left out once",
            calibrate=scores is not None,
            threshold=threshold,
            reject=reject,
        )
    return Fitted(head, info | {"penalty": penalty})


def _rooted(task: Task, weights: np.ndarray) -> Task:
    """Rows times the square roots of their weights `[N]`, which are those of a problem without weights; in memory."""
    X = task.standard() * np.sqrt(weights, dtype=np.float32)[:, None]
    return replace(task, X=X, mean=np.zeros_like(task.mean), scale=np.ones_like(task.scale))


def _choose(left_out: LeftOut, grid: np.ndarray, info: dict[str, Any]) -> float:
    """The penalty of `grid` with the least error of rows left out; `info` gets the errors of those tried."""
    errors: dict[int, float] = {}
    level = list(range(0, len(grid), 4))
    for stride in (2, 1, 0):  # every fourth penalty, then half-way around the best, twice
        level = [i for i in level if 0 <= i < len(grid) and i not in errors]
        if level:
            found = left_out.errors(grid[level] * left_out.design.count)
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


class LeftOut:
    """Leave-one-out scores and errors, at any penalty on `||W||^2`."""

    def __init__(
        self,
        design: Design,
        targets: np.ndarray,
        groups: np.ndarray | None = None,
        counted: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        dtype: Any = None,
    ) -> None:
        """targets `float32 [N, C]`, groups `int [N]`, the rows that count, `bool [N]`, and weights `float [N]` of mean
        1, all in `design`'s order, whose rows are times the square roots of the weights. The rows are rotated here,
        once. dtype: of the arithmetic; by default double precision for small data.
        """
        self.design, self.targets = design, targets
        self.dtype = dtype = dtype or (np.float64 if design.count * design.size < EXACT else np.float32)
        self.counted = np.ones(design.count, bool) if counted is None else counted
        self.alone, self.blocks = _shared_groups(groups, design.count, design.size - 1)
        design.rotate(dtype)
        self.weights = np.ones(design.count) if weights is None else weights
        self.centre = (targets * self.weights[:, None]).mean(axis=0, dtype=np.float64)
        """`[C]`."""
        self.root = np.sqrt(self.weights)[:, None]
        self.T = T = ((targets - self.centre) * self.root).astype(dtype)
        C, width = targets.shape[1], design.rows.shape[1] - 1

        def product(rows: slice, into: np.ndarray) -> None:
            into += T[rows].T @ np.asarray(design.rows[rows], dtype)[:, :-1]

        step, flops = max(64, SCRATCH // width), float(design.count * width * C)
        shared = np.sum(spread(product, design.count, step, lambda: np.zeros((C, width)), flops), axis=0)
        self.coefficients = shared if design.rotation is None else shared @ design.rotation
        """`Z^T T` in the eigenbasis, `[C, rank]`."""

    def errors(self, penalties: np.ndarray) -> np.ndarray:
        """Mean squared left-out errors `float64 [S]` of every penalty."""
        design, dtype, S, T = self.design, self.dtype, len(penalties), self.T
        C, size = T.shape[1], design.size - 1
        inverse = 1 / (design.eigenvalues[:, None] + penalties)  # [rank, S]
        solve = (self.coefficients.T[:, None, :] * inverse[:, :, None]).reshape(size, S * C).astype(dtype)
        shrunk, alone = inverse.astype(dtype), self.alone & self.counted

        def left_out(rows: slice, into: np.ndarray) -> None:
            fitted, kept = self._fitted(rows, solve, shrunk)
            residual = fitted.reshape(-1, S, C)
            np.subtract(T[rows][:, None, :], residual, out=residual)
            squares = np.einsum("nsc,nsc->ns", residual, residual)
            squares /= kept**2
            into += squares[alone[rows]].sum(axis=0)

        step, flops = max(64, SCRATCH // max(size, S * C)), float(design.count * size) * (size + S * C)
        errors = np.sum(spread(left_out, design.count, step, lambda: np.zeros(S), flops), axis=0)
        for members in self.blocks:
            Q = design.rotated(members.ravel(), np.float64).reshape(*members.shape, size)
            for s, penalty in enumerate(penalties):
                residual = self._together(Q, members, penalty)
                errors[s] += (residual[self.counted[members]] ** 2).sum()
        return np.asarray(errors / (self.weights[self.counted].sum() * C))

    def scores(self, penalty: float) -> np.ndarray:
        """Each row's scores when it is left out, `float32 [N, C]`, in `design`'s order."""
        design, dtype, targets, root = self.design, self.dtype, self.targets, self.root.astype(self.dtype)
        values, scores = design.eigenvalues + penalty, np.empty(targets.shape, np.float32)
        solve, shrunk = (self.coefficients / values).T.astype(dtype), (1 / values).astype(dtype)

        def left_out(rows: slice, _: None) -> None:
            fitted, kept = self._fitted(rows, solve, shrunk)
            scores[rows] = targets[rows] - (self.T[rows] - fitted) / (kept[:, None] * root[rows])

        step, flops = max(64, SCRATCH // (design.size + targets.shape[1])), float(design.count) * design.size**2
        spread(left_out, design.count, step, lambda: None, flops)
        for members in self.blocks:
            Q = design.rotated(members.ravel(), np.float64).reshape(*members.shape, -1)
            scores[members] = targets[members] - self._together(Q, members, penalty) / self.root[members]
        return scores

    def _fitted(self, rows: slice, solve: np.ndarray, shrunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centred scores of rows that are not left out, and `1 - h`, with h a row's own share of its fit."""
        Q = self.design.rotated(rows, self.dtype)
        own = (self.weights[rows] / self.design.count).astype(self.dtype)
        return Q @ solve, np.maximum(1 - ((Q * Q) @ shrunk + (own if shrunk.ndim == 1 else own[:, None])), 1e-9)

    def _together(self, Q: np.ndarray, members: np.ndarray, penalty: float) -> np.ndarray:
        """Left-out residuals `[G, k, C]` of groups whose rotated rows are Q `float64 [G, k, rank]`."""
        values = self.design.eigenvalues + penalty
        residual, root = self.T[members] - Q @ (self.coefficients / values).T, self.root[members]
        hat = (Q / values) @ np.swapaxes(Q, 1, 2) + root @ np.swapaxes(root, 1, 2) / self.design.count
        left_out: np.ndarray = np.linalg.solve(np.eye(Q.shape[1]) - hat, residual)
        return left_out


def _shared_groups(groups: np.ndarray | None, count: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Which rows are alone in their group, `bool [N]`, and the others in blocks `int [G, k]`, G groups of size k.
    The rows of a block, `width` numbers each, and its hat matrices take at most four million numbers each.
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
