"""Products with the Hessians of many logistic problems at once, in single precision."""

from __future__ import annotations

import numpy as np

from featx.solvers.design import Array, Design, taken_back
from featx.solvers.training import FLOOR

CACHE = 1 << 28  # bytes of probabilities that are kept between products


class Hessian:
    """The Hessians of P problems' losses at A `[K, P, rank + 1]`, without the penalty.

    Newton's directions need few digits, so single precision is enough, if small probabilities are not
    rounded away: they are all the curvature that there is where planes part the classes.
    """

    def __init__(self, design: Design, A: np.ndarray, member: np.ndarray) -> None:
        self.design, self.member = design, member
        self.at = design.for_rows(A.astype(np.float32))
        kept = not design.streamed and design.count * A[..., 0].size * 4 <= CACHE
        shape = (*A.shape[:2], design.count)
        self.shares: Array = design.xp.empty(shape, dtype=design.xp.float32, **design.place) if kept else None
        self.known = False  # whether `shares` holds what `_shares` gives
        self._place()

    def _place(self) -> None:
        self.flat, self.members = self.design.flat(self.at), self.design.placed(self.member)

    def take(self, kept: np.ndarray) -> None:
        """Go on with some of the problems, `bool [P]`."""
        self.member, self.at = self.member[kept], self.at[:, kept]
        if self.shares is not None:
            self.shares = self.shares[:, kept]
        self._place()

    def times(self, V: np.ndarray) -> np.ndarray:
        """The products with V, `float32 [K, P, rank + 1]`."""
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
            for _ in range(2):  # the second time takes what rounding left: all there is, where one is nearly sure
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
