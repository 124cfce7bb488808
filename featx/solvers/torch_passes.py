"""Owns the solver's passes on a GPU: what `Design.visit` computes, in torch, on rows that stay there."""

from __future__ import annotations

import numpy as np
import torch

from featx.features import Rows
from featx.solvers.training import FLOOR

SCRATCH = 1 << 26  # numbers per block of logits


class TorchPasses:
    """Passes over the rows of a `Design` on `device`; they stay there where they take less than half of its memory."""

    def __init__(
        self,
        rows: dict[torch.dtype, Rows],
        y: np.ndarray,
        fold: np.ndarray,
        weights: np.ndarray,
        scored: np.ndarray,
        *,
        several: bool,
        device: str,
    ) -> None:
        """rows: `[N, width]` for each arithmetic, float32 and float64; the others `[N]`, as `Design` has them.
        several: a sigmoid for each column of `y` `[N, K]`, else a softmax.
        """
        self.rows, self.several, self.device = rows, several, torch.device(device)
        self.count = len(fold)
        self.y = torch.from_numpy(np.ascontiguousarray(y)).to(self.device)
        self.fold, self.weights, self.scored = (torch.from_numpy(a).to(self.device) for a in (fold, weights, scored))
        self._kept: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, W: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For weights W `[K * P, width]` and the folds left out, `int [P]`: loss `float64 [P]`, held-out loss
        `float64 [P]`, gradient `[K * P, width]`, and the sum of `p (1 - p)`, `float64 [K, P]`.
        """
        P = len(member)
        K = len(W) // P
        weight, left_out = torch.from_numpy(W).to(self.device), torch.from_numpy(member).to(self.device)
        loss, held = (torch.zeros(P, dtype=torch.float64, device=self.device) for _ in range(2))
        curvature = torch.zeros((K, P), dtype=torch.float64, device=self.device)
        gradient = torch.zeros_like(weight)
        step = max(64, SCRATCH // len(W))
        for start in range(0, self.count, step):
            rows = slice(start, min(start + step, self.count))
            Z = self._block(rows, weight.dtype)
            L = (weight @ Z.T).view(K, P, len(Z))  # logits, then probabilities, then residuals
            each = self._sigmoid(L, rows, curvature) if self.several else self._softmax(L, rows, curvature)
            fold = self.fold[rows]
            inside = (fold != left_out[:, None]) | (fold < 0)
            trained = inside * self.weights[rows]
            loss += (each * trained).sum(dim=1, dtype=torch.float64)
            held += (each * (~inside & self.scored[rows]) * self.weights[rows]).sum(dim=1, dtype=torch.float64)
            L *= trained.to(L.dtype)
            gradient += L.view(K * P, -1) @ Z
        return loss.cpu().numpy(), held.cpu().numpy(), gradient.cpu().numpy(), curvature.cpu().numpy()

    def product(self, W: np.ndarray, V: np.ndarray, member: np.ndarray) -> np.ndarray:
        """The products of the losses' Hessians at W with V, `[K * P, width]` each, without the penalty."""
        P = len(member)
        weight, along, left_out = (torch.from_numpy(a).to(self.device) for a in (W, V, member))
        total = torch.zeros_like(along)
        step = max(64, SCRATCH // len(W))
        for start in range(0, self.count, step):
            rows = slice(start, min(start + step, self.count))
            Z = self._block(rows, weight.dtype)
            share, U = ((A @ Z.T).view(-1, P, len(Z)) for A in (weight, along))
            if self.several:
                share = share.sigmoid() * (-share).sigmoid()
            else:
                share = share.softmax(dim=0)
                for _ in range(2):  # the second time takes what rounding left
                    U -= (share * U).sum(dim=0)
            fold = self.fold[rows]
            U *= share * (((fold != left_out[:, None]) | (fold < 0)) * self.weights[rows]).to(U.dtype)
            total += U.view(len(V), -1) @ Z
        return total.cpu().numpy()

    def _block(self, rows: slice, dtype: torch.dtype) -> torch.Tensor:
        whole = self.rows[dtype]
        if dtype not in self._kept and isinstance(whole, np.ndarray) and self._fits(whole.size * dtype.itemsize):
            self._kept[dtype] = torch.from_numpy(whole).to(self.device, dtype)
        if dtype in self._kept:
            return self._kept[dtype][rows]
        return torch.from_numpy(np.ascontiguousarray(whole[rows])).to(self.device, dtype)

    def _fits(self, size: int) -> bool:
        return self.device.type != "cuda" or size < torch.cuda.mem_get_info(self.device)[0] // 2

    def _softmax(self, L: torch.Tensor, rows: slice, curvature: torch.Tensor) -> torch.Tensor:
        y = self.y[rows].expand(1, L.shape[1], -1)
        L -= L.amax(dim=0)
        own = L.gather(0, y)[0]
        L.clamp_(min=FLOOR).exp_()
        total = L.sum(dim=0)
        L /= total
        curvature += (L - L * L).sum(dim=2, dtype=torch.float64)
        L.scatter_add_(0, y, -torch.ones_like(own)[None])
        return total.log() - own

    def _sigmoid(self, L: torch.Tensor, rows: slice, curvature: torch.Tensor) -> torch.Tensor:
        target = self.y[rows].T[:, None].to(L.dtype)
        signed = L * (1 - 2 * target)  # the loss is log(1 + exp(signed))
        loss = (torch.log1p(torch.exp(-signed.abs())) + signed.clamp(min=0)).sum(dim=0)
        L.sigmoid_()
        curvature += (L - L * L).sum(dim=2, dtype=torch.float64)
        L -= target
        return loss
