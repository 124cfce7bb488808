"""Owns fine-tuning from end to end: when it starts again, and what it leaves in a run."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from featx.backbones.backbone import Backbone
from featx.backbones.request import BackboneRequest
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import Features
from featx.files import write_atomic
from featx.finetuning.checkpoints import Progress
from featx.finetuning.memory import keep_freed
from featx.finetuning.preparing import prepare
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.training import Setup, train
from featx.head import Head
from featx.runs import RunConfig, start

MODEL = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What fine-tuning gives. The run's folder holds its `model.safetensors` and `metrics.jsonl`."""

    request: BackboneRequest
    """The tuned backbone: `load_backbone` and `extract` take it like any other."""
    head: Head
    history: dict[str, Any]
    """JSON values: `epochs` (as in metrics.jsonl), `best_epoch`, `groups`, `select`, counts, seconds."""


def finetune(
    extraction: Extraction,
    features: Features,
    head: Head | None,
    settings: FinetuneConfig,
    folder: Path,
    device: str = "auto",
    *,
    config: RunConfig | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Finetuned:
    """Train a backbone's layers and its head; write the run's network, metrics and checkpoints.

    features: of `hold_out`. head: fitted on its `train` rows; None starts from a random one (`init`). config:
    what the run's folder is started with, by `featx.runs.start`, once all that was asked for is checked; None
    where it was started before. The same call continues where a killed one stopped, and on the CPU ends with
    the same bits. What is trained is said on standard error before it starts. torch's random generators are
    left as they were.

    When memory runs out, training goes back to the last checkpoint and passes half as many images at a
    time, adding up their gradients: the same arithmetic, but for batch norm, which sees the smaller parts.

    Raises `TrainingError`: unknown or frozen groups, a loss that is NaN (the batch is named, the last good
    checkpoint kept), a checkpoint of another configuration, a full disk, one image that does not fit.
    """
    keep_freed()
    world = World.join(device)
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        setup = prepare(extraction, features, head, settings, folder, world, workers)
        try:
            if config is not None and world.leads:
                start(folder, config, overwrite=overwrite)
            begin = time.perf_counter()
            while True:
                progress = setup.checkpoints.load(setup.network, setup.optimizer)
                if progress is None:
                    progress = Progress(micro=settings.batch_size)
                elif world.leads:
                    step = f" and {progress.step} steps of the next" if progress.step else ""
                    tqdm.write(f"going on from the checkpoint after epoch {progress.epoch}{step}", file=sys.stderr)
                progress.micro = min(progress.micro, setup.micro)
                try:
                    train(setup, progress)
                    break
                except RuntimeError as error:
                    if not _out_of_memory(error):
                        raise
                    halve(setup, progress, error)
            if settings.select != "last":
                setup.checkpoints.load_best(setup.network, progress)
            return finish(setup, progress, time.perf_counter() - begin)
        finally:
            setup.inputs.close()


def halve(setup: Setup, progress: Progress, error: RuntimeError) -> None:
    """Make ready to go on with half as many images at a time. Raises `TrainingError` where that is none."""
    setup.optimizer.zero_grad(set_to_none=True)
    if progress.micro <= 1 or setup.world.size > 1:
        what = "one image does not fit" if progress.micro <= 1 else "several processes cannot go back together"
        raise TrainingError(
            f"out of memory with {progress.micro} images at a time, and {what} ({str(error).splitlines()[0]}); "
            "use a smaller batch size or more accumulate, freeze more, or bf16"
        ) from error
    setup.micro = progress.micro // 2
    if setup.world.device.type == "cuda":
        torch.cuda.empty_cache()
    tqdm.write(
        f"out of memory with {progress.micro} images at a time: going on from the last checkpoint with "
        f"{setup.micro}, the same batch in more parts",
        file=sys.stderr,
    )


def finish(setup: Setup, progress: Progress, seconds: float) -> Finetuned:
    """Write the tuned network, and say how it came to be."""
    settings, backbone, network = setup.settings, setup.backbone, setup.network
    layer = network.head
    head = Head(
        layer.weight.detach().float().cpu().numpy().copy(),
        layer.bias.detach().float().cpu().numpy().copy(),
        setup.class_names,
    )
    path = setup.folder / MODEL
    if setup.world.leads:
        from safetensors.torch import save

        # the network's own classifier stays as it was: the file fits the architecture, the head lies beside it
        state = {**backbone.network.state_dict(), **backbone.module.network.state_dict()}
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
        try:
            write_atomic(path, save(tensors, {"backbone": backbone.info.name}))
        except OSError as error:
            raise TrainingError(
                f"{path} could not be saved ({error.strerror or error}); the checkpoints are kept. Make room "
                "and run the same command again"
            ) from error
    setup.world.wait()
    history = {
        "mode": settings.mode,
        "select": settings.select,
        "best_epoch": progress.best_epoch,
        "epochs": progress.history,
        "groups": [{"name": g.name, "parameters": g.size, "lr": g.lr} for g in setup.groups],
        "trained_on": len(setup.targets),
        "selected_on": len(setup.held),
        "micro_batch": progress.micro,
        "device": str(setup.world.device),
        "processes": setup.world.size,
        "seconds": round(seconds, 3),
    }
    return Finetuned(tuned_request(backbone, path), head, history)


def tuned_request(backbone: Backbone, path: os.PathLike[str]) -> BackboneRequest:
    """How a tuned network is loaded: its file, seen through the preprocessing that it was trained with."""
    overrides = tuple(vars(backbone.info.preprocess).items())
    return BackboneRequest(
        name=backbone.info.name.removeprefix("custom/"),
        weights=os.fspath(path),
        layer=backbone.info.layer,
        preprocess=overrides,
    )


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
