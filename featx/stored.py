"""What `report.json` and `curve.json` hold, as types: a file that does not fit them is refused before it is used."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from featx.extraction.report import ExtractionReport
from featx.options import Split
from featx.records import convert

Cell = int | float | str | bool | None


class Interval(TypedDict):
    low: float
    high: float


class ClassRow(TypedDict):
    label: str
    precision: float
    recall: float
    f1: float
    support: int


class MistakeRow(TypedDict):
    id: str
    label: str
    answer: str
    probability: float


class Calibration(TypedDict):
    temperature: float
    ece_before: float
    ece_after: float


class Rejection(TypedDict):
    threshold: float
    coverage: float
    accuracy: float


class Bin(TypedDict):
    confidence: float
    accuracy: float
    count: int


class Measured(TypedDict):
    """`Report.to_dict`, but for the scores beside accuracy."""

    accuracy: float
    count: int
    intervals: dict[str, Interval]
    labels: list[str]
    confusion: list[list[int]] | None
    confusion_columns: list[str]
    calibration_error: float
    per_class: list[ClassRow]
    reliability: list[Bin]
    mistakes: list[MistakeRow]
    rejection: NotRequired[Rejection | None]
    notes: list[str]


class Score(TypedDict):
    accuracy: float
    log_loss: float


class Gain(TypedDict):
    value: float
    low: float
    high: float


class Gained(TypedDict):
    """`Gain.to_dict`."""

    folds: int
    images: int
    augmented: int
    center: Score
    views: Score
    averaged: Score
    views_gain: dict[str, Gain]
    averaged_gain: dict[str, Gain]


class Int8Compared(TypedDict):
    """`Int8Cost.to_dict`."""

    images: int
    folds: int
    int8: Score
    fp32: Score
    differences: dict[str, Gain]
    passed: bool


class Epoch(TypedDict):
    epoch: int
    loss: NotRequired[float | None]
    accuracy: NotRequired[float | None]
    held_loss: NotRequired[float | None]
    held_accuracy: NotRequired[float | None]
    lr: NotRequired[dict[str, float]]


class Finetuned(TypedDict):
    epochs: list[Epoch]


class Fitting(TypedDict, total=False):
    """What a head says of its fit, as far as others read it."""

    notes: list[str]
    seconds: float
    training_loss: list[float] | None
    cross_validation: dict[str, Cell | list[float]]
    leave_one_out: dict[str, Cell | list[float]]
    strength: float
    weight_decay: float
    penalty: float
    calibration: Calibration
    rejection: Rejection
    finetune: Finetuned


class Fitted(TypedDict):
    """`report.json`; where validation images were measured, it has what `Measured` has, too."""

    accuracy: float | None
    split: Split
    count: int
    fit: Fitting
    extract: ExtractionReport
    notes: list[str]
    train_accuracy: NotRequired[float | None]
    test: NotRequired[Measured]
    averaged_views: NotRequired[Measured]
    views: NotRequired[Gained]
    views_note: NotRequired[str]
    int8: NotRequired[Int8Compared]
    int8_note: NotRequired[str]
    files: NotRequired[dict[str, str]]
    """The SHA-256s of the files beside it."""


class Checked(TypedDict):
    value: float
    limit: float


class Compared(TypedDict):
    """`parity.json`, beside the file that it is about."""

    passed: bool
    file: str
    sha256: str
    images: int
    equal_labels: int
    method: NotRequired[str]
    checks: NotRequired[dict[str, Checked]]


def check_report(values: dict[str, Any]) -> None:
    """Raise `ValueError` for what no `report.json` holds."""
    convert(values, Fitted)
    parts = [values] if values["count"] else []
    for part in [*parts, *(values[name] for name in ("test", "averaged_views") if name in values)]:
        convert(part, Measured)
        rows, columns = len(part["labels"]), len(part["confusion_columns"])
        if part["confusion"] and [len(row) for row in part["confusion"]] != [columns] * rows:
            raise ValueError(f"confusion: expected {rows} rows of {columns} numbers")
        unfit = [name for name in part["intervals"] if not isinstance(part.get(name), int | float)]
        if unfit:
            raise ValueError(f"{unfit[0]}: expected `float`")
