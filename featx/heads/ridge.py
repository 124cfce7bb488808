"""Ridge regression on class targets: the exact leave-one-out error of every penalty from one eigendecomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featx.devices import single_thread
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.design import Design
from featx.solvers.examples import Examples
from featx.solvers.finishing import finish
from featx.solvers.moments import SCRATCH, spread
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

    Z: the rows, standardised, read in blocks, twice as a rule. The penalty p with the least squared error of rows left
    out is taken (every fourth is tried, and those around the best by generalised cross-validation, which are the best
    as a rule; otherwise, those around the best found). That error is exact and takes no second fit: a
    left-out residual is `r / (1 - h)`, with h the row's own share of its fit (Allen's PRESS, 1974), and rows of
    one group are left out together, `(I - H_GG)^-1 r_G`. Rows that count are the scored ones whose class has
    another group to be learned from; without any, the penalty is `UNMEASURED`. The logits are the scores over
    the temperature with the least log-loss on left-out rows, or, without such rows, the scores.
    threshold, reject: see `featx.solvers.finishing.finish`. seed, device: unused. Raises `HeadError`.
    """
    grid = _training.ascending(penalties, "penalties are positive numbers")
    with single_thread():
        task = _training.labelled(examples.X, examples.y, class_names, examples.weights)
        task, (sums,), _ = _training.summed(task, np.full(len(task.y), -1), gram=True)
        weights = np.ones(task.X.shape[0]) if task.weights is None else task.weights / task.weights.mean()
        able, notes = _training.measurable(task.y, examples.groups)
        counted = _training.counted(able, examples.scored)
        info: dict[str, Any] = {"notes": [*task.notes, *notes]}

        design = Design(task if task.weights is None else _rooted(task, weights), np.full(task.X.shape[0], -1))
        groups = None if examples.groups is None else np.asarray(examples.groups)[design.order]
        targets = (2 * task.one_hot() - 1)[design.order]
        left_out = LeftOut(design, targets, groups, counted[design.order], weights[design.order], sums=sums)

        if counted.any():
            penalty, every = _choose(left_out, grid, info)
            scores = every[np.argsort(design.order)][counted]
        else:
            penalty, scores = float(grid[0]) if len(grid) == 1 else UNMEASURED, None
            info["notes"] += [f"penalty {UNMEASURED:g} was taken without measuring"] * (len(grid) > 1)
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


