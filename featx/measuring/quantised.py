"""What int8 features cost a head: measured on held-out training images against fp32's, in the same folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from featx import learning
from featx.errors import HeadError
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.features import Features, gathered
from featx.head import Head, columns
from featx.measuring.views import FOLDS, MEASURES, Difference, Score, held_out, paired, scores
from featx.solvers.training import folds

IMAGES = 2000


@dataclass(frozen=True)
class Int8Cost:
    """What a head gives on held-out training images, by their int8 and by their fp32 features."""

    images: int
    folds: int
    """0 where the head learns nothing from images, so that all are held out."""
    int8: Score
    fp32: Score
    differences: dict[str, Difference]
    """`accuracy` (up is better) and `log_loss` (down is better): int8's less fp32's, image by image."""

    @property
    def passed(self) -> bool:
        """Whether int8's log-loss is not worse than fp32's by more than the interval of their difference."""
        return self.differences["log_loss"].low <= 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Int8Cost:
        differences = {name: Difference(**found) for name, found in values["differences"].items()}
        return cls(values["images"], values["folds"], Score(**values["int8"]), Score(**values["fp32"]), differences)

    def text(self) -> str:
        """A line for people."""
        loss, how = self.differences["log_loss"], f"{self.folds} folds" if self.folds else "none of them learned from"
        return (
            f"int8 against fp32 on {self.images} training images, {how}: log-loss {self.int8.log_loss:.4f} against "
            f"{self.fp32.log_loss:.4f} ({loss.value:+.4f}, 95 % {loss.low:+.4f} to {loss.high:+.4f}), accuracy "
            f"{self.int8.accuracy:.4f} against {self.fp32.accuracy:.4f}"
        )


def int8_cost(
    extraction: Extraction, features: Features, name: str, head: Head, chosen: dict[str, Any]
) -> dict[str, Any]:
    """`report.json`: what int8 costs on up to 2,000 training images, those with the smallest keys; empty for a run that
    is not int8.

    fp32's rows come from the cache, or are computed. A head that learns is fitted again in each fold, with `chosen`,
    the keyword arguments of `learning.learn`; another answers for all images as it is.

    Raises `HeadError` where the log-loss is worse by more than its interval. Nothing but a note where there are too few
    images to hold any out.
    """
    if features.spec.precision != "int8":
        return {}
    train = np.flatnonzero(features.splits == "train")
    _, first = np.unique(features.keys[train].view("V32").ravel(), return_index=True)
    numbers = train[first[:IMAGES]]
    y, keys = features.y[numbers], features.keys[numbers]
    source, spec = extraction.source.take(extraction.numbers[numbers]), features.spec
    large = sync(source, extraction.request, cache=extraction.cache, dtype=spec.dtype, device="cpu")
    both = [gathered(features.rows, numbers), large.stores[0].read(keys)]

    if learning.module(name).LEARNS:
        fold, _ = folds(y, FOLDS, seed=chosen["seed"])
        held = np.flatnonzero(fold >= 0)
        if not len(held):
            return {"int8_note": "int8 was not compared with fp32: there are too few training images to hold any out"}
        count, names = int(fold.max()) + 1, features.class_names
        logits = [held_out(name, [rows], y, names, fold, **chosen)[0][held] for rows in both]
        truth = y[held]
    else:
        count, logits = 0, [head(rows) for rows in both]
        truth = columns(features.class_names, head.class_names)[y]

    small, reference = (scores(each, truth) for each in logits)
    means = {
        precision: Score(*(float(values.mean()) for values in each))
        for precision, each in (("int8", small), ("fp32", reference))
    }
    apart = {m: paired(m, mine, base) for m, mine, base in zip(MEASURES, small, reference, strict=True)}
    found = Int8Cost(len(truth), count, **means, differences=apart)
    if not found.passed:
        raise HeadError(
            f"{found.text()}. int8 costs this head more than chance would explain: use --precision fp32, or another "
            "--calibration"
        )
    return {"int8": found.to_dict()}
