"""Owns what a report shows of the data itself: photographs, and a map of their features."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from featx.errors import FeatxError
from featx.features import Features, content_key
from featx.head import MULTILABEL
from featx.pixels.preprocess import Preprocess, decode
from featx.pixels.views import CENTER, augmented
from featx.pixels.views import pixels as view_pixels
from featx.reporting import page, plots
from featx.runs import Run, RunConfig
from featx.sources.opening import open_source
from featx.sources.source import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL = 300  # pixels, the longer side
GRID = 8  # photographs in the grids of a batch and of predictions, as in the tutorials
# t-SNE's time grows faster than the points; 1,000 take about 2 s on one core
MOST_POINTS = 1000
PERPLEXITY = 30.0


@dataclass(eq=False)
class Material:
    """A run and what its report needs beside it; what is no longer at hand is None, and said in `missing`."""

    run: Run
    config: dict[str, Any]
    report: dict[str, Any]
    features: Features | None
    source: Source | None
    missing: list[str]

    def clean(self, sentence: str) -> str:
        """`sentence` without this machine's folders: what lies in them keeps its name."""
        return strip_paths(sentence, self.config)

    def picture(self, id: str) -> Image.Image | None:
        """A photograph, upright; None where it cannot be read any more."""
        row = self._rows.get(id)
        if row is None or self.source is None:
            return None
        try:
            return decode(self.source.read(row))
        except FeatxError:
            return None

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {id: i for i, id in enumerate(self.source.ids)} if self.source is not None else {}

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_dict(self.config["backbone"]["preprocess"])


def gather(run: Run, features: Features | None = None, source: Source | None = None) -> Material:
    """A finished run with its features and photographs, where these are not given as far as they are still there."""
    config = run.config
    missing = []
    if source is None:
        try:
            source = open_source(config.data)
        except FeatxError:
            missing.append("The photographs are not where they were: they are not shown.")
    if features is None and source is not None:
        features = _cached(config, source)
        if features is None:
            missing.append("The cache does not hold the run's features any more: no map and no predictions.")
        elif features.digest != config.data_digest:
            features = None
            missing.append("The data have changed since the run: no map and no predictions.")
    return Material(run, config.to_dict(), run.report, features, source, missing)


def _cached(config: RunConfig, source: Source) -> Features | None:
    """The run's features as far as its cache has them, in the source's order; None where it has none."""
    from featx.cache.memo import KeyMemo
    from featx.cache.store import FeatureStore
    from featx.extraction.pipeline import Extraction

    keys, known = np.zeros((len(source), 32), np.uint8), np.zeros(len(source), bool)
    cache = Path(config.cache)
    if not cache.is_dir():
        return None
    if source.stats is not None:
        keys, known = KeyMemo(cache, source.root).lookup(source.ids, source.stats)
    for i in np.flatnonzero(~known).tolist():
        try:
            keys[i] = np.frombuffer(content_key(source.read(i)), np.uint8)
            known[i] = True
        except FeatxError:
            continue
    store = FeatureStore(cache, config.spec)
    rows = np.flatnonzero(known & store.contains(keys))
    if not len(rows):
        return None
    return Extraction(
        source, config.request, config.backbone, cache, [store], rows, keys[rows], {"notes": []}
    ).features()


def strip_paths(sentence: str, config: dict[str, Any]) -> str:
    """`sentence` without the folders of this machine that a run's configuration knows of."""
    paths = [config["data"], config["cache"], config["request"]["weights"], os.getcwd(), os.path.expanduser("~")]
    folders = {str(Path(p).parent) for p in paths if os.path.isabs(p)} | set(paths[-2:])
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            sentence = sentence.replace(folder.rstrip("/") + "/", "")
    return sentence


def _thumbnail(picture: Image.Image | None) -> np.ndarray | None:
    if picture is None:
        return None
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


