"""`sweep`: a grid of backbones, layers, heads and views; each point is a run, and one of them is named the winner."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx import metrics
from featx.backbones.loading import check
from featx.backbones.request import BackboneInfo, BackboneRequest, preprocessing
from featx.devices import memory_for_features
from featx.engines.engine import Engine, measure_speed
from featx.engines.int8 import calibrated
from featx.engines.onnx import backbone_onnx
from featx.engines.opening import open_engine
from featx.errors import FeatxError, RunError
from featx.extraction.job import Backbone, Data
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.features import Features, FeatureSpec, groups
from featx.files import read_plain, write_atomic
from featx.fitting import fit
from featx.head import columns
from featx.learning import check_heads, head_text, module, parse_head
from featx.measuring.swept import CRITERIA, CrossValidated, Point, Sweep
from featx.measuring.views import FOLDS, held_out, paired, scores
from featx.options import Criterion, Preprocessing, Shared, complete, fields_of, home, listed, plain
from featx.records import array_bytes, array_of, convert, read_record
from featx.runs import Run, is_finished, open_run, read_config
from featx.solvers.training import folds
from featx.sources.opening import open_source
from featx.sources.source import Source

HELD_OUT = "held-out-by-key.npy"


@dataclass(frozen=True, eq=False)
class _Place:
    """What all points of a sweep share."""

    path: Path
    source: Source
    memory: float
    engine: Engine | None
    options: dict[str, Any]
    """What `fit` and `sync` take: seed, cache, device and the others of `Shared`."""
    speeds: dict[str, float]
    """Images per second, by a former sweep's point and by the features' spec: heads on one backbone share its speed."""
    labels: dict[str, str]
    """What tells local weights apart, by the weights of a request."""


def sweep(
    data: Data,
    backbones: Sequence[Backbone] = ("resnet18",),
    heads: Sequence[str] = ("logreg",),
    *,
    layers: Sequence[str] = ("features",),
    views: Sequence[int] = (0,),
    by: Criterion = "accuracy",
    output: str | Path | None = None,
    memory: float | None = None,
    engine: Engine | None = None,
    **options: Unpack[Shared],
) -> Sweep:
    """Fit every combination, each on features that are extracted once, and rank them on training images.

    backbones: names, each with weights of its own if written `name=weights`. heads: names, with settings if
    written `logreg class_weight=balanced`; the same head may come several times. by: `accuracy` or `log_loss`
    over five folds of the training images, in which each head chooses its settings again; the validation
    images are measured, too, and choose nothing. memory: as for `featx.fit`. engine, options: as for
    `featx.extract`; one engine runs one backbone and layer.

    Each point is a run in `<output>/runs/`, by default `export/<data>-sweep`. A point that is there already, on the
    same images, is not fitted again. One that fails (a layer that a network lacks, weights that cannot be had) is
    named and left out. Raises `FeatxError` where all fail, for a wrong grid, and for a folder with other data's sweep.
    """
    asked = complete(options, Shared, sweep)
    requests = [_request(backbone, layer, asked) for backbone in listed(backbones) for layer in listed(layers)]
    variants, views = [parse_head(head) for head in listed(heads)], plain(listed(views))
    asked |= dict.fromkeys(fields_of(Preprocessing))  # the requests have them
    source = open_source(data)
    check_heads(variants, source)
    root = Path(source.uri).resolve()
    path = Path(home(output or f"export/{root.name if root.is_dir() else root.stem}-sweep"))
    _check(path, root, by, views, requests, variants)
    if engine is not None and len(requests) > 1:
        raise FeatxError(f"one engine runs one backbone and layer, and the grid has {len(requests)}")

    limit = memory_for_features() if memory is None else memory
    place = _Place(path, source, limit, engine, asked, _former_speeds(path), _labels(requests))
    found: list[tuple[Point, np.ndarray | None]] = []
    failed: list[dict[str, str]] = []
    for request, count, (head, settings) in product(requests, dict.fromkeys(views), variants):
        if not module(head).LEARNS and count != min(views):
            continue  # views change nothing
        try:
            found.append(_point(place, request, head, settings, count))
        except FeatxError as error:
            which = place.labels.get(request.weights, "") if isinstance(request, BackboneRequest) else ""
            words = [f"{request.name}/{request.layer}", which, head_text(head, settings), f"{count} views"]
            name = " ".join(filter(None, words))
            failed.append({"point": name, "error": str(error)})
            continue
        found.sort(key=lambda each: _rank(each[0], by))
        Sweep(path, source.uri, [point for point, _ in found], failed, by).write()  # survives an interruption
    if not found:
        raise FeatxError("no point of the sweep could be fitted; the first: " + "{point}: {error}".format(**failed[0]))

    swept = Sweep(path, source.uri, _compared(found, by), failed, by)
    swept.write()
    return swept


def _request(backbone: Backbone, layer: str, options: dict[str, Any]) -> BackboneRequest | BackboneInfo:
    """A backbone of the grid as a request. Raises `BackboneError` for what fails the whole grid: a mistyped name, or a
    file that is not there."""
    asked = tuple(preprocessing(options).items())
    if isinstance(backbone, BackboneInfo):
        return replace(
            backbone, preprocess=BackboneRequest(backbone.name, preprocess=asked).override(backbone.preprocess)
        )
    if isinstance(backbone, BackboneRequest):
        request = replace(backbone, layer=layer)
    else:
        name, _, own = backbone.partition("=") if isinstance(backbone, str) else (backbone, "", "")
        request = BackboneRequest(name, own or options["weights"], layer, options["seed"])
    check(request, Path(options["cache"]))
    return replace(request, preprocess=(*request.preprocess, *asked))


def _labels(requests: Sequence[BackboneRequest | BackboneInfo]) -> dict[str, str]:
    """What tells local weights apart: a file's name, with as many of its folders as that takes."""
    files = {r.weights: Path(r.weights).parts for r in requests if isinstance(r, BackboneRequest) and r.file}
    labels: dict[str, str] = {}
    for size in range(1, max(map(len, files.values()), default=0) + 1):
        labels = {weights: "/".join(parts[-size:]) for weights, parts in files.items()}
        if len(set(labels.values())) == len(files):
            break
    return labels


