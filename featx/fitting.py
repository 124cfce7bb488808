"""Owns `fit`, a run from a data set, and `fit_features`, its heart, which touches no disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from featx import __version__, heads, runs
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.devices import memory_for_features
from featx.errors import HeadError
from featx.extraction.job import request_of
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.features import Features, Rows, StoredRows, groups, repeated, short_keys
from featx.finetuning.processes import World, processes, rank
from featx.head import Fitted, Head, columns
from featx.measuring.evaluation import Report, evaluate_logits
from featx.measuring.views import average, measure_gain
from featx.options import Options, complete
from featx.solvers.examples import Examples
from featx.sources.source import Source

if TYPE_CHECKING:
    from featx.finetuning.recipes import FinetuneConfig


OWN = ("settings", "finetune", "output", "overwrite", "gain", "memory")  # of `fit`, beside the extraction's options


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted head, and what it is worth on images that it has not learned from."""

    head: Head
    info: dict[str, Any]
    """JSON values: what the head chose, see `featx.head.Fitted`."""
    seconds: float
    """Of fitting alone."""
    val: Report | None
    """On the validation images; None where there are none."""
    test: Report | None
    train_accuracy: float | None
    """In [0, 1]; with several labels per image, the share of images where all are right."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what the numbers promise too much, or do not say."""

    def to_dict(self) -> dict[str, Any]:
        """`report.json`: the validation images' report at the top level, then what led to it."""
        values: dict[str, Any] = {"accuracy": None, "split": "val", "count": 0}
        values |= self.val.to_dict() if self.val else {}
        values |= {"test": self.test.to_dict()} if self.test else {}
        values |= {"train_accuracy": self.train_accuracy, "fit": self.info | {"seconds": round(self.seconds, 4)}}
        return values | {"notes": [*values.get("notes", []), *self.notes]}


