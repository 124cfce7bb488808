"""L-BFGS for many logistic problems at once: one pass over the features per step, in single precision.

Where the classes overlap it takes a third of the time of Newton's steps. Its metric is diagonal in the
eigenbasis of `X^T X`, where the Hessian is close to `h * eigenvalue + 1 / C`, with `h` the mean of `p (1 - p)`.
The more certain the answers, the more `p (1 - p)` varies over rows, and the worse is the metric's estimate of the gap.

Where a part of the rows is in memory, its Hessian is the metric. It differs from that of all rows by the sampling
error alone, so a pass over all rows shrinks the gap by a factor of some tens (subsampled Newton; Byrd, Chin, Neveitt
and Nocedal 2011, SIAM Journal on Optimization 21, 977-995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featx.solvers.design import Design
from featx.solvers.newton import Batch, Problems, Solution, dot, solved

LONG = 60  # passes; Newton's method solves what needs more
MEMORY = 12  # pairs of steps and gradient changes that each problem keeps
SURE = 10  # times less curvature than at equal probabilities: beyond this the estimated gap is not trusted


def lbfgs(
    design: Design, found: Solution, some: np.ndarray, wanted: np.ndarray, part: Design | None, dtype: type
) -> None:
    """Minimise the problems numbered `some`, from their coordinates in `found`, to relative gaps of `wanted` `[P]`,
    in `LONG` passes, with arithmetic in `dtype`. part: some of the rows, in memory, in the same coordinates. Those
    whose gap cannot be estimated stop where they are, not converged.
    """
    A: np.ndarray = found.A[:, some].astype(dtype)
    at = Problems.visit(design, some, found.strength[some], found.member[some], A)
    noise = 4 * float(np.finfo(dtype).eps)  # rounding: a relative difference of losses below this means nothing
    pairs: list[_Pair] = []  # newest last
    t = np.ones(len(some))

    for passes in range(1, LONG + 1):
        d = _direction(design, part, at, pairs)
        slope = dot(at.g, d)
        sureness = np.ones(len(t)) if part else design.even / np.maximum(at.curvature.mean(axis=0), 1e-9)
        gap = -0.5 * slope * np.maximum(sureness, 1) / at.f
        done = (gap <= wanted[at.number]) & (sureness <= SURE)
        over = done | (sureness > SURE) | (t < 1e-4) | (passes == LONG)
        if over.any():
            found.record(at.take(over), gap[over], done[over])
            if over.all():
                break
            at, d, t, slope, pairs = at.take(~over), d[:, ~over], t[~over], slope[~over], [p.take(~over) for p in pairs]

        new = Problems.visit(design, at.number, at.strength, at.member, at.A + d * t[:, None].astype(dtype))
        good = new.f <= at.f + 1e-4 * t * slope + noise * np.abs(at.f)
        step, change = new.A - at.A, new.g - at.g
        along = dot(step, change)
        usable = good & (along > 0)
        rho: np.ndarray = np.where(usable, 1 / np.where(usable, along, 1), 0).astype(dtype)
        pairs = [*pairs, _Pair(step, change, rho)][-MEMORY:]
        # a refused step is halved, or cut to a tenth at most, as the parabola through both losses says
        with np.errstate(divide="ignore", invalid="ignore"):
            parabola = -slope * t / (2 * (new.f - at.f - slope * t)) * t
        t = np.where(good, 1.0, np.clip(np.nan_to_num(parabola, nan=0.0), 0.1 * t, 0.5 * t))
        at.put(np.flatnonzero(good), new.take(good))


@dataclass(frozen=True)
class _Pair(Batch):
    """A step and the gradient's change along it, `[K, P, rank + 1]`, and one over their product, `[P]`; 0 where
    the pair cannot be used.
    """

    step: np.ndarray
    change: np.ndarray
    rho: np.ndarray


def _direction(design: Design, part: Design | None, at: Problems, pairs: list[_Pair]) -> np.ndarray:
    """L-BFGS's two loops (Nocedal 1980) for all problems at once."""
    q = at.g.copy()
    alphas = []
    for pair in reversed(pairs):
        alpha = pair.rho * np.einsum("kpd,kpd->p", pair.step, q)
        q -= alpha[:, None] * pair.change
        alphas.append(alpha)
    q = q / at.metric(design) if part is None else solved(part, at, q, part.mean / design.mean).astype(q.dtype)
    for pair, alpha in zip(pairs, reversed(alphas), strict=True):
        beta = pair.rho * np.einsum("kpd,kpd->p", pair.change, q)
        q += (alpha - beta)[:, None] * pair.step
    return -q
