"""`Classifier`, a backbone and a head together, in torch; `load` makes one from a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featx.backbones.backbone import Backbone
from featx.backbones.loading import load_backbone
from featx.errors import RunError, WeightsError
from featx.head import Head
from featx.pixels.preprocess import Preprocess
from featx.runs import Run, open_run
from featx.state import ordinary

BATCH = 32


@dataclass(frozen=True, eq=False)
class Classifier:
    """`uint8 [N, 3, H, W]` pixels -> logits, by torch on the CPU: what exported files are compared with."""

    backbone: Backbone
    head: Head

    @property
    def preprocess(self) -> Preprocess:
        return self.backbone.info.preprocess

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.head.class_names

    @ordinary()
    def features(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [N, 3, H, W]` -> `float32 [N, D]`."""
        with torch.inference_mode():
            batches = [torch.from_numpy(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
            parts = [self.backbone.module(batch) for batch in batches]
        return torch.cat(parts).float().numpy()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [N, 3, H, W]` -> logits `float32 [N, C]`."""
        return self.head(self.features(images))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [N, 3, H, W]` -> `float32 [N, C]` in [0, 1]."""
        return self.head.probabilities(self(images))


@ordinary()
def load(run: str | Path | Run, *, factory: str | None = None, weights: str | Path | None = None) -> Classifier:
    """The classifier of a run's folder. Raises `WeightsError` where its backbone's weights have changed, and `RunError`
    for an int8 run.

    factory: the `package.module:function` that made the backbone. Where the run names one, it is imported only if it
    is named here, too (`RunError`). weights: the file with the run's weights, where that lies elsewhere now; without
    it, a renamed file is found by its content in the folder where it was. Other weights are a `WeightsError`.
    """
    opened = open_run(run, factory, weights)
    if opened.config.spec.precision == "int8":
        raise RunError(
            f"{opened.path} was fitted on int8 features, which torch does not compute; use `featx export` and "
            "`featx.predict`, or fit without --precision int8"
        )
    backbone, fitted_on = load_backbone(opened.request), opened.config.backbone.weights_digest
    if backbone.info.weights_digest != fitted_on:
        raise WeightsError(
            f"{opened.path} was fitted on weights {fitted_on[:12]} of {backbone.info.name}, but "
            f"{backbone.info.weights_note} is {backbone.info.weights_digest[:12]} now; "
            "put the former weights back, or fit again"
        )
    return Classifier(backbone, opened.head)