def fit_features(
    features: Features,
    head: str = "logreg",
    *,
    views: Sequence[Rows] = (),
    classifier: Head | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Fit:
    """Fit a head on the `train` split of features, and measure it on the others. Reads and writes no file.

    views: of the training images, in the order of `features.split("train")`, the centre crops first, `[M, D]`
    each; by default the features' own rows alone. classifier: the network's own, for `--head pretrained`. settings:
    keyword arguments of the head's `fit`. Only training images choose anything.

    `fit_features(features.relabel({"7.jpg": "bee"}))` is a fit with one label changed.
    Raises `HeadError` where there is nothing to learn from.
    """
    heads.check_settings(head, settings or {})
    begin, learns = time.perf_counter(), heads.module(head).LEARNS
    fitted: Fitted
    if learns:
        check_learnable(features)
        train = features.split("train")
        examples = Examples.of_views(views or [train.rows], train.y, groups(train.keys))
        fitted = heads.learn(head, examples, features.class_names, seed=seed, device=device, settings=settings)
    elif classifier is None:
        raise HeadError(f"the {head} head is the network's own classifier, which was not given")
    else:
        fitted = heads.module(head).fit(classifier, features.class_names, **(settings or {}))
    return measured(features, fitted, time.perf_counter() - begin, learned=learns)


def measured(features: Features, fitted: Fitted, seconds: float, *, learned: bool) -> Fit:
    """A head with its reports. learned: from these training images, so that their copies elsewhere are no test."""
    head, train, notes = fitted.head, features.split("train"), repeated(features) if learned else []
    val, test = (
        evaluate_logits(head(part.rows), part.y, head, part.class_names, part.ids) if len(part) else None
        for part in map(features.split, ("val", "test"))
    )
    if val is None:
        notes = ["there are no validation images: nothing was measured on images the head has not seen", *notes]
    return Fit(head, fitted.info, seconds, val, test, share_right(head, train) if len(train) else None, notes)


def fit(
    data: str | Path | Source,
    backbone: str | BackboneRequest = "resnet18",
    head: str = "logreg",
    *,
    settings: dict[str, Any] | None = None,
    finetune: FinetuneConfig | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    gain: bool = True,
    memory: float | None = None,
    **options: Unpack[Options],
) -> runs.Run:
    """Extract what is missing, fit a head on the training images, evaluate it on the others, write a run.

    head: the name of a file in `featx/heads`; settings: keyword arguments of its `fit`. finetune: then train
    the backbone further, from that head on. output: the run's folder, by default
    `export/<data>-<backbone>-<head>-<8 hex of the configuration>`. gain: where there are views, measure by
    cross-validation what they bring, which costs two fits a fold. memory: bytes that a table of features may
    take, by default a fifth of what is free, since a fit holds up to four copies; a larger one stays in the cache
    and is read by slices, pass by pass (heads logreg, ridge and ncm). options: as for `featx.extract`; a head
    learns from the augmented `views` of an image, too.

    Only training images choose anything; validation and test images are for measuring. Raises `HeadError`
    where there is nothing to learn from and `RunError` where a run would be overwritten.
    """
    heads.check_settings(head, settings or {})
    asked = complete(options, others=OWN)
    chosen: dict[str, Any] = {"settings": settings or {}, "seed": asked["seed"], "device": asked["device"]}
    limit = memory_for_features() if memory is None else memory
    request = request_of(backbone, asked)
    learns = heads.module(head).LEARNS
    if not learns:
        request = own_classifier_request(request, resolve(request, Path(asked["cache"])), finetune)
    extracted, features = _extracted(data, request, asked, limit, finetune)
    if learns:
        check_learnable(features)
    config = configuration(extracted, features, head, settings or {}, asked["seed"], finetune)
    path = Path(output) if output else runs.default_path("export", config)
    if rank() == 0:  # of several processes that train together, the leader writes the run
        runs.check(path, config, overwrite=overwrite)  # nothing is written, or replaced, before there is a head

    if finetune is not None:
        start: dict[str, Any] = {"path": path, "config": config, "overwrite": overwrite}
        return fine_tuned(extracted, features, head, finetune, limit, asked, chosen, **start)
    classifier = None if learns else own_classifier(request, extracted.info)
    rows = training_views(extracted, features, limit) if learns else ()
    fitted = fit_features(features, head, views=rows, classifier=classifier, **chosen)
    values = fitted.to_dict()
    if asked["views"] and learns:
        values |= measured_averages(extracted, features, fitted.head)
        values |= measured_gain(extracted, features, head, limit, **chosen) if gain else {}
    runs.start(path, config, overwrite=overwrite)
    return _finish(path, extracted, features, fitted.head, values, learns)


def fine_tuned(
    extracted: Extraction,
    features: Features,
    head: str,
    finetune: FinetuneConfig,
    memory: float,
    options: dict[str, Any],
    chosen: dict[str, Any],
    *,
    path: Path,
    config: runs.RunConfig,
    overwrite: bool,
) -> runs.Run:
    """`fit` with fine-tuning: a head on the cached features, the backbone trained further from it on, a run.

    options: of the extraction of the tuned features; chosen: the head's settings, seed and device. Of several
    processes the leader alone writes the run; the others give one with an empty report.
    """
    from featx.finetuning import preparing, tuning  # and torch with them

    held, first = preparing.hold_out(features, finetune), None
    if finetune.init != "random":
        first = fit_features(held, head, views=training_views(extracted, held, memory), **chosen)
    start: dict[str, Any] = {"config": config, "overwrite": overwrite}
    tuned = tuning.finetune(extracted, held, first.head if first else None, finetune, path, chosen["device"], **start)
    if rank() != 0:
        return runs.Run(path, config, {}, tuned.head, factory=extracted.request.name)

    # the tuned backbone is one like any other from here on: cached, loaded and exported by its file
    base = {name: config.to_dict()[name] for name in ("request", "backbone", "spec")}
    extracted = sync(extracted.source, tuned.request, **{**options, "views": 0})
    features = extracted.features(memory=memory)
    request = replace(tuned.request, weights=Path(tuned.request.weights).name)
    config = replace(config, request=request, backbone=extracted.info, spec=features.spec, base=base)
    runs.write_config(path, config)

    info = (first.info if first else {}) | {"finetune": tuned.history}
    values = measured(features, Fitted(tuned.head, info), first.seconds if first else 0.0, learned=True).to_dict()
    if finetune.select == "val":
        values["notes"].append("the epoch was chosen on the validation images: expect less of new ones")
    return _finish(path, extracted, features, tuned.head, values)


def _finish(
    path: Path, extracted: Extraction, features: Features, head: Head, values: dict[str, Any], learns: bool = True
) -> runs.Run:
    """Write what `fit` found; `report.json`, which makes the run a finished one, last."""
    learned = features.keys[(features.splits == "train") & learns]
    assert features.report is not None
    report = values | {"extract": features.report.to_dict()}
    return runs.finish(path, head, np.unique(short_keys(learned)), report, extracted.request.name)


def _extracted(
    data: str | Path | Source,
    request: BackboneRequest,
    options: dict[str, Any],
    memory: float,
    finetune: FinetuneConfig | None,
) -> tuple[Extraction, Features]:
    """All features, extracted by one process where several train together. Raises `HeadError` without labels."""
    world = World.join(options["device"]) if finetune is not None and processes() > 1 else None
    if world and not world.leads:
        world.wait()  # the leader extracts; the others then find everything cached
    extracted = sync(data, request, **options)
    features = extracted.features(memory=memory)
    if world and world.leads:
        world.wait()
    if not features.class_names:
        raise HeadError(
            f"{extracted.source.uri} has no labels: put the images into one folder a class, or name a manifest"
        )
    return extracted, features


def training_views(extracted: Extraction, features: Features, memory: float) -> Sequence[np.ndarray | StoredRows]:
    """The training images' rows in each view; tables that are read by slices where they take more than `memory`."""
    if len(extracted.stores) == 1 and isinstance(features.rows, np.ndarray):
        return [features.split("train").rows]  # a second reading would cost more
    return extracted.views(features.keys[features.splits == "train"], memory=memory)


def check_learnable(features: Features) -> None:
    """Raise `HeadError` unless the training images show at least two classes."""
    y = features.y[features.splits == "train"]
    if len(y) == 0:
        raise HeadError("there are no training images; expected class folders, or train/ with class folders")
    seen = np.unique(y)
    if y.ndim == 1 and len(seen) < 2:
        only = features.class_names[seen[0]]
        others = [name for name in features.class_names if name != only]
        none = f"; of {', '.join(map(repr, others[:5]))} there is none to learn from: add images" if others else ""
        raise HeadError(f"all {len(y)} training images are {only!r}, and a classifier needs at least two classes{none}")


def own_classifier_request(
    request: BackboneRequest, info: BackboneInfo, finetune: FinetuneConfig | None
) -> BackboneRequest:
    """The request whose features the network's own classifier is affine in: SqueezeNet's are its logits."""
    if finetune is not None:
        raise HeadError("--head pretrained is the network as it is; fine-tune from --head logreg or linear")
    if info.class_names is None:
        raise HeadError(f"{info.name} ({info.weights_note}) names no classes; use --head logreg or linear")
    if info.affine and request.layer != "features":
        raise HeadError(f"--head pretrained works on --layer features, not {request.layer!r}")
    return request if info.affine else replace(request, layer="logits")


def own_classifier(request: BackboneRequest, info: BackboneInfo) -> Head:
    """The network's own classifier: its last Linear, or, where the rows are its logits, the identity."""
    assert info.class_names is not None
    count = len(info.class_names)
    classifier = load_backbone(request).classifier if info.affine else (np.eye(count), np.zeros(count))
    assert classifier is not None
    weight, bias = (np.asarray(values, np.float32) for values in classifier)
    return Head(weight, bias, info.class_names)


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


def share_right(head: Head, features: Features) -> float:
    """The accuracy alone, in [0, 1]: images whose label, or labels, are all answered."""
    logits, column = head(features.rows), columns(features.class_names, head.class_names)
    if head.activation == "sigmoid":
        known = column >= 0
        said = head.answers(head.probabilities(logits[:, column[known]]))
        return float((said == features.y[:, known]).all(axis=1).mean())
    return float((logits.argmax(axis=1) == column[features.y]).mean())


def measured_averages(extracted: Extraction, features: Features, head: Head) -> dict[str, Any]:
    """`report.json`: what averaging over the views of each validation image gives."""
    val = features.split("val")
    if not len(val):
        return {}
    views = extracted.views(val.keys, memory=0)
    logits = average(head, views)
    averaged = evaluate_logits(logits, val.y, head, features.class_names, val.ids).to_dict()
    return {"averaged_views": {"views": len(views)} | averaged}


def measured_gain(extracted: Extraction, features: Features, head: str, memory: float, **chosen: Any) -> dict[str, Any]:
    """`report.json`: what learning from views brings, cross-validated on the training images, in `memory` bytes."""
    train = np.flatnonzero(features.splits == "train")
    if extracted.exceeds(memory, len(train) * len(extracted.stores)):
        return {"views_note": f"what views bring was not measured: their features take more than {memory / 1e9:.2g} GB"}
    keys = features.keys[train]
    try:
        views = extracted.views(keys)
        found = measure_gain(head, views, features.y[train], features.class_names, groups=groups(keys), **chosen)
    except HeadError as error:  # too few images to hold any out
        return {"views_note": f"what views bring was not measured: {error}"}
    return {"views": found.to_dict()}
