"""Owns the logistic optimum: all strengths and folds of a regularisation path in one matrix product a step.

The objective is scikit-learn's, `sum_i w_i * cross_entropy_i + ||W||^2 / (2 C)`, bias not penalised. Every
problem (a fold with a strength) runs its own L-BFGS; what they share is the pass over the features, which
reads X once for all of them. The first metric of each is diagonal in the eigenbasis of `X^T X`, where the
Hessian is close to `h * eigenvalue + 1 / C` with `h` the mean of `p (1 - p)` (Böhning 1992 bounds it by 1/2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from featx.solvers.design import Design

MEMORY = 12  # pairs of steps and gradient changes that each L-BFGS keeps
STATE = 1 << 29  # bytes of L-BFGS state at a time; more problems than fit are solved in turns
# Where almost nothing is left of the loss of a blind guess, gaps are measured against this share of it:
# single precision cannot tell optima apart there, and nobody can tell their answers apart.
NEAR_ZERO = 1e-2


@dataclass(frozen=True)
class Solution:
    """P minimised problems."""

    A: np.ndarray
    """Coordinates, `[K, P, rank + 1]`."""
    loss: np.ndarray
    """Objective, `float64 [P]`."""
    held: np.ndarray
    """Loss summed over held-out rows, `float64 [P]`."""
    gap: np.ndarray
    """Half the squared Newton decrement over the objective, `float64 [P]`: the relative distance to the
    optimum, estimated with L-BFGS's Hessian."""
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
    most: int = 300,
) -> Solution:
    """Minimise P problems, `strengths` `[P]` (scikit-learn's C) and `member` `int [P]` (the fold left out),
    from `start` `[K, P, rank + 1]`, whose dtype is the arithmetic's, to a relative gap of `tolerance`.
    """
    K, P, size = start.shape
    each = (2 * MEMORY + 8) * K * size * start.dtype.itemsize
    turn = max(1, STATE // each)
    parts = [
        _minimise(design, strengths[i : i + turn], member[i : i + turn], start[:, i : i + turn], tolerance, most)
        for i in range(0, P, turn)
    ]
    if len(parts) == 1:
        return parts[0]
    A = np.concatenate([p.A for p in parts], axis=1)
    each = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _EACH}
    return Solution(A, **each, passes=sum(p.passes for p in parts))


