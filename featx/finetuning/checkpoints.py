"""Checkpoints of fine-tuning: safetensors files, written aside and renamed, that belong to one configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from featx.errors import TrainingError
from featx.files import MOST_CHECKPOINT_BYTES, make_folder, read_plain, sweep, write_atomic
from featx.records import TENSOR_SEAL, convert, tensor_metadata, warn_older
from featx.runs import CHECKPOINT
from featx.seals import escape, seal
from featx.text import from_json

LAST = "last.safetensors"


@dataclass
class Progress:
    """How far training has come. With the tensors and the seed this decides all that follows.

    No state of a random generator is needed: every draw follows from the seed and from what it is for
    (`featx.finetuning.training`), and the learning rate from the step.
    """

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps done in the epoch that follows."""
    best_epoch: int = 0
    """The epoch whose network is kept; 0 is the start."""
    best_score: tuple[float, float] = (-1.0, 0.0)
    """Accuracy and negated loss of that epoch, on the images that select."""
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Loss, right answers and total weight (which divides the loss) so far in the epoch that is under way."""
    micro: int = 0
    """Most images in one forward pass; shrinks when memory runs out."""
    scale: dict[str, float] = field(default_factory=dict)
    """The state of fp16's gradient scaler."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per epoch, the start first."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """`checkpoints/last.safetensors` and `checkpoints/best-<epoch>.safetensors` of a run.

    `last` holds network, optimizer and `Progress`, and names the `best` that it belongs with; a `best` is
    written before the `last` that names it, and removed after the next. So a kill at any moment leaves a
    matching pair.
    """

    folder: Path
    configuration: dict[str, Any]
    """JSON values; a checkpoint is loaded only where they are the same."""
    write: Callable[[Path, bytes], None] = write_atomic

    def save(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, best: bool = False
    ) -> None:
        """Save the state; `best`: its network is the one to keep. Raises `TrainingError` on a full disk."""
        tensors = on_cpu(network.state_dict(), "network.")
        if best:
            self._write(self._best(progress.best_epoch), tensors, {})

        for number, slots in optimizer.state_dict()["state"].items():
            kept = {k: v for k, v in slots.items() if isinstance(v, Tensor)}
            tensors |= on_cpu(kept, f"optimizer.{number}.")
        self._write(self.folder / LAST, tensors, {"progress": escape(json.dumps(asdict(progress)))})

        for old in self.folder.iterdir():
            if CHECKPOINT.fullmatch(old.name) and old.name not in (LAST, self._best(progress.best_epoch).name):
                old.unlink(missing_ok=True)

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Bring network and optimizer to the last checkpoint; None where there is none.

        Raises `TrainingError` for a checkpoint of another configuration, and for a damaged one.
        """
        path = self.folder / LAST
        if not path.is_file():
            return None
        tensors, progress = self._restore(path, network)
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            slots = _under(tensors, f"optimizer.{number}.")
            # in the parameter's own memory layout, so that the arithmetic is the same to the last bit
            state[number] = {
                k: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape and v.ndim else v
                for k, v in slots.items()
            }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {k: v for k, v in state.items() if v}, "param_groups": groups})
        return progress

    def load_best(self, network: nn.Module, progress: Progress) -> None:
        """Bring the network to the epoch that is kept. Raises as `load` does."""
        self._restore(self._best(progress.best_epoch), network)

    def _best(self, epoch: int) -> Path:
        return self.folder / f"best-{epoch:04d}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        try:
            make_folder(self.folder)
            sweep(self.folder)
            metadata |= {"configuration": escape(json.dumps(self.configuration))}
            self.write(path, seal(save(tensors, metadata | TENSOR_SEAL)))
        except OSError as error:
            kept = "the one before is kept" if path.is_file() else "there is none yet"
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            raise TrainingError(
                f"the checkpoint {path} ({size / 1e6:,.0f} MB) could not be saved ({error.strerror or error}); "
                f"{kept}. Make room and run the same command again"
            ) from error

    def _restore(self, path: Path, network: nn.Module) -> tuple[dict[str, Tensor], Progress]:
        """Read a checkpoint whole, and bring the network to it."""
        try:
            data = read_plain(path, MOST_CHECKPOINT_BYTES)
            metadata, sealed = tensor_metadata(data)
            if not sealed:
                warn_older(path)
            ours = json.loads(json.dumps(self.configuration))
            stated = from_json(metadata["configuration"]) if "configuration" in metadata or sealed else ours
            theirs = convert(stated, dict[str, Any])
            progress, tensors = convert(from_json(metadata.get("progress", "{}")), Progress), load(data)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise TrainingError(
                f"the checkpoint {path} cannot be read ({error}); start over with --overwrite"
            ) from error

        different = [n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n)]
        if different:
            shown = ", ".join(f"{n} {theirs.get(n)!r} -> {ours.get(n)!r}" for n in different[:4])
            raise TrainingError(
                f"{path} is a checkpoint of another configuration ({shown}); "
                "start over with --overwrite, or give another --output"
            )
        try:
            network.load_state_dict(_under(tensors, "network."))
        except RuntimeError as error:
            raise TrainingError(f"the checkpoint {path} holds another network; start over with --overwrite") from error
        return tensors, progress


def on_cpu(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Copies on the CPU: safetensors takes no tensors that share memory, as tied weights do."""
    return {prefix + name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
