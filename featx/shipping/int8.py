"""The gate of an int8 run's file: onnxruntime runs it, and it must answer as the head does on the cached features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from featx.runs import Run
from featx.shipping import graph
from featx.shipping.deployed import open_session
from featx.shipping.gate import CHANGED, LOST, Images, allowed_images, batches
from featx.shipping.parity import SAME_FEATURES, SAME_SUM, Check, Parity, as_reported, far, sum_of_sizes

if TYPE_CHECKING:
    from onnx import ModelProto

# Probabilities, averaged over the images: the worst of 153 photographs says little.
PROBABILITIES = 2e-2


def verify(run: Run, model: ModelProto, images: Images, *, tolerance: float | None = None) -> Parity:
    """Compare a file with the head's answers for the cached int8 features. Its own resize may change them, whose pixels
    are a level or two off, and so may onnxruntime, where another engine computed them. tolerance: on the mean
    difference of probabilities, in [0, 1], instead of 0.02.
    """
    head, whole, resizes = run.head, open_session(graph.opened_up(model)), graph.resizes(model)
    found = [
        whole.run(graph.INNER, {"images": (image if resizes else crop)[None]})
        for batch in batches(images)
        for image, crop in batch
    ]
    probabilities, logits, features = map(np.concatenate, zip(*found, strict=True))

    expected = head.probabilities(head(images.cached))
    said = [head.answers(each) for each in (probabilities, expected)]
    right = [images.right(head.class_names, answers) for answers in said]
    others, size = np.flatnonzero((said[0] != said[1]).any(axis=1)).tolist(), sum_of_sizes(head, features)
    count, lost = len(images.source), float(right[1].sum() - right[0].sum())
    apart = np.abs(probabilities - expected).max(axis=1)
    checks = [
        Check("labels", float(len(others)), float(allowed_images(count, CHANGED))),
        Check("right answers lost", max(0.0, lost), float(allowed_images(count, LOST))),
        Check("mean probabilities", float(apart.mean()), PROBABILITIES if tolerance is None else tolerance),
        Check("same-feature logits", far(logits, head(features)), SAME_SUM * size),
        *as_reported(images, head, SAME_FEATURES * size),
    ]
    ids = images.source.ids
    return Parity(
        images=count,
        method="cached",
        accuracy=float(right[0].mean()) if images.known else None,
        torch_accuracy=float(right[1].mean()) if images.known else None,
        equal_labels=count - len(others),
        differing=[ids[i] for i in others],
        max_logit_difference=far(logits, head(images.cached)),
        checks=checks,
    )
