"""Passes over standardised features: losses, gradients, logits and Hessians of many logistic problems at once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from featx.devices import single_thread
from featx.features import gathered
from featx.solvers.moments import SCRATCH, spread
from featx.solvers.training import FLOOR, Task, streamed

Array = Any  # numpy's, or torch's where torch makes the passes
T = TypeVar("T")


class Design:
    """Standardised features in the coordinates that the solver works in, and passes over them.

    With fewer rows than columns the rows are rotated into their own span (`[N, rank]`); otherwise the
    features stay as they are, in memory or streamed from `task.X`, and weights are rotated instead.
    Coordinates have one entry more than the rank: the bias. State is `[K, P, rank + 1]` for P problems,
    K = 1 for two classes (one sigmoid), else C.
    """

    def __init__(
        self,
        task: Task,
        fold: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        scored: np.ndarray | None = None,
        torch_device: str = "",
        like: Design | None = None,
    ) -> None:
        """fold: `int [N]`, -1 for never held out; weights: `float [N]`; scored: `bool [N]`, rows whose held-out loss
        counts. torch_device: where torch makes the passes, `cuda:0`; empty for numpy. Tables on disk are streamed.
        like: the design whose coordinates, which are rotated, the rows take.
        """
        several = task.several
        self.paired = not several and len(task.class_names) == 2  # one column for both classes
        self.several = several or self.paired
        self.columns = 1 if self.paired else len(task.class_names)
        # the mean of `p (1 - p)` over classes where all are equally likely
        self.even = 0.25 if self.several else (1 - 1 / self.columns) / self.columns
        self.count = len(fold)
        self.passes = 0
        self.streamed, self.partial = streamed(task.X), like is not None
        # class by class, so that a block's targets are a few slices
        order = np.arange(self.count) if self.streamed or self.several else np.argsort(task.y, kind="stable")
        self.order = order
        y = task.y[order]
        self.y: Array = y[:, None] if self.paired else y
        self.fold: Array = fold[order]
        self.mean = 1.0 if weights is None else float(weights.mean())  # the solver's steps expect weights around 1
        self.weights: Array = np.ones(self.count) if weights is None else weights[order] / self.mean
        self.scored: Array = np.ones(self.count, bool) if scored is None else scored[order]
        self.rotation: np.ndarray | None = None  # float64 [D, rank]: coordinates -> standardised features
        self.dual: np.ndarray | None = None  # set where rows were rotated instead

        width = task.X.shape[1] + 1
        self.rows: Array = _Streamed(task) if self.streamed else np.empty((self.count, width), np.float32)
        self.single = self.rows  # for single-precision passes
        if not self.streamed:
            self._fill(task)
        self.eigenvalues: np.ndarray
        if like is not None:
            self.eigenvalues, self.rotation = like.eigenvalues * (self.count / like.count), like.rotation
            self.rotate(np.float32)
        elif task.gram is None:
            self._rotate_rows()
        else:
            with single_thread(width < 2048):
                values, self.rotation = np.linalg.eigh(task.gram)
            self.eigenvalues = np.maximum(values, 0.0)
        self.size = len(self.eigenvalues) + 1

        self.xp: Any = np  # the module of the arrays that passes work on
        self.place: dict[str, str] = {}  # their device, as keyword arguments
        self.scratch = SCRATCH
        if torch_device:
            self._move(torch_device)

    def _rotate_rows(self) -> None:
        Z = self.rows[:, :-1].astype(np.float64)
        with single_thread(len(Z) < 2048):
            values, vectors = np.linalg.eigh(Z @ Z.T)
            kept = values > 1e-9 * values[-1]
            self.eigenvalues = values[kept]
            root = np.sqrt(self.eigenvalues)
            self.dual = Z.T @ (vectors[:, kept] / root)
        self.rows = np.concatenate([vectors[:, kept] * root, np.ones((self.count, 1))], axis=1)
        self.single = self.rows.astype(np.float32)

    def _fill(self, task: Task) -> None:
        def work(rows: slice, _: None) -> None:
            task.standardise(task.X[self.order[rows]], self.rows[rows, :-1])  # type: ignore[index]
            self.rows[rows, -1] = 1

        spread(work, self.count, max(64, SCRATCH // self.rows.shape[1]), lambda: None, 16.0 * self.rows.size)

    def _move(self, device: str) -> None:
        """Let torch make the passes; rows that take less than half of the GPU's free memory move to it."""
        import torch

        self.xp, self.place, self.scratch = torch, {"device": device}, 1 << 26
        self.fold, self.weights, self.scored = map(self.placed, (self.fold, self.weights, self.scored))
        if self.several:
            self.y = self.placed(self.y)
        if not self.streamed and ("cuda" not in device or self.rows.nbytes < torch.cuda.mem_get_info(device)[0] // 2):
            self.rows = self.placed(self.rows)
            self.single = self.rows.float()

    def placed(self, a: Array, like: Array = None) -> Array:
        """An array on the device of the passes, in the precision of `like`."""
        return self.xp.asarray(a, dtype=None if like is None else like.dtype, **self.place)

    def block(self, rows: slice, like: Array) -> Array:
        """Rows with the bias's column of ones, on the device of the passes, in the precision of `like`."""
        return self.placed((self.rows if like.dtype == self.xp.float64 else self.single)[rows], like)

    def trained(self, rows: slice, member: Array) -> Array:
        """The weight of each row in problems that leave these folds out, `float64 [P, B]`."""
        fold = self.fold[rows]
        return ((fold != member[:, None]) | (fold < 0)) * self.weights[rows]

    def held_out(self, member: np.ndarray) -> np.ndarray:
        """The total weight of the scored rows in each of these folds, `float64 [P]`; 0 for fold -1."""
        counts = self.scored & (self.fold >= 0)
        return np.array([float(self.weights[counts & (self.fold == m)].sum()) for m in member.tolist()])

    def rotate(self, dtype: Any) -> None:
        """Rotate rows that are in memory into the eigenbasis, once, as `dtype`; streamed rows stay as they are."""
        if self.rotation is None or self.streamed:
            return
        kept = self.rows = self.single = self.rows.astype(dtype, copy=False)
        turn = self.rotation.astype(dtype)

        def work(rows: slice, _: None) -> None:
            kept[rows, :-1] = kept[rows, :-1] @ turn

        flops = float(kept.size) * len(turn)
        spread(work, self.count, max(64, SCRATCH // len(turn)), lambda: None, flops)
        self.dual, self.rotation = self.rotation, None

    def rotated(self, rows: slice | np.ndarray, dtype: Any = np.float32) -> np.ndarray:
        """Rows in the eigenbasis, without the bias, `[B, rank]`."""
        part = np.asarray(self.rows[rows], dtype)[:, :-1]
        return part if self.rotation is None else part @ self.rotation.astype(dtype, copy=False)

    def affine(self, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates `[C, rank + 1]` -> weight `float64 [C, D]` and bias `[C]` for standardised features."""
        back = self.rotation if self.rotation is not None else self.dual
        assert back is not None
        return A[:, :-1].astype(np.float64) @ back.T, A[:, -1].astype(np.float64)

    def features_space(self, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates `[K, rank + 1]` of one problem -> weight `float64 [C, D]` and bias `[C]` of its head."""
        weight, bias = self.affine(A)
        if self.paired:  # softmax of (-z/2, z/2) is the sigmoid of z
            return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
        return weight, bias

    def logits(self, A: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """The logits `[M, C]` of the rows `counted`, `bool [N]`, in the order of the training data, each by the
        problem, of `[K, P, rank + 1]`, that its fold numbers; in one pass.
        """
        weights = self.flat(self.for_rows(A.astype(np.float32)).swapaxes(0, 1)).reshape(A.shape[1], len(A), -1)
        place, chosen = np.cumsum(counted) - 1, counted[self.order]
        every = np.empty((int(counted.sum()), len(A)), np.float32)

        def work(rows: slice, _: None) -> None:
            Z, to, fold = self.block(rows, weights), self.order[rows], taken_back(self.fold[rows])
            for k, weight in enumerate(weights):
                mine = np.flatnonzero((fold == k) & chosen[rows])
                every[place[to[mine]]] = taken_back(Z[mine] @ weight.T)

        step = max(64, 4 * SCRATCH // self.rows.shape[1])
        spread(work, self.count, step, lambda: None, 0 if self.place else float(A[:, 0].size * self.count))
        return np.concatenate([-every / 2, every / 2], axis=1) if self.paired else every

    def for_rows(self, A: np.ndarray) -> np.ndarray:
        """Coordinates `[K, P, rank + 1]` -> weights that multiply `rows`, `[K, P, width]`."""
        return A if self.rotation is None else _turned(A, self.rotation.T)

    def from_rows(self, G: np.ndarray) -> np.ndarray:
        """The gradient by such weights, `[K, P, width]` -> the gradient by coordinates `[K, P, rank + 1]`."""
        return G if self.rotation is None else _turned(G, self.rotation)

    def visit(self, A: np.ndarray, member: np.ndarray) -> Visit:
        """One pass over the features for P problems. A: coordinates `[K, P, rank + 1]`, whose dtype is that of
        the arithmetic; member: `int [P]`, the fold that each problem leaves out, -1 for none.
        """
        K, P, _ = A.shape
        W, left_out = self.flat(self.for_rows(A)), self.placed(member)
        zeros = functools.partial(self.xp.zeros, dtype=self.xp.float64, **self.place)
        total = self.spread(
            lambda rows, sums: self._block(rows, W, left_out, sums),
            lambda: Visit(zeros(P), self.xp.zeros_like(W), zeros((K, P)), zeros(P)),
            K * P,
        )
        loss, gradient, curvature, held = map(taken_back, vars(total).values())
        return Visit(loss, self.from_rows(gradient.reshape(K, P, -1)), curvature / self.count, held)

    def flat(self, A: np.ndarray) -> Array:
        """Weights `[K, P, width]` as `[K * P, width]`, on the device of the passes."""
        return self.placed(np.ascontiguousarray(A.reshape(-1, A.shape[-1])))

    def spread(self, work: Callable[[slice, T], None], empty: Callable[[], T], problems: int) -> T:
        """One pass: the sum of what `work` gathers from every block of B rows, for logits `[problems, B]`."""
        self.passes += 1
        width = self.rows.shape[1]
        step = max(64, min(self.scratch // problems, 2 * self.scratch // width))
        flops = 0 if self.place else self.count * width * problems  # a device has threads of its own
        return functools.reduce(operator.iadd, spread(work, self.count, step, empty, flops))

    def _block(self, rows: slice, W: Array, member: Array, sums: Visit) -> None:
        Z, y = self.block(rows, W), self.y[rows]
        fold, weight = self.fold[rows], self.weights[rows]
        L = (W @ Z.T).reshape(-1, len(member), len(Z))  # logits, then probabilities, then residuals
        loss = self._sigmoid(L, y, sums) if self.several else self._softmax(L, y, sums)

        trained = self.trained(rows, member)
        sums.loss += (loss * trained).sum(1)
        left = (fold == member[:, None]) & (fold >= 0) & self.scored[rows]
        if left.any():
            sums.held += (loss * (left * weight)).sum(1)
        if (trained != 1).any():
            L *= self.placed(trained, L)
        sums.gradient += L.reshape(-1, len(Z)) @ Z

    def _softmax(self, L: Array, y: np.ndarray, sums: Visit) -> Array:
        xp = self.xp
        L -= xp.amax(L, 0)
        classes = np.unique(y)
        places = [_slice(np.flatnonzero(y == k)) for k in classes]
        own = xp.empty_like(L[0])
        for k, place in zip(classes, places, strict=True):
            own[:, place] = L[k][:, place]

        xp.exp(xp.clip(L, FLOOR, None, out=L), out=L)
        total = L.sum(0)
        loss = xp.log(total) - own
        L *= 1 / total
        sums.curvature += L.sum(2) - xp.einsum("kpb,kpb->kp", L, L)

        for k, place in zip(classes, places, strict=True):
            L[k][:, place] -= 1
        return loss

    def _sigmoid(self, L: Array, y: Array, sums: Visit) -> Array:
        xp, target = self.xp, self.placed(y.T[:, None], L)
        signed = L * (1 - 2 * target)  # the loss is log(1 + exp(signed))
        small = xp.exp(xp.clip(-abs(L), FLOOR, None))
        loss = (xp.log1p(small) + xp.clip(signed, 0, None)).sum(0)
        xp.divide(xp.where(L >= 0, 1, small), 1 + small, out=L)
        sums.curvature += L.sum(2) - xp.einsum("kpb,kpb->kp", L, L)
        L -= target
        return loss


@dataclass
class Visit:
    """The results of one pass for P problems, without the penalty."""

    loss: Array
    """`float64 [P]`, summed over training rows."""
    gradient: Array
    """`[K, P, rank + 1]`."""
    curvature: Array
    """`float64 [K, P]`: the mean of `p (1 - p)`."""
    held: Array
    """`float64 [P]`: the loss summed over held-out rows, weighted as in training."""

    def __iadd__(self, other: Visit) -> Visit:
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine += theirs
        return self


def _turned(A: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """All of `A` `[K, P, ...]` but the last column, the bias's, times `rotation`."""
    out = np.empty((*A.shape[:2], rotation.shape[1] + 1), A.dtype)
    out[..., :-1] = A[..., :-1] @ rotation.astype(A.dtype)
    out[..., -1] = A[..., -1]
    return out


def taken_back(a: Array) -> np.ndarray:
    return a if isinstance(a, np.ndarray) else a.cpu().numpy()


def _slice(index: np.ndarray) -> slice | np.ndarray:
    run = len(index) > 0 and index[-1] - index[0] + 1 == len(index)
    return slice(int(index[0]), int(index[-1]) + 1) if run else index


class _Streamed:
    """Rows standardised as they are read, with the bias's ones."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shape = (task.X.shape[0], task.X.shape[1] + 1)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        part = self.task.X[rows] if isinstance(rows, slice) else gathered(self.task.X, rows)
        out = np.ones((len(part), self.shape[1]), np.float32)
        self.task.standardise(part, out[:, :-1])
        return out
