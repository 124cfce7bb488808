"""Owns `fit`: cached features -> head -> evaluation -> a run's folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx import __version__, heads, runs
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.cache.streaming import Stacked, StoredRows
from featx.devices import memory_for_features
from featx.errors import HeadError
from featx.extraction.pipeline import Extraction, sync
from featx.features import Features, Rows, groups, repeated, short_keys
from featx.finetuning.processes import World, processes, rank
from featx.head import MULTILABEL, Fitted, Head
from featx.measuring import views as augmentation
from featx.measuring.evaluation import evaluate_logits
from featx.sources.source import Source

if TYPE_CHECKING:
    from featx.finetuning.recipes import FinetuneConfig


def fit(
    data: str | Path | Source,
    backbone: str | BackboneRequest = "resnet18",
    head: str = "logreg",
    *,
    weights: str = "pretrained",
    layer: str = "features",
    settings: dict[str, Any] | None = None,
    finetune: FinetuneConfig | None = None,
    seed: int = 0,
    views: int = 0,
    cache: str | Path = "cache",
    device: str = "auto",
    output: str | Path | None = None,
    overwrite: bool = False,
    gain: bool = True,
    report: bool = True,
    memory: float | None = None,
    **extraction: Any,
) -> runs.Run:
    """Extract what is missing, fit a head on the training images, evaluate it on the others, write a run.

    head: the name of a file in `featx/heads`; settings: keyword arguments of its `fit`. finetune: then train
    the backbone further, from that head on. views: augmented views of each training image to learn from
    beside its centre crop. output: the run's folder, by default
    `export/<data>-<backbone>-<head>-<8 hex of the configuration>`. gain: where there are views, measure by
    cross-validation what they bring, which costs two fits a fold. report: write `report.html` and `plots/`
    too. memory: bytes that a table of features may take, by default a fifth of what is free, since a fit
    holds up to four copies; a larger one stays in the cache and is read by slices, pass by pass (heads
    logreg, ridge and ncm). The others: as for `featx.extraction.sync`.

    Only training images choose anything; validation and test images are for measuring. Raises `HeadError`
    where there is nothing to learn from and `RunError` where a run would be overwritten.
    """
    settings = settings or {}
    fitter = heads.module(head)
    heads.check_settings(head, settings)
    request = backbone
    if isinstance(request, str):
        request = BackboneRequest(name=request, weights=weights, layer=layer, seed=seed)
    if head == "pretrained":
        if finetune is not None:
            raise HeadError("--head pretrained is the network as it is; fine-tune from --head logreg or linear")
        request = own_classifier_request(request, resolve(request, Path(cache)))
    options: dict[str, Any] = {"seed": seed, "cache": cache, "device": device, **extraction}
    world = World.join(device) if finetune is not None and processes() > 1 else None
    if world and not world.leads:
        world.wait()  # the leader extracts; the others then find everything cached
    extracted = sync(data, request, views=views, **options)
    limit = memory_for_features() if memory is None else memory
    features = extracted.features(memory=limit)
    if world and world.leads:
        world.wait()
    if not features.class_names:
        raise HeadError(
            f"{extracted.source.uri} has no labels: put the images into one folder a class, or name a manifest"
        )
    if head != "pretrained":
        check_learnable(features.split("train"))
    config = configuration(extracted, features, head, settings, seed, finetune)
    path = Path(output) if output else runs.default_path("export", config)
    if rank() == 0:  # of several processes that train together, the leader writes the run
        runs.check(path, config, overwrite=overwrite)  # nothing is written, or replaced, before there is a head

    begin = time.perf_counter()
    chosen = features
    if finetune is not None:
        from featx.finetuning import preparing, tuning  # and torch with them

        chosen = preparing.hold_out(features, finetune)
    if head == "pretrained":
        fitted = fitter.fit(*own_classifier(request, extracted.info), features.class_names, **settings)
    elif finetune is not None and finetune.init == "random":
        fitted = None
    else:
        X, y, group = training_rows(extracted, chosen, limit)
        if head == "linear" and not isinstance(X, np.ndarray):
            raise HeadError(
                f"--head linear holds the features in memory, and {X.shape[0]:,} rows of {X.shape[1]} take more "
                f"than {limit / 1e9:.2g} GB; use --head logreg, ridge or ncm, or a larger --memory"
            )
        centre = heads.scoring(head, np.arange(X.shape[0]) < X.shape[0] // len(extracted.stores))  # as it will be used
        fitted = fitter.fit(X, y, features.class_names, groups=group, seed=seed, device=device, **centre, **settings)
    seconds = time.perf_counter() - begin
    if finetune is not None:
        first = fitted.head if fitted else None
        tuned = tuning.finetune(extracted, chosen, first, finetune, path, device, config=config, overwrite=overwrite)
        if rank() != 0:
            return runs.Run(path, config, {}, tuned.head)
        # the tuned backbone is one like any other from here on: cached, loaded and exported by its file
        extracted = sync(data, tuned.request, **options)
        features = extracted.features(memory=limit)
        fitted = Fitted(tuned.head, (fitted.info if fitted else {}) | {"finetune": tuned.history})
        base = config.to_dict()
        config = replace(
            config,
            request=replace(tuned.request, weights=Path(tuned.request.weights).name),
            backbone=extracted.info,
            spec=features.spec,
            base={name: base[name] for name in ("request", "backbone", "spec")},
        )
        runs.write_config(path, config)
    assert fitted is not None
    values = measured(features, fitted, seconds)
    if head != "pretrained":  # which learned from no image here
        values["notes"] += repeated(features)
    if views and finetune is None and head != "pretrained":
        values |= measured_averages(extracted, features, fitted.head)
        if gain:
            values |= measured_gain(extracted, features, head, limit, seed=seed, device=device, **settings)
    if finetune is not None and finetune.select == "val":
        values["notes"].append("the epoch was chosen on the validation images: expect less of new ones")
    if finetune is None:
        runs.start(path, config, overwrite=overwrite)
    learned = features.keys[(features.splits == "train") & (head != "pretrained")]
    run = runs.finish(path, fitted.head, np.unique(short_keys(learned)), values)
    if report:
        from featx.reporting.report import write_report

        write_report(run, features=features, source=extracted.source)
    return run


def training_rows(
    extracted: Extraction, features: Features, memory: float = float("inf")
) -> tuple[Rows, np.ndarray, np.ndarray]:
    """X, y and group numbers of all views of the training images; views and duplicates share a group.

    memory: bytes that X may take; a larger one is read by slices.
    """
    rows = np.flatnonzero(features.splits == "train")
    train, views = features.keys[rows], extracted.stores
    X: Rows
    if extracted.exceeds(memory, len(train) * len(views)):
        parts = [StoredRows(store, train) for store in views]
        X = Stacked(parts) if len(parts) > 1 else parts[0]
    else:
        X = np.concatenate([store.read(train) for store in views]) if len(views) > 1 else features.take(rows).X
    times = (len(views),) + (1,) * (features.y.ndim - 1)
    return X, np.tile(features.y[rows], times), np.tile(groups(train), len(views))


def check_learnable(train: Features) -> None:
    """Raise `HeadError` unless the training images show at least two classes."""
    seen = np.unique(train.y) if train.y.ndim == 1 else np.flatnonzero(train.y.any(axis=0))
    if len(train) == 0:
        raise HeadError("there are no training images; expected class folders, or train/ with class folders")
    if train.y.ndim == 1 and len(seen) < 2:
        only = train.class_names[seen[0]]
        others = [name for name in train.class_names if name != only]
        none = f"; of {', '.join(map(repr, others[:5]))} there is none to learn from: add images" if others else ""
        raise HeadError(
            f"all {len(train)} training images are {only!r}, and a classifier needs at least two classes{none}"
        )


def own_classifier_request(request: BackboneRequest, info: BackboneInfo) -> BackboneRequest:
    """The request whose features the network's own classifier is affine in: SqueezeNet's are its logits."""
    if info.class_names is None:
        raise HeadError(f"{info.name} ({info.weights_note}) names no classes; use --head logreg or linear")
    if info.affine and request.layer != "features":
        raise HeadError(f"--head pretrained works on --layer features, not {request.layer!r}")
    return request if info.affine else replace(request, layer="logits")


def own_classifier(
    request: BackboneRequest, info: BackboneInfo
) -> tuple[np.ndarray | None, np.ndarray | None, tuple[str, ...]]:
    """The network's own classifier: weight `[K, D]`, bias `[K]` (None where the rows are its logits), K names."""
    assert info.class_names is not None
    if not info.affine:
        return None, None, info.class_names
    classifier = load_backbone(request).classifier
    assert classifier is not None
    return *classifier, info.class_names


