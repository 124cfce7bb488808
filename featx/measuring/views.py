"""Measures the gain by augmented views, by cross-validation, and averages over views at test time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np

from featx import learning, metrics
from featx.errors import HeadError
from featx.features import LazyRows, Rows, taken
from featx.head import Head, right
from featx.solvers.examples import Examples
from featx.solvers.training import folds as make_folds

MEASURES = ("accuracy", "log_loss")
FOLDS = 5
WAYS = ("center", "views", "averaged")  # of learning; the others are compared with the first


def average(head: Head, views: Sequence[Rows]) -> np.ndarray:
    """Logits `float64 [N, C]` of the mean of a head's probabilities over views, features `[N, D]` each.

    For `softmax` they are logarithms of the mean, for `sigmoid` its log-odds, so that whatever takes a
    head's logits (`evaluate_logits`) takes these. Raises `HeadError` for no view.
    """
    if not views:
        raise HeadError("there is no view to average over")
    mean = np.mean([head.probabilities(head(view)).astype(np.float64) for view in views], axis=0)
    mean = np.clip(mean, metrics.SMALLEST, 1 - metrics.SMALLEST if head.activation == "sigmoid" else 1.0)
    return np.asarray(np.log(mean) - np.log1p(-mean) if head.activation == "sigmoid" else np.log(mean))


def held_out(
    name: str,
    views: Sequence[np.ndarray | LazyRows],
    y: np.ndarray,
    class_names: Sequence[str],
    fold: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-validated logits of training images, twice `float64 [N, C]`: NaN where fold is -1.

    name: of the head. views: `[N, D]` each; a head learns from all views of its images. fold: `int [N]`, in
    which an image is held out. Returns the logits of the held-out images' first views, and those of the mean
    over their views. Each head chooses its settings inside its own training images, by their first views.
    """
    logits = np.full((2, len(y), len(class_names)), np.nan)
    groups = np.arange(len(y)) if groups is None else groups
    for k in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        examples = Examples.of_views([taken(view, train) for view in views], y[train], groups[train])
        head = learning.learn(name, examples, list(class_names), seed=seed, device=device, settings=settings).head
        unseen = [taken(view, test) for view in views]
        logits[0, test] = head.aligned(head(unseen[0]), class_names)
        logits[1, test] = head.aligned(average(head, unseen), class_names)
    return logits[0], logits[1]


@dataclass(frozen=True)
class Score:
    """What one way of learning gives on held-out training images."""

    accuracy: float
    log_loss: float


@dataclass(frozen=True)
class Difference:
    """The mean of per-image differences, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """The gain by learning from views, measured on held-out training images."""

    folds: int
    images: int
    augmented: int
    """Augmented views, beside the centre crop."""
    center: Score
    """Learned from the centre crops, measured on those of held-out images."""
    views: Score
    """Learned from all views, measured on centre crops."""
    averaged: Score
    """Learned from all views, measured on the mean over views."""
    views_gain: dict[str, Difference]
    """`accuracy` (up is better) and `log_loss` (down is better): the difference to `center`."""
    averaged_gain: dict[str, Difference]
    better: str
    """`center`, `views` or `averaged`: the least log-loss."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Gain:
        means = {way: Score(**values[way]) for way in WAYS}
        gains = {name: {m: Difference(**values[name][m]) for m in MEASURES} for name in ("views_gain", "averaged_gain")}
        return cls(**values | means | gains)

    def text(self) -> str:
        """Two lines for a terminal."""
        before, lines = self.center, []
        for what, score, gain in (
            (f"{self.augmented} views", self.views, self.views_gain),
            ("averaged over views", self.averaged, self.averaged_gain),
        ):
            (accuracy, low, high), (loss, least, most) = (astuple(gain[measure]) for measure in MEASURES)
            lines.append(
                f"{what}, cross-validated on {self.images} training images: accuracy "
                f"{before.accuracy:.4f} -> {score.accuracy:.4f} ({accuracy:+.4f}, 95 % {low:+.4f} to {high:+.4f}), "
                f"log-loss {before.log_loss:.4f} -> {score.log_loss:.4f} ({loss:+.4f}, {least:+.4f} to {most:+.4f})"
            )
        return "\n".join(lines)


def measure_gain(
    name: str,
    views: Sequence[np.ndarray | LazyRows],
    y: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Gain:
    """Whether learning from views beats the centre crop alone, on held-out training images.

    views: features of the training images, `[N, D]` each, the centre crop first, then the augmented views.
    settings: the head's own, its `folds` among them. All ways share the folds, and a gain compares the
    same images.
    Raises `HeadError` where there are too few images to hold any out.
    """
    if len(views) < 2:
        raise HeadError("there is no augmented view; extract with --views 1 or more")
    fold, notes = make_folds(np.asarray(y), FOLDS, groups=groups, seed=seed)
    held = np.flatnonzero(fold >= 0)
    if not len(held):
        raise HeadError("there are too few training images to measure what views bring")

    alike: dict[str, Any] = {"groups": groups, "seed": seed, "device": device, "settings": settings}
    center, _ = held_out(name, views[:1], y, class_names, fold, **alike)
    found = (center, *held_out(name, views, y, class_names, fold, **alike))
    each = {way: scores(logits[held], y[held]) for way, logits in zip(WAYS, found, strict=True)}
    means = {way: Score(float(right.mean()), float(loss.mean())) for way, (right, loss) in each.items()}
    gains = {
        f"{way}_gain": {
            m: paired(m, mine, base) for m, mine, base in zip(MEASURES, each[way], each["center"], strict=True)
        }
        for way in WAYS[1:]
    }
    measured: dict[str, Any] = means | gains | {"better": min(WAYS, key=lambda way: means[way].log_loss)}
    return Gain(folds=int(fold.max()) + 1, images=len(held), augmented=len(views) - 1, notes=notes, **measured)


def scores(logits: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's `right` (0 or 1; with several labels: all of them) and log-loss, `float64 [N]` each."""
    loss = metrics.binary_losses(logits, y).mean(axis=1) if y.ndim == 2 else metrics.losses(logits, y)
    return right(logits, y) * 1.0, loss


def paired(measure: str, mine: np.ndarray, base: np.ndarray) -> Difference:
    """The mean of `mine - base`, `[N]` each, of one of `MEASURES` on the same images, with its 95 % interval.

    Right answers are counted with two more images, one for each side by halves (Agresti and Min 2005): without them,
    answers that agree on all images would give an interval of no width.
    """
    difference, half = mine - base, 0.5**0.5
    value = float(difference.mean())
    more, most = ([half, -half], 1.0) if measure == "accuracy" else ([], metrics.LARGEST)
    found = metrics.mean_of(np.append(difference, more), -most, most)
    return Difference(value, min(value, found.low), max(value, found.high))
