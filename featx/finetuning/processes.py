"""Owns how several training processes work as one, where `torchrun` started them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from featx.errors import TrainingError

if TYPE_CHECKING:
    import torch

# One process decodes, caches and measures while the others wait for it.
PATIENCE = timedelta(hours=12)


def rank() -> int:
    """This process's number among those that `torchrun` started; 0 where it did not. Imports no torch.

    The leader, 0, writes a run's folder; the others only compute.
    """
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes `torchrun` started; 1 where it did not. Imports no torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> World:
        """Find the device, and meet the other processes if there are any.

        device: `auto` (the process's own GPU, else the CPU), `cpu`, `cuda` or `cuda:1`. Raises `TrainingError`.
        """
        import torch

        size, local = processes(), int(os.environ.get("LOCAL_RANK", "0"))
        name = device
        if device in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{local}" if size > 1 else "cuda:0"
        elif device == "auto":
            name = "cpu"
        try:
            place = torch.device(name)
        except RuntimeError:
            raise TrainingError(f"device is auto, cpu, cuda or cuda:N, not {device!r}") from None
        if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
            raise TrainingError(f"there is no device {name}: torch finds {torch.cuda.device_count()} GPUs")
        if size > 1:
            import torch.distributed as dist

            if place.type == "cuda":
                torch.cuda.set_device(place)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
            size = dist.get_world_size()
        return cls(rank(), size, place)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def added(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """The sums over all processes."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def share(self, tensors: list[torch.Tensor]) -> None:
        """Give the leader's tensors to all, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)
