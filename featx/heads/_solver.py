"""Owns the logistic optimum: all strengths and folds of a regularisation path in one matrix product a step.

The objective is scikit-learn's, `sum_i w_i * cross_entropy_i + ||W||^2 / (2 C)`, bias not penalised. Every
problem (a fold with a strength) takes Newton's steps, each found by conjugate gradients; what they share is
the pass over the features, which reads X once for all of them. Gradients are in double precision, since
single cannot reach the optima where planes part the classes; the Hessian's products are in single.
Conjugate gradients are preconditioned by what is diagonal in the eigenbasis of `X^T X`: the Hessian is close
to `h * eigenvalue + 1 / C` there, with `h` the mean of `p (1 - p)` (Böhning 1992 bounds it by 1/2).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from featx.heads._design import Design
from featx.heads._hessian import CACHE, Hessian

STATE = 1 << 29  # bytes of vectors at a time; more problems than fit are solved in turns
INEXACT = 0.2  # of the gradient, in the preconditioner's norm: what conjugate gradients leave of it
PRODUCTS = 500  # with the Hessian, at most, for one of Newton's steps
# A step of Newton's that changed the held-out loss per row by less than this was the last: what is left is
# several times less, since conjugate gradients solve for all but a share of it.
SETTLED = 2e-4


@dataclass(frozen=True)
class Solution:
    """P minimised problems."""

    A: np.ndarray
    """Coordinates, `float64 [K, P, rank + 1]`."""
    loss: np.ndarray
    """Objective, `float64 [P]`."""
    held: np.ndarray
    """Loss summed over held-out rows, `float64 [P]`."""
    gap: np.ndarray
    """Half the squared Newton decrement before the last step over the objective, `float64 [P]`: the relative
    distance to the optimum is less."""
    bound: np.ndarray
    """What the relative gap cannot exceed by strong convexity, `C / 2 * ||gradient||^2` over the objective,
    `float64 [P]`: strict but for the bias, and loose where C is large."""
    converged: np.ndarray
    """`bool [P]`."""
    passes: int
    """Over the features, for all problems together."""

    def take(self, which: slice) -> Solution:
        """Some of the problems."""
        return replace(self, A=self.A[:, which], **{name: getattr(self, name)[which] for name in _EACH})


_EACH = ("loss", "held", "gap", "bound", "converged")


def minimise(
    design: Design,
    strengths: np.ndarray,
    member: np.ndarray,
    start: np.ndarray,
    *,
    tolerance: float,
    most: int = 50,
) -> Solution:
    """Minimise P problems, `strengths` `[P]` (scikit-learn's C) and `member` `int [P]` (the fold left out),
    from `start` `[K, P, rank + 1]`, by at most `most` of Newton's steps: until one gains less than
    `tolerance` of the objective, and leaves the held-out loss as it was.
    """
    K, P, size = start.shape
    turn = max(1, STATE // (100 * K * size))
    if not design.streamed:
        turn = min(turn, max(1, CACHE // (4 * K * design.count)))
    parts = [
        _minimise(design, strengths[i : i + turn], member[i : i + turn], start[:, i : i + turn], tolerance, most)
        for i in range(0, P, turn)
    ]
    if len(parts) == 1:
        return parts[0]
    A = np.concatenate([p.A for p in parts], axis=1)
    each = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _EACH}
    return Solution(A, **each, passes=sum(p.passes for p in parts))


@dataclass
class _Problems:
    """Where P problems stand."""

    number: np.ndarray
    strength: np.ndarray
    member: np.ndarray
    A: np.ndarray
    f: np.ndarray
    """The objective."""
    g: np.ndarray
    """Its gradient."""
    held: np.ndarray
    curvature: np.ndarray

    def take(self, which: np.ndarray) -> _Problems:
        """Some of them, `bool [P]` or `int`."""
        return _Problems(*(a[:, which] if a.ndim > 1 else a[which] for a in self._arrays()))

    def put(self, which: np.ndarray, other: _Problems) -> None:
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            mine[(slice(None), which) if mine.ndim > 1 else which] = theirs

    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)]


def _minimise(
    design: Design, strengths: np.ndarray, member: np.ndarray, start: np.ndarray, tolerance: float, most: int
) -> Solution:
    P = len(member)
    loss, held, gaps, bounds = (np.full(P, np.nan) for _ in range(4))
    result = Solution(np.array(start, np.float64), loss, held, gaps, bounds, np.zeros(P, bool), 0)
    at = _visit(design, np.arange(P), strengths, member, result.A)
    rows = np.maximum(design.held_out(member), 1e-300)
    passes = 1
    for step in range(most):
        d, products = _direction(design, at)
        slope = np.einsum("kpd,kpd->p", at.g, d)
        gap = -0.5 * slope / at.f
        before = at.held.copy()
        t, visits = _along(design, at, d, slope)
        passes += products + visits
        change = np.abs(at.held - before) / rows[at.number]
        done = (gap <= tolerance) & (change <= SETTLED) & (t == 1)
        over = done | (t == 0) | (step + 1 == most)
        if over.any():
            last, where = at.take(over), at.number[over]
            result.A[:, where], result.loss[where], result.held[where] = last.A, last.f, last.held
            result.gap[where], result.converged[where] = gap[over], done[over]
            square = np.square(last.g[..., :-1]).sum(axis=(0, 2))
            result.bound[where] = last.strength / 2 * square / np.maximum(last.f, 1e-300)
            if over.all():
                break
            at = at.take(~over)
    return replace(result, passes=passes)


def _visit(
    design: Design, number: np.ndarray, strength: np.ndarray, member: np.ndarray, A: np.ndarray
) -> _Problems:
    seen = design.visit(A, member)
    pulled = A / strength[:, None]
    pulled[..., -1] = 0
    f = seen.loss + 0.5 * np.einsum("kpd,kpd->p", A, pulled)
    return _Problems(number, strength, member, A, f, seen.gradient + pulled, seen.held, seen.curvature)


def _along(design: Design, at: _Problems, d: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, int]:
    """Move each problem by `t * d`, with the first t of 1, 2/5, ... that lowers its objective as it should;
    returns t `[P]`, 0 where none does, and how many passes it took.
    """
    t, left, visits = np.ones(len(slope)), np.arange(len(slope)), 0
    while len(left):
        old = at if visits == 0 else at.take(left)
        new = _visit(design, old.number, old.strength, old.member, old.A + d[:, left] * t[left][:, None])
        visits += 1
        # a loss cannot be compared more finely than by its rounding
        good = new.f <= old.f + 1e-4 * t[left] * slope[left] + 1e-14 * np.abs(old.f)
        at.put(left[good], new.take(good))
        left = left[~good]
        t[left] = np.where(t[left] > 1e-5, 0.4 * t[left], 0)
        left = left[t[left] > 0]
    return t, visits


def _direction(design: Design, at: _Problems) -> tuple[np.ndarray, int]:
    """Newton's direction `[K, P, rank + 1]` by conjugate gradients, and how many products it took."""
    single = np.float32
    eigenvalues = np.append(design.eigenvalues, design.count)
    pull = np.where(np.arange(design.size) < design.size - 1, 1 / at.strength[:, None], 0).astype(single)
    diagonal = (np.maximum(at.curvature, 1e-12)[:, :, None] * eigenvalues + pull + 1e-12).astype(single)
    hessian = Hessian(design, at.A, at.member)
    out = np.zeros(at.A.shape, single)
    left = np.arange(len(at.f))
    scale = np.maximum(np.abs(at.g).max(axis=(0, 2)), 1e-300)[:, None]  # single precision has a least number
    x, r = np.zeros_like(out), (at.g / -scale).astype(single)
    v = r / diagonal
    size = _dot(r, v)
    enough = INEXACT**2 * size
    for products in range(1, PRODUCTS + 1):
        bent = hessian.times(v) + pull * v
        curvature = _dot(v, bent)
        length = np.where(curvature > 0, size / np.where(curvature > 0, curvature, 1), 0)[:, None].astype(single)
        x += length * v
        r -= length * bent
        z = r / diagonal
        before, size = size, _dot(r, z)
        over = (size <= enough) | (curvature <= 0) | (products == PRODUCTS)
        if over.any():
            out[:, left[over]] = x[:, over]
            if over.all():
                break
            keep = ~over
            hessian.take(keep)
            left, pull, before, size, enough = left[keep], pull[keep], before[keep], size[keep], enough[keep]
            x, r, z, v, diagonal = (a[:, keep] for a in (x, r, z, v, diagonal))
        v = z + (size / before)[:, None].astype(single) * v
    return out * scale, products


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("kpd,kpd->p", a, b)


class Path:
    """The problems of a path, every strength (`[S]`, ascending) with every member (`int [M]`), solved in
    whatever order is asked for.

    A new strength starts on a curve through its solved neighbours. What is interpolated, over log C, is
    `A * (h * eigenvalue + 1 / C)`, which a ridge keeps constant, so most of a path starts next to its
    optimum. Beyond the weakest prior solved, A itself goes on along a line: where planes part the classes,
    weights grow with log C.
    """

    def __init__(
        self,
        design: Design,
        strengths: np.ndarray,
        members: np.ndarray,
        *,
        tolerance: float = 1e-4,
        most: int = 50,
    ) -> None:
        self.design, self.strengths, self.members = design, strengths, members
        self.tolerance, self.most = tolerance, most
        even = 0.25 if design.several else (1 - 1 / design.columns) / design.columns
        self._metric = even * np.append(design.eigenvalues, 0.0) + 1 / strengths[:, None]
        self._metric[:, -1] = 1.0
        self.solved: dict[int, Solution] = {}
        """By strength: a problem per member."""
        self.passes = 0

    def solve(self, level: list[int]) -> None:
        """Solve these strengths together; those already solved are skipped."""
        level = [i for i in level if i not in self.solved]
        if not level:
            return
        M, K, size = len(self.members), self.design.columns, self.design.size
        start = np.zeros((K, len(level), M, size))
        for column, i in enumerate(level):
            start[:, column] = self._start(i)
        found = minimise(
            self.design,
            np.repeat(self.strengths[level], M),
            np.tile(self.members, len(level)),
            start.reshape(K, -1, size),
            tolerance=self.tolerance,
            most=self.most,
        )
        self.passes += found.passes
        for column, i in enumerate(level):
            self.solved[i] = found.take(slice(column * M, (column + 1) * M))

    def _start(self, i: int) -> np.ndarray | float:
        known, x = sorted(self.solved), np.log(self.strengths)
        if len(known) > 1 and i > known[-1]:
            before, last = known[-2:]
            share = (x[i] - x[last]) / (x[last] - x[before])
            return (1 + share) * self.solved[last].A - share * self.solved[before].A
        return sum(
            (share * self.solved[j].A * self._metric[j] / self._metric[i] for j, share in _neighbours(x, known, i)), 0.0
        )

    def whole(self) -> None:
        """Solve all of it, coarse to fine."""
        last = len(self.strengths) - 1
        for i in [*range(0, last + 1, 8), last]:
            self.solve([i])
        for stride in (4, 2, 1):
            self.solve([*range(0, last + 1, stride)])

    def search(self) -> int:
        """The strength with the least held-out loss, solving only what it takes to find it.

        Every eighth strength, from the strongest prior, until the loss rises; then half-way around the best,
        three times. The loss is taken to have one minimum at these distances.
        """
        last = len(self.strengths) - 1
        coarse = sorted({*range(0, last + 1, 8), last})
        self.solve(coarse[:3])
        for anchor in coarse[3:]:
            if self.best != max(self.solved):
                break
            self.solve([anchor])
        for stride in (4, 2, 1):
            best = self.best
            self.solve([i for i in (best - stride, best + stride) if 0 <= i <= last])
        return self.best

    @property
    def best(self) -> int:
        return min(self.solved, key=lambda i: (self.held(i), i))

    def held(self, i: int) -> float:
        """A strength's loss, summed over all held-out rows."""
        return float(self.solved[i].held.sum())


def _neighbours(x: np.ndarray, known: list[int], i: int) -> list[tuple[int, float]]:
    """Lagrange weights at x[i] of its two solved neighbours on each side; past the ends, its nearest's own."""
    if not known:
        return []
    if not known[0] < i < known[-1]:
        return [(known[0] if i < known[0] else known[-1], 1.0)]
    place = int(np.searchsorted(known, i))
    near = known[max(0, place - 2) : place + 2]
    return [(j, float(np.prod([(x[i] - x[k]) / (x[j] - x[k]) for k in near if k != j]))) for j in near]