def mistakes(material: Material) -> tuple[str, Figure | None]:
    rows = material.report.get("mistakes") or []
    if not rows:
        return "", None
    shown = [_thumbnail(material.picture(row["id"])) for row in rows]
    items = []
    for row, small in zip(rows, shown, strict=True):
        answer, label = page.text(row["answer"]), page.text(row["label"])
        items.append(
            page.picture(
                small,
                f"{row['label']}, answered as {row['answer']}",
                f'<span class="wrong">{answer}</span> {row["probability"]:.1%}',
                f"is {label}",
                f"<small>{page.text(name(row['id']))}</small>",
            )
        )
    there = [(row, small) for row, small in zip(rows, shown, strict=True) if small is not None]
    titles = [
        f"{plots.short(row['answer'])} {row['probability']:.0%}\nis {plots.short(row['label'])}" for row, _ in there
    ]
    grid = plots.images([small for _, small in there], titles, [True] * len(there)) if there else None
    note = "The wrong answers that were most sure. A wrong label in the data often shows here."
    return page.section("Most confident mistakes", page.pictures(items), note=note), grid


def predictions(material: Material) -> tuple[str, Figure | None]:
    features = material.features
    if features is None or material.source is None:
        return "", None
    part = features.split("val")
    if not len(part) or len(part.rows.shape) != 2:
        return "", None
    rng = np.random.default_rng(material.config.get("seed", 0))
    part = part.take(np.sort(rng.choice(len(part), min(GRID, len(part)), replace=False)))
    head = material.run.head
    probabilities = head.probabilities(head(part.X))
    items, pictures, titles, wrongs = [], [], [], []
    for i, id in enumerate(part.ids):
        answer, sure = _answer(probabilities[i], head.class_names, head.activation == "sigmoid")
        label = _label(part.y[i], part.class_names)
        wrong = answer != label
        small = _thumbnail(material.picture(id))
        said = f'<span class="{"wrong" if wrong else "right"}">{page.text(answer)}</span> {sure}'
        truth = f"is {page.text(label)}" if wrong else ""
        items.append(page.picture(small, f"{label}, answered as {answer}", *filter(None, (said, truth))))
        if small is not None:
            pictures.append(small)
            titles.append(f"{plots.short(answer)} {sure}" + (f"\nis {plots.short(label)}" if wrong else ""))
            wrongs.append(wrong)
    grid = plots.images(pictures, titles, wrongs) if pictures else None
    note = f"{len(items)} validation images, drawn with the run's seed."
    return page.section("Predictions", page.pictures(items), note=note), grid


def _answer(probabilities: np.ndarray, names: tuple[str, ...], several: bool) -> tuple[str, str]:
    if several:
        said = np.flatnonzero(probabilities >= MULTILABEL)
        return ", ".join(names[i] for i in said) or "none", ""
    best = int(probabilities.argmax())
    return names[best], f"{probabilities[best]:.0%}"


def _label(y: np.ndarray, names: list[str]) -> str:
    if np.ndim(y):
        return ", ".join(names[i] for i in np.flatnonzero(y)) or "none"
    return names[int(y)]


def batch(material: Material) -> tuple[str, Figure | None]:
    """What the backbone sees: centre crops, or for a run with views four images in four views each."""
    features = material.features
    if features is None or material.source is None:
        return "", None
    train = features.split("train")
    config, preprocess = material.config, material.preprocess
    views = int(config.get("views") or 0)
    names = [CENTER, *(augmented(config.get("seed", 0), k) for k in range(1, min(views, 3) + 1))]
    rng = np.random.default_rng(config.get("seed", 0))
    count = min(GRID if views == 0 else 4, len(train))
    items, pictures, titles = [], [], []
    for i in rng.choice(len(train), count, replace=False).tolist():
        whole = material.picture(train.ids[i])
        if whole is None:
            continue
        label = _label(train.y[i], train.class_names)
        for k, name in enumerate(names):
            try:
                seen = view_pixels(preprocess, whole, train.keys[i].tobytes(), name).transpose(1, 2, 0)
            except FeatxError:
                continue
            below = "" if views == 0 else "<small>centre</small>" if k == 0 else f"<small>view {k}</small>"
            items.append(page.picture(seen, label, *filter(None, (page.text(label), below))))
            pictures.append(seen)
            titles.append(plots.short(label) + (f", view {k}" if k else ""))
    if not items:
        return "", None
    note = f"Training images as the backbone sees them, {preprocess.crop} x {preprocess.crop} pixels"
    note += f"; {views} augmented views of each are cached beside its centre crop." if views else "."
    return page.section("A training batch", page.pictures(items), note=note), plots.images(
        pictures, titles, [False] * len(pictures)
    )


