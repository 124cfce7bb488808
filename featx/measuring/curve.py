"""The learning curve: accuracy against the number of training images, and a forecast where one can be defended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featx import learning, metrics
from featx.devices import memory_for_features
from featx.errors import HeadError, RunError
from featx.extraction.pipeline import sync
from featx.features import Features, LazyRows, groups, taken
from featx.measuring.views import scores
from featx.metrics import Estimate
from featx.options import count, listed, plain
from featx.records import convert, write_record
from featx.runs import Run, open_run
from featx.solvers.examples import Examples
from featx.state import ordinary

RESAMPLES = 1000
MAX_SIZES = 7
MIN_POINTS = 4  # a forecast fits two points and checks one more; one is to spare


@dataclass(frozen=True)
class CurvePoint:
    """One size of a learning curve."""

    images: int
    accuracy: float
    low: float
    high: float
    subsets: int
    spread: float | None
    """The standard deviation over subsets; None for one."""


@dataclass(frozen=True)
class Forecast:
    """The accuracy expected with so many images, with its 95 % interval; `error = a * n ** -exponent`."""

    images: int
    accuracy: float
    low: float
    high: float
    exponent: float


@dataclass(frozen=True)
class Curve:
    """Accuracy against the number of training images; `curve.json`. Intervals are 95 %."""

    points: list[CurvePoint]
    forecast: Forecast | None
    verdict: str
    """A sentence."""
    seed: int
    repeats: int
    measured_on: int
    """Validation images."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"rows" if name == "points" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curve:
        """The curve that `to_dict` gave these values of. Raises `ValueError`."""
        curve = convert({"points" if name == "rows" else name: value for name, value in values.items()}, cls)
        if not curve.points or min(point.images for point in curve.points) < 1:
            raise ValueError("rows: expected one or more, of one image or more")
        return curve

    def text(self) -> str:
        """For a terminal."""
        lines = [f"{p.images:>6}  {p.accuracy:.4f}    [{p.low:.4f}, {p.high:.4f}]  {p.subsets}" for p in self.points]
        return "\n".join(["images  accuracy  95% interval      subsets", *lines, self.verdict])


@ordinary()
def learning_curve(
    run: str | Path | Run,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    seed: int | None = None,
    device: str = "auto",
    memory: float | None = None,
    factory: str | None = None,
    weights: str | Path | None = None,
) -> Curve:
    """Fit a run's head on parts of its training images, and write `curve.json` into its folder.

    sizes: training images, by default N, N / 2, N / 4, ... down to about four per class. repeats: subsets of
    each size, stratified, drawn with `seed` (default: the run's), each within the next larger one; duplicates
    stay together. Measured on the run's validation images, which choose nothing: each subset's head chooses
    inside the subset. Intervals are for other images and other subsets; that of all training images is the report's.
    memory: as for `featx.fit`; factory, weights: as for `featx.load`.

    Raises `RunError` where the data are not the run's any more, `HeadError` where nothing can be learned or measured.
    """
    opened = open_run(run, factory, weights)
    config = opened.config
    if not learning.module(config.head).LEARNS:
        raise HeadError(
            f"the {config.head} head learns nothing from training images; fit another first: {learning.able('LEARNS')}"
        )
    if config.finetune:
        raise HeadError("a learning curve of fine-tuning would fine-tune once per point; give a run of a head")
    repeats = count("repeats", repeats)
    features, views = _features(opened, device, memory_for_features() if memory is None else memory)
    train, held = features.split("train"), features.split("val")
    if not len(held):
        raise HeadError("there are no validation images to measure on")
    sizes = default_sizes(len(train), len(features.class_names)) if sizes is None else listed(sizes)
    wanted = sorted({count("a size", plain(each)) for each in sizes})
    if not wanted or wanted[0] < 2 or wanted[-1] > len(train):
        raise HeadError(f"sizes lie between 2 and the {len(train)} training images, not {list(wanted)}")

    seed = config.seed if seed is None else int(seed)
    group = groups(train.keys)
    orders = [nested_order(train.y, group, seed + r) for r in range(repeats)]
    right: list[np.ndarray] = []
    for size in wanted:
        each = []
        for r, order in enumerate(orders if size < len(train) else orders[:1]):
            part = order[:size]
            examples = Examples.of_views([taken(view, part) for view in views], train.y[part], group[part])
            how: dict[str, Any] = {"seed": seed + r, "device": device, "settings": config.settings}
            try:
                head = learning.learn(config.head, examples, features.class_names, **how).head
            except HeadError as error:
                raise HeadError(f"with {size} training images: {error}") from error
            each.append(scores(head.aligned(head(held.rows), features.class_names), held.y)[0])
        right.append(np.array(each))

    found = Curve(*summarise(wanted, right), seed, repeats, len(held))
    write_record(opened.path / "curve.json", found.to_dict())
    return found


def _features(run: Run, device: str, memory: float) -> tuple[Features, Sequence[np.ndarray | LazyRows]]:
    """A run's features, and its training images' rows in each view. Raises `RunError` where they have changed."""
    config = run.config
    spec = config.spec
    asked = {"seed": config.seed, "views": config.views, "device": device, "cache": config.cache, **spec.asked}
    extraction = sync(config.data, run.request, **asked)
    features = extraction.features(memory=memory)
    if features.spec != spec or features.digest != config.data_digest:
        raise RunError(f"the data or the backbone of {run.path} have changed since; fit again")
    return features, extraction.views(features.keys[features.splits == "train"], memory=memory)