def configuration(
    extracted: Extraction,
    features: Features,
    head: str,
    settings: dict[str, Any],
    seed: int,
    finetune: FinetuneConfig | None,
) -> runs.RunConfig:
    """What `config.json` says before any fine-tuning."""
    request = extracted.request
    if Path(request.weights).is_file():  # a run can be loaded from any working folder
        request = replace(request, weights=str(Path(request.weights).resolve()))
    config = runs.RunConfig(
        featx=__version__,
        data=str(Path(extracted.source.uri).resolve()),
        data_digest=features.digest,
        cache=str(extracted.cache.resolve()),
        request=request,
        backbone=extracted.info,
        spec=features.spec,
        views=len(extracted.stores) - 1,
        head=head,
        settings=settings,
        finetune=finetune.to_dict() if finetune else None,
        seed=seed,
        class_names=features.class_names,
        splits={name: int((features.splits == name).sum()) for name in ("train", "val", "test")},
    )
    return replace(config, digest=runs.digest(config))


def measured(features: Features, fitted: Fitted, seconds: float) -> dict[str, Any]:
    """`report.json`: the validation images' report at the top level, then what led to it."""
    values: dict[str, Any] = {"accuracy": None, "split": "val", "count": 0}
    for name in ("val", "test"):
        part = features.split(name)
        if len(part):
            values |= measure(fitted.head, part) if name == "val" else {"test": measure(fitted.head, part)}
    train = features.split("train")
    values["train_accuracy"] = share_right(fitted.head, train) if len(train) else None
    values["fit"] = fitted.info | {"seconds": round(seconds, 4)}
    values["extract"] = features.report
    if not values["count"]:
        values["notes"] = ["there are no validation images: nothing was measured on images the head has not seen"]
    return values


