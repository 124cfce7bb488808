"""`fit` makes a run from a data set; `fit_features`, the core of it, reads and writes no file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from featx import __version__, learning, runs
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneRequest
from featx.devices import memory_for_features
from featx.engines.engine import Engine
from featx.errors import HeadError
from featx.extraction.job import Backbone, Data, request_of
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.features import Features, LazyRows, Rows, groups, labelled, repeated, short_keys
from featx.finetuning.processes import World, processes, rank
from featx.head import Fitted, Head
from featx.heads import pretrained
from featx.measuring.evaluation import Report, answered, evaluate_logits
from featx.measuring.quantised import int8_cost
from featx.measuring.views import average, measure_gain
from featx.options import Options, Preprocessing, complete, fields_of, home
from featx.solvers.examples import Examples, in_stored_order
from featx.sources.opening import open_source
from featx.sources.source import Source
from featx.state import ordinary

if TYPE_CHECKING:
    from featx.finetuning.recipes import FinetuneConfig


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted head, with its reports on images that it has not learned from."""

    head: Head
    info: dict[str, Any]
    """JSON values: what the head chose, see `featx.head.Fitted`."""
    seconds: float
    """What fitting alone took."""
    val: Report | None
    """On the validation images; None where there are none."""
    test: Report | None
    train_accuracy: float | None
    """In [0, 1]; with several labels per image, the share of images where all are right."""
    notes: list[str] = field(default_factory=list)
    """Sentences on where the numbers are too optimistic, or incomplete."""

    def to_dict(self) -> dict[str, Any]:
        """`report.json`: the validation images' report at the top level, then what led to it."""
        values = {"accuracy": None, "split": "val", "count": 0} | (self.val.to_dict() if self.val else {})
        values |= {"test": self.test.to_dict()} if self.test else {}
        values |= {"train_accuracy": self.train_accuracy, "fit": self.info | {"seconds": round(self.seconds, 4)}}
        return values | {"notes": [*values.get("notes", []), *self.notes]}


@ordinary()
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
    begin, learns = time.perf_counter(), learning.module(head).LEARNS
    fitted: Fitted
    if learns:
        train = features.split("train")
        if train.y.ndim == 1 or not len(train):
            learning.require_classes(
                Counter(train.labels), train.class_names, train.report.notes if train.report else ()
            )
        examples = Examples.of_views(views or [train.rows], train.y, groups(train.keys))
        fitted = learning.learn(head, examples, features.class_names, seed=seed, device=device, settings=settings)
    elif classifier is None:
        raise HeadError(f"the {head} head is the network's own classifier, which was not given")
    else:
        chosen = learning.check_settings(head, settings or {})
        fitted = learning.module(head).fit(classifier, features.class_names, **chosen)
    return measured(features, fitted, time.perf_counter() - begin, learned=learns)


def measured(features: Features, fitted: Fitted, seconds: float, *, learned: bool) -> Fit:
    """A head with its reports. learned: from these training images; their copies in `val` and `test` are noted."""
    head, notes = fitted.head, repeated(features) if learned else []
    train, *others = features.parts()
    val, test = (
        evaluate_logits(answered(head, part.rows), part.y, head, part.class_names, part.ids) if len(part.y) else None
        for part in others
    )
    if val is None:
        notes = ["there are no validation images: nothing was measured on images the head has not seen", *notes]
    rows, order = in_stored_order(train.rows)
    right = head.accuracy(rows, train.y[order], train.class_names) if len(train.y) else None
    return Fit(head, fitted.info, seconds, val, test, right, notes)


