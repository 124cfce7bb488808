"""What fine-tuning starts from: which images train, which layers at which rates, and the inputs of the network."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from featx.backbones.backbone import Backbone
from featx.backbones.loading import load_backbone
from featx.devices import available_threads
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import Features, hash_fraction
from featx.finetuning import layers, prefix
from featx.finetuning.checkpoints import Checkpoints
from featx.finetuning.pixels import Material, Pictures
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.training import Inputs, Setup
from featx.head import Head, columns
from featx.runs import own_folder
from featx.state import FILTERS

HOLDOUT = "holdout"


def hold_out(features: Features, settings: FinetuneConfig) -> Features:
    """Move the training images that will choose the epoch to the split `holdout`, where `settings.select` wants that.

    Fit the head that fine-tuning starts from on the `train` rows of what this returns: epoch 0 is then
    measured on images it has not seen either. Chosen by content hash, with other bits than the validation split:
    duplicates stay together, and the same image is always on the same side. A class keeps at least one
    training image. Raises `TrainingError` where no image is left to measure on, and for several labels.
    """
    _check_labels(features)
    if settings.select != HOLDOUT:
        return features

    splits = features.splits.astype("U7")
    train = splits == "train"
    held = train & (hash_fraction(features.keys[:, 8:]) < settings.holdout)
    for label in np.unique(features.y[held]):
        if not (train & ~held & (features.y == label)).any():
            held &= features.y != label
    if not held.any():
        raise TrainingError(
            f"{int(train.sum())} training images leave none to choose the epoch by; use select last, or val"
        )

    splits[held] = HOLDOUT
    return replace(features, splits=splits)


def prepare(
    extraction: Extraction,
    features: Features,
    head: Head | None,
    settings: FinetuneConfig,
    folder: Path,
    world: World,
    workers: int | None,
) -> Setup:
    """Load the network, decide what is trained, and prepare the images. Raises `TrainingError`."""
    _check_labels(features)
    if settings.precision == "fp16" and world.device.type == "cpu":
        raise TrainingError("fp16 is for GPUs; on a CPU use bf16 or fp32")
    if settings.init == "random":
        head = None
    elif head is None:
        raise TrainingError("init is fitted and there is no fitted head; use init random")

    backbone = _load(extraction, settings)
    info = backbone.info
    train, held, classes, class_names = _choose(features, head, settings)
    _check_batches(len(train), settings.batch_size, world.size)
    network = _build(backbone, head, len(class_names), settings)
    if world.leads:
        tqdm.write(layers.format_table(network.groups), file=sys.stderr)

    material = Material(extraction, settings, world.device, workers or available_threads(), train, held)
    inputs = _open_inputs(material, network, backbone, world)
    network.to(world.device)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    targets = torch.from_numpy(classes[train]).to(world.device)
    identity = {"weights": info.weights_digest, "layer": info.layer, "images": features.digest, "processes": world.size}
    return Setup(
        settings=settings,
        folder=folder,
        world=world,
        backbone=backbone,
        network=network,
        model=_wrap(network, settings, world),
        optimizer=_make_optimizer(network, settings),
        inputs=inputs,
        ids=[features.ids[i] for i in train],
        targets=targets,
        held=torch.from_numpy(classes[held]).to(world.device),
        weights=_weigh_classes(targets, class_names, settings).to(world.device),
        class_names=class_names,
        checkpoints=Checkpoints(own_folder(folder, "checkpoints"), {**settings.to_dict(), **identity}),
        micro=-(-settings.batch_size // (settings.accumulate * world.size)),
    )


def _check_labels(features: Features) -> None:
    if features.y.ndim != 1:
        raise TrainingError("fine-tuning needs one label per image; fit a head for several")


def _choose(
    features: Features, head: Head | None, settings: FinetuneConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Row numbers of the images that train and that select, every row's class (-1: none), and the class names."""
    train = np.flatnonzero((features.splits == "train") & (features.y >= 0))
    seen = tuple(features.class_names[i] for i in np.unique(features.y[train]))
    class_names = seen if head is None else head.class_names
    if len(seen) < 2:
        raise TrainingError(f"training needs images of two classes; there are {len(train)} images of {seen}")
    if missing := sorted(set(seen) - set(class_names)):
        raise TrainingError(f"the head does not know {', '.join(missing)}; fit it on these images")

    classes = np.append(columns(features.class_names, class_names), -1)[features.y]
    held = np.flatnonzero((features.splits == settings.select) & (classes >= 0))
    if not len(held) and settings.select != "last":
        raise TrainingError(
            f"there are no images in {settings.select!r} to choose the epoch by; use select last, or val"
        )
    return train, held, classes, class_names


