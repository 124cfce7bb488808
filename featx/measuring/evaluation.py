"""Owns `Report`: what a head's answers are worth on labelled data, every score with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from featx import metrics
from featx.devices import memory_for_features
from featx.engines.engine import Engine
from featx.errors import HeadError, RunError
from featx.extraction.pipeline import sync
from featx.features import short_keys
from featx.head import Head, columns
from featx.measuring import intervals
from featx.measuring.intervals import Estimate
from featx.options import Running, complete
from featx.runs import Run, open_run
from featx.sources.source import Source
from featx.text import near

OTHER = "other"
MISTAKES = 20


@dataclass(frozen=True, eq=False)
class Report:
    """What `evaluate_logits` measured. `to_dict` is what `report.json` holds, `table` what people read."""

    labels: tuple[str, ...]
    count: int
    """Images measured."""
    scores: dict[str, Estimate]
    """`accuracy` first. One label per image: `balanced_accuracy`, `macro_f1`, `log_loss` and, for more
    than five classes, `top5_accuracy`. Several: `accuracy` (all of an image's labels right), `mean_average_precision`,
    `micro_f1`, `macro_f1`, `log_loss`."""
    calibration_error: float
    """Expected calibration error over 15 bins of the highest probability, in [0, 1]."""
    per_class: list[dict[str, Any]]
    """label, precision, recall, f1, support; with several labels per image also average_precision."""
    confusion: np.ndarray | None
    """`int64 [L, L]`, true label by answer; a column more where answers outside the labels are possible
    (`other`). None with several labels per image."""
    reliability: list[dict[str, float]]
    """confidence, accuracy and count of each non-empty bin."""
    mistakes: list[dict[str, Any]]
    """The wrong answers that were most sure: id, label, answer, probability (0 to 1)."""
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
        """The confusion's columns: the labels, and `other` where it has one more."""
        extra = self.confusion is not None and self.confusion.shape[1] > len(self.labels)
        return (*self.labels, OTHER) if extra else self.labels

    def to_dict(self) -> dict[str, Any]:
        """JSON values; each score at the top level by name, its interval under `intervals`."""
        intervals = {k: {"low": s.low, "high": s.high, "method": s.method} for k, s in self.scores.items()}
        values = asdict(self)
        del values["scores"], values["labels"], values["confusion"]
        table = None if self.confusion is None else self.confusion.tolist()
        return {
            **{k: s.value for k, s in self.scores.items()},
            "intervals": intervals,
            "labels": list(self.labels),
            "confusion": table,
            "confusion_columns": list(self.columns),
            **values,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report that `to_dict` gave these values of; other values, such as a run's, are left out."""
        scores = {name: Estimate(values[name], **interval) for name, interval in values["intervals"].items()}
        table = values["confusion"]
        apart = ("labels", "scores", "confusion")
        kept = {f.name: values[f.name] for f in fields(cls) if f.name not in apart and f.name in values}
        confusion = None if table is None else np.array(table, np.int64)
        return cls(labels=tuple(values["labels"]), scores=scores, confusion=confusion, **kept)

    def table(self, most: int = 30) -> str:
        """Plain text for people: scores with intervals, then classes and confusion for up to `most` labels."""
        width = max(map(len, [*self.scores, "calibration_error"]))
        lines = [f"{self.count} images, {len(self.labels)} labels (value and 95 % interval)"]
        lines += [f"  {name:<{width}}  {score}" for name, score in self.scores.items()]
        lines.append(f"  {'calibration_error':<{width}}  {self.calibration_error:.4f}")
        if self.rejection:
            lines.append(
                f"  at threshold {self.rejection['threshold']:.3f}: {self.rejection['coverage']:.1%} answered, "
                f"{self.rejection['accuracy']:.1%} of them right"
            )
        wide = max(5, *(len(name) for name in self.columns))
        lines += ["", f"  {'label':<{wide}}  precision  recall  f1      images"]
        for row in self.per_class[:most]:
            lines.append(
                f"  {row['label']:<{wide}}  {row['precision']:<9.4f}  {row['recall']:<6.4f}  "
                f"{row['f1']:<6.4f}  {row['support']}"
            )
        if len(self.labels) > most:
            lines.append(f"  ... and {len(self.labels) - most} more labels in report.json")
        elif self.confusion is not None and len(self.columns) <= 12:
            lines += ["", f"  {'true':<{wide}}  " + "  ".join(f"{c:>{wide}}" for c in self.columns)]
            for name, counts in zip(self.labels, self.confusion, strict=True):
                lines.append(f"  {name:<{wide}}  " + "  ".join(f"{c:>{wide}}" for c in counts))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def evaluate(
    run: str | Path | Run,
    data: str | Path | Source,
    *,
    split: str | None = None,
    cache: str | Path | None = None,
    memory: float | None = None,
    factory: str | None = None,
    engine: Engine | None = None,
    **options: Unpack[Running],
) -> Report:
    """Measure a run's head on labelled data: its backbone, its precision, its cache unless another is given.

    split: `train`, `val` or `test`, to measure these rows only; by default all that have a label.
    memory: as for `featx.fit`; factory: as for `featx.load`. engine: what runs the backbone, which is then the one
    that the run records, and is not loaded. options: `device`, `batch_size` and `workers` of `featx.extract`.
    Raises `RunError` for what is no finished run, `HeadError` where there is no labelled image.
    """
    asked = complete(options, Running, evaluate)
    opened = open_run(run, factory)
    spec = opened.config.spec
    asked |= {"precision": spec.precision, "dtype": spec.dtype, "cache": cache or opened.config.cache}
    extraction = sync(data, opened.config.backbone if engine else opened.request, engine=engine, **asked)
    features = extraction.features(memory=memory_for_features() if memory is None else memory)
    if features.spec != spec:
        raise RunError(f"{opened.path} was fitted on other features than its backbone gives today; fit again")
    head = opened.head
    there = {name: int((features.splits == name).sum()) for name in ("train", "val", "test")}
    if split and not there.get(split):
        listed = ", ".join(f"{name} ({count})" for name, count in there.items() if count)
        raise HeadError(f"no image of {data} is in the split {split!r}; there are {listed}.{near(split, list(there))}")
    if (head.activation == "sigmoid") != (features.y.ndim == 2):
        kinds = ("one label for each image", "several labels for an image")
        run_has, data_has = kinds if features.y.ndim == 2 else kinds[::-1]
        raise HeadError(f"{opened.path} was fitted on {run_has}, and {data} has {data_has}: they cannot be compared")
    if split:
        features = features.split(split)
    features = features.take(np.flatnonzero(features.labelled))
    if not features.class_names or not len(features):
        what = f"image in the split {split!r}" if split else "labelled image"
        raise HeadError(f"there is no {what} in {data}; put images into one folder a class, or name a manifest")

    report = evaluate_logits(head(features.rows), features.y, head, features.class_names, features.ids)
    notes = list(report.notes)
    trained_on = opened.trained_on
    seen = 0 if trained_on is None else int(np.isin(short_keys(features.keys), trained_on).sum())
    if seen:
        notes.append(
            f"{seen} of {len(features)} images are images that the run was trained on, byte for byte: what is "
            "measured here promises too much"
        )
    skipped = features.report.skipped_images if features.report else []
    if skipped:
        first = "; ".join(f"{image['id']}: {image['reason']}" for image in skipped[:3])
        notes.append(f"{len(skipped)} images could not be read and are left out, the first: {first}")
    return replace(report, notes=notes, skipped=len(skipped))


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
    count, size = len(y), len(labels)
    row_of = columns(labels, head.class_names)  # label -> row of the head
    label_of = columns(head.class_names, labels)  # row of the head -> label, or `other`
    label_of[label_of < 0] = size
    best = logits.argmax(axis=1)
    answers, confidence = label_of[best], head.probabilities(logits)[np.arange(count), best]
    right, known = answers == y, row_of[y] >= 0

    outside = bool((label_of == size).any())
    full = metrics.confusion(y, answers, size, size + 1)
    scores = {"accuracy": intervals.proportion(right)} | intervals.class_averages(full)
    if len(head.class_names) > 5:
        top = np.argpartition(-logits, 5, axis=1)[:, :5]
        scores["top5_accuracy"] = intervals.proportion((label_of[top] == y[:, None]).any(axis=1))
    if known.any():
        scores["log_loss"] = intervals.mean_of(metrics.losses(logits[known], row_of[y[known]]))
    precision, recall, f1 = metrics.precision_recall_f1(full)
    per_class = [
        {"label": n, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for n, p, r, f, s in zip(labels, precision, recall, f1, full.sum(axis=1), strict=True)
    ]

    wrong = np.flatnonzero(~right)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    mistakes = [_mistake(ids[i], labels[y[i]], head.class_names[best[i]], confidence[i]) for i in wrong]
    rejection = None
    if head.threshold is not None:
        answered = confidence >= head.threshold
        accuracy = float(right[answered].mean()) if answered.any() else 0.0
        rejection = {"threshold": head.threshold, "coverage": float(answered.mean()), "accuracy": accuracy}
    return Report(
        labels=labels,
        count=count,
        scores=scores,
        calibration_error=metrics.calibration_error(confidence, right),
        per_class=per_class,
        confusion=full if outside else full[:, :size],
        reliability=metrics.reliability(confidence, right),
        mistakes=mistakes,
        rejection=rejection,
        notes=_left_out(y, labels, row_of),
    )


def _left_out(y: np.ndarray, labels: tuple[str, ...], row_of: np.ndarray) -> list[str]:
    """Sentences on the labels that the head does not know or no image has."""
    unseen = [labels[i] for i in np.flatnonzero(row_of < 0)]
    absent = [labels[i] for i in np.flatnonzero(np.bincount(y, minlength=len(labels)) == 0)]
    notes = []
    if unseen:
        notes.append(
            f"the head never learned {_listed(unseen)}: their {int((row_of[y] < 0).sum())} images can only be "
            "answered wrongly, and the log-loss leaves them out"
        )
    if absent:
        notes.append(f"no image of {_listed(absent)} is here: averages over classes leave them out")
    return notes


def _mistake(id: str, label: str, answer: str, probability: float) -> dict[str, Any]:
    return {"id": id, "label": label, "answer": answer, "probability": float(probability)}


def _several_labels(logits: np.ndarray, y: np.ndarray, head: Head, labels: tuple[str, ...], ids: list[str]) -> Report:
    column, notes = columns(labels, head.class_names), []
    unknown = [labels[i] for i in np.flatnonzero(column < 0)]
    if len(unknown) == len(labels):
        raise HeadError(f"the head never learned {_listed(unknown)}; it knows {_listed(list(head.class_names))}")
    if unknown:
        notes.append(f"the head never learned {_listed(unknown)}, which are not measured")
        y, labels = y[:, column >= 0], tuple(np.array(labels, object)[column >= 0])
    logits = logits[:, column[column >= 0]]
    probabilities = head.probabilities(logits)
    truth: np.ndarray = y.astype(bool)
    said = head.answers(probabilities)
    here = np.asarray(truth.any(axis=0))
    if not here.all():
        missing = [labels[i] for i in np.flatnonzero(~here)]
        notes.append(f"no image has {_listed(missing)}: averages over labels leave them out")

    precisions = np.array([metrics.average_precision(logits[:, i], truth[:, i])[0] for i in range(len(labels))])
    # per label: hits, false alarms, misses; every F1 is a ratio of their sums
    table = np.stack([truth & said, ~truth & said, truth & ~said], axis=2).sum(axis=0).astype(np.float64)
    per_class = [
        {
            "label": name,
            "precision": float(hits / max(1, hits + alarms)),
            "recall": float(hits / max(1, hits + missed)),
            "f1": float(_f1(table[i])),
            "support": int(truth[:, i].sum()),
            "average_precision": float(precisions[i]) if here[i] else None,
        }
        for i, (name, (hits, alarms, missed)) in enumerate(zip(labels, table, strict=True))
    ]

    confidence = np.where(said, probabilities, 1 - probabilities)
    sure = np.where(truth != said, confidence, -1.0).ravel()
    mistakes = []
    for i in np.argsort(-sure, kind="stable")[:MISTAKES]:
        row, k = divmod(int(i), len(labels))
        if sure[i] >= 0:
            answers = (labels[k], f"not {labels[k]}")
            answer, label = answers if said[row, k] else answers[::-1]
            mistakes.append(_mistake(ids[row], label, answer, confidence[row, k]))
    return Report(
        labels=labels,
        count=len(y),
        scores=_label_scores(logits, truth, said, precisions),
        calibration_error=metrics.calibration_error(confidence.ravel(), (truth == said).ravel()),
        per_class=per_class,
        confusion=None,
        reliability=metrics.reliability(confidence.ravel(), (truth == said).ravel()),
        mistakes=mistakes,
        notes=notes,
    )


def _f1(table: np.ndarray) -> np.ndarray:
    """F1 `[...]` of hits, false alarms and misses `[..., 3]`; 0 where there are none."""
    return np.asarray(2 * table[..., 0] / np.maximum(2 * table[..., 0] + table[..., 1] + table[..., 2], 1))


def _label_scores(
    logits: np.ndarray, truth: np.ndarray, said: np.ndarray, precisions: np.ndarray
) -> dict[str, Estimate]:
    """The scores over L labels of N images, `[N, L]` each, with `precisions` `[L]`; intervals by the bootstrap."""
    count, size = truth.shape
    resamples = max(50, min(intervals.RESAMPLES, int(2e8 / logits.size)))
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
    parts = np.stack([truth & said, ~truth & said, truth & ~said], axis=2).astype(np.float64)
    sums = (drawn @ parts.reshape(count, -1)).reshape(resamples, size, 3)
    table, sizes, here = parts.sum(axis=0), truth.sum(axis=0), truth.any(axis=0)

    scores = {"accuracy": intervals.proportion(np.all(truth == said, axis=1))}
    if here.any():
        each = [metrics.average_precision(logits[:, i], truth[:, i], drawn) for i in np.flatnonzero(here)]
        found = np.array(each)
        found = found[:, ~np.isnan(found).all(axis=0)]  # NaN: drew no image of a label
        scores["mean_average_precision"] = intervals.average(
            float(precisions[here].mean()), np.nanmean(found, axis=0), sizes
        )
        positive = (sums[..., 0] + sums[..., 2])[:, here] > 0  # a label that a resample leaves out has no F1 in it
        f1s = np.where(positive, _f1(sums)[:, here], np.nan)[positive.any(axis=1)]
        scores["macro_f1"] = intervals.average(float(_f1(table)[here].mean()), np.nanmean(f1s, axis=1), sizes)
    micro = float(_f1(table.sum(axis=0)))
    scores["micro_f1"] = intervals.average(micro, _f1(sums.sum(axis=1)), truth.sum(keepdims=True))
    scores["log_loss"] = intervals.mean_of(metrics.binary_losses(logits, truth).mean(axis=1))
    return scores


def _listed(names: list[str], most: int = 5) -> str:
    text = ", ".join(repr(n) for n in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
