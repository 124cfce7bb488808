"""Newton's method for many logistic problems at once: steps by conjugate gradients on shared passes.

Gradients are in double precision, since single cannot reach the optima of linearly separable classes; the
Hessian's products are in single. The preconditioner is diagonal in the eigenbasis of `X^T X`: the Hessian is
close to `h * eigenvalue + 1 / C` there, with `h` the mean of `p (1 - p)` (Böhning 1992 bounds it by 1/2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from featx.solvers.design import Design
from featx.solvers.hessian import Hessian

INEXACT = 0.2  # conjugate gradients stop at this share of the gradient, in the preconditioner's norm
PRODUCTS = 500  # a Newton step multiplies by the Hessian at most so often
# A Newton step that changes the held-out loss per row by less than this is the last: the distance that remains
# is several times less, since conjugate gradients leave only a share of it.
SETTLED = 5e-4
# By so much the Hessian of a part may lengthen a step: where its answers are certain, it has hardly any curvature.
FURTHEST = 1e4


class Batch:
    """Arrays of P problems: `[P]`, or `[K, P, ...]`."""

    def take(self, which: np.ndarray | slice) -> Self:
        """Some of the problems: `bool [P]`, `int` or a slice."""
        return type(self)(*(a[:, which] if a.ndim > 1 else a[which] for a in vars(self).values()))

    def put(self, which: np.ndarray, other: Self) -> None:
        """Overwrite the problems with these numbers."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[(slice(None), which) if mine.ndim > 1 else which] = theirs


@dataclass(frozen=True)
class Solution(Batch):
    """P minimised problems: strengths (scikit-learn's C), the folds left out, and the results."""

    strength: np.ndarray
    member: np.ndarray
    A: np.ndarray
    """Coordinates, `float64 [K, P, rank + 1]`."""
    loss: np.ndarray
    """Objective, `float64 [P]`."""
    held: np.ndarray
    """Loss summed over held-out rows, `float64 [P]`."""
    gap: np.ndarray
    """Half the squared Newton decrement over the objective, `float64 [P]`: about the relative distance to the
    optimum; after Newton's last step the distance is smaller."""
    bound: np.ndarray
    """An upper bound of the relative gap by strong convexity, `C / 2 * ||gradient||^2` over the objective,
    `float64 [P]`: strict except for the bias, and loose where C is large."""
    converged: np.ndarray
    """`bool [P]`."""

    @classmethod
    def unsolved(cls, strength: np.ndarray, member: np.ndarray, start: np.ndarray) -> Solution:
        """P problems that are not solved yet."""
        loss, held, gap, bound = np.full((4, len(member)), np.nan)
        return cls(strength, member, start.astype(np.float64), loss, held, gap, bound, np.zeros(len(member), bool))

    def record(self, at: Problems, gap: np.ndarray, converged: np.ndarray) -> None:
        """Store the current state of some problems."""
        square = np.square(at.g[..., :-1], dtype=np.float64).sum(axis=(0, 2))
        bound = at.strength / 2 * square / np.maximum(at.f, 1e-300)
        self.put(at.number, Solution(at.strength, at.member, at.A, at.f, at.held, gap, bound, converged))


@dataclass
class Problems(Batch):
    """The current state of P problems."""

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

    @classmethod
    def visit(
        cls, design: Design, number: np.ndarray, strength: np.ndarray, member: np.ndarray, A: np.ndarray
    ) -> Problems:
        """One pass, in A's precision."""
        seen = design.visit(A, member)
        pulled = A * (1 / strength)[:, None].astype(A.dtype)
        pulled[..., -1] = 0
        f = seen.loss + 0.5 * dot(A, pulled)
        return cls(number, strength, member, A, f, seen.gradient + pulled, seen.held, seen.curvature)

    def metric(self, design: Design) -> np.ndarray:
        """Diagonal approximations of the Hessians, `[K, P, rank + 1]`: exact for ridge regression."""
        diagonal = np.maximum(self.curvature, 1e-12)[:, :, None] * np.append(design.eigenvalues, design.count)
        diagonal[..., :-1] += 1 / self.strength[:, None]
        return np.asarray(diagonal + 1e-12, np.float32)


def newton(design: Design, found: Solution, some: np.ndarray, tolerance: float, most: int) -> None:
    """Minimise the problems numbered `some`, from their coordinates in `found`, in at most `most` steps. A problem
    is done when a step gains less than `tolerance` of the objective and hardly changes the held-out loss.
    """
    at = Problems.visit(design, some, found.strength[some], found.member[some], found.A[:, some])
    count = np.maximum(design.held_out(at.member), 1e-300)
    radius = np.full(len(some), np.inf)

    for step in range(most):
        d, gain, length = _direction(design, at, radius)
        gap, before = gain / at.f, at.held.copy()
        t = _along(design, at, d, gain)
        change = np.abs(at.held - before) / count
        done = (gap <= tolerance) & (change <= SETTLED) & (t == 1) & (length < radius)
        over = done | (step + 1 == most)
        radius = np.where(t < 1, 2 * np.maximum(t, 1e-6) * length, np.where(length < radius, radius, 4 * radius))
        if over.any():
            found.record(at.take(over), gap[over], done[over])
            if over.all():
                break
            at, radius, count = at.take(~over), radius[~over], count[~over]


