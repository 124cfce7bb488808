"""Products with the Hessians of many logistic problems at once, in passes over the features."""

from __future__ import annotations

import numpy as np

from featx.solvers.design import Array, Design, taken_back
from featx.solvers.training import FLOOR

CACHE = 1 << 28  # bytes of probabilities that a Hessian keeps between products


class Hessian:
    """The Hessians of P problems' losses at A `[K, P, rank + 1]`, without the penalty.

    Newton's directions need few digits, so single precision is enough, if small probabilities are not
    rounded to 0: where the classes are linearly separable, they carry all of the curvature.
    """

    def __init__(self, design: Design, A: np.ndarray, member: np.ndarray) -> None:
        self.design, self.member, self.at = design, member, design.for_rows(A.astype(np.float32))
        kept = not design.streamed and design.count * A[..., 0].size * 4 <= CACHE
        shape = (*A.shape[:2], design.count)
        self.shares: Array = design.xp.empty(shape, dtype=design.xp.float32, **design.place) if kept else None
        self.known = False  # whether `shares` has been filled in
        self._place()

    def take(self, kept: np.ndarray) -> None:
        """Keep some of the problems, `bool [P]`."""
        self.member, self.at = self.member[kept], self.at[:, kept]
        self.shares = None if self.shares is None else self.shares[:, kept]
        self._place()

    def _place(self) -> None:
        self.flat, self.members = self.design.flat(self.at), self.design.placed(self.member)

    def times(self, V: np.ndarray) -> np.ndarray:
        """The Hessians' products with V, `float32 [K, P, rank + 1]`."""
        design = self.design
        turned = design.flat(design.for_rows(V))
        product = design.spread(
            lambda rows, total: self._block(rows, turned, total), lambda: design.xp.zeros_like(turned), len(turned)
        )
        self.known = self.shares is not None
        return design.from_rows(taken_back(product).reshape(*V.shape[:2], -1))

    def _block(self, rows: slice, turned: Array, total: Array) -> None:
        design, xp, member = self.design, self.design.xp, self.members
        Z = design.block(rows, turned)
        if self.known:
            share = self.shares[:, :, rows]
        else:
            share = self._shares((self.flat @ Z.T).reshape(-1, len(member), len(Z)), rows, member)
            if self.shares is not None:
                self.shares[:, :, rows] = share

        U = (turned @ Z.T).reshape(share.shape)
        if not design.several:
            weight = design.placed(xp.clip(design.weights[rows], 1e-30, None), U)
            for _ in range(2):  # the second time removes what rounding left: all of it, if a class is nearly certain
                U -= xp.einsum("kpb,kpb->pb", share, U) / weight
        U *= share
        total += U.reshape(-1, len(Z)) @ Z

    def _shares(self, L: Array, rows: slice, member: Array) -> Array:
        """Each row's weight, 0 where it is held out, times its probabilities, or `p (1 - p)` for sigmoids; L:
        logits `[K, P, B]`.
        """
        xp = self.design.xp
        if self.design.several:
            xp.exp(xp.clip(-abs(L), FLOOR, None, out=L), out=L)
            L /= (1 + L) ** 2
        else:
            L -= xp.amax(L, 0)
            xp.exp(xp.clip(L, FLOOR, None, out=L), out=L)
            L /= L.sum(0)
        L *= self.design.placed(self.design.trained(rows, member), L)
        return L
