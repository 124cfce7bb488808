"""Owns what fine-tuning starts from: which images, which layers at which rates, and all that `train` is given."""

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

from featx.backbones.loading import load_backbone
from featx.devices import available_threads
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import Features, hash_fraction
from featx.finetuning import layers, prefix
from featx.finetuning.augment import Augmentation
from featx.finetuning.checkpoints import Checkpoints
from featx.finetuning.pixels import Pictures
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.training import Inputs, Setup
from featx.head import Head, columns
from featx.runs import own_folder

HOLDOUT = "holdout"


def hold_out(features: Features, settings: FinetuneConfig) -> Features:
    """Name the training images that will choose the epoch `holdout`, where `settings.select` wants that.

    Fit the head that fine-tuning starts from on the `train` rows of what this returns: epoch 0 is then
    measured on images it has not seen either. By content hash, with other bits than the validation split:
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
    """Load the network, decide what is trained, and get the images ready."""
    _check_labels(features)
    if settings.precision == "fp16" and world.device.type == "cpu":
        raise TrainingError("fp16 is for GPUs; on a CPU use bf16 or fp32")
    request = extraction.request
    if settings.mode == "scratch":
        request = replace(request, weights="random", seed=settings.seed, preprocess=_overrides(extraction))
    backbone = load_backbone(request)
    trunk = backbone.module
    if len(backbone.info.row_shape) != 1:
        raise TrainingError(f"layer {request.layer} gives {list(backbone.info.row_shape)}, not one row of features")
    if settings.init == "random":
        head = None
    elif head is None:
        raise TrainingError("init is fitted and there is no fitted head; use init random")
    train, held, class_names = _rows(features, head, settings)
    smallest = len(train) // -(-len(train) // settings.batch_size)  # batches differ by one image
    if smallest < world.size:  # said by every process: one without images would leave the others waiting for it
        raise TrainingError(
            f"{len(train)} training images in batches of {settings.batch_size} give some batches {smallest} images, "
            f"which are too few for {world.size} processes; use a larger batch size, or fewer processes"
        )
    layer = layers.linear(head, backbone.info.row_shape[0], len(class_names), settings.seed)
    network = layers.Tuned(trunk, layer)
    network.requires_grad_(True)
    crop = extraction.info.preprocess.crop
    freeze_until = settings.freeze_until
    if settings.mode == "partial" and freeze_until is None and not settings.freeze:
        freeze_until = backbone.groups[-1][0]
    planned = layers.plan(
        network,
        backbone.groups,
        layers.replaced_names(backbone),
        lr=settings.rate,
        lrs=settings.lrs,
        layer_decay=settings.layer_decay,
        freeze_until=freeze_until,
        freeze=settings.freeze,
        unreached=layers.unreached(network, crop),
    )
    if world.leads:
        tqdm.write(layers.table(planned), file=sys.stderr)

    threads = workers or available_threads()
    augmentation = Augmentation.parse(settings.augmentation)
    views = settings.views if augmentation.geometry == "views" else 0
    first = next(group.name for group in planned if group.lr is not None)

    def set_mode() -> None:
        layers.train_mode(network, backbone.groups, planned, settings.freeze_norm)

    inputs: Inputs
    if settings.cache_prefix:
        part = prefix.cut(network, set_mode, crop)
        for fill in (True, False):  # the leader fills the cache, then everybody opens it
            if fill == world.leads:
                inputs = prefix.Activations(
                    extraction,
                    train,
                    held,
                    part,
                    first,
                    backbone.info.spec(),
                    views=views,
                    limit=settings.prefix_gb * 1e9,
                    seed=settings.seed,
                    device=world.device,
                    workers=threads,
                    fill=fill,
                )
            world.wait()
        for half in part.suffix.parts.values():
            half.to(world.device)
        network.suffix = part.suffix
    else:
        inputs = Pictures(
            extraction,
            train,
            held,
            augmentation,
            views=views,
            min_area=settings.min_area,
            seed=settings.seed,
            device=world.device,
            workers=threads,
        )
    network.to(world.device)
    if settings.channels_last:
        network.to(memory_format=torch.channels_last)
    targets = torch.from_numpy(_classes(features, class_names)[train]).to(world.device)
    optimizer = _optimizer(network, planned, settings)
    parts = settings.accumulate * world.size
    return Setup(
        settings=settings,
        folder=folder,
        world=world,
        backbone=backbone,
        network=network,
        model=_wrapped(network, settings, world),
        groups=planned,
        optimizer=optimizer,
        inputs=inputs,
        ids=[features.ids[i] for i in train],
        targets=targets,
        held=torch.from_numpy(_classes(features, class_names)[held]).to(world.device),
        weights=_class_weights(targets, class_names, settings).to(world.device),
        class_names=class_names,
        checkpoints=Checkpoints(
            own_folder(folder, "checkpoints"),
            {
                **settings.to_dict(),
                "weights": backbone.info.weights_digest,
                "layer": backbone.info.layer,
                "images": features.digest,
                "processes": world.size,
            },
        ),
        micro=-(-settings.batch_size // parts),
    )


def _check_labels(features: Features) -> None:
    if features.y.ndim != 1:
        raise TrainingError("fine-tuning needs one label per image; fit a head for several")


def _overrides(extraction: Extraction) -> tuple[tuple[str, Any], ...]:
    return tuple(vars(extraction.info.preprocess).items())


def _rows(
    features: Features, head: Head | None, settings: FinetuneConfig
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Row numbers of the images that train and of those that select, and the classes to tell apart."""
    train = np.flatnonzero((features.splits == "train") & (features.y >= 0))
    seen = tuple(features.class_names[i] for i in np.unique(features.y[train]))
    class_names = seen if head is None else head.class_names
    if len(seen) < 2:
        raise TrainingError(f"training needs images of two classes; there are {len(train)} images of {seen}")
    classes = _classes(features, class_names)
    if (classes[train] < 0).any():
        missing = sorted(set(seen) - set(class_names))
        raise TrainingError(f"the head does not know {', '.join(missing)}; fit it on these images")
    if settings.select == "last":
        return train, train[:0], class_names
    held = np.flatnonzero((features.splits == settings.select) & (classes >= 0))
    if not len(held):
        raise TrainingError(
            f"there are no images in {settings.select!r} to choose the epoch by; use select last, or val"
        )
    return train, held, class_names