def _check(path: Path, data: Path, by: str, views: Sequence[int], *grid: Sequence[object]) -> None:
    """Raise `FeatxError` for what is wrong with a sweep as a whole; `RunError` where another one would be replaced."""
    if by not in CRITERIA:
        raise FeatxError(f"a sweep chooses by {' or '.join(CRITERIA)}, not {by!r}")
    if not all(grid) or not len(views) or min(views) < 0:
        raise FeatxError("a sweep needs at least one backbone, layer, head and number of views")
    ours = path.is_dir() and ({each.name for each in path.iterdir()} <= {"runs"} or _former_speeds(path))
    if path.exists() and not ours:
        raise RunError(f"{path} exists and is not a sweep; give another --output")
    for run in filter(is_finished, path.glob("runs/*")):
        if (other := read_config(run)[0].data) != str(data):
            raise RunError(f"{path} holds a sweep of {other}, and this one is of {data}; give another --output")


def _point(
    place: _Place, backbone: Backbone, head: str, settings: dict[str, Any], views: int
) -> tuple[Point, np.ndarray | None]:
    """One point's run and figures; and what `_held_out` gives for it."""
    options, engine = place.options, place.engine
    extraction = sync(place.source, backbone, engine=engine, views=views, **options)
    request, features = extraction.request, extraction.features(memory=place.memory)
    asked = [request.to_dict(), head, settings, views, options["seed"], features.digest, features.spec.digest]
    words = [re.sub(r"[^\w.]+", "_", w) for w in (request.name, request.layer, head)]
    name = "-".join([*words, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]])
    folder = place.path / "runs" / name
    if is_finished(folder):
        run = open_run(folder, request.name)
    else:
        given: dict[str, Any] = {"settings": settings, "views": views, "gain": False, "memory": place.memory, **options}
        run = fit(place.source, backbone, head, output=folder, overwrite=True, engine=engine, **given)

    measured, info = run.report, run.config.backbone
    if run.config.request.layer != request.layer:  # the pretrained head may want the logits
        request = run.request
        extraction = sync(place.source, request, engine=engine, **options)
        features = extraction.features(memory=place.memory)
    right, spec = _held_out(run, extraction, features, head, settings, place), features.spec
    if spec.digest not in place.speeds:
        place.speeds[spec.digest] = place.speeds.get(name) or _speed(request, info, spec, place)
    interval = measured.get("intervals", {}).get("accuracy", {})
    point = Point(
        name=name,
        run=f"runs/{name}",
        backbone=info.name.removeprefix("torchvision/"),
        weights=place.labels.get(request.weights, info.weights_note),
        layer=request.layer,
        head=head_text(head, settings),
        views=views,
        cross_validated=_summary(right),
        accuracy=measured["accuracy"],
        low=interval.get("low"),
        high=interval.get("high"),
        log_loss=measured.get("log_loss"),
        images_per_second=place.speeds[spec.digest],
        megabytes=_megabytes(request, info, run, Path(options["cache"])),
        parameters=info.parameters,
        fit_seconds=measured["fit"]["seconds"],
    )
    return point, right