@ordinary()
def fit(
    data: Data,
    backbone: Backbone = "resnet18",
    head: str = "logreg",
    *,
    settings: dict[str, Any] | None = None,
    finetune: FinetuneConfig | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    gain: bool = True,
    memory: float | None = None,
    engine: Engine | None = None,
    **options: Unpack[Options],
) -> runs.Run:
    """Extract what is missing, fit a head on the training images, evaluate it on the others, write a run.

    head: the name of a file in `featx/heads`; settings: keyword arguments of its `fit`. finetune: then train the
    backbone further, from that head on. output: the run's folder, by default `export/<data>-<backbone>-<head>-<8 hex of
    the configuration>`. overwrite: replace the run that is there: its own files go, and those that no fit writes again,
    such as exports, are named on standard error. gain: where there are views, measure by cross-validation what they
    bring, which costs two fits per fold. memory: bytes that a table of features may take, by default a fifth of what is
    free, since a fit holds up to four copies; a larger one stays in the cache and is read by slices, pass by pass
    (heads with `STREAMS`). engine, options: as for `featx.extract`; a head learns from the augmented `views` of an
    image, too.

    Only training images choose anything; validation and test images are for measuring. Raises `HeadError` where
    there is nothing to learn from or int8 costs too much (`int8_cost`), `RunError` where a run would be overwritten.
    """
    asked = complete(options, function=fit)
    settings = learning.check_settings(head, settings or {})
    limit = memory_for_features() if memory is None else memory
    learns, source = learning.module(head).LEARNS, open_source(data)
    place = Path(home(output)) if output else None
    if place and rank() == 0:
        runs.check(place, None, overwrite=overwrite)
    learning.check_heads([(head, settings)], source)
    if not learns:
        backbone = own_classifier_request(request_of(backbone, asked), source, Path(asked["cache"]), settings, finetune)

    extracted = extracted_once(source, backbone, engine, asked, finetune)
    features = extracted.features(memory=limit)
    config = configuration(extracted, features, head, settings, asked["seed"], finetune)
    path = place or runs.default_path("export", config)
    if finetune is None or rank() == 0:  # where processes train together, the leader writes the run
        runs.check(path, config, overwrite=overwrite)  # nothing is written, or replaced, before there is a head
    if finetune is not None:
        return fine_tuned(extracted, features, finetune, asked, limit, path, config, overwrite)

    classifier = None if learns else own_classifier(extracted)
    views = training_views(extracted, features, limit) if learns else ()
    chosen: dict[str, Any] = {"settings": settings, "seed": config.seed, "device": asked["device"]}
    fitted = fit_features(features, head, views=views, classifier=classifier, **chosen)
    values = fitted.to_dict()
    if len(views) > 1:
        values |= measured_averages(extracted, features, fitted.head)
        values |= measured_gain(views, features, head, limit, chosen) if gain else {}
    values |= int8_cost(extracted, features, head, fitted.head, chosen)

    runs.start(path, config, overwrite=overwrite)
    return finish(path, extracted, features, fitted.head, values, learns)


def extracted_once(
    data: Data, backbone: Backbone, engine: Engine | None, options: dict[str, Any], finetune: FinetuneConfig | None
) -> Extraction:
    """`sync`, by one process where several train together. Raises `HeadError` for fine-tuning in int8."""
    if finetune is not None and options["precision"] == "int8":
        raise HeadError(
            "fine-tuning does not begin in int8: leave --precision out, then fit on the tuned weights, "
            "--weights RUN/model.safetensors --precision int8"
        )
    world = World.join(options["device"]) if finetune is not None and processes() > 1 else None
    if world and not world.leads:
        world.wait()  # the leader extracts; the others then find everything cached
    extracted = sync(data, backbone, engine=engine, **options)
    if world and world.leads:
        world.wait()
    return extracted


def fine_tuned(
    extracted: Extraction,
    features: Features,
    finetune: FinetuneConfig,
    options: dict[str, Any],
    memory: float,
    path: Path,
    config: runs.RunConfig,
    overwrite: bool,
) -> runs.Run:
    """`fit` with fine-tuning: fit a head on the cached features, train the backbone further from it, write a run.

    options: of both extractions, before and after. If several processes train together, only the leader writes the
    run; the others return one with an empty report.
    """
    from featx.finetuning import preparing, tuning  # and torch with them

    held, first, device = preparing.hold_out(features, finetune), None, options["device"]
    if finetune.init != "random":
        views = training_views(extracted, held, memory)
        chosen: dict[str, Any] = {"settings": config.settings, "seed": config.seed, "device": device}
        first = fit_features(held, config.head, views=views, **chosen)
    start: dict[str, Any] = {"config": config, "overwrite": overwrite}
    tuned = tuning.finetune(extracted, held, first.head if first else None, finetune, path, device, **start)
    if rank() != 0:
        return runs.Run(path, config, {}, tuned.head, factory=extracted.request.name)

    # the tuned backbone is one like any other from here on: cached, loaded and exported by its file
    base = {name: config.to_dict()[name] for name in runs.PARTS}
    options = options | dict.fromkeys(fields_of(Preprocessing)) | {"views": 0}  # the request has them all
    extracted = sync(extracted.source, tuned.request, **options)
    features = extracted.features(memory=memory)
    request = replace(tuned.request, weights=Path(tuned.request.weights).name)
    config = replace(config, request=request, backbone=extracted.info, spec=features.spec, base=base)
    runs.write_config(path, config)

    info = (first.info if first else {}) | {"finetune": tuned.history}
    values = measured(features, Fitted(tuned.head, info), first.seconds if first else 0.0, learned=True).to_dict()
    if finetune.select == "val":
        values["notes"].append("the epoch was chosen on the validation images: expect less of new ones")
    return finish(path, extracted, features, tuned.head, values)


