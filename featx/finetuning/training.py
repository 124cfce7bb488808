"""The training loop, visible from top to bottom: batches, steps, measuring, keeping the best epoch."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from featx.backbones.backbone import Backbone
from featx.errors import TrainingError
from featx.files import write_atomic
from featx.finetuning import layers
from featx.finetuning.augment import Draws, seed_of
from featx.finetuning.checkpoints import Checkpoints, Progress
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig
from featx.text import some

METRICS = "metrics.jsonl"
MEASURE_BATCH = 32


class Inputs(Protocol):
    """Gives the batches: `pixels.Pictures`, or `prefix.Activations` for a cut network. `then`: the next batch."""

    def train(self, numbers: np.ndarray, draws: Draws, then: np.ndarray | None = None) -> Tensor: ...
    def held(self, numbers: np.ndarray, then: np.ndarray | None = None) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class Setup:
    """All that the loop works with."""

    settings: FinetuneConfig
    folder: Path
    world: World
    backbone: Backbone
    network: layers.Tuned
    model: nn.Module
    """`network` itself, or wrapped for several processes or compiled."""
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    ids: list[str]
    """Ids of the training images, in the order of `targets`."""
    targets: Tensor
    """`int64 [N]`, the training images' classes, on the device."""
    held: Tensor
    """`int64 [M]`, classes of the images that select, on the device."""
    weights: Tensor
    """`float32 [C]`, how much an image of each class counts."""
    class_names: tuple[str, ...]
    checkpoints: Checkpoints
    micro: int
    """Most images in one forward pass on this process."""
    save_seconds: float = 600.0
    """Seconds between checkpoints within an epoch; every epoch is saved at its end."""

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits, `float32 [B, C]`, of a forward pass in the precision and memory layout of the settings."""
        if self.settings.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.precision]
        with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
            logits: Tensor = model(images).float()
        return logits


def train(setup: Setup, progress: Progress) -> None:
    """Train from where `progress` stands to the last epoch, or until `patience` epochs bring no better one."""
    settings, world, count = setup.settings, setup.world, len(setup.targets)
    steps, patience = -(-count // settings.batch_size), settings.patience or settings.epochs
    scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
    if progress.scale:
        scaler.load_state_dict(progress.scale)
    if not progress.history:
        progress.history.append({"epoch": 0, **measure(setup)})
        keep(setup, progress)

    done = progress.epoch * steps + progress.step
    quiet = None if world.leads else True  # the leader's bar alone, and only on a terminal
    with tqdm(total=settings.epochs * steps, initial=done, desc="fine-tune", unit=" steps", disable=quiet) as bar:
        while progress.epoch < min(settings.epochs, progress.best_epoch + patience):
            begin, first = time.perf_counter(), progress.step
            sums = train_epoch(setup, progress, scaler, steps, bar)

            loss_sum, right_sum, weight_sum = world.added(tuple(sums.tolist()))
            world.share(list(setup.network.buffers()))
            trained = time.perf_counter() - begin
            row = {
                "epoch": progress.epoch + 1,
                "loss": loss_sum / weight_sum,
                "accuracy": right_sum / count,
                "lr": {g["name"]: g["lr"] for g in setup.optimizer.param_groups},
                **measure(setup),
                "images_per_second": round(count * (1 - first / steps) / trained, 1),
                "seconds": round(time.perf_counter() - begin, 3),
            }
            progress.history.append(row)
            progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, (0.0, 0.0, 0.0)
            progress.scale = scaler.state_dict()
            keep(setup, progress)

            shown = {"epoch": progress.epoch, "loss": f"{row['loss']:.4f}", "accuracy": f"{row['accuracy']:.4f}"}
            if "held_accuracy" in row:
                shown[settings.select] = f"{row['held_accuracy']:.4f}"
            bar.set_postfix(shown)


def train_epoch(
    setup: Setup, progress: Progress, scaler: torch.amp.GradScaler, steps: int, bar: tqdm[NoReturn]
) -> Tensor:
    """Do the remaining steps of an epoch, saving now and then -> sums of loss, hits and weights."""
    seed, world, epoch, count = setup.settings.seed, setup.world, progress.epoch, len(setup.targets)
    draws = Draws.of(count, seed, epoch)
    order = np.random.default_rng(seed_of(seed, "order", epoch)).permutation(count)
    # as equal as can be: no last batch of one image, which batch norm cannot take
    batches = np.array_split(order, steps)
    sums = torch.tensor(progress.sums, dtype=torch.float64, device=world.device)
    former: tuple[Tensor, np.ndarray] | None = None
    saved = time.monotonic()
    setup.network.train()

    for step in range(progress.step, steps):
        loss = train_step(setup, progress, scaler, draws, batches, step, sums)
        if former is not None:  # one step late, so that a GPU need not wait for each
            _check(setup, *former, epoch)
        former = loss, batches[step]
        bar.update()

        if time.monotonic() - saved > setup.save_seconds and step + 1 < steps:
            _check(setup, *former, epoch)
            progress.step, progress.sums = step + 1, tuple(sums.tolist())
            progress.scale = scaler.state_dict()
            if world.leads and world.size == 1:
                setup.checkpoints.save(setup.network, setup.optimizer, progress)
            saved = time.monotonic()

    if former is not None:
        _check(setup, *former, epoch)
    return sums


def train_step(
    setup: Setup,
    progress: Progress,
    scaler: torch.amp.GradScaler,
    draws: Draws,
    batches: list[np.ndarray],
    step: int,
    sums: Tensor,
) -> Tensor:
    """One step of the optimizer on one batch, in parts where it is large; adds to `sums`. Returns the loss."""
    settings, world = setup.settings, setup.world
    at = progress.epoch * len(batches) + step
    for group in setup.optimizer.param_groups:
        group["lr"] = group["base"] * settings.factor(at, len(batches))
    total = setup.weights[setup.targets[torch.from_numpy(batches[step]).to(world.device)]].sum()
    loss = torch.zeros((), device=world.device)
    setup.optimizer.zero_grad(set_to_none=True)

    for numbers, then, last in _parts(setup, batches, step, progress.micro):
        images = setup.inputs.train(numbers, draws, then)
        y = setup.targets[torch.from_numpy(numbers).to(world.device)]
        # dropout's draws follow from the step, so that a resumed run repeats them
        torch.manual_seed(seed_of(settings.seed, "dropout", at, world.rank, int(numbers[0])))
        # several processes exchange gradients in the last part of a batch only
        no_sync = getattr(setup.model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if last else no_sync():
            logits = setup.logits(setup.model, images)
            share = F.cross_entropy(logits, y, setup.weights, reduction="sum", label_smoothing=settings.label_smoothing)
            # several processes' gradients are averaged, and the loss is a mean over all images
            scaled: Tensor = scaler.scale(share / total * world.size)
            torch.autograd.backward(scaled)
        loss = loss + share.detach()
        right = (logits.detach().argmax(dim=1) == y).double()
        sums += torch.stack([share.detach().double(), right.sum(), setup.weights[y].double().sum()])

    scaler.step(setup.optimizer)
    scaler.update()
    return loss


def measure(setup: Setup) -> dict[str, float]:
    """Loss and accuracy on the centre crops of the images that select; nothing where there are none."""
    count, world = len(setup.held), setup.world
    if not count:
        return {}

    setup.network.eval()
    loss = right = 0.0
    mine = np.arange(count)[world.rank :: world.size]
    parts = [mine[i : i + MEASURE_BATCH] for i in range(0, len(mine), MEASURE_BATCH)]
    with torch.no_grad():
        for numbers, then in zip_longest(parts, parts[1:]):
            logits = setup.logits(setup.network, setup.inputs.held(numbers, then))
            y = setup.held[torch.from_numpy(numbers).to(world.device)]
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += float((logits.argmax(dim=1) == y).sum())

    loss, right = world.added((loss, right))
    if not math.isfinite(loss):
        raise TrainingError(
            "the network gives NaN on the images that select; the checkpoint before is kept. Lower the "
            "learning rate, or use fp32"
        )
    return {"held_loss": loss / count, "held_accuracy": right / count}


def keep(setup: Setup, progress: Progress) -> None:
    """Note whether the epoch is the best so far, and save it; the first of equals is kept."""
    row, better = progress.history[-1], False
    if setup.settings.select == "last":
        progress.best_epoch = progress.epoch
    else:
        score = (row["held_accuracy"], -row["held_loss"])
        better = score > progress.best_score
        if better:
            progress.best_score, progress.best_epoch = score, progress.epoch
    if setup.world.leads:
        setup.checkpoints.save(setup.network, setup.optimizer, progress, best=better)
        text = "".join(json.dumps(row) + "\n" for row in progress.history)
        write_atomic(setup.folder / METRICS, text.encode())
    setup.world.wait()


def _parts(
    setup: Setup, batches: list[np.ndarray], step: int, micro: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None, bool]]:
    """This process's share of a batch in parts of at most `micro`, what follows each, and whether it is the last."""

    def split(batch: np.ndarray) -> list[np.ndarray]:
        mine = batch[setup.world.rank :: setup.world.size]
        return np.array_split(mine, max(1, -(-len(mine) // micro)))

    parts = split(batches[step])
    later = [split(batch)[0] for batch in batches[step + 1 : step + 2]]
    for numbers, then in zip_longest(parts, [*parts[1:], *later]):
        yield numbers, then, numbers is parts[-1]


def _check(setup: Setup, loss: Tensor, numbers: np.ndarray, epoch: int) -> None:
    if not math.isfinite(float(loss)):
        names = some([setup.ids[i] for i in numbers.tolist()], 8)
        raise TrainingError(
            f"the loss became NaN or infinite in epoch {epoch + 1}, on the batch of {names}; the last good "
            f"checkpoint is kept in {setup.checkpoints.folder}. Lower the learning rate, or use fp32"
        )
