"""Owns `sweep`: a grid of backbones, layers, heads and views; each point a run, one of them the winner."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featx import metrics
from featx.backbones.loading import locate, resolve
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.backbones.table import names
from featx.engines.opening import backbone_onnx, open_engine
from featx.errors import FeatxError, HeadError, RunError
from featx.extraction.pipeline import Extraction, sync
from featx.features import Features, groups
from featx.files import write_array, write_atomic, write_json
from featx.fitting import fit
from featx.heads import check_settings
from featx.measuring import views as augmentation
from featx.reporting import comparison
from featx.runs import Run, is_finished, open_run
from featx.solvers import training as _training
from featx.sources.opening import open_source
from featx.sources.source import Source

FOLDS = 5
SPEED_SECONDS = 1.0  # that a backbone's throughput is measured for, after one batch that is not counted
HELD_OUT = "held-out-by-key.npy"
CRITERIA = ("accuracy", "log_loss")


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep found: `sweep.json`, `sweep.csv`, `sweep.html`, `plots/trade-off.png`, and `runs/`."""

    path: Path
    points: list[dict[str, Any]]
    """One for each point that could be fitted, best first, by the criterion; see `sweep`."""
    failed: list[dict[str, str]]
    """`point` and `error` of those that could not."""
    by: str

    @property
    def winner(self) -> Run:
        """A run like any other: evaluate it, export it."""
        return open_run(self.path / self.points[0]["run"])

    def table(self) -> str:
        """Plain text for people, best first."""
        return comparison.table(self.points, self.failed, self.by)


def sweep(
    data: str | Path | Source,
    backbones: Sequence[str | BackboneRequest] = ("resnet18",),
    heads: Sequence[str] = ("logreg",),
    *,
    weights: str = "pretrained",
    layers: Sequence[str] = ("features",),
    views: Sequence[int] = (0,),
    by: str = "accuracy",
    seed: int = 0,
    cache: str | Path = "cache",
    device: str = "auto",
    output: str | Path | None = None,
    report: bool = True,
    **extraction: Any,
) -> Sweep:
    """Fit every combination, each on features that are extracted once, and rank them on training images.

    backbones: names, each with weights of its own if written `name=weights`. heads: names, with settings if
    written `logreg class_weight=balanced`; the same head may come several times. by: `accuracy` or `log_loss`
    over five folds of the training images, in which each head chooses its settings anew; the validation
    images are measured, beside, and choose nothing. extraction: as for `featx.extract`.

    Each point is a run in `<output>/runs/`, by default `export/<data>-sweep`. A point that is there already,
    on the same data, is not fitted again. One that fails (a layer that a network lacks, weights that cannot
    be had) is named and left out. Raises `FeatxError` where all fail, and for what is wrong with the grid.
    """
    if by not in CRITERIA:
        raise FeatxError(f"a sweep chooses by {' or '.join(CRITERIA)}, not {by!r}")
    source = data if isinstance(data, Source) else open_source(data)
    requests = [_request(b, weights, layer, seed) for b in backbones for layer in layers]
    variants = [parse_head(h) for h in heads]
    if not requests or not variants or not views or min(views) < 0:
        raise FeatxError("a sweep needs at least one backbone, layer, head and number of views")
    path = Path(output) if output else Path("export") / f"{Path(source.uri).resolve().stem}-sweep"
    if path.exists() and not (path.is_dir() and ((path / "sweep.json").is_file() or not any(path.iterdir()))):
        raise RunError(f"{path} exists and is no sweep; give another --output")
    for head, settings in variants:
        check_settings(head, settings)  # a mistyped name is not one failed point among many
    for request in requests:
        kind, network = locate(request.name)
        if kind == "torchvision" and network not in names():
            resolve(request, Path(cache))  # says what it may have meant, unless this torchvision is newer than featx
    former = _former(path)
    speeds: dict[str, float] = {}
    points: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    held: list[np.ndarray | None] = []
    common: dict[str, Any] = {"seed": seed, "cache": cache, "device": device, **extraction}
    for request in requests:
        for count in dict.fromkeys(views):
            for head, settings in variants:
                if head == "pretrained" and count != min(views):
                    continue  # it learns nothing, so views change nothing
                name = " ".join([f"{request.name}/{request.layer}", head_text(head, settings), f"{count} views"])
                try:
                    point, right = _point(path, source, request, head, settings, count, common, former, speeds)
                except FeatxError as error:
                    failed.append({"point": name, "error": str(error)})
                    continue
                points.append(point)
                held.append(right)
                former[point["name"]] = point
                _write(path, points, failed, by)  # what is known survives an interruption
    if not points:
        raise FeatxError("no point of the sweep could be fitted; the first: " + "{point}: {error}".format(**failed[0]))
    order = sorted(range(len(points)), key=lambda i: _rank(points[i], by))
    best = held[order[0]]
    for i in order:
        mine = held[i]
        if i != order[0] and best is not None and mine is not None:
            points[i]["behind"] = augmentation.paired(mine[CRITERIA.index(by)] - best[CRITERIA.index(by)])
    found = Sweep(path, [points[i] for i in order], failed, by)
    _write(path, found.points, failed, by)
    comparison.write_page(path, found.points, failed, by, source)
    if report:
        from featx.reporting.report import write_report

        write_report(found.winner)
    return found