def _choose(left_out: LeftOut, grid: np.ndarray, info: dict[str, Any]) -> tuple[float, np.ndarray]:
    """The penalty of `grid` with the least error of rows left out, and its scores; `info` gets the errors of those
    tried.
    """
    errors: dict[int, float] = {}
    best, last = left_out.expected(grid), len(grid)
    level = {*range(0, last, 4), best - 1, best, best + 1}
    while True:
        asked, scored = sorted(i for i in level if 0 <= i < last), best
        found, scores = left_out.measure(grid[asked] * left_out.design.count, asked.index(best))
        errors |= dict(zip(asked, found.tolist(), strict=True))
        best = min(errors, key=lambda i: (errors[i], i))
        unknown = {i for i in range(max(0, best - 3), min(last, best + 4)) if i not in errors}
        if not unknown & {best - 1, best + 1} and scored == best:
            break
        level = {best, *(unknown if unknown & {best - 1, best + 1} else ())}

    info["leave_one_out"] = {
        "penalties": [float(grid[i]) for i in sorted(errors)],
        "mean_squared_error": [errors[i] for i in sorted(errors)],
    }
    if len(grid) > 1 and best in (0, len(grid) - 1):
        info["notes"].append(f"the best penalty, {grid[best]:g}, is at the end of the grid")
    return float(grid[best]), scores


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
        sums: np.ndarray | None = None,
    ) -> None:
        """targets `float32 [N, C]`, groups `int [N]`, the rows that count, `bool [N]`, and weights `float [N]` of mean
        1, all in `design`'s order, whose rows are times the square roots of the weights. The rows are rotated here,
        once. dtype: of the arithmetic; by default double precision for small data. sums: of the rows of each class, as
        `summed` gives them; small data are summed again, in double precision.
        """
        self.design, self.targets = design, targets
        self.dtype = dtype = dtype or (np.float64 if design.count * design.size < EXACT else np.float32)
        self.counted = np.ones(design.count, bool) if counted is None else counted
        many, self.blocks = _shared_groups(groups, design.count, design.size - 1)
        self.alone, self.together = many == 1, float(many.mean())
        design.rotate(dtype)
        self.weights = np.ones(design.count) if weights is None else weights
        self.centre = np.average(targets, axis=0, weights=self.weights)
        """`[C]`."""
        self.root = np.sqrt(self.weights)[:, None]
        C, width = targets.shape[1], design.rows.shape[1] - 1

        def product(rows: slice, into: np.ndarray) -> None:
            into += self._centred(rows).T @ np.asarray(design.rows[rows], dtype)[:, :-1]

        if sums is None or (dtype == np.float64 and not design.streamed):
            step, flops = max(64, SCRATCH // width), float(design.count * width * C)
            shared = np.sum(spread(product, design.count, step, lambda: np.zeros((C, width)), flops), axis=0)
            self.coefficients = shared if design.rotation is None else shared @ design.rotation
        else:  # a class's targets are 1, all others' -1
            every = sums[::C].sum(axis=0) if len(sums) > C else sums.sum(axis=0)  # a label, and its absence
            shared = 2 * sums[:C] - np.outer(1 + self.centre, every)
            self.coefficients = shared @ (design.dual if design.rotation is None else design.rotation)
        """`Z^T T` in the eigenbasis, `[C, rank]`."""

    def _centred(self, rows: slice | np.ndarray) -> np.ndarray:
        return np.asarray((self.targets[rows] - self.centre) * self.root[rows], self.dtype)

    def expected(self, grid: np.ndarray) -> int:
        """The number of the penalty with the least error by generalised cross-validation (Golub, Heath and Wahba 1979):
        every row counts with the mean row's share of its fit, times the rows in its group.
        """
        design, T = self.design, self.targets - self.centre
        total, together = float((self.weights @ T**2).sum()), self.together
        values = design.eigenvalues[:, None]
        kept = values + grid * design.count
        explained = (self.coefficients**2).sum(axis=0) @ ((2 * kept - values) / kept**2)
        share = (1 + (values / kept).sum(axis=0)) / design.count * together
        return int(np.argmin((total - explained) / np.maximum(1 - share, 1e-9) ** 2))

    def measure(self, penalties: np.ndarray, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared left-out errors `float64 [S]` of every penalty, and each row's scores when it is left out, by
        the penalty numbered `which`, `float32 [N, C]`, in `design`'s order; in one pass.
        """
        design, dtype, S, targets = self.design, self.dtype, len(penalties), self.targets
        C, size, scores = targets.shape[1], design.size - 1, np.empty(targets.shape, np.float32)
        inverse = 1 / (design.eigenvalues[:, None] + penalties)  # [rank, S]
        solve = (self.coefficients.T[:, None, :] * inverse[:, :, None]).reshape(size, S * C).astype(dtype)
        shrunk, alone, root = inverse.astype(dtype), self.alone & self.counted, self.root.astype(dtype)

        def left_out(rows: slice, into: np.ndarray) -> None:
            Q = design.rotated(rows, dtype)
            own = (self.weights[rows] / design.count).astype(dtype)[:, None]
            kept = np.maximum(1 - ((Q * Q) @ shrunk + own), 1e-9)  # 1 - h, with h a row's own share of its fit
            residual = (Q @ solve).reshape(-1, S, C)
            np.subtract(self._centred(rows)[:, None, :], residual, out=residual)
            residual /= kept[:, :, None]
            scores[rows] = targets[rows] - residual[:, which] / root[rows]
            into += np.einsum("nsc,nsc->ns", residual, residual)[alone[rows]].sum(axis=0)

        step, flops = max(64, SCRATCH // max(size, S * C)), float(design.count * size) * (size + S * C)
        errors = np.sum(spread(left_out, design.count, step, lambda: np.zeros(S), flops), axis=0)
        for members in self.blocks:
            Q = design.rotated(members.ravel(), np.float64).reshape(*members.shape, size)
            for s, penalty in enumerate(penalties):
                residual = self._together(Q, members, penalty)
                errors[s] += (residual[self.counted[members]] ** 2).sum()
                if s == which:
                    scores[members] = targets[members] - residual / self.root[members]
        return np.asarray(errors / (self.weights[self.counted].sum() * C)), scores

    def _together(self, Q: np.ndarray, members: np.ndarray, penalty: float) -> np.ndarray:
        """Left-out residuals `[G, k, C]` of groups whose rotated rows are Q `float64 [G, k, rank]`."""
        values = self.design.eigenvalues + penalty
        residual, root = self._centred(members) - Q @ (self.coefficients / values).T, self.root[members]
        hat = (Q / values) @ np.swapaxes(Q, 1, 2) + root @ np.swapaxes(root, 1, 2) / self.design.count
        left_out: np.ndarray = np.linalg.solve(np.eye(Q.shape[1]) - hat, residual)
        return left_out


def _shared_groups(groups: np.ndarray | None, count: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """How many rows share each row's group, `int [N]`, and those that are not alone in blocks `int [G, k]`, G groups of
    size k, in the order of their first rows, since the table may be on a disk. The rows of a block, `width` numbers
    each, and its hat matrices take at most four million numbers each.
    """
    if groups is None:
        return np.ones(count, np.int64), []
    _, first, inverse, size = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first[inverse], kind="stable")
    size = size[np.argsort(first)]
    start = np.cumsum(size) - size
    blocks = []
    for k in np.unique(size[size > 1]):
        members = order[start[size == k][:, None] + np.arange(k)]
        most = max(1, (1 << 22) // (int(k) * max(int(k), width)))
        blocks += [members[i : i + most] for i in range(0, len(members), most)]
    many = np.empty(count, np.int64)
    many[order] = np.repeat(size, size)
    return many, blocks