def share_right(head: Head, features: Features) -> float:
    """The accuracy alone, in [0, 1]: images whose label, or labels, are all answered."""
    logits = head(features.rows)
    if head.activation == "sigmoid":
        known = [i for i, name in enumerate(features.class_names) if name in head.class_names]
        columns = [head.class_names.index(features.class_names[i]) for i in known]
        said = head.probabilities(logits[:, columns]) >= MULTILABEL
        return float((said == features.y[:, known]).all(axis=1).mean())
    answers, labels = (np.array(names, object) for names in (head.class_names, features.class_names))
    return float((answers[logits.argmax(axis=1)] == labels[features.y]).mean())


def measured_averages(extracted: Extraction, features: Features, head: Head) -> dict[str, Any]:
    """`report.json`: what averaging over the views of each validation image gives."""
    val = np.flatnonzero(features.splits == "val")
    if not len(val):
        return {}
    views = [StoredRows(store, features.keys[val]) for store in extracted.stores]
    logits = augmentation.average(head, views)
    ids = [features.ids[i] for i in val]
    averaged = evaluate_logits(logits, features.y[val], head, features.class_names, ids).to_dict()
    return {"averaged_views": {"views": len(views)} | averaged}


def measured_gain(
    extracted: Extraction, features: Features, head: str, memory: float, **settings: Any
) -> dict[str, Any]:
    """`report.json`: what learning from views brings, cross-validated on the training images, in `memory` bytes."""
    train = np.flatnonzero(features.splits == "train")
    if extracted.exceeds(memory, len(train) * len(extracted.stores)):
        return {"views_note": f"what views bring was not measured: their features take more than {memory / 1e9:.2g} GB"}
    views = [store.read(features.keys[train]) for store in extracted.stores]
    y, group = features.y[train], groups(features.keys[train])
    try:
        found = augmentation.measure_gain(head, views, y, features.class_names, groups=group, **settings)
    except HeadError as error:  # too few images to hold any out
        return {"views_note": f"what views bring was not measured: {error}"}
    return {"views": found}


def measure(head: Head, features: Features) -> dict[str, Any]:
    """One split's report, as JSON values."""
    return evaluate_logits(head(features.rows), features.y, head, features.class_names, features.ids).to_dict()