def feature_map(material: Material, layout: str) -> tuple[Figure | None, str]:
    """The features of training and validation images in two dimensions, and what to say below it."""
    features = material.features
    if features is None or len(features.rows.shape) != 2:
        return None, ""
    rows = np.flatnonzero(np.isin(features.splits, ["train", "val"]))
    if len(rows) < 5:
        return None, ""
    rng = np.random.default_rng(0)
    every = len(rows)
    if every > MOST_POINTS:
        rows = np.sort(rng.choice(rows, MOST_POINTS, replace=False))
    part = features.take(rows)
    X = part.X
    points = project(X, layout)
    alone = part.y.sum(axis=1) == 1 if part.y.ndim == 2 else None
    group = part.y if alone is None else np.where(alone, part.y.argmax(axis=1), -1)
    held = part.splits == "val"
    wrong = np.zeros(len(part), bool)
    head = material.run.head
    probabilities = head.probabilities(head(X[held]))
    wrong[held] = [
        _answer(p, head.class_names, head.activation == "sigmoid")[0] != _label(y, part.class_names)
        for p, y in zip(probabilities, part.y[held], strict=True)
    ]
    method = "t-SNE" if layout == "tsne" else "The first two principal components"
    note = f"{method} of the {features.rows.shape[1]} features: what is near looks alike to the backbone. "
    note += "Distances between groups say little. " if layout == "tsne" else ""
    note += "Strong colours are validation images, soft ones were trained on."
    note += f" {len(rows):,} of {every:,} images, drawn at random." if every > len(rows) else ""
    figure = plots.feature_map(points, group, part.class_names, ~held, wrong)
    return figure, note


def project(X: np.ndarray, layout: str) -> np.ndarray:
    """`[N, D]` standardised -> `float64 [N, 2]`; the same on every run: `pca`, or `tsne` of 50 components.

    t-SNE (van der Maaten and Hinton 2008) as scikit-learn has it, from the PCA, on one thread: the order in
    which threads add up would show.
    """
    Z = np.asarray(X, np.float64)
    spread = Z.std(axis=0)
    Z = (Z - Z.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    # from the smaller of the two Gram matrices: a tenth of the time of a singular value decomposition
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = np.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    values, vectors = np.maximum(values[::-1][:50], 0.0), vectors[:, ::-1][:, :50]
    components = vectors * np.sqrt(values) if wide else Z @ vectors
    # a sign that does not depend on the library
    components = components * np.sign(components[np.abs(components).argmax(axis=0), np.arange(components.shape[1])])
    if components.shape[1] < 2:
        components = np.pad(components, ((0, 0), (0, 2 - components.shape[1])))
    if layout == "pca":
        return components[:, :2]
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = components[:, :2] / max(components[:, 0].std(), 1e-12) * 1e-4
    perplexity = min(PERPLEXITY, (len(X) - 1) / 3)
    with threadpool_limits(1):
        method = TSNE(perplexity=perplexity, init=start.astype(np.float32), random_state=0, max_iter=500)
        return np.asarray(method.fit_transform(components.astype(np.float32)), np.float64)


def name(id: str) -> str:
    """An image's id for people; of a path from elsewhere on the machine its last part."""
    return Path(id).name if os.path.isabs(id) or id.startswith("..") else id
