"""Owns products with the Hessians of many logistic problems at once, in single precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from featx.solvers.design import Design, spread
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
        kept = not design.streamed and design.torch is None and design.count * self.at[..., 0].size * 4 <= CACHE
        self.shares = np.empty((*self.at.shape[:2], design.count), np.float32) if kept else None
        self.known = False  # whether `shares` holds what `_shares` gives

    def take(self, kept: np.ndarray) -> None:
        """Go on with some of the problems, `bool [P]`."""
        self.member, self.at = self.member[kept], self.at[:, kept]
        if self.shares is not None:
            self.shares = self.shares[:, kept]

    def times(self, V: np.ndarray) -> np.ndarray:
        """The products with V, `float32 [K, P, rank + 1]`."""
        design, (K, P, _) = self.design, V.shape
        turned = np.ascontiguousarray(design.for_rows(V).reshape(K * P, -1))
        at = np.ascontiguousarray(self.at.reshape(K * P, -1))
        if design.torch:
            product = design.torch.product(at, turned, self.member)
        else:
            product = np.sum(
                spread(
                    lambda rows, total: self._block(rows, at, turned, total),
                    design.count,
                    design.step(K * P),
                    lambda: np.zeros_like(turned),
                    design.count * turned.size,
                ),
                axis=0,
            )
            self.known = self.shares is not None
        return design.from_rows(product.reshape(K, P, -1))

    def _block(self, rows: slice, at: np.ndarray, turned: np.ndarray, total: np.ndarray) -> None:
        design = self.design
        Z = np.asarray(design.single[rows], np.float32)
        if self.known:
            share = self.shares[:, :, rows]  # type: ignore[index]
        else:
            share = self._shares(at, rows, Z)
            if self.shares is not None:
                self.shares[:, :, rows] = share
        U = (turned @ Z.T).reshape(share.shape)
        if not design.several:
            weight = np.maximum(design.weights[rows], 1e-30).astype(np.float32)
            for _ in range(2):  # the second time takes what rounding left: all there is, where one is nearly sure
                U -= np.einsum("kpb,kpb->pb", share, U) / weight
        U *= share
        total += U.reshape(-1, len(Z)) @ Z

    def _shares(self, at: np.ndarray, rows: slice, Z: np.ndarray) -> Any:
        """Each row's weight, 0 where it is held out, times its probabilities, or `p (1 - p)` for sigmoids."""
        design, member = self.design, self.member
        L = (at @ Z.T).reshape(-1, len(member), len(Z))
        if design.several:
            np.exp(np.maximum(-np.abs(L, out=L), FLOOR, out=L), out=L)
            L /= (1 + L) ** 2
        else:
            L -= L.max(axis=0)
            np.exp(np.maximum(L, FLOOR, out=L), out=L)
            L /= L.sum(axis=0)
        L *= design.trained(rows, member).astype(np.float32)
        return L
