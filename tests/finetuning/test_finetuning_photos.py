"""Fine-tuning on the real photographs with real weights: accuracy on the 153 that neither saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featx.backbones.loading import load_backbone
from featx.backbones.request import BackboneRequest
from featx.extraction.pipeline import Extraction, sync
from featx.features import groups
from featx.finetuning.preparing import hold_out
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.tuning import finetune
from featx.heads import linear, logreg
from featx.solvers.examples import Examples


@pytest.fixture(scope="module")
def extraction(photos: Path, squeezenet_weights: Path, photo_run: Path) -> Extraction:
    request = BackboneRequest("squeezenet1_1", weights=str(squeezenet_weights))
    return sync(photos, request, cache=photo_run.parent / "cache", device="cpu")


def test_the_last_layer_by_the_tutorials_recipe_reaches_91_percent(extraction: Extraction) -> None:
    features = extraction.features()
    train, val = features.split("train"), features.split("val")
    assert len(train) == 244 and len(val) == 153
    accuracies = []
    for seed in range(5):
        fitted = linear.fit(
            Examples(train.X, train.y), features.class_names, seed=seed, recipe="tutorial", device="cpu"
        )
        accuracies.append((fitted.head(val.X).argmax(1) == val.y).mean())
    assert np.median(accuracies) >= 0.91


def test_tuning_all_layers_from_the_fitted_head_loses_no_more_than_two_photographs(
    extraction: Extraction, tmp_path: Path
) -> None:
    features = extraction.features()
    train, val = features.split("train"), features.split("val")
    head = logreg.fit(Examples(train.X, train.y, groups(train.keys)), features.class_names, seed=0).head
    alone = int((head(val.X).argmax(1) == val.y).sum())
    numbers = extraction.numbers[features.splits == "val"]
    pixels = np.stack([extraction.info.preprocess(extraction.source.read(int(i))) for i in numbers])

    config = FinetuneConfig(epochs=1, warmup=0.5, seed=0)
    chosen = hold_out(features, config)
    part = chosen.split("train")
    first = logreg.fit(Examples(part.X, part.y, groups(part.keys)), features.class_names, seed=0).head
    tuned = finetune(extraction, chosen, first, config, tmp_path, "cpu")
    assert tuned.history["selected_on"] > 20

    with torch.inference_mode():
        parts = [load_backbone(tuned.request).module(p) for p in torch.from_numpy(pixels).split(32)]
    right = int((tuned.head(torch.cat(parts).numpy()).argmax(1) == val.y).sum())
    assert right >= alone - 2
    assert alone >= 138
