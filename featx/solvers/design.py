"""Owns passes over standardised features: losses and gradients of many logistic problems at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from featx.devices import available_threads
from featx.features import Rows, gathered
from featx.solvers.training import FLOOR, Task

if TYPE_CHECKING:
    from featx.solvers.torch_passes import TorchPasses

SCRATCH = 1 << 20  # numbers per block of logits: they stay near a core between two products
# Below this many multiplications a pass is over before threads have started.
THREADED = 1 << 26

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
    ) -> None:
        """fold: `int [N]`, -1 for never held out; weights: `float [N]`; scored: `bool [N]`, the rows whose
        held-out loss counts. torch_device: where torch makes the passes, such as `cuda:0`; empty for numpy.
        A memory map, and anything that is no array, is streamed in blocks.
        """
        self.several = task.several or len(task.class_names) == 2
        self.paired = not task.several and self.several  # two classes, one column for both
        self.columns = 1 if self.paired else len(task.class_names)
        self.count = len(fold)
        self.streamed = streamed = isinstance(task.X, np.memmap) or not isinstance(task.X, np.ndarray)
        # class by class, so that a block's targets are a few slices
        order = np.arange(self.count) if streamed or self.several else np.argsort(task.y, kind="stable")
        self.order = order
        y = task.y[order]
        self.y = y if task.several else y[:, None] if self.several else y
        self.fold = fold[order]
        self.weights = np.ones(self.count) if weights is None else weights[order]
        self.scored = np.ones(self.count, bool) if scored is None else scored[order]
        self.rotation: np.ndarray | None = None  # float64 [D, rank]: coordinates -> standardised features
        self.dual: np.ndarray | None = None  # set where rows were rotated instead
        self.rows: Rows
        if streamed:
            self.rows = _Streamed(task)
        else:
            self.rows = np.empty((self.count, task.X.shape[1] + 1), np.float32)
        self.single = self.rows  # for single-precision passes
        if self.count < task.X.shape[1] and not streamed:
            self.rows[:, :-1], self.rows[:, -1] = task.standardise(task.X[order]), 1  # type: ignore[index]
            self._rotate_rows()
        else:
            gram = self._gram(task)
            with single_thread(len(gram) < 2048):
                values, self.rotation = np.linalg.eigh(gram)
            self.eigenvalues = np.maximum(values, 0.0)
        self.torch: TorchPasses | None = None
        if torch_device:
            import torch

            from featx.solvers.torch_passes import TorchPasses

            self.torch = TorchPasses(
                {torch.float32: self.single, torch.float64: self.rows},
                *(self.y, self.fold, self.weights, self.scored),
                several=self.several,
                device=torch_device,
            )

    def _rotate_rows(self) -> None:
        Z = np.asarray(self.rows[:])[:, :-1].astype(np.float64)
        with single_thread(len(Z) < 2048):
            values, vectors = np.linalg.eigh(Z @ Z.T)
            kept = values > 1e-9 * values[-1]
            self.eigenvalues = values[kept]
            root = np.sqrt(self.eigenvalues)
            self.dual = Z.T @ (vectors[:, kept] / root)
        self.rows = np.concatenate([vectors[:, kept] * root, np.ones((self.count, 1))], axis=1)
        self.single = self.rows.astype(np.float32)

    def _gram(self, task: Task) -> np.ndarray:
        """`X^T X` of standardised features, and the rows themselves where they are kept."""
        width = self.rows.shape[1] - 1

        def work(rows: slice, gram: np.ndarray) -> None:
            if isinstance(self.rows, np.ndarray):
                part = task.standardise(np.asarray(task.X)[self.order[rows]])
                self.rows[rows, :-1], self.rows[rows, -1] = part, 1
            else:
                part = self.rows[rows][:, :-1]
            gram += part.T @ part

        step = max(64, 4 * SCRATCH // width)
        parts = spread(work, self.count, step, lambda: np.zeros((width, width)), self.count * width**2)
        return np.sum(parts, axis=0)

    @property
    def size(self) -> int:
        return len(self.eigenvalues) + 1

    def trained(self, rows: slice, member: np.ndarray) -> np.ndarray:
        """The weight of each row in problems that leave these folds out, `float64 [P, B]`."""
        fold = self.fold[rows]
        return ((fold != member[:, None]) | (fold < 0)) * self.weights[rows]

    def held_out(self, member: np.ndarray) -> np.ndarray:
        """The weight of the rows that count when these folds are left out, `float64 [P]`."""
        counts = self.scored & (self.fold >= 0)
        return np.array([self.weights[counts & (self.fold == m)].sum() for m in member])

    def rotate(self, dtype: Any) -> None:
        """Keep the rows in the eigenbasis, in `dtype`, where they are kept at all: for many uses of it."""
        if self.rotation is None or not isinstance(self.rows, np.ndarray):
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
        if isinstance(rows, np.ndarray) and not isinstance(self.rows, np.ndarray):
            part = self.rows.take(rows)  # type: ignore[attr-defined]
        else:
            part = self.rows[rows]  # type: ignore[index]
        part = np.asarray(part, dtype)[:, :-1]
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

    def logits(self, A: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The head's logits `[M, C]` for rows `int [M]` of the training data, by one problem `[K, rank + 1]`."""
        weight = self.for_rows(A[:, None])[:, 0]
        place = np.empty(self.count, np.int64)
        place[self.order] = np.arange(self.count)
        every = np.empty((self.count, len(weight)), np.float32)
        step = max(64, 4 * SCRATCH // self.rows.shape[1])
        for start in range(0, self.count, step):
            every[start : start + step] = self.rows[start : start + step] @ weight.T
        out = every[place[rows]]
        return np.concatenate([-out / 2, out / 2], axis=1) if self.paired else out

    def for_rows(self, A: np.ndarray) -> np.ndarray:
        """Coordinates -> what multiplies `rows`."""
        if self.rotation is None:
            return A
        out = np.empty((*A.shape[:2], len(self.rotation) + 1), A.dtype)
        out[..., :-1] = A[..., :-1] @ self.rotation.T.astype(A.dtype)
        out[..., -1] = A[..., -1]
        return out

    def from_rows(self, G: np.ndarray) -> np.ndarray:
        if self.rotation is None:
            return G
        out = np.empty((*G.shape[:2], self.rotation.shape[1] + 1), G.dtype)
        out[..., :-1] = G[..., :-1] @ self.rotation.astype(G.dtype)
        out[..., -1] = G[..., -1]
        return out

    def step(self, problems: int) -> int:
        """Rows per block, for logits `[problems, B]`."""
        return max(64, min(SCRATCH // problems, 2 * SCRATCH // self.rows.shape[1]))

    def visit(self, A: np.ndarray, member: np.ndarray) -> Visit:
        """One pass over the features for P problems: coordinates A `[K, P, rank + 1]` (its dtype is the
        arithmetic's), `member` `int [P]` the fold that each leaves out, -1 for none.
        """
        K, P, _ = A.shape
        W = np.ascontiguousarray(self.for_rows(A).reshape(K * P, -1))
        width = self.rows.shape[1]
        if self.torch:
            loss, held, gradient, curvature = self.torch(W, member)
            return Visit(loss, self.from_rows(gradient.reshape(K, P, width)), curvature / self.count, held)
        parts = spread(
            lambda rows, sums: self._block(rows, W, member, sums),
            self.count,
            self.step(K * P),
            lambda: _Sums.empty(K, P, width, A.dtype),
            self.count * width * K * P,
        )
        total = parts[0]
        for part in parts[1:]:
            total.add(part)
        G = self.from_rows(total.gradient.reshape(K, P, width))
        return Visit(total.loss, G, total.curvature / self.count, total.held)

    def _block(self, rows: slice, W: np.ndarray, member: np.ndarray, sums: _Sums) -> None:
        Z = np.asarray((self.rows if W.dtype == np.float64 else self.single)[rows], W.dtype)
        y, fold, weight = self.y[rows], self.fold[rows], self.weights[rows]
        P = len(member)
        L = (W @ Z.T).reshape(-1, P, len(Z))  # logits, then probabilities, then residuals
        loss = self._sigmoid(L, y, sums) if self.several else self._softmax(L, y, sums)
        trained = self.trained(rows, member)
        sums.loss += (loss * trained).sum(axis=1, dtype=np.float64)
        left = (fold == member[:, None]) & (fold >= 0) & self.scored[rows]
        if left.any():
            sums.held += (loss * (left * weight)).sum(axis=1, dtype=np.float64)
        if (trained != 1).any():
            L *= trained.astype(W.dtype)
        sums.gradient += L.reshape(-1, len(Z)) @ Z

    @staticmethod
    def _softmax(L: np.ndarray, y: np.ndarray, sums: _Sums) -> np.ndarray:
        L -= L.max(axis=0)
        classes = np.unique(y)
        places = [_slice(np.flatnonzero(y == k)) for k in classes]
        own = np.empty(L.shape[1:], L.dtype)
        for k, place in zip(classes, places, strict=True):
            own[:, place] = L[k][:, place]
        np.maximum(L, FLOOR, out=L)
        np.exp(L, out=L)
        total = L.sum(axis=0)
        loss = np.log(total) - own
        L *= 1 / total
        sums.curvature += L.sum(axis=2) - np.einsum("kpb,kpb->kp", L, L)
        for k, place in zip(classes, places, strict=True):
            L[k][:, place] -= 1
        return loss

    @staticmethod
    def _sigmoid(L: np.ndarray, y: np.ndarray, sums: _Sums) -> np.ndarray:
        target = y.T[:, None].astype(L.dtype)
        signed = L * (1 - 2 * target)  # the loss is log(1 + exp(signed))
        small = np.exp(np.maximum(-np.abs(L), FLOOR))
        loss = (np.log1p(small) + np.maximum(signed, 0)).sum(axis=0)
        np.divide(np.where(L >= 0, 1, small).astype(L.dtype), 1 + small, out=L)
        sums.curvature += L.sum(axis=2) - np.einsum("kpb,kpb->kp", L, L)
        L -= target
        return loss


def single_thread(wanted: bool = True) -> AbstractContextManager[Any]:
    """One BLAS thread: more would wait for each other on small matrices, and inside our own threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas") if wanted else nullcontext()


def spread(work: Callable[[slice, T], None], count: int, step: int, empty: Callable[[], T], flops: float) -> list[T]:
    """Run `work` on every block of `step` of `count` rows, in one thread or as many as there are cores;
    returns what each thread has gathered.
    """
    threads = 1 if flops < THREADED else min(available_threads(), -(-count // step))
    starts = iter(range(0, count, step))

    def run(gathered: T) -> T:
        for start in starts:  # a range's iterator hands out each number once, whoever asks
            work(slice(start, min(start + step, count)), gathered)
        return gathered

    if threads == 1:
        return [run(empty())]
    with single_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, [empty() for _ in range(threads)]))


@dataclass(slots=True)
class _Sums:
    loss: np.ndarray
    held: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray

    def add(self, other: _Sums) -> None:
        for name in self.__slots__:
            getattr(self, name).__iadd__(getattr(other, name))

    @classmethod
    def empty(cls, K: int, P: int, width: int, dtype: Any) -> _Sums:
        return cls(np.zeros(P), np.zeros(P), np.zeros((K * P, width), dtype), np.zeros((K, P)))


@dataclass(frozen=True)
class Visit:
    """What one pass finds for P problems, without the penalty."""

    loss: np.ndarray
    """`float64 [P]`, summed over training rows."""
    gradient: np.ndarray
    """`[K, P, rank + 1]`."""
    curvature: np.ndarray
    """`float64 [K, P]`: the mean of `p (1 - p)`."""
    held: np.ndarray
    """`float64 [P]`: the loss summed over held-out rows, weighted as in training."""


def _slice(index: np.ndarray) -> slice | np.ndarray:
    run = len(index) > 0 and index[-1] - index[0] + 1 == len(index)
    return slice(int(index[0]), int(index[-1]) + 1) if run else index


class _Streamed:
    """Rows standardised as they are read, with the bias's ones."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shape = (task.X.shape[0], task.X.shape[1] + 1)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._made(self.task.X[rows])

    def take(self, which: np.ndarray) -> np.ndarray:
        """The rows with these numbers, `int [M]`."""
        return self._made(gathered(self.task.X, which))

    def _made(self, part: np.ndarray) -> np.ndarray:
        part = self.task.standardise(part)
        return np.concatenate([part, np.ones((len(part), 1), np.float32)], axis=1)
