"""What a report shows of the data itself: photographs, and a map of their features."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from featx.cache.store import FeatureStore
from featx.errors import FeatxError
from featx.extraction.findings import Findings
from featx.extraction.keys import KeyTable
from featx.extraction.report import ExtractionReport
from featx.extraction.result import Extraction
from featx.features import Features
from featx.pixels.decoding import decode
from featx.pixels.views import CENTER, augmented
from featx.pixels.views import pixels as view_pixels
from featx.reporting import plots
from featx.reporting.page import Drawing, Picture, strip_paths
from featx.runs import Run, RunConfig
from featx.sources.opening import open_source
from featx.sources.source import Source

THUMBNAIL = 300  # pixels, the longer side
GRID = 8  # photographs in the grids of a batch and of predictions, as in the tutorials
# t-SNE's time grows faster than the points; 1,000 take about 2 s on one core
MAX_POINTS = 1000
PERPLEXITY = 30.0


@dataclass(eq=False)
class RunMaterial:
    """A run with its features and photographs; None where they are no longer there, and `missing` says so."""

    run: Run
    features: Features | None
    source: Source | None
    missing: list[str]

    def clean(self, sentence: str) -> str:
        """`sentence` without this machine's folders: what lies in them keeps its name."""
        config = self.run.config
        paths = [config.data, config.cache, str(config.request.file or "")]
        return strip_paths(sentence, [Path(p).parent for p in paths if os.path.isabs(p)])

    def picture(self, id: str) -> Image.Image | None:
        """A photograph, upright; None where it cannot be read any more."""
        with contextlib.suppress(FeatxError, KeyError):
            return decode(self.source.read(self._numbers[id])) if self.source else None
        return None

    def thumbnail(self, id: str) -> np.ndarray | None:
        """The photograph made small, `uint8 [H, W, 3]`."""
        small = self.picture(id)
        if small is not None:
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        return None if small is None else np.asarray(small)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {id: i for i, id in enumerate(self.source.ids)} if self.source else {}

    def split(self, name: str) -> Features | None:
        """The features of a split; None where they, or the photographs, are missing."""
        return self.features.split(name) if self.features and self.source else None


def gather(run: Run, features: Features | None = None, source: Source | None = None) -> RunMaterial:
    """A finished run with its features and photographs: those given, or those that are still there."""
    missing = []
    if source is None:
        try:
            source = open_source(run.config.data)
        except FeatxError:
            missing.append("The photographs are not where they were: they are not shown.")
    if features is None and source is not None:
        features = _cached(run.config, source)
        if features is None:
            missing.append("The cache does not hold the run's features any more: no map and no predictions.")
        elif features.digest != run.config.data_digest:
            features = None
            missing.append("The data have changed since the run: no map and no predictions.")
    return RunMaterial(run, features, source, missing)


def _cached(config: RunConfig, source: Source) -> Features | None:
    """The run's features as far as its cache has them, in the source's order; None where it has none."""
    cache = Path(config.cache)
    if not cache.is_dir():
        return None
    table, store = KeyTable(source, cache), FeatureStore(cache, config.spec)
    table.read_missing()
    numbers = np.flatnonzero(table.stored([store]))
    if not len(numbers):
        return None

    counts, keys = ExtractionReport(len(source), 0, len(numbers), 0, 0, 0), table.keys[numbers]
    found = Findings.of(source, numbers, keys, {})
    return Extraction(source, config.request, config.backbone, cache, [store], numbers, keys, counts, found).features()


def mistakes(material: RunMaterial) -> list[Picture]:
    """The most confident wrong answers."""
    return [
        Picture(material.thumbnail(m["id"]), m["label"], m["answer"], f"{m['probability']:.1%}", name(m["id"]))
        for m in material.run.report.get("mistakes", [])
    ]


def predictions(material: RunMaterial) -> list[Picture]:
    """Validation images drawn with the run's seed, and the head's answers."""
    part = material.split("val")
    if part is None or len(part.rows.shape) != 2:
        return []
    rng = np.random.default_rng(material.run.config.seed)
    part = part.take(np.sort(rng.choice(len(part), min(GRID, len(part)), replace=False)))
    answers = zip(part.ids, _answers(material.run, part), strict=True)
    return [Picture(material.thumbnail(id), label, answer, sure) for id, (label, answer, sure) in answers]