def _classes(features: Features, class_names: tuple[str, ...]) -> np.ndarray:
    """`int64 [N]`: each image's class as the head counts them, -1 for none."""
    return np.append(columns(features.class_names, class_names), -1)[features.y]


def _class_weights(targets: Tensor, class_names: tuple[str, ...], settings: FinetuneConfig) -> Tensor:
    """`float32 [C]`."""
    if settings.class_weight is None:
        return torch.ones(len(class_names))
    if settings.class_weight == "balanced":
        counts = torch.bincount(targets.cpu(), minlength=len(class_names)).float()
        return len(targets) / (len(class_names) * counts.clamp_min(1))
    assert isinstance(settings.class_weight, dict)
    unknown = sorted(set(settings.class_weight) - set(class_names))
    if unknown or min(settings.class_weight.values(), default=1) <= 0:
        raise TrainingError(
            f"class weights are above 0, for classes among {', '.join(class_names[:20])}; got {settings.class_weight}"
        )
    return torch.tensor([settings.class_weight.get(name, 1.0) for name in class_names])


def _optimizer(network: layers.Tuned, planned: list[layers.Group], settings: FinetuneConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over the trained groups, each with its rate; vectors (biases, norms) do not decay."""
    named = dict(network.named_parameters())
    groups: list[dict[str, Any]] = []
    for group in planned:
        if group.lr is None:
            continue
        members = [named[name] for name in group.parameters]
        for decay, chosen in (
            (settings.weight_decay, [p for p in members if p.ndim > 1]),
            (0.0, [p for p in members if p.ndim <= 1]),
        ):
            if chosen:
                values = {"params": chosen, "lr": group.lr, "base": group.lr, "name": group.name}
                groups.append({**values, "weight_decay": decay})
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum, fused=True)


def _wrapped(network: layers.Tuned, settings: FinetuneConfig, world: World) -> nn.Module:
    model: nn.Module = network
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    if world.size > 1:
        from torch.nn.parallel import DistributedDataParallel

        # statistics of batch norm stay each process's own; the leader's are measured and saved
        with warnings.catch_warnings():  # newer releases have another name for it, which older ones lack
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, broadcast_buffers=False)
    return model
