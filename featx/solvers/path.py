"""The logistic optimum: all strengths and folds of a regularisation path in shared passes over the features.

The objective is scikit-learn's, `sum_i w_i * cross_entropy_i + ||W||^2 / (2 C)`, bias not penalised. Every
problem (a fold with a strength) takes its own steps; a pass reads X once for all of them. Where rows far outnumber
weights, L-BFGS in single precision is accurate enough; Newton's method solves the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featx.solvers.design import Design
from featx.solvers.hessian import CACHE
from featx.solvers.lbfgs import lbfgs
from featx.solvers.newton import SETTLED, Solution, newton

STATE = 1 << 29  # bytes of vectors at a time; more problems than fit are solved in turns
ROUGH = 1e-3  # the relative gap of a part's solutions: they are only a start
NEARER = 3e-7  # the aim with a part, where a pass gains so much that one more tells neighbouring strengths apart
SINGLE = 1e-6  # the smallest relative gap to aim at in single precision


def minimise(
    design: Design,
    strengths: np.ndarray,
    member: np.ndarray,
    start: np.ndarray,
    *,
    tolerance: float,
    most: int = 100,
    part: Design | None = None,
) -> Solution:
    """Minimise P problems, `strengths` `[P]` (scikit-learn's C) and `member` `int [P]` (the fold left out),
    from `start` `[K, P, rank + 1]`, to a relative gap of `tolerance` and until the held-out loss hardly changes.
    part: some of the rows, in memory, in the same coordinates; with it a pass gains more.
    """
    found = Solution.unsolved(strengths * design.mean, member, start)
    K = design.columns
    many = max(1, STATE // (200 * K * design.size))
    wanted = _wanted(design, member, tolerance)
    single = wanted >= SINGLE
    if part:
        wanted = np.minimum(wanted, NEARER)
    for which, dtype in ((single, np.float32), (~single & (part is not None), np.float64)):
        for some in _parts(np.flatnonzero(which), many):
            lbfgs(design, found, some, wanted, part, dtype)

    if not design.streamed:
        many = min(many, max(1, CACHE // (4 * K * design.count)))
    for some in _parts(np.flatnonzero(~found.converged), many):
        newton(design, found, some, tolerance, most)
    return found


def climb(design: Design, strength: float, members: np.ndarray) -> np.ndarray:
    """A start for the first strength, `[K, M, rank + 1]`: zeros up to C = 1, else solutions of smaller C, each from
    the one before.

    Where regularisation is weak and some answers are wrong, a distant start leads Newton's steps astray.
    """
    A = np.zeros((design.columns, len(members), design.size))
    for rung in range(int(np.ceil(np.log(max(strength, 1)) / np.log(100))), 0, -1):
        A = minimise(design, np.full(len(members), strength / 100**rung), members, A, tolerance=1e-3).A
    return A


def _parts(which: np.ndarray, many: int) -> list[np.ndarray]:
    return [which[i : i + many] for i in range(0, len(which), many)]


def _wanted(design: Design, member: np.ndarray, tolerance: float) -> np.ndarray:
    """The relative gaps `[P]` at which held-out losses are right to `SETTLED` per row, at most `tolerance`.

    By Cauchy and Schwarz a gap of g moves the loss of n held-out rows by at most `sqrt(2 g f * h' H^-1 h)`, h
    its gradient. For rows like the N trained on, `h' H^-1 h` is about n / N times the number of weights (the
    Hessian is the gradients' covariance), and f about N.
    """
    count = design.held_out(member)
    settled = SETTLED * (10 if design.partial else 1)  # what a part says is only a start
    near = settled**2 * count / (2 * design.columns * design.size)
    return np.where(count > 0, np.minimum(near, tolerance), tolerance)


class Path:
    """The problems of a path, every strength (`[S]`, ascending) with every member (`int [M]`, the fold
    left out), solved in any order.

    A new strength starts from its solved neighbours: `A * (h * eigenvalue + 1 / C)` is interpolated over log C.
    Ridge regression keeps this product constant, so most of a path starts next to its optimum. Beyond the
    largest C solved, A itself is extrapolated linearly: where the classes are linearly separable, weights
    grow with log C.

    With a `coarse` path it starts from the part's solution, plus what the part's of the nearest solved strength lacks:
    most of the sampling error is the same at both.
    """

    def __init__(self, design: Design, strengths: np.ndarray, members: np.ndarray, *, tolerance: float = 1e-5) -> None:
        self.design, self.strengths, self.members, self.tolerance = design, strengths, members, tolerance
        self.coarse: Path | None = None
        """The path of a part of the rows, in memory, once begun there."""
        self.near = 0
        self._metric = design.even * np.append(design.eigenvalues, 0.0) + 1 / (design.mean * strengths[:, None])
        self._metric[:, -1] = 1.0
        self.solved: dict[int, Solution] = {}
        """By the index of the strength: a problem per member."""
        self.passes = 0

    def begin(self, part: Design) -> dict[str, Any]:
        """Search where to begin on a part of the rows, in memory, in the same coordinates; returns what was found.

        The best strength is sought as scikit-learn's C, which depends little on the number of rows: weights are as
        large, whoever measures them. Each solution on all rows then starts from the part's of the same penalty per row.
        """
        own = self.strengths * (self.design.mean / part.mean)
        found = Path(part, own, self.members, tolerance=ROUGH)
        self.near = found.search()
        self.coarse = Path(part, self.strengths, self.members, tolerance=ROUGH)
        return {"rows": part.count, "strength": float(self.strengths[self.near])}

    def solve(self, level: list[int]) -> None:
        """Solve the strengths with these indices together; those already solved are skipped."""
        level = [i for i in level if i not in self.solved]
        if not level:
            return
        M, K = len(self.members), self.design.columns
        start = np.stack([self._start(i) for i in level], axis=1).reshape(K, len(level) * M, -1)
        before = self.design.passes
        strengths, members = np.repeat(self.strengths[level], M), np.tile(self.members, len(level))
        part = self.coarse.design if self.coarse else None
        found = minimise(self.design, strengths, members, start, tolerance=self.tolerance, part=part)

        self.passes += self.design.passes - before
        for column, i in enumerate(level):
            self.solved[i] = found.take(slice(column * M, (column + 1) * M))

    def _start(self, i: int) -> np.ndarray:
        if self.coarse:
            self.coarse.solve([i])
            j = min(self.solved, key=lambda j: abs(j - i), default=i)
            lacking = self.solved[j].A - self.coarse.solved[j].A if j != i else 0
            return np.asarray(self.coarse.solved[i].A + lacking)
        if not self.solved:
            return climb(self.design, float(self.strengths[i]), self.members)
        known, x = sorted(self.solved), np.log(self.strengths)
        if len(known) > 1 and i > known[-1]:
            before, last = known[-2:]
            share = (x[i] - x[last]) / (x[last] - x[before])
            return np.asarray((1 + share) * self.solved[last].A - share * self.solved[before].A)
        parts = [share * self.solved[j].A * self._metric[j] for j, share in _neighbours(x, known, i)]
        return np.asarray(np.sum(parts, axis=0) / self._metric[i])

    def whole(self) -> None:
        """Solve all strengths, coarse to fine."""
        last = len(self.strengths) - 1
        for i in [*range(0, last + 1, 8), last]:
            self.solve([i])
        for stride in (4, 2, 1):
            self.solve([*range(0, last + 1, stride)])

    def search(self) -> int:
        """The index of the strength with the least held-out loss; solves only what it takes to find it.

        Every eighth strength, from the strongest regularisation on, until the loss rises; then those half-way
        around the best, three times. The loss is assumed to have one minimum at these distances. With a `coarse`
        path: the part's best and its neighbours, and on from there until the best has both neighbours solved.
        """
        last = len(self.strengths) - 1
        if self.coarse:
            best = self.near
            while True:
                self.solve([i for i in range(best - 1, best + 2) if 0 <= i <= last])
                if best == self.best:
                    return best
                best = self.best
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
        """The index of the solved strength with the least held-out loss, converged ones first."""
        return min(self.solved, key=lambda i: (not self.solved[i].converged.all(), self.held(i), i))

    def held(self, i: int) -> float:
        """A strength's loss, summed over all held-out rows."""
        return float(self.solved[i].held.sum())


def _neighbours(x: np.ndarray, known: list[int], i: int) -> list[tuple[int, float]]:
    """Lagrange weights at x[i] of its two solved neighbours on each side; beyond the ends, the nearest alone."""
    if not known[0] < i < known[-1]:
        return [(known[0] if i < known[0] else known[-1], 1.0)]
    place = int(np.searchsorted(known, i))
    near = known[max(0, place - 2) : place + 2]
    return [(j, float(np.prod([(x[i] - x[k]) / (x[j] - x[k]) for k in near if k != j]))) for j in near]