def _along(design: Design, at: Problems, d: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Line search: move each problem by `t * d`, with the first t of 1, 2/5, ... that lowers its objective by
    some of the predicted `gain`; returns t `[P]`, 0 where none does.
    """
    t, left, old = np.ones(len(gain)), np.arange(len(gain)), at
    while len(left):
        A = old.A + d[:, left] * t[left][:, None]
        new = Problems.visit(design, old.number, old.strength, old.member, A)
        # a loss cannot be compared more finely than its rounding
        good = new.f <= old.f - 1e-4 * t[left] * gain[left] + 1e-14 * np.abs(old.f)
        at.put(left[good], new.take(good))
        left = left[~good]
        t[left] = np.where(t[left] > 1e-5, 0.4 * t[left], 0)
        left = left[t[left] > 0]
        old = at.take(left)
    return t


def _direction(design: Design, at: Problems, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's direction `[K, P, rank + 1]` by conjugate gradients in a trust region (Steihaug 1983) of `radius`
    `[P]` in the metric's norm: far from the optimum, where answers are certain and some wrong, the Hessian
    says little. Also returns, `[P]` each, the decrease that the quadratic model predicts, and the direction's
    length.
    """
    single = np.float32
    pull = np.where(np.arange(design.size) < design.size - 1, 1 / at.strength[:, None], 0).astype(single)
    diagonal = at.metric(design)
    hessian = Hessian(design, at.A, at.member)
    left = np.arange(len(at.f))
    # small gradients would underflow in single precision
    scale = np.maximum(np.abs(at.g).max(axis=(0, 2)), 1e-300)
    r = (at.g / -scale[:, None]).astype(single)
    x, out = np.zeros_like(r), np.zeros_like(r)
    v = r / diagonal
    size = _dot(r, v)
    enough = INEXACT**2 * size
    # the gain; in the metric, the squared length of x and its product with v (`own`: v's squared length)
    gain, length, along, gains, lengths = np.zeros((5, len(left)))
    own, edge = size, radius / scale

    for products in range(1, PRODUCTS + 1):
        bent = hessian.times(v) + pull * v
        curvature = np.maximum(_dot(v, bent), 1e-30)
        step = size / curvature
        reach = length + 2 * step * along + step**2 * own
        outside = reach >= edge**2
        if outside.any():  # stop at the edge of the trust region
            root = np.sqrt(np.maximum(along**2 + own * (np.minimum(edge, 1e15) ** 2 - length), 0))
            step = np.where(outside, (root - along) / np.maximum(own, 1e-30), step)
            reach = np.where(outside, edge**2, reach)
        length, stride = reach, step[:, None].astype(single)
        gain = gain + step * size - step**2 * curvature / 2
        x += stride * v
        r -= stride * bent
        z = r / diagonal
        before, size = size, _dot(r, z)

        over = (size <= enough) | outside | (products == PRODUCTS)
        if over.any():
            out[:, left[over]], gains[left[over]], lengths[left[over]] = x[:, over], gain[over], length[over]
            if over.all():
                break
            keep = ~over
            hessian.take(keep)
            left, pull, before, size, enough = left[keep], pull[keep], before[keep], size[keep], enough[keep]
            gain, length, along, own, edge, step = (a[keep] for a in (gain, length, along, own, edge, step))
            x, r, z, v, diagonal = (a[:, keep] for a in (x, r, z, v, diagonal))

        turn = size / before
        along, own = turn * (along + step * own), size + turn**2 * own
        v = z + turn[:, None].astype(single) * v
    return out * scale[:, None], gains * scale**2, np.sqrt(lengths) * scale


def solved(part: Design, at: Problems, g: np.ndarray, ratio: float) -> np.ndarray:
    """g `[K, P, rank + 1]` times the inverse Hessians of all rows, as a part of them has them: nearly.

    ratio: how many rows one row of the part stands for.
    """
    like = replace(at, g=g, strength=ratio * at.strength)
    radius = FURTHEST * np.sqrt(_dot(g, g / like.metric(part)))
    return np.asarray(_direction(part, like, radius)[0] / -ratio)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("kpd,kpd->p", a, b), np.float64)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The inner product of each problem's vectors, `float64 [P]`, summed in double precision."""
    return np.asarray(np.einsum("kpd,kpd->p", a, b, dtype=np.float64))