def _check_batches(count: int, batch_size: int, processes: int) -> None:
    smallest = count // -(-count // batch_size)  # batches differ by one image
    if smallest < processes:  # raised by every process: one without images would leave the others waiting for it
        raise TrainingError(
            f"{count} training images in batches of {batch_size} give some batches {smallest} images, "
            f"which are too few for {processes} processes; use a larger batch size, or fewer processes"
        )


def _load(extraction: Extraction, settings: FinetuneConfig) -> Backbone:
    request = extraction.request
    if settings.mode == "scratch":
        overrides = tuple(vars(extraction.info.preprocess).items())
        request = replace(request, weights="random", seed=settings.seed, preprocess=overrides)
    backbone = load_backbone(request)
    if len(backbone.info.row_shape) != 1:
        raise TrainingError(f"layer {request.layer} gives {list(backbone.info.row_shape)}, not one row of features")
    return backbone


def _build(backbone: Backbone, head: Head | None, classes: int, settings: FinetuneConfig) -> layers.Tuned:
    """The network with its last layer; decides which layers are trained."""
    last = layers.make_linear(head, backbone.info.row_shape[0], classes, settings.seed)
    network = layers.Tuned(backbone.module, last, freeze_norm=settings.freeze_norm)
    network.requires_grad_(True)
    unreached = layers.find_unreached(network, backbone.info.preprocess.crop)
    layers.plan(network, backbone.groups, layers.find_replaced(backbone), settings, unreached)
    return network


def _open_inputs(material: Material, network: layers.Tuned, backbone: Backbone, world: World) -> Inputs:
    """The decoded images; or, with a cached prefix, its activations, for a network that is cut there."""
    if not material.settings.cache_prefix:
        return Pictures(material)

    part = prefix.cut(network, backbone.info.preprocess.crop)
    first = next(group.name for group in network.groups if group.lr is not None)
    spec = replace(backbone.info.spec(), layer=f"before {first}", precision="fp32", dtype="float16")
    with world.leader_first():
        inputs = prefix.Activations(material, part, spec)
    for half in part.suffix.parts.values():
        half.to(world.device)
    network.suffix = part.suffix
    return inputs


def _weigh_classes(targets: Tensor, class_names: tuple[str, ...], settings: FinetuneConfig) -> Tensor:
    """`float32 [C]`."""
    given = settings.class_weight or {}
    if given == "balanced":
        counts = torch.bincount(targets.cpu(), minlength=len(class_names)).float()
        return len(targets) / (len(class_names) * counts.clamp_min(1))
    assert isinstance(given, dict)
    if given.keys() - set(class_names) or min(given.values(), default=1) <= 0:
        raise TrainingError(f"class weights are above 0, for classes among {', '.join(class_names[:20])}; got {given}")
    return torch.tensor([given.get(name, 1.0) for name in class_names], dtype=torch.float32)


def _make_optimizer(network: layers.Tuned, settings: FinetuneConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trained groups, each with its rate; vectors (biases, norms) do not decay."""
    named = dict(network.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": chosen, "lr": group.lr, "base": group.lr, "name": group.name, "weight_decay": decay}
        for group in network.groups
        if group.lr is not None
        for decay, matrices in ((settings.weight_decay, True), (0.0, False))
        if (chosen := [named[name] for name in group.parameters if (named[name].ndim > 1) == matrices])
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum, fused=True)


def _wrap(network: layers.Tuned, settings: FinetuneConfig, world: World) -> nn.Module:
    model: nn.Module = network
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world.size > 1:
        # statistics of batch norm stay each process's own; the leader's are measured and saved
        with FILTERS, warnings.catch_warnings():  # newer releases have another name for it, which older ones lack
            warnings.simplefilter("ignore", FutureWarning)
            model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    return model
