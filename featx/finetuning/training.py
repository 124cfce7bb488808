"""Owns the training loop, visible from top to bottom: batches, steps, measuring, keeping the best epoch."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from featx.backbones.backbone import Backbone
from featx.errors import TrainingError
from featx.files import write_atomic
from featx.finetuning import layers
from featx.finetuning.augment import seed_of
from featx.finetuning.checkpoints import Checkpoints, Progress
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig

METRICS = "metrics.jsonl"
# A long epoch is saved so often, in seconds; every epoch is saved at its end.
SAVE_SECONDS = 600.0
MEASURE_BATCH = 32


class Inputs(Protocol):
    """Where batches come from: `pixels.Pictures`, or `prefix.Activations` for a cut network."""

    def train(self, rows: np.ndarray, epoch: int, then: np.ndarray | None = None) -> Tensor: ...
    def held(self, rows: np.ndarray, then: np.ndarray | None = None) -> Tensor: ...
    def close(self) -> None: ...


@dataclass(eq=False)
class Setup:
    """All that the loop uses and does not change, but for what it trains."""

    settings: FinetuneConfig
    folder: Path
    world: World
    backbone: Backbone
    network: layers.Tuned
    model: nn.Module
    """`network` itself, or wrapped for several processes or compiled."""
    groups: list[layers.Group]
    optimizer: torch.optim.Optimizer
    inputs: Inputs
    ids: list[str]
    """Of the training images, in the order of `targets`."""
    targets: Tensor
    """`int64 [N]`, the training images' classes, on the device."""
    held: Tensor
    """`int64 [M]`, of the images that select."""
    weights: Tensor
    """`float32 [C]`, how much an image of each class counts."""
    class_names: tuple[str, ...]
    checkpoints: Checkpoints
    micro: int
    """Most images in one forward pass on this process."""

    def train_mode(self) -> None:
        layers.train_mode(self.network, self.backbone.groups, self.groups, self.settings.freeze_norm)


def train(setup: Setup, progress: Progress) -> None:
    """The loop: from where `progress` stands to the last epoch, or until no better one comes."""
    settings, world, count = setup.settings, setup.world, len(setup.targets)
    steps = -(-count // settings.batch_size)
    scaler = torch.amp.GradScaler(world.device.type, enabled=settings.precision == "fp16")
    if progress.scale:
        scaler.load_state_dict(progress.scale)
    if not progress.history:
        progress.history.append({"epoch": 0, **measure(setup)})
        keep(setup, progress, 0)

    done = progress.epoch * steps + progress.step
    bar = tqdm(total=settings.epochs * steps, initial=done, desc="fine-tune", unit=" steps", disable=_quiet(world))
    with contextlib.closing(bar):
        while progress.epoch < settings.epochs and not _stale(settings, progress):
            begin, first = time.perf_counter(), progress.step
            sums = train_epoch(setup, progress, scaler, steps, bar)

            loss_sum, right_sum, weight_sum = world.added(tuple(sums.tolist()))
            world.share([b for b in setup.network.buffers()])
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
            keep(setup, progress, progress.epoch)

            shown = {"epoch": progress.epoch, "loss": f"{row['loss']:.4f}", "accuracy": f"{row['accuracy']:.4f}"}
            if "held_accuracy" in row:
                shown[settings.select] = f"{row['held_accuracy']:.4f}"
            bar.set_postfix(shown)


def train_epoch(
    setup: Setup, progress: Progress, scaler: torch.amp.GradScaler, steps: int, bar: tqdm[NoReturn]
) -> Tensor:
    """The steps of an epoch not done yet, saved now and then -> sums of loss, hits and weights."""
    settings, world, epoch = setup.settings, setup.world, progress.epoch
    order = np.random.default_rng(seed_of(settings.seed, "order", epoch)).permutation(len(setup.targets))
    # as equal as can be: no last batch of one image, which batch norm cannot take
    batches = np.array_split(order, steps)
    sums = torch.tensor(progress.sums, dtype=torch.float64, device=world.device)
    former: tuple[Tensor, np.ndarray] | None = None
    saved = time.monotonic()
    setup.train_mode()

    for step in range(progress.step, steps):
        loss = train_step(setup, progress, scaler, batches, step, sums)
        if former is not None:  # one step late, so that a GPU need not wait for each
            _check(setup, *former, epoch)
        former = loss, batches[step]
        bar.update()

        if time.monotonic() - saved > SAVE_SECONDS and step + 1 < steps:
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
    setup: Setup, progress: Progress, scaler: torch.amp.GradScaler, batches: list[np.ndarray], step: int, sums: Tensor
) -> Tensor:
    """One step of the optimizer on one batch, in parts where it is large; adds to `sums`. Returns the loss."""
    settings, world, epoch = setup.settings, setup.world, progress.epoch
    at = epoch * len(batches) + step
    for group in setup.optimizer.param_groups:
        group["lr"] = group["base"] * settings.factor(at, len(batches))
    total = setup.weights[setup.targets[torch.from_numpy(batches[step]).to(world.device)]].sum()
    loss = torch.zeros((), device=world.device)
    setup.optimizer.zero_grad(set_to_none=True)

    for rows, then, last in _parts(setup, batches, step, progress.micro):
        images = setup.inputs.train(rows, epoch, then)
        if settings.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        y = setup.targets[torch.from_numpy(rows).to(world.device)]
        # dropout's draws follow from the step, so that a resumed run repeats them
        torch.manual_seed(seed_of(settings.seed, "dropout", at, world.rank, int(rows[0])))
        with _synchronised(setup.model, last):
            with _autocast(setup):
                logits = setup.model(images).float()
            share = F.cross_entropy(logits, y, setup.weights, reduction="sum", label_smoothing=settings.label_smoothing)
            # several processes' gradients are averaged, and the loss is a mean over all images
            scaler.scale(share / total * world.size).backward()
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
    parts = np.split(mine, range(MEASURE_BATCH, len(mine), MEASURE_BATCH))
    with torch.no_grad():
        for number, rows in enumerate(parts):
            if not len(rows):
                continue
            images = setup.inputs.held(rows, parts[number + 1] if number + 1 < len(parts) else None)
            if setup.settings.channels_last and images.ndim == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            y = setup.held[torch.from_numpy(rows).to(world.device)]
            with _autocast(setup):
                logits = setup.network(images).float()
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += float((logits.argmax(dim=1) == y).sum())
    loss, right = world.added((loss, right))
    if not math.isfinite(loss):
        raise TrainingError(
            "the network gives NaN on the images that select; the checkpoint before is kept. Lower the "
            "learning rate, or use fp32"
        )
    return {"held_loss": loss / count, "held_accuracy": right / count}