def _held_out(
    run: Run, extraction: Extraction, features: Features, head: str, settings: dict[str, Any], place: _Place
) -> np.ndarray | None:
    """`right` and log-loss of held-out training images, `float64 [2, N]`, kept in the run; None without folds.

    The images and their order, by content key, are the same for every point on one data set.
    """
    file, seed = run.path / HELD_OUT, place.options["seed"]
    with contextlib.suppress(OSError, ValueError):
        return array_of(read_plain(file), "<f8", 2)
    numbers = np.flatnonzero(features.splits == "train")
    train = features.take(numbers[np.lexsort(features.keys[numbers].T[::-1])])
    group = groups(train.keys)
    fold, _ = folds(train.y, FOLDS, groups=group, seed=seed)
    measured = np.flatnonzero(fold >= 0)
    if not len(measured):
        return None

    if module(head).LEARNS:
        views = extraction.views(train.keys, memory=place.memory)
        alike: dict[str, Any] = {"groups": group, "seed": seed, "device": place.options["device"]}
        logits, _ = held_out(head, views, train.y, train.class_names, fold, settings=settings, **alike)
        right = np.array(scores(logits[measured], train.y[measured]))
    else:  # it learned from no image here: all are held out
        part, known = train.take(measured), run.head
        right = np.array(scores(known(part.rows), columns(part.class_names, known.class_names)[part.y]))
    write_atomic(file, array_bytes(right))
    return right


def _summary(right: np.ndarray | None) -> CrossValidated | None:
    if right is None:
        return None
    hits, loss = metrics.proportion(right[0]), metrics.mean_of(right[1])
    return CrossValidated(hits.value, hits.low, hits.high, loss.value, loss.low, loss.high, right.shape[1])


def _rank(point: Point, by: str) -> tuple[float, ...]:
    """A sort key: best first, the faster of equals; points that could not be cross-validated come last."""
    found = point.cross_validated
    if found is None:
        return (1,)
    order = (-found.accuracy, found.log_loss)
    return (0, *(order if by == "accuracy" else order[::-1]), -point.images_per_second)


def _compared(found: list[tuple[Point, np.ndarray | None]], by: str) -> list[Point]:
    """The points, each with how far it is behind the first on the same images."""
    (first, best), *others = found
    i, ranked = CRITERIA.index(by), [first]
    for point, right in others:
        behind = None if best is None or right is None else paired(by, right[i], best[i])
        ranked.append(replace(point, behind=behind))
    return ranked


def _speed(request: BackboneRequest, info: BackboneInfo, spec: FeatureSpec, place: _Place) -> float:
    options: dict[str, Any] = {name: place.options[name] for name in ("device", "precision", "batch_size")}
    options |= {"calibration": spec.calibration, "engine": spec.engine or None}
    if place.engine:
        return measure_speed(place.engine, info.preprocess.crop)
    with contextlib.closing(open_engine(request, info, cache=Path(place.options["cache"]), **options)) as engine:
        return measure_speed(engine, info.preprocess.crop)


def _megabytes(request: BackboneRequest, info: BackboneInfo, run: Run, cache: Path) -> float:
    """The exported backbone and the head, 10**6 bytes; where it cannot be exported, four bytes a parameter."""
    try:
        digest = run.config.spec.calibration
        size = (calibrated(cache, digest) if digest else backbone_onnx(request, info, cache)).stat().st_size
    except FeatxError:
        size = 4 * info.parameters
    return round((size + (run.path / "head.safetensors").stat().st_size) / 1e6, 3)


def _former_speeds(path: Path) -> dict[str, float]:
    """Images per second by the names of a former sweep's points."""
    with contextlib.suppress(OSError, ValueError):
        points = convert(read_record(path / "sweep.json")[0].get("points"), list[Point])
        return {point.name: point.images_per_second for point in points}
    return {}