def finish(
    path: Path, extracted: Extraction, features: Features, head: Head, values: dict[str, Any], learned: bool = True
) -> runs.Run:
    """Write what `fit` found; `report.json`, which makes the run a finished one, last."""
    assert features.report is not None
    trained_on = np.unique(short_keys(features.keys[(features.splits == "train") & learned]))
    report = values | {"extract": features.report.to_dict()}
    return runs.finish(path, head, trained_on, report, extracted.request.name)


def training_views(extracted: Extraction, features: Features, memory: float) -> Sequence[np.ndarray | LazyRows]:
    """The training images' rows in each view; tables that are read by slices where they take more than `memory`."""
    if len(extracted.stores) == 1 and isinstance(features.rows, np.ndarray):
        return ()  # the features' own rows: a second reading would cost more
    return extracted.views(features.keys[features.splits == "train"], memory=memory)


def own_classifier_request(
    request: BackboneRequest, source: Source, cache: Path, settings: dict[str, Any], finetune: FinetuneConfig | None
) -> BackboneRequest:
    """The request whose features the network's own classifier is affine in: SqueezeNet's are its logits.

    Raises `HeadError` where the source's labels do not match its classes.
    """
    info = resolve(request, cache)
    if finetune is not None:
        raise HeadError(f"--head pretrained is the network as it is; fine-tune from another: {learning.able('LEARNS')}")
    if info.class_names is None:
        raise HeadError(
            f"{info.name} ({info.weights_note}) names no classes; use another head: {learning.able('LEARNS')}"
        )
    if info.affine and request.layer != "features":
        raise HeadError(f"--head pretrained works on --layer features, not {request.layer!r}")
    labels = labelled(source.labels or [], source.multilabel)[1]
    pretrained.matched(labels, info.class_names, settings.get("mapping"))
    return request if info.affine else replace(request, layer="logits")


def own_classifier(extracted: Extraction) -> Head:
    """The network's own classifier: its last Linear, or, where the rows are its logits, the identity."""
    names, classifier = extracted.info.class_names, None
    assert names is not None
    if extracted.info.affine:
        classifier = load_backbone(extracted.request).classifier
        assert classifier is not None
    weight, bias = classifier or (np.eye(len(names)), np.zeros(len(names)))
    return Head(np.asarray(weight, np.float32), np.asarray(bias, np.float32), names)


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
    if request.file:  # a run can be loaded from any working folder
        request = request.at(request.file.resolve())
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


def measured_averages(extracted: Extraction, features: Features, head: Head) -> dict[str, Any]:
    """`report.json`: what averaging over the views of each validation image gives."""
    val = features.split("val")
    if not len(val.y):
        return {}
    views = extracted.views(val.keys, memory=0)
    report = evaluate_logits(average(head, views), val.y, head, features.class_names, val.ids)
    return {"averaged_views": {"views": len(views)} | report.to_dict()}


def measured_gain(
    views: Sequence[np.ndarray | LazyRows], features: Features, head: str, memory: float, chosen: dict[str, Any]
) -> dict[str, Any]:
    """`report.json`: what learning from views of the training images brings, cross-validated. `views`: their rows."""
    train = features.splits == "train"
    why = f"their features take more than {memory / 1e9:.2g} GB"
    if isinstance(views[0], np.ndarray):
        same = groups(features.keys[train])
        try:
            found = measure_gain(head, views, features.y[train], features.class_names, groups=same, **chosen)
            return {"views": found.to_dict()}
        except HeadError as error:  # too few images to hold any out
            why = str(error)
    return {"views_note": f"what views bring was not measured: {why}"}
