"""Owns what cached augmented views are worth: the gain measured by cross-validation, averaging at test time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from featx import heads, metrics
from featx.errors import HeadError
from featx.features import Rows, StoredRows, taken
from featx.head import Head
from featx.solvers.examples import Examples
from featx.solvers.training import folds as make_folds

RESAMPLES = 2000


def average(head: Head, views: Sequence[Rows]) -> np.ndarray:
    """Logits `float64 [N, C]` whose probabilities are the mean over views of the head's, `views` of `[N, D]` each.

    For `softmax` they are logarithms of the mean, for `sigmoid` its log-odds, so that whatever takes a
    head's logits (`evaluate_logits`) takes these.
    """
    if not views:
        raise HeadError("there is no view to average over")
    mean = np.mean([head.probabilities(head(view)).astype(np.float64) for view in views], axis=0)
    mean = np.clip(mean, metrics.SMALLEST, 1 - metrics.SMALLEST if head.activation == "sigmoid" else 1.0)
    return np.log(mean) - np.log1p(-mean) if head.activation == "sigmoid" else np.log(mean)


def held_out(
    name: str,
    views: Sequence[np.ndarray | StoredRows],
    y: np.ndarray,
    class_names: Sequence[str],
    fold: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What heads say of training images that they have not seen: logits `float64 [N, C]`, NaN where fold is -1.

    name: of the head. views: `[N, D]` each; a head learns from all views of its images. fold: `int [N]`, in
    which an image is held out. Returns what it says of the first view of the others, and of the mean over
    their views. Everything a head chooses, it chooses inside its own training images, by what it says of
    their first view.
    """
    logits = np.full((2, len(y), len(class_names)), np.nan)
    groups = np.arange(len(y)) if groups is None else groups
    for k in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        examples = Examples.of_views([taken(view, train) for view in views], y[train], groups[train])
        head = heads.learn(name, examples, list(class_names), seed=seed, device=device, settings=settings).head
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
    """What learning from views brings, measured on held-out training images."""

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
        found = dict(values)
        found |= {way: Score(**found[way]) for way in ("center", "views", "averaged")}
        for way in ("views_gain", "averaged_gain"):
            found[way] = {measure: Difference(**values) for measure, values in found[way].items()}
        return cls(**found)

    def text(self) -> str:
        """Two lines for a terminal."""
        lines = []
        for what, score, gain in (
            (f"{self.augmented} views", self.views, self.views_gain),
            ("averaged over views", self.averaged, self.averaged_gain),
        ):
            accuracy, loss = gain["accuracy"], gain["log_loss"]
            lines.append(
                f"{what}, cross-validated on {self.images} training images: accuracy "
                f"{self.center.accuracy:.4f} -> {score.accuracy:.4f} ({accuracy.value:+.4f}, "
                f"95 % {accuracy.low:+.4f} to {accuracy.high:+.4f}), log-loss {self.center.log_loss:.4f} -> "
                f"{score.log_loss:.4f} ({loss.value:+.4f}, {loss.low:+.4f} to {loss.high:+.4f})"
            )
        return "\n".join(lines)


def measure_gain(
    name: str,
    views: Sequence[np.ndarray | StoredRows],
    y: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    outer_folds: int = 5,
    settings: Mapping[str, Any] | None = None,
) -> Gain:
    """Whether learning from views beats the centre crop alone, on held-out training images.

    views: features of the training images, `[N, D]` each, the centre crop first, then the augmented views.
    settings: the head's own, its `folds` among them. All ways share `outer_folds`; intervals are those of
    2,000 paired resamples of the images.
    Raises `HeadError` where there are too few images to hold any out.
    """
    if len(views) < 2:
        raise HeadError("there is no augmented view; extract with --views 1 or more")
    fold, notes = make_folds(np.asarray(y), outer_folds, groups=groups, seed=seed)
    held = np.flatnonzero(fold >= 0)
    if not len(held):
        raise HeadError("there are too few training images to measure what views bring")

    alike: dict[str, Any] = {"groups": groups, "seed": seed, "device": device, "settings": settings}
    center, _ = held_out(name, views[:1], y, class_names, fold, **alike)
    several, averaged = held_out(name, views, y, class_names, fold, **alike)
    ways = {"center": center, "views": several, "averaged": averaged}
    each = {way: scores(logits[held], y[held]) for way, logits in ways.items()}
    means = {way: Score(float(right.mean()), float(loss.mean())) for way, (right, loss) in each.items()}
    gains = {
        way: {measure: paired(each[way][i] - each["center"][i]) for i, measure in enumerate(("accuracy", "log_loss"))}
        for way in ("views", "averaged")
    }
    return Gain(
        folds=int(fold.max()) + 1,
        images=len(held),
        augmented=len(views) - 1,
        **means,
        views_gain=gains["views"],
        averaged_gain=gains["averaged"],
        better=min(means, key=lambda way: means[way].log_loss),
        notes=notes,
    )


def scores(logits: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's `right` (0 or 1; with several labels: all of them) and log-loss, `float64 [N]` each."""
    if y.ndim == 2:
        return ((logits >= 0) == (y > 0)).all(axis=1) * 1.0, metrics.binary_losses(logits, y).mean(axis=1)
    return (logits.argmax(axis=1) == y) * 1.0, metrics.losses(logits, y)


def paired(difference: np.ndarray) -> Difference:
    """The mean of per-image differences `[N]` with its 95 % bootstrap interval, seeded."""
    rng = np.random.default_rng(0)
    # resampling images is a multinomial draw over their counts, some images at a time
    share = max(1, 4_000_000 // len(difference))
    means = [
        difference[rng.integers(0, len(difference), (min(share, RESAMPLES - done), len(difference)))].mean(axis=1)
        for done in range(0, RESAMPLES, share)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Difference(float(difference.mean()), float(low), float(high))