def keep(setup: Setup, progress: Progress, epoch: int) -> None:
    """Note whether an epoch is the best so far, and save it; the first of equals is kept."""
    row = progress.history[-1]
    best = setup.settings.select == "last"
    if not best:
        score = (row["held_accuracy"], -row["held_loss"])
        best = score > progress.best_score
        if best:
            progress.best_score = score
    if best:
        progress.best_epoch = epoch
    if setup.world.leads:
        setup.checkpoints.save(setup.network, setup.optimizer, progress, best=best and setup.settings.select != "last")
        text = "".join(json.dumps(row) + "\n" for row in progress.history)
        write_atomic(setup.folder / METRICS, text.encode())
    setup.world.wait()


def _parts(
    setup: Setup, batches: list[np.ndarray], step: int, micro: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None, bool]]:
    """This process's share of a batch in parts of at most `micro`, what follows each, and whether it is the last."""
    world = setup.world

    def split(batch: np.ndarray) -> list[np.ndarray]:
        mine = batch[world.rank :: world.size]
        return np.array_split(mine, max(1, -(-len(mine) // micro)))

    parts = split(batches[step])
    following = split(batches[step + 1])[0] if step + 1 < len(batches) else None
    for number, rows in enumerate(parts):
        last = number + 1 == len(parts)
        yield rows, following if last else parts[number + 1], last


def _synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Several processes exchange gradients in the last part of a batch alone."""
    if last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()  # type: ignore[operator]


def _autocast(setup: Setup) -> torch.autocast:
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setup.settings.precision]
    return torch.autocast(setup.world.device.type, dtype, enabled=dtype is not None)


def _check(setup: Setup, loss: Tensor, rows: np.ndarray, epoch: int) -> None:
    if not math.isfinite(float(loss)):
        names = [setup.ids[i] for i in rows.tolist()]
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise TrainingError(
            f"the loss became NaN or infinite in epoch {epoch + 1}, on the batch of {some}; the last good "
            f"checkpoint is kept in {setup.checkpoints.folder}. Lower the learning rate, or use fp32"
        )


def _stale(settings: FinetuneConfig, progress: Progress) -> bool:
    return settings.patience is not None and progress.epoch - progress.best_epoch >= settings.patience


def _quiet(world: World) -> bool | None:
    """Progress of the leader alone, and only on a terminal."""
    return None if world.leads else True