def parse_head(text: str) -> tuple[str, dict[str, Any]]:
    """`logreg class_weight=balanced folds=10` as a name and settings; a value is JSON where it reads as such."""
    try:
        name, *pairs = shlex.split(text)
    except ValueError as error:
        raise HeadError(f"{text!r} is no head: {error or 'it is empty'}") from None
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise HeadError(f"{pair!r} in the head {text!r} is not NAME=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return name, settings


def head_text(name: str, settings: dict[str, Any]) -> str:
    """A head with its settings, as `parse_head` reads it."""
    return shlex.join([name, *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())])


def _request(backbone: str | BackboneRequest, weights: str, layer: str, seed: int) -> BackboneRequest:
    if isinstance(backbone, BackboneRequest):
        return replace(backbone, layer=layer)
    name, _, own = backbone.partition("=")
    return BackboneRequest(name=name, weights=own or weights, layer=layer, seed=seed)


def _point(
    path: Path,
    source: Source,
    request: BackboneRequest,
    head: str,
    settings: dict[str, Any],
    views: int,
    common: dict[str, Any],
    former: dict[str, dict[str, Any]],
    speeds: dict[str, float],
) -> tuple[dict[str, Any], np.ndarray | None]:
    """One point's run and figures; and, of each training image, held out, `right` and log-loss `[2, N]`."""
    extraction = sync(source, request, views=views, **common)
    features = extraction.features()
    asked = [request.to_dict(), head, settings, views, common["seed"], features.digest, features.spec.digest]
    words = [re.sub(r"[^\w.]+", "_", w) for w in (request.name, request.layer, head)]
    name = "-".join([*words, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]])
    folder = path / "runs" / name
    if is_finished(folder):
        run = open_run(folder)
    else:
        wanted: dict[str, Any] = {"output": folder, "overwrite": True, "gain": False, "report": False} | common
        run = fit(source, request, head, settings=settings, views=views, **wanted)
    measured, info = run.report, run.config.backbone
    if run.request.layer != request.layer:  # the pretrained head may want the logits
        request = run.request
        extraction = sync(source, request, **common)
        features = extraction.features()
    right = _held_out(run, extraction, features, head, settings, common)
    seen = former.get(name, {})
    if features.spec.digest not in speeds:  # heads on one backbone share its speed
        speeds[features.spec.digest] = seen.get("images_per_second") or _speed(request, info, common)
    interval = (measured.get("intervals") or {}).get("accuracy", {})
    point: dict[str, Any] = {
        "name": name,
        "run": f"runs/{name}",
        "backbone": info.name.removeprefix("torchvision/"),
        "layer": request.layer,
        "head": head_text(head, settings),
        "views": views,
        "cross_validated": _summary(right),
        "accuracy": measured["accuracy"],
        "low": interval.get("low"),
        "high": interval.get("high"),
        "log_loss": measured.get("log_loss"),
        "images_per_second": speeds[features.spec.digest],
        "megabytes": seen.get("megabytes") or _megabytes(request, info, run, Path(common["cache"])),
        "parameters": info.parameters,
        "fit_seconds": measured["fit"]["seconds"],
        "behind": None,
    }
    return point, right