def default_sizes(count: int, classes: int) -> list[int]:
    """`count`, and its halves down to about four images per class, ascending; at most seven."""
    halves = {round(count / 2**k) for k in range(MAX_SIZES)}
    return sorted({n for n in halves if n >= max(4 * classes, 8)} | {count})


def nested_order(y: np.ndarray, group: np.ndarray, seed: int) -> np.ndarray:
    """An order of the images, `int [N]`, each beginning of which is stratified and random.

    Two groups of each class come first, so that folds can be made of any beginning; then classes advance
    in step. Images of one `group` are neighbours within their class. Several labels per image (y `[N, C]`):
    a random order of groups.
    """
    rng = np.random.default_rng(seed)
    chance = rng.permutation(int(group.max()) + 1)[group]
    if y.ndim == 2:
        return np.argsort(chance, kind="stable")
    place = np.empty(len(y))
    for label in np.unique(y):
        mine = np.flatnonzero(y == label)
        mine = mine[np.argsort(chance[mine], kind="stable")]
        order = np.cumsum(np.append(True, np.diff(chance[mine]) != 0)) - 1  # of its groups
        place[mine] = np.where(order < 2, order - 2.0, (np.arange(len(mine)) + 0.5) / len(mine))
    return np.lexsort((chance, place))


def summarise(sizes: Sequence[int], right: Sequence[np.ndarray]) -> tuple[list[CurvePoint], Forecast | None, str]:
    """The curve of `right` (0/1 `[subsets, images]` for each size) with intervals, its forecast and a verdict."""
    rng = np.random.default_rng(0)
    images = right[0].shape[1]
    # the same images are drawn for all sizes: that some are hard moves the whole curve, not its slope
    drawn = rng.multinomial(images, np.full(images, 1 / images), RESAMPLES) / images
    samples, points = [], []
    for size, hits in zip(sizes, right, strict=True):
        subsets = len(hits)
        weights = rng.multinomial(subsets, np.full(subsets, 1 / subsets), RESAMPLES) / subsets
        sample = ((weights @ hits) * drawn).sum(axis=1)
        samples.append(sample)
        accuracies = hits.mean(axis=1)
        spread = float(accuracies.std(ddof=1)) if subsets > 1 else None
        found = metrics.proportion(hits[0]) if subsets == 1 else _over_subsets(hits)
        points.append(CurvePoint(int(size), found.value, found.low, found.high, subsets, spread))

    return points, *extrapolate(np.array(sizes), np.array([p.accuracy for p in points]), np.array(samples))


def _over_subsets(hits: np.ndarray) -> Estimate:
    """The mean of `hits` (0/1 `[subsets, images]`) with an interval for other images and other subsets.

    The variances over images, of each one's mean over the subsets, and over subsets add up; for one subset, the first
    gives Wilson's interval. Averaging takes out some of the noise of images, so this interval may be narrower than
    Wilson's of one subset, but never narrower than if all answers of all subsets were independent.
    """
    value, (subsets, images) = float(hits.mean()), hits.shape
    variance = hits.mean(axis=0).var() / images + hits.mean(axis=1).var(ddof=1) / subsets
    least = value * (1 - value) / hits.size
    return metrics.average(value, np.array(max(variance, least)) ** 0.5, 1, images)


def extrapolate(sizes: np.ndarray, accuracy: np.ndarray, samples: np.ndarray) -> tuple[Forecast | None, str]:
    """Accuracy with twice the images, from `error = a * n ** -b` through the curve; or None, and why.

    sizes, accuracy: `[S]`; samples `[S, B]`: resamples of the accuracy. There is no forecast from fewer than
    four sizes, from a curve without errors, or where the same law, fitted without the largest size, misses
    what was measured there by more than the resamples allow. Learning curves of image classifiers follow
    such laws over their middle part (Hestness et al. 2017) and flatten later, so that the forecast is
    more likely too high than too low.
    """
    if len(sizes) < MIN_POINTS:
        return None, f"No forecast from {len(sizes)} sizes; {MIN_POINTS} are needed."
    if accuracy.max() >= 1.0:
        return None, "No forecast: at some size there is no error left."
    error = np.maximum(1 - np.column_stack([accuracy, samples]), 0.5e-3)  # [S, 1 + B]
    x, z = np.log(sizes), np.log(error)

    slope, start = np.polyfit(x[:-1], z[:-1], 1)
    before = np.exp(start + slope * x[-1])
    low, high = np.quantile((before - error[-1])[1:], [0.025, 0.975])
    if not low <= 0 <= high:
        return None, (
            f"No forecast: a power law through the smaller sizes expects {1 - before[0]:.1%} with "
            f"{sizes[-1]:,} images, and {accuracy[-1]:.1%} was measured."
        )

    twice = 2 * int(sizes[-1])
    slope, start = np.polyfit(x, z, 1)
    ahead = 1 - np.exp(start + slope * np.log(twice))
    expected, (low, high) = float(ahead[0]), np.quantile(ahead[1:], [0.025, 0.975])
    forecast = Forecast(twice, expected, min(float(low), expected), max(float(high), expected), float(-slope[0]))
    steepest, flattest = np.quantile(slope[1:], [0.025, 0.975])
    if steepest <= 0 <= flattest:
        return forecast, "The curve is flat within its error: more photographs of the same kind may not help."
    if slope[0] > 0:
        return forecast, "Accuracy falls as images are added: look at the labels of this data set."
    return forecast, (
        f"If the error goes on falling like this, {twice:,} training images would give {expected:.1%} "
        f"({low:.1%} to {high:.1%}), after {accuracy[-1]:.1%} with {sizes[-1]:,}."
    )
