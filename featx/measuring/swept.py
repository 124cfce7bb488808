"""What a sweep found: its points, their table for people, `sweep.json` and `sweep.csv`."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from featx.files import write_atomic
from featx.measuring.views import Difference
from featx.options import Criterion
from featx.records import write_record
from featx.runs import Run, open_run
from featx.text import cell

COLUMNS = ["backbone", "weights", "head", "views", "cross-validated", "log-loss", "difference to best", "validation"]
COLUMNS += ["images/s", "MB"]
CRITERIA = get_args(Criterion)


@dataclass(frozen=True)
class CrossValidated:
    """What held-out training images say of a head; 95 % intervals."""

    accuracy: float
    low: float
    high: float
    log_loss: float
    log_loss_low: float
    log_loss_high: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """One backbone, layer, head and number of views: a run, and its scores."""

    name: str
    run: str
    """Its folder, from the sweep's."""
    backbone: str
    weights: str = ""
    """Which weights it has: a file's name, with as much of its path as tells it from the others."""
    layer: str
    head: str
    """With its settings, as `parse_head` reads it."""
    views: int
    cross_validated: CrossValidated | None
    """None where there are too few images for folds."""
    accuracy: float | None
    """On the validation images, with its 95 % interval and log-loss; None where there are none."""
    low: float | None
    high: float | None
    log_loss: float | None
    images_per_second: float
    """The backbone alone."""
    megabytes: float
    """The exported backbone and the head, 10**6 bytes."""
    parameters: int
    fit_seconds: float
    behind: Difference | None = None
    """The criterion on the same held-out images, this point's less the winner's; None for the winner."""

    @property
    def cells(self) -> list[Any]:
        """Its row in a table of `COLUMNS`; None for what is not known."""
        found, behind = self.cross_validated, self.behind
        return [
            self.backbone + ("" if self.layer == "features" else f", {self.layer}"),
            self.weights,
            self.head,
            self.views,
            _between(found.accuracy, found.low, found.high) if found else None,
            f"{found.log_loss:.3f}" if found else None,
            f"{behind.value:+.3f} ({behind.low:+.3f} to {behind.high:+.3f})" if behind else None,
            None if self.accuracy is None else _between(self.accuracy, self.low, self.high),
            f"{self.images_per_second:g}",
            f"{self.megabytes:.1f}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _between(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep found: `sweep.json`, `sweep.csv` and `runs/`; `featx.reporting.comparison` adds a page."""

    path: Path
    data: str
    """What was swept over: the source's `uri`."""
    points: list[Point]
    """One for each point that could be fitted, best first, by the criterion."""
    failed: list[dict[str, str]]
    """`point` and `error` of those that could not."""
    by: str

    @property
    def winner(self) -> Run:
        """A run like any other: evaluate it, export it."""
        return open_run(self.path / self.points[0].run, self.points[0].backbone)

    def to_dict(self) -> dict[str, Any]:
        return {"by": self.by, "points": [point.to_dict() for point in self.points], "failed": self.failed}

    def write(self) -> None:
        """Write `sweep.json` and `sweep.csv`, a line for each point."""
        write_record(self.path / "sweep.json", {"by": self.by, "winner": self.points[0].run, **self.to_dict()})
        rows = []
        for point in self.points:
            row = point.to_dict()
            _, found = row.pop("behind"), row.pop("cross_validated") or {}
            rows.append(row | {f"cross_validated_{name}": value for name, value in found.items()})

        file = io.StringIO()
        writer = csv.DictWriter(file, max(rows, key=len), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
        write_atomic(self.path / "sweep.csv", file.getvalue().encode("utf-8", "backslashreplace"))

    @property
    def verdict(self) -> str:
        """How the first was chosen, and how many of the others may be as good."""
        first, *others = self.points
        if first.cross_validated is None:
            return "Too few training images to cross-validate: nothing was chosen, the first of the grid comes first."
        near = sum(1 for p in others if p.behind and p.behind.low <= 0 <= p.behind.high)
        criterion, images = self.by.replace("_", "-"), first.cross_validated.images
        text = f"Chosen by cross-validated {criterion} on {images:,} training images: {first.run}. "
        text += "Validation images were not used to pick the winner."
        if near:
            which = f"None of the other {near} is"
            which = which if near == len(others) else f"{near} of the other {len(others)} are not"
            text += f" {which} measurably worse on these images."
        return text

    def text(self) -> str:
        """A table for a terminal, best first."""
        rows = [COLUMNS, *([str("–" if v is None else v) for v in point.cells] for point in self.points)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.verdict, *(f"failed: {f['point']}: {f['error']}" for f in self.failed)])
