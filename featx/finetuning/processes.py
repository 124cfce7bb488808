"""Several training processes that work as one, started by `torchrun`. Imports no torch before it is needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from featx.devices import choose_device

if TYPE_CHECKING:
    import torch

# One process decodes, caches and measures while the others wait for it.
PATIENCE = timedelta(hours=12)


def rank() -> int:
    """This process's number among those that `torchrun` started. The leader, 0, writes a run's folder."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes `torchrun` started; 1 where it started none."""
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

        device: `auto` (the process's own GPU, else the CPU), `cpu`, `cuda` or `cuda:1`. Raises `FeatxError`.
        """
        import torch

        size = processes()
        if device == "cuda" or (device == "auto" and size > 1 and torch.cuda.is_available()):
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        place = torch.device(choose_device(device))
        if size > 1:
            import torch.distributed as dist

            if place.type == "cuda":
                torch.cuda.set_device(place)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(rank(), size, place)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body in the leader, then in the others: they find what it stored."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def added(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Sum the values over all processes."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def share(self, tensors: list[torch.Tensor]) -> None:
        """Copy the leader's tensors to all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, 0)
