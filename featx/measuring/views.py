"""Owns what cached augmented views are worth: the gain measured by cross-validation, averaging at test time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featx import heads, metrics
from featx.errors import HeadError
from featx.features import Rows
from featx.head import Head
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
    views: Sequence[np.ndarray],
    y: np.ndarray,
    class_names: Sequence[str],
    fold: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    **settings: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """What heads say of training images that they have not seen: logits `float64 [N, C]`, NaN where fold is -1.

    name: of the head. views: `[N, D]` each; a head learns from all views of its images. fold: `int [N]`, in
    which an image is held out. Returns what it says of the first view of the others, and of the mean over
    their views. Everything a head chooses, it chooses inside its own training images, by what it says of
    their first view. A class that these lack gets a logit below all others.
    """
    fitter = heads.module(name)
    logits = np.full((2, len(y), len(class_names)), np.nan)
    column = {c: i for i, c in enumerate(class_names)}
    for k in range(fold.max() + 1):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        X = np.concatenate([view[train] for view in views]) if len(views) > 1 else views[0][train]
        targets = np.tile(y[train], (len(views),) + (1,) * (y.ndim - 1))
        group = np.tile(train if groups is None else groups[train], len(views))
        scored = heads.scoring(name, np.arange(len(X)) < len(train))
        fitted = fitter.fit(X, targets, list(class_names), groups=group, seed=seed, device=device, **scored, **settings)
        head = fitted.head
        for i, said in enumerate((head(views[0][test]), average(head, [view[test] for view in views]))):
            rows = np.full((len(test), len(class_names)), np.log(metrics.SMALLEST) + said.min())
            rows[:, [column[c] for c in head.class_names]] = said
            logits[i, test] = rows
    return logits[0], logits[1]


def measure_gain(
    name: str,
    views: Sequence[np.ndarray],
    y: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    outer_folds: int = 5,
    **settings: Any,
) -> dict[str, Any]:
    """Whether learning from views beats the centre crop alone, on held-out training images; JSON values.

    views: features of the training images, `[N, D]` each, the centre crop first, then the augmented views,
    `augmented` of them. settings: the head's own, its `folds` among them. The same `outer_folds` for all:
    `center` learns from the first view, `views` from all, both are measured on the centre crops of held-out
    images, `averaged` on the mean over their views. Each has `accuracy` and `log_loss`; `views_gain` and
    `averaged_gain` are differences to `center` (accuracy up, log-loss down is better) with 95 % intervals of
    2,000 paired resamples of the images. `better` is `center`, `views` or `averaged`: the least log-loss.
    Raises `HeadError` where there are too few images to hold any out.
    """
    if len(views) < 2:
        raise HeadError("there is no augmented view; extract with --views 1 or more")
    fold, notes = make_folds(np.asarray(y), outer_folds, groups=groups, seed=seed)
    held = np.flatnonzero(fold >= 0)
    if not len(held):
        raise HeadError("there are too few training images to measure what views bring")
    alike: dict[str, Any] = {"groups": groups, "seed": seed, **settings}
    center, _ = held_out(name, views[:1], y, class_names, fold, **alike)
    several, averaged = held_out(name, views, y, class_names, fold, **alike)
    ways = {"center": center, "views": several, "averaged": averaged}
    each = {way: scores(logits[held], y[held]) for way, logits in ways.items()}
    found: dict[str, Any] = {"folds": int(fold.max()) + 1, "images": len(held), "augmented": len(views) - 1}
    for way, (right, loss) in each.items():
        found[way] = {"accuracy": float(right.mean()), "log_loss": float(loss.mean())}
    for way in ("views", "averaged"):
        found[f"{way}_gain"] = {
            measure: paired(each[way][i] - each["center"][i]) for i, measure in enumerate(("accuracy", "log_loss"))
        }
    found["better"] = min(each, key=lambda way: found[way]["log_loss"])
    found["notes"] = notes
    return found


def scores(logits: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's `right` (0 or 1; with several labels: all of them) and log-loss, `float64 [N]` each."""
    if y.ndim == 2:
        return ((logits >= 0) == (y > 0)).all(axis=1) * 1.0, metrics.binary_losses(logits, y).mean(axis=1)
    return (logits.argmax(axis=1) == y) * 1.0, metrics.losses(logits, y)


def paired(difference: np.ndarray) -> dict[str, float]:
    """The mean of per-image differences `[N]` with its 95 % bootstrap interval, seeded."""
    rng = np.random.default_rng(0)
    # resampling images is a multinomial draw over their counts, some images at a time
    share = max(1, 4_000_000 // len(difference))
    means = [
        difference[rng.integers(0, len(difference), (min(share, RESAMPLES - done), len(difference)))].mean(axis=1)
        for done in range(0, RESAMPLES, share)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"value": float(difference.mean()), "low": float(low), "high": float(high)}


def gain_text(found: dict[str, Any]) -> str:
    """What `measure_gain` found, in two lines for a terminal."""
    lines = []
    for way, what in (("views", f"{found['augmented']} views"), ("averaged", "averaged over views")):
        accuracy, loss = found[f"{way}_gain"]["accuracy"], found[f"{way}_gain"]["log_loss"]
        lines.append(
            f"{what}, cross-validated on {found['images']} training images: accuracy "
            f"{found['center']['accuracy']:.4f} -> {found[way]['accuracy']:.4f} ({accuracy['value']:+.4f}, "
            f"95 % {accuracy['low']:+.4f} to {accuracy['high']:+.4f}), log-loss {found['center']['log_loss']:.4f} -> "
            f"{found[way]['log_loss']:.4f} ({loss['value']:+.4f}, {loss['low']:+.4f} to {loss['high']:+.4f})"
        )
    return "\n".join(lines)
