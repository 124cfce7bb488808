"""The photographs that an exported file is compared on: which of a run's images, read and decoded in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx.devices import available_threads, memory_for_features
from featx.errors import ExportError, ImageError
from featx.extraction.pipeline import sync
from featx.features import FeatureSpec, content_key, short_keys
from featx.options import Clustered, Split, count
from featx.runs import Run
from featx.sources.source import Source
from featx.threads import ahead

IMAGES = 2000
"""Images that are compared, at most."""
BATCH = 32
CHANGED = 5.0
"""Answers that less precise arithmetic may change, in points of the images."""
LOST = 0.5
"""Right answers that it may lose, likewise."""
ALLOWED_IMAGES = 2
"""Right answers that it may lose, and answers it may change, on any number of images: chance alone moves some."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images that a file is compared with torch on: M distinct ones."""

    source: Source
    keys: np.ndarray
    """`uint8 [M, 32]`, ascending."""
    cached: np.ndarray
    """`float32 [M, D]`: the features that the head was fitted and measured on."""
    spec: FeatureSpec
    """The spec of `cached`."""
    split: str | None = None
    """Which of the run's splits they are; None where the data have changed since the fit, and with them the splits."""
    unseen: bool = False
    """In that case, whether the head is known to have learned from none of them."""
    labels: tuple[str, ...] = ()
    """The data's L labels, sorted."""
    y: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """`int64 [M]`, indices into `labels`, or 0/1 `[M, L]`."""
    stated: dict[str, Any] = field(default_factory=dict)
    """What `report.json` says of exactly these images; empty where it was measured on others, or on more of them."""

    @property
    def known(self) -> bool:
        """Whether an accuracy on them means something: they are a split of the run's, or new to the head."""
        return self.split is not None or self.unseen

    def right(self, class_names: Sequence[str], answers: np.ndarray) -> np.ndarray:
        """`bool [M]`: whether answers, `bool [M, C]`, are exactly the labels of each image."""
        labels, names = self.source.labels, np.array(class_names, object)
        assert labels is not None
        truth = [set(label.split("|")) - {""} if self.source.multilabel else {label} for label in labels]
        return np.array([set(names[row]) == label for row, label in zip(answers, truth, strict=True)])


def gate_images(
    run: Run, limit: int, split: Split, data: str | Path | Source | None = None, **cluster: Unpack[Clustered]
) -> Images:
    """Up to `limit` distinct images of a split, those with the smallest content hashes.

    data: in place of the run's own. Raises `ExportError` where there are none, or the backbone has changed.
    """
    limit = count("images", limit)
    config, spec = run.config, run.config.spec
    extraction = sync(data or config.data, run.request, cache=config.cache, **spec.asked, **cluster)
    features = extraction.features(memory=memory_for_features())
    if features.spec != spec:
        raise ExportError(
            f"{config.backbone.name} gives other features now than when {run.path} was fitted "
            "(its weights or preprocessing changed); fit again"
        )
    run.require_alike(features.y.ndim == 2, data or config.data)

    numbers = np.flatnonzero(features.splits == split)
    if not len(numbers):
        there = ", ".join(f"{(features.splits == name).sum()} {name}" for name in ("train", "val", "test"))
        raise ExportError(
            f"the run has no {split} images to compare the file on ({there}); use --split train, or --data FOLDER "
            "of other labelled images"
        )
    _, first = np.unique(features.keys[numbers].view("V32").ravel(), return_index=True)
    numbers = numbers[first[:limit]]
    chosen = features.take(numbers)

    seen, changed, report = run.trained_on, features.digest != config.data_digest, run.report
    stated = {"val": report, "test": report.get("test", {}), "train": {"accuracy": report.get("train_accuracy")}}
    return Images(
        source=extraction.source.take(extraction.numbers[numbers]),
        keys=chosen.keys,
        cached=np.asarray(chosen.X, np.float32),
        spec=spec,
        split=None if changed else split,
        unseen=changed and seen is not None and not np.isin(short_keys(chosen.keys), seen).any(),
        labels=tuple(chosen.class_names),
        y=chosen.y,
        stated={} if changed or len(numbers) != config.splits.get(split) else stated[split],
    )


def allowed_images(images: int, points: float) -> int:
    """So many points of the images, but at least `ALLOWED_IMAGES`."""
    return max(ALLOWED_IMAGES, math.floor(points * images / 100 + 1e-9))


def batches(images: Images) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Every image, in order: `uint8 [H, W, 3]` as decoded, and `uint8 [3, crop, crop]` as trained on."""
    source, preprocess, threads = images.source, images.spec.preprocess, available_threads()

    def load(i: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            data = source.read(i)
            if content_key(data) != images.keys[i].tobytes():
                raise ImageError("it has changed since it was listed")
            with preprocess.decoded(data) as image:
                return np.asarray(image), preprocess.square(image, preprocess.crop).transpose(2, 0, 1)
        except ImageError as error:
            raise ExportError(f"{source.ids[i]}, an image to compare the file on: {error}") from error

    numbers = range(len(source))
    with closing(ahead(load, numbers, threads=threads, window=BATCH + threads, name="featx-parity")) as loaded:
        while batch := list(islice(loaded, BATCH)):
            yield batch