def batch(material: RunMaterial) -> list[Picture]:
    """What the backbone sees: centre crops, or for a run with views four images in four views each."""
    train, config = material.split("train"), material.run.config
    if train is None:
        return []
    views = {"centre" if config.views else "": CENTER}
    views |= {f"view {k}": augmented(config.seed, k) for k in range(1, min(config.views, 3) + 1)}
    count = min(4 if config.views else GRID, len(train))
    part = train.take(np.random.default_rng(config.seed).choice(len(train), count, replace=False))

    shown = []
    for id, key, y in zip(part.ids, part.keys, part.y, strict=True):
        whole = material.picture(id)
        if whole is None:
            continue
        for detail, view in views.items():
            seen = view_pixels(config.backbone.preprocess, whole, key.tobytes(), view)
            shown.append(Picture(seen.transpose(1, 2, 0), _label(y, part.class_names), detail=detail))
    return shown


def grid(pictures: list[Picture]) -> Drawing | None:
    """The pictures that can be read, in one drawing."""
    there = [(p.pixels, p.title, p.wrong) for p in pictures if p.pixels is not None]
    return Drawing(plots.images(*zip(*there, strict=True))) if there else None


def _answers(run: Run, part: Features) -> Iterator[tuple[str, str, str]]:
    """Each image's label, the head's answer, and how sure it is."""
    head = run.head
    probabilities = head.probabilities(head(part.rows))
    for p, said, y in zip(probabilities, head.answers(probabilities), part.y, strict=True):
        sure = "" if head.activation == "sigmoid" else f"{p.max():.0%}"
        yield _label(y, part.class_names), _named(np.flatnonzero(said), head.class_names), sure


def _label(y: np.ndarray, names: list[str]) -> str:
    return _named(np.flatnonzero(y), names) if np.ndim(y) else names[int(y)]


def _named(which: np.ndarray, names: Sequence[str]) -> str:
    return ", ".join(names[i] for i in which) or "none"


def feature_map(material: RunMaterial, layout: str) -> Drawing | None:
    """The features of training and validation images in two dimensions."""
    features = material.features
    if features is None or len(features.rows.shape) != 2:
        return None
    which = np.flatnonzero(np.isin(features.splits, ["train", "val"]))
    every = len(which)
    if every < 5:
        return None
    if every > MAX_POINTS:
        which = np.sort(np.random.default_rng(0).choice(which, MAX_POINTS, replace=False))

    part = features.take(which)
    group = part.y
    if group.ndim == 2:  # an image of several labels, or of none, has no group
        group = np.where(group.sum(axis=1) == 1, group.argmax(axis=1), -1)
    held = part.splits == "val"
    wrong = np.zeros(len(part), bool)
    wrong[held] = [label != answer for label, answer, _ in _answers(material.run, part.split("val"))]

    method = "t-SNE" if layout == "tsne" else "The first two principal components"
    note = f"{method} of the {features.rows.shape[1]} features: images that are near look alike to the backbone. "
    note += "Distances between groups say little. " if layout == "tsne" else ""
    note += "Strong colours are validation images, soft ones were trained on."
    note += f" {len(part):,} of {every:,} images, drawn at random." if every > len(part) else ""
    figure = plots.feature_map(project(part.X, layout), group, part.class_names, ~held, wrong)
    return Drawing(figure, note, 760)


def project(X: np.ndarray, layout: str) -> np.ndarray:
    """`[N, D]` standardised -> `float64 [N, 2]`; the same on every run: `pca`, or `tsne` of 50 components.

    t-SNE (van der Maaten and Hinton 2008) as scikit-learn has it, from the PCA, on one thread: the order in
    which threads add up would change the points.
    """
    Z = np.asarray(X, np.float64)
    spread = Z.std(axis=0)
    Z = (Z - Z.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    # from the smaller of the two Gram matrices: a tenth of the time of a singular value decomposition
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = np.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    values, vectors = np.maximum(values[::-1][:50], 0.0), vectors[:, ::-1][:, :50]
    components: np.ndarray = vectors * np.sqrt(values) if wide else Z @ vectors
    # a sign that does not depend on the library
    components *= np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    components = np.pad(components, ((0, 0), (0, max(0, 2 - components.shape[1]))))
    if layout == "pca":
        return components[:, :2]

    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
    options = {"perplexity": min(PERPLEXITY, (len(X) - 1) / 3), "init": start.astype(np.float32), "max_iter": 500}
    with threadpool_limits(1):
        points = TSNE(**options, random_state=0).fit_transform(components.astype(np.float32))
    return np.asarray(points, np.float64)


def name(id: str) -> str:
    """An image's id for people: a path from elsewhere on the machine is cut to its last part."""
    return Path(id).name if os.path.isabs(id) or id.startswith("..") else id
