"""Fine-tuning from end to end: preparing, training, resuming, and saving the result in the run's folder."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from featx.backbones.request import BackboneRequest
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import Features
from featx.files import write_atomic
from featx.finetuning.checkpoints import Progress, on_cpu
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
    """The result of fine-tuning. The run's folder holds `model.safetensors` and `metrics.jsonl` too."""

    request: BackboneRequest
    """The tuned backbone, for `load_backbone` and `extract`."""
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

    features: from `hold_out`. head: fitted on their `train` rows; None starts from a random one (`init`). config:
    starts the run's folder by `featx.runs.start`, once all settings are checked; None where that was done before.
    The same call continues where a killed one stopped, and on the CPU ends with the same bits. Prints what is
    trained on standard error before it starts. Leaves torch's random generators as they were.

    When memory runs out, training goes back to the last checkpoint and passes half as many images at a
    time, adding up their gradients: the same arithmetic, except for batch norm, which sees the smaller parts.

    Raises `TrainingError`: unknown or frozen groups, a loss that is NaN (the batch is named, the last good
    checkpoint kept), a checkpoint of another configuration, a full disk, one image that does not fit.
    """
    keep_freed()
    world = World.join(device)
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        setup = prepare(extraction, features, head, settings, folder, world, workers)
        with contextlib.closing(setup.inputs):
            if config is not None and world.leads:
                start(folder, config, overwrite=overwrite)
            return tune(setup)


def tune(setup: Setup) -> Finetuned:
    """Train from the last checkpoint, if there is one, to the end; again from there when memory runs out."""
    begin = time.perf_counter()
    while True:
        progress = setup.checkpoints.load(setup.network, setup.optimizer)
        if progress is None:
            progress = Progress(micro=setup.micro)
        elif setup.world.leads:
            step = f" and {progress.step} steps of the next" if progress.step else ""
            tqdm.write(f"continuing from the checkpoint after epoch {progress.epoch}{step}", file=sys.stderr)
        progress.micro = min(progress.micro, setup.micro)
        try:
            train(setup, progress)
            break
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            halve(setup, progress, error)

    if setup.settings.select != "last":
        setup.checkpoints.load_best(setup.network, progress)
    return finish(setup, progress, time.perf_counter() - begin)


def halve(setup: Setup, progress: Progress, error: RuntimeError) -> None:
    """Prepare to go on with half as many images at a time. Raises `TrainingError` where that is impossible."""
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
        f"out of memory with {progress.micro} images at a time: continuing from the last checkpoint with "
        f"{setup.micro}, the same batch in more parts",
        file=sys.stderr,
    )


def finish(setup: Setup, progress: Progress, seconds: float) -> Finetuned:
    """Write the tuned network, and describe how it was trained."""
    backbone, info, path = setup.backbone, setup.backbone.info, setup.folder / MODEL
    if setup.world.leads:
        # the network's own classifier is unchanged: the file fits the architecture, the new head has its own file
        tensors = on_cpu({**backbone.network.state_dict(), **backbone.module.network.state_dict()})
        try:
            write_atomic(path, save(tensors, {"backbone": info.name}))
        except OSError as error:
            raise TrainingError(
                f"{path} could not be saved ({error.strerror or error}); the checkpoints are kept. Make room "
                "and run the same command again"
            ) from error
    setup.world.wait()

    overrides = tuple(vars(info.preprocess).items())
    request = BackboneRequest(info.name.removeprefix("custom/"), str(path), info.layer, preprocess=overrides)
    history = {
        "mode": setup.settings.mode,
        "select": setup.settings.select,
        "best_epoch": progress.best_epoch,
        "epochs": progress.history,
        "groups": [{"name": g.name, "parameters": g.size, "lr": g.lr} for g in setup.network.groups],
        "trained_on": len(setup.targets),
        "selected_on": len(setup.held),
        "micro_batch": progress.micro,
        "device": str(setup.world.device),
        "processes": setup.world.size,
        "seconds": round(seconds, 3),
    }
    layer = on_cpu(setup.network.head.state_dict())
    head = Head(layer["weight"].float().numpy(), layer["bias"].float().numpy(), setup.class_names)
    return Finetuned(request, head, history)