def _minimise(
    design: Design, strengths: np.ndarray, member: np.ndarray, start: np.ndarray, tolerance: float, most: int
) -> Solution:
    K, P, size = start.shape
    dtype = start.dtype
    noise = 4 * float(np.finfo(dtype).eps)  # a loss cannot be compared more finely than this share of it
    loss, heldout, gaps, bounds = (np.full(P, np.nan) for _ in range(4))
    result = Solution(start.copy(), loss, heldout, gaps, bounds, np.zeros(P, bool), 0)
    left = np.arange(P)  # the problems not yet done, by number
    A = start.copy()
    penalty = np.append(np.ones(size - 1), 0.0).astype(dtype)
    eigenvalues = np.append(design.eigenvalues, design.count)

    floor = NEAR_ZERO * design.null(member)
    even = 0.25 if design.several else (1 - 1 / K) / K

    def visit(A: np.ndarray) -> tuple[np.ndarray, ...]:
        seen = design.visit(A, member[left])
        inverse = (1 / strengths[left])[None, :, None].astype(dtype)
        pulled = A * penalty * inverse
        f = seen.loss + 0.5 * np.einsum("kpd,kpd->p", A, pulled, dtype=np.float64)
        # the metric: exact for a ridge, near enough elsewhere
        metric = np.maximum(seen.curvature, 1e-7)[:, :, None] * eigenvalues
        metric += penalty * inverse + 1e-12
        # The metric takes the curvature as even over rows. The surer the answers, the less it is, and the
        # more a decrement measured with it falls short.
        short = np.clip(even / np.maximum(seen.curvature.mean(axis=0), 1e-9), 1, 1e3)
        return f, seen.gradient + pulled, (1 / metric).astype(dtype), seen.held, short

    f, g, H, held, short = visit(A)
    # newest last; [K, P, size], [K, P, size], [P]
    steps: list[np.ndarray] = []
    changes: list[np.ndarray] = []
    rho: list[np.ndarray] = []
    t = np.ones(P)
    passes = 1
    while True:
        d = _direction(g, H, steps, changes, rho)
        slope = np.einsum("kpd,kpd->p", g, d, dtype=np.float64)
        gap = -0.5 * slope * short / np.maximum(f, floor)
        done = gap <= tolerance
        stuck = t < 1e-4
        over = done | stuck | (passes >= most)
        if over.any():
            where = left[over]
            result.A[:, where], result.loss[where], result.held[where] = A[:, over], f[over], held[over]
            result.gap[where], result.converged[where] = gap[over], done[over]
            square = np.einsum("kpd,d,kpd->p", g[:, over], penalty, g[:, over], dtype=np.float64)
            result.bound[where] = strengths[where] / 2 * square / np.maximum(f[over], 1e-300)
            keep = ~over
            left = left[keep]
            if not len(left):
                break
            A, g, H, d = A[:, keep], g[:, keep], H[:, keep], d[:, keep]
            f, held, short, t, slope, floor = (a[keep] for a in (f, held, short, t, slope, floor))
            steps, changes = [s[:, keep] for s in steps], [c[:, keep] for c in changes]
            rho = [r[keep] for r in rho]
        trial = A + d * t[None, :, None].astype(dtype)
        f2, g2, H2, held2, short2 = visit(trial)
        passes += 1
        good = f2 <= f + 1e-4 * t * slope + noise * np.abs(f)
        s, c = trial - A, g2 - g
        along = np.einsum("kpd,kpd->p", s, c, dtype=np.float64)
        usable = good & (along > 0)
        steps.append(s)
        changes.append(c)
        rho.append(np.where(usable, 1 / np.where(usable, along, 1), 0).astype(dtype))
        if len(steps) > MEMORY:
            del steps[0], changes[0], rho[0]
        pick = good[None, :, None]
        A, g, H = np.where(pick, trial, A), np.where(pick, g2, g), np.where(pick, H2, H)
        f, held, short = (np.where(good, a, b) for a, b in ((f2, f), (held2, held), (short2, short)))
        # a step refused is halved, or more where the parabola through it says so
        with np.errstate(divide="ignore", invalid="ignore"):
            parabola = -slope * t / (2 * (f2 - f - slope * t)) * t
        t = np.where(good, 1.0, np.clip(np.nan_to_num(parabola, nan=0.0), 0.1 * t, 0.5 * t))
    return replace(result, passes=passes)


def _direction(
    g: np.ndarray, H: np.ndarray, steps: list[np.ndarray], changes: list[np.ndarray], rho: list[np.ndarray]
) -> np.ndarray:
    """L-BFGS's two loops (Nocedal 1980) for all problems at once; a pair with rho 0 is skipped."""
    q = g.copy()
    alphas = []
    for s, c, r in zip(reversed(steps), reversed(changes), reversed(rho), strict=True):
        alpha = r * np.einsum("kpd,kpd->p", s, q)
        q -= alpha[None, :, None] * c
        alphas.append(alpha)
    q *= H
    for s, c, r, alpha in zip(steps, changes, rho, reversed(alphas), strict=True):
        beta = r * np.einsum("kpd,kpd->p", c, q)
        q += (alpha - beta)[None, :, None] * s
    return -q


class Path:
    """The problems of a path, every strength (`[S]`, ascending) with every member (`int [M]`), solved in
    whatever order is asked for.

    A new strength starts on a curve through its solved neighbours. What is interpolated, over log C, is
    `A * (h * eigenvalue + 1 / C)`, which a ridge keeps constant, so most of a path starts next to its
    optimum.
    """

    def __init__(
        self,
        design: Design,
        strengths: np.ndarray,
        members: np.ndarray,
        *,
        tolerance: float = 1e-5,
        most: int = 200,
    ) -> None:
        self.design, self.strengths, self.members = design, strengths, members
        self.tolerance, self.most = tolerance, most
        even = 0.25 if design.several else (1 - 1 / design.columns) / design.columns
        self._metric = (even * np.append(design.eigenvalues, 0.0) + 1 / strengths[:, None]).astype(np.float32)
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
        known, x = sorted(self.solved), np.log(self.strengths)
        start = np.zeros((K, len(level), M, size), np.float32)
        for column, i in enumerate(level):
            for j, share in _neighbours(x, known, i):
                start[:, column] += np.float32(share) * self.solved[j].A * self._metric[j]
            start[:, column] /= self._metric[i]
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

    def whole(self) -> None:
        """Solve all of it, coarse to fine."""
        last = len(self.strengths) - 1
        for stride in (8, 4, 2, 1):
            self.solve([*range(0, last + 1, stride), last])

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
