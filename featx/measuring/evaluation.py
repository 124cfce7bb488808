"""Measures a head's answers on labelled data: a `Report`, with an interval for every score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import compress, repeat
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx import metrics
from featx.devices import memory_for_features
from featx.engines.engine import Engine
from featx.errors import HeadError, RunError
from featx.extraction.pipeline import sync
from featx.features import Rows, labelled, short_keys
from featx.head import Head, columns
from featx.metrics import Estimate
from featx.options import Running, Split, complete
from featx.runs import Run, open_run
from featx.solvers.examples import in_stored_order
from featx.sources.opening import open_source
from featx.sources.source import Source
from featx.state import ordinary
from featx.text import near, printable, some

OTHER = "other"
MISTAKES = 20


@dataclass(frozen=True)
class ClassScores:
    """How well one label is answered."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    """Images that have it."""
    average_precision: float | None = None
    """With several labels per image; None for a label without images."""


@dataclass(frozen=True)
class Mistake:
    """A wrong answer."""

    id: str
    label: str
    answer: str
    probability: float
    """The answer's, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate_logits` measured. `to_dict` is what `report.json` holds, `text` what people read."""

    labels: tuple[str, ...]
    count: int
    """Images measured."""
    scores: dict[str, Estimate]
    """`accuracy` first. One label per image: `balanced_accuracy`, `macro_f1`, `log_loss` and, for more
    than five classes, `top5_accuracy`. Several: `accuracy` (all of an image's labels right), `mean_average_precision`,
    `micro_f1`, `macro_f1`, `log_loss`."""
    calibration_error: float
    """Expected calibration error over 15 bins of the highest probability, in [0, 1]."""
    per_class: list[ClassScores]
    confusion: np.ndarray | None
    """`int64 [L, L]`, true label by answer; one more column where answers outside the labels are possible
    (`other`). None with several labels per image."""
    reliability: list[dict[str, float]]
    """confidence, accuracy and count of each non-empty bin."""
    mistakes: list[Mistake]
    """The most confident wrong answers."""
    rejection: dict[str, float] | None = None
    """At the head's threshold: coverage (share answered), accuracy of the answered, both in [0, 1]."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what the numbers leave out."""
    skipped: int = 0
    """Images of the data that could not be read; they are not measured."""

    @property
    def accuracy(self) -> float:
        return self.scores["accuracy"].value

    @property
    def columns(self) -> tuple[str, ...]:
        """The confusion's columns: the labels, and `other` where there is one more."""
        extra = self.confusion is not None and self.confusion.shape[1] > len(self.labels)
        return (*self.labels, OTHER) if extra else self.labels

    def to_dict(self) -> dict[str, Any]:
        """JSON values; each score at the top level by name, its interval under `intervals`."""
        values = asdict(self)
        intervals, labels, table = (values.pop(name) for name in ("scores", "labels", "confusion"))
        if table is not None:  # one label per image
            for row in values["per_class"]:
                del row["average_precision"]
        return {
            **{name: interval.pop("value") for name, interval in intervals.items()},
            "intervals": intervals,
            "labels": list(labels),
            "confusion": None if table is None else table.tolist(),
            "confusion_columns": list(self.columns),
            **values,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report that `to_dict` gave these values of; other values, such as a run's, are left out."""
        kept = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        table = kept["confusion"]
        kept["per_class"] = [ClassScores(**row) for row in kept["per_class"]]
        kept["mistakes"] = [Mistake(**row) for row in kept["mistakes"]]
        kept["scores"] = {name: Estimate(values[name], **interval) for name, interval in values["intervals"].items()}
        kept["confusion"] = None if table is None else np.array(table, np.int64)
        return cls(**kept | {"labels": tuple(kept["labels"])})

    def text(self, most: int = 30) -> str:
        """Plain text: scores with intervals, then classes and confusion for up to `most` labels."""
        shown = {**self.scores, "calibration_error": f"{self.calibration_error:.4f}"}
        columns = [printable(name) for name in self.columns]  # a line's end in one would forge the next line
        width, wide = max(map(len, shown)), max(5, *map(len, columns))
        lines = [f"{self.count} images, {len(self.labels)} labels (value and 95 % interval)"]
        lines += [f"  {name:<{width}}  {score}" for name, score in shown.items()]
        if self.rejection:
            sentence = "  at threshold {threshold:.3f}: {coverage:.1%} answered, {accuracy:.1%} of them right"
            lines.append(sentence.format(**self.rejection))

        lines += ["", f"  {'label':<{wide}}  precision  recall  f1      images"]
        line = "  {label:<{wide}}  {precision:<9.4f}  {recall:<6.4f}  {f1:<6.4f}  {support}"
        rows = [vars(row) | {"label": printable(row.label)} for row in self.per_class[:most]]
        lines += [line.format(wide=wide, **row) for row in rows]
        if len(self.labels) > most:
            lines.append(f"  ... and {len(self.labels) - most} more labels in report.json")
        elif self.confusion is not None and len(self.columns) <= 12:
            table = [("true", columns), *zip(columns, self.confusion, strict=False)]
            lines += ["", *(f"  {name:<{wide}}  " + "  ".join(f"{c:>{wide}}" for c in row) for name, row in table)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@ordinary()
def evaluate(
    run: str | Path | Run,
    data: str | Path | Source,
    *,
    split: Split | None = None,
    cache: str | Path | None = None,
    memory: float | None = None,
    factory: str | None = None,
    weights: str | Path | None = None,
    engine: Engine | None = None,
    **options: Unpack[Running],
) -> Report:
    """Measure a run's head on labelled data: its backbone, its precision, its cache unless another is given.

    split: `train`, `val` or `test`, to measure these rows only; by default all that have a label.
    memory: as for `featx.fit`; factory, weights: as for `featx.load`. engine: what runs the backbone that the run
    records, which is then not loaded. options: `device`, `batch_size` and `workers` of `featx.extract`.
    Raises `RunError` for a folder without a finished run, `HeadError` where there is no labelled image.
    """
    asked = complete(options, Running, evaluate)
    opened = open_run(run, factory, weights)
    spec, head = opened.config.spec, opened.head
    asked |= {**spec.asked, "cache": cache or opened.config.cache}
    source = open_source(data)
    _require_known(opened, source)
    extraction = sync(source, opened.config.backbone if engine else opened.request, engine=engine, **asked)
    features = extraction.features(memory=memory_for_features() if memory is None else memory)
    if features.spec != spec:
        raise RunError(f"{opened.path} was fitted on other features than its backbone gives today; fit again")

    there = {name: int((features.splits == name).sum()) for name in ("train", "val", "test")}
    if split and not there.get(split):
        listed = ", ".join(f"{name} ({count})" for name, count in there.items() if count)
        raise HeadError(f"no image of {data} is in the split {split!r}; there are {listed}.{near(split, there)}")
    features = features.take(np.flatnonzero(features.labelled & (not split or features.splits == split)))
    if not len(features):
        raise HeadError(
            f"there is no labelled image in {extraction.source.uri}; put images into one folder per class, or name a "
            "manifest"
        )

    report = evaluate_logits(answered(head, features.rows), features.y, head, features.class_names, features.ids)
    trained_on = () if opened.trained_on is None else opened.trained_on
    if seen := int(np.isin(short_keys(features.keys), trained_on).sum()):
        report.notes.append(
            f"{seen} of {len(features)} images are images that the run was trained on, byte for byte: "
            "the scores are too optimistic"
        )
    if skipped := extraction.report.skipped:
        first = "; ".join(f"{image['id']}: {image['reason']}" for image in extraction.report.skipped_images[:3])
        report.notes.append(f"{skipped} images could not be read and are left out, the first: {first}")
    return replace(report, skipped=skipped)


def answered(head: Head, rows: Rows) -> np.ndarray:
    """A head's logits `float32 [N, C]`; a table in the cache is read in the order in which it is stored."""
    stored, order = in_stored_order(rows)
    logits = head(stored)
    return logits if stored is rows else logits[np.argsort(order)]


def _require_known(run: Run, source: Source) -> None:
    """Raise `HeadError`, before any image is computed, for a source whose labels have nothing to do with the run's."""
    labels, known = labelled(source.labels or [], source.multilabel)[1], run.head.class_names
    if labels:
        run.require_alike(source.multilabel, source.uri)
    if labels and not set(labels) & set(known):
        raise HeadError(
            f"no label of {source.uri} ({_named(labels, repeat(True))}) is a class that {run.path} knows "
            f"({_named(known, repeat(True))}): no answer could be right. Name the folders, or the labels of the "
            "manifest, as the run's classes are named"
        )


@ordinary()
def evaluate_logits(
    logits: np.ndarray, y: np.ndarray, head: Head, labels: Sequence[str], ids: Sequence[str] | None = None
) -> Report:
    """Measure a head's logits `[N, C]` against labels.

    y: `int [N]`, indices into `labels`; or, for a head with `sigmoid` activation, 0/1 `[N, len(labels)]`.
    `head.class_names` may hold other names than `labels`: such an answer is wrong and counts as `other`;
    a label that the head never learned can only be answered wrongly, which a note says.
    ids: N names for the list of mistakes (default: row numbers). Raises `HeadError` for shapes that do not
    fit, NaN logits, and no rows.
    """
    logits, y, labels = np.asarray(logits), np.asarray(y), tuple(labels)
    ids = [str(i) for i in range(len(logits))] if ids is None else list(ids)
    if logits.ndim != 2 or logits.shape[1] != len(head.class_names):
        raise HeadError(f"expected logits [N, {len(head.class_names)}], got {list(logits.shape)}")
    if not len(logits):
        raise HeadError("there is no image to evaluate on; give data with labels")
    if len(y) != len(logits) or len(ids) != len(logits):
        raise HeadError(f"{len(logits)} rows of logits, {len(y)} of labels and {len(ids)} ids do not match")
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        raise HeadError(f"the logits of {ids[bad[0]]} hold NaN or infinity ({len(bad)} such rows)")
    if head.activation == "sigmoid":
        if y.shape != (len(logits), len(labels)):
            raise HeadError(f"several labels per image need 0/1 targets [N, {len(labels)}], got {list(y.shape)}")
        return _several_labels(logits, y, head, labels, ids)
    if y.ndim != 1 or y.min() < 0 or y.max() >= len(labels):
        raise HeadError(f"expected labels as int [N] in [0, {len(labels)}), got {list(y.shape)}")
    return _one_label(logits, y, head, labels, ids)


def _one_label(logits: np.ndarray, y: np.ndarray, head: Head, labels: tuple[str, ...], ids: list[str]) -> Report:
    size = len(labels)
    row_of = columns(labels, head.class_names)  # label -> row of the head
    label_of = columns(head.class_names, labels)  # row of the head -> label, or `other`
    label_of[label_of < 0] = size
    best, confidence = logits.argmax(axis=1), head.probabilities(logits).max(axis=1)
    answers = label_of[best]
    right, known = answers == y, row_of[y] >= 0

    table = np.bincount(y * (size + 1) + answers, minlength=size * (size + 1)).reshape(size, size + 1)
    scores = {"accuracy": metrics.proportion(right)} | metrics.class_averages(table)
    if len(head.class_names) > 5:
        top = np.argpartition(-logits, 5, axis=1)[:, :5]
        scores["top5_accuracy"] = metrics.proportion((label_of[top] == y[:, None]).any(axis=1))
    if known.any():
        scores["log_loss"] = metrics.mean_of(metrics.losses(logits[known], row_of[y[known]]))

    rejection, notes = None, []
    if head.threshold is not None:
        answered = confidence >= head.threshold
        accuracy = float(right[answered].mean()) if answered.any() else 0.0
        rejection = {"threshold": head.threshold, "coverage": float(answered.mean()), "accuracy": accuracy}
    if (row_of < 0).any():
        notes.append(
            f"the head never learned {_named(labels, row_of < 0)}: their {int((~known).sum())} images can only be "
            "answered wrongly, and the log-loss leaves them out"
        )
    surest = _surest_wrong(right, confidence)
    mistakes = [Mistake(ids[i], labels[y[i]], head.class_names[best[i]], float(confidence[i])) for i in surest]
    outcomes = np.diagonal(table), table.sum(axis=0)[:size], table.sum(axis=1)
    report = _report(labels, scores, outcomes, confidence, right, mistakes, notes)
    confusion = table if (label_of == size).any() else table[:, :size]
    return replace(report, confusion=confusion, rejection=rejection)


def _several_labels(logits: np.ndarray, y: np.ndarray, head: Head, labels: tuple[str, ...], ids: list[str]) -> Report:
    column, notes = columns(labels, head.class_names), []
    known = column >= 0
    if not known.any():
        knows = _named(head.class_names, repeat(True))
        raise HeadError(f"the head never learned {_named(labels, ~known)}; it knows {knows}")
    if not known.all():
        notes.append(f"the head never learned {_named(labels, ~known)}, which are not measured")
    labels, truth, logits = tuple(compress(labels, known)), y[:, known] > 0, logits[:, column[known]]
    probabilities = head.probabilities(logits)
    said = head.answers(probabilities)
    size, right = len(labels), truth == said

    averages, areas = metrics.label_averages(logits, truth, said)
    scores = {"accuracy": metrics.proportion(right.all(axis=1))} | averages
    scores["log_loss"] = metrics.mean_of(metrics.binary_losses(logits, truth).mean(axis=1))

    confidence, mistakes = np.where(said, probabilities, 1 - probabilities), []
    for i, k in (divmod(i, size) for i in _surest_wrong(right, confidence)):
        yes, no = labels[k], f"not {labels[k]}"
        label, answer = (no, yes) if said[i, k] else (yes, no)
        mistakes.append(Mistake(ids[i], label, answer, float(confidence[i, k])))
    outcomes = [each.sum(axis=0) for each in (truth & said, said, truth)]
    report = _report(labels, scores, outcomes, confidence, right, mistakes, notes)
    rows = [replace(row, average_precision=area) for row, area in zip(report.per_class, areas, strict=True)]
    return replace(report, per_class=rows)


def _surest_wrong(right: np.ndarray, confidence: np.ndarray) -> list[int]:
    """The most confident wrong answers, as places in the flat arrays."""
    wrong = np.flatnonzero(~right)
    order = np.argsort(-confidence.ravel()[wrong], kind="stable")
    return [int(i) for i in wrong[order[:MISTAKES]]]


def _report(
    labels: tuple[str, ...],
    scores: dict[str, Estimate],
    outcomes: Sequence[np.ndarray],
    confidence: np.ndarray,
    right: np.ndarray,
    mistakes: list[Mistake],
    notes: list[str],
) -> Report:
    """outcomes: hits, answers and images of each label; confidence and right: `[N]`, or `[N, L]` for several labels."""
    support = outcomes[-1]
    if not support.all():
        notes.append(f"no image of {_named(labels, support == 0)} is here: averages over classes leave them out")
    per_class = [
        ClassScores(name, float(p), float(r), float(f), int(n))
        for name, p, r, f, n in zip(labels, *metrics.precision_recall_f1(*outcomes), support, strict=True)
    ]
    return Report(
        labels=labels,
        count=len(right),
        scores=scores,
        calibration_error=metrics.calibration_error(confidence.ravel(), right.ravel()),
        per_class=per_class,
        confusion=None,
        reliability=metrics.reliability(confidence.ravel(), right.ravel()),
        mistakes=mistakes,
        notes=notes,
    )


def _named(names: Sequence[str], which: Iterable[bool]) -> str:
    return some([repr(name) for name in compress(names, which)], 5)