def _held_out(
    run: Run,
    extraction: Extraction,
    features: Features,
    head: str,
    settings: dict[str, Any],
    common: dict[str, Any],
) -> np.ndarray | None:
    """`right` and log-loss of held-out training images, `float64 [2, N]`, kept in the run; None without folds.

    The images and their order, by content key, are the same for every point on one data set.
    """
    file = run.path / HELD_OUT
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        pass
    rows = np.flatnonzero(features.splits == "train")
    rows = rows[np.lexsort(features.keys[rows].T[::-1])]
    y, group = features.y[rows], groups(features.keys[rows])
    fold, _ = _training.folds(y, FOLDS, groups=group, seed=common["seed"])
    measured = np.flatnonzero(fold >= 0)
    if not len(measured):
        return None
    if head == "pretrained" and y.ndim == 1:  # it learned from no image here: all are held out
        answers = run.head
        logits = answers(features.X[rows[measured]])
        column = np.array([answers.class_names.index(c) for c in features.class_names])[y[measured]]
        right = np.array([logits.argmax(axis=1) == column, metrics.losses(logits, column)])
    else:
        views = [features.X, *(extraction.features(k).X for k in range(1, len(extraction.stores)))]
        logits, _ = augmentation.held_out(
            head,
            [view[rows] for view in views],
            y,
            features.class_names,
            fold,
            groups=group,
            seed=common["seed"],
            device=common["device"],
            **settings,
        )
        right = np.array(augmentation.scores(logits[measured], y[measured]))
    write_array(file, right)
    return right


def _summary(right: np.ndarray | None) -> dict[str, Any] | None:
    if right is None:
        return None
    low, high = metrics.wilson(int(right[0].sum()), right.shape[1])
    loss = augmentation.paired(right[1])
    return {
        "accuracy": float(right[0].mean()),
        "low": low,
        "high": high,
        "log_loss": loss["value"],
        "log_loss_low": loss["low"],
        "log_loss_high": loss["high"],
        "images": right.shape[1],
    }


def _rank(point: dict[str, Any], by: str) -> tuple[Any, ...]:
    """Best first; what could not be cross-validated last; of equals the faster."""
    found = point["cross_validated"]
    if found is None:
        return (1,)
    first, second = -found["accuracy"], found["log_loss"]
    return (0, *((first, second) if by == "accuracy" else (second, first)), -(point["images_per_second"] or 0))


def _speed(request: BackboneRequest, info: BackboneInfo, common: dict[str, Any]) -> float:
    """Images per second of the backbone alone, on this machine: decoding depends on the photographs."""
    options = {k: common[k] for k in ("device", "precision", "batch_size") if k in common}
    engine = open_engine(request, info, cache=Path(common["cache"]), **options)
    crop = info.preprocess.crop
    images = np.random.default_rng(0).integers(0, 256, (engine.batch_size, 3, crop, crop), dtype=np.uint8)
    engine(images)
    begin, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begin < SPEED_SECONDS:
        engine(images)
        done += 1
    return round(done * len(images) / (time.perf_counter() - begin), 1)


def _megabytes(request: BackboneRequest, info: BackboneInfo, run: Run, cache: Path) -> float:
    """Of the exported backbone and the head, 10**6 bytes; where it cannot be exported, four bytes a parameter."""
    try:
        size = backbone_onnx(request, info, cache).stat().st_size
    except FeatxError:
        size = 4 * info.parameters
    return round((size + (run.path / "head.safetensors").stat().st_size) / 1e6, 3)


def _former(path: Path) -> dict[str, dict[str, Any]]:
    """The points of a former sweep there, by name: speeds and sizes are not measured twice."""
    try:
        return {p["name"]: p for p in json.loads((path / "sweep.json").read_bytes())["points"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, points: list[dict[str, Any]], failed: list[dict[str, str]], by: str) -> None:
    ranked = sorted(points, key=lambda p: _rank(p, by))
    values = {"by": by, "winner": ranked[0]["run"] if ranked else None, "points": ranked, "failed": failed}
    write_json(path / "sweep.json", values)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    flat = [
        {
            **{k: v for k, v in p.items() if k not in ("cross_validated", "behind")},
            **{f"cross_validated_{k}": v for k, v in (p["cross_validated"] or {}).items()},
        }
        for p in ranked
    ]
    columns = list(dict.fromkeys(k for p in flat for k in p))
    writer.writerow(columns)
    writer.writerows([p.get(c) for c in columns] for p in flat)
    write_atomic(path / "sweep.csv", file.getvalue().encode("utf-8", "backslashreplace"))
