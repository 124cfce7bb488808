"""The page of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featx.measuring.swept import COLUMNS, Point, Sweep
from featx.reporting import plots
from featx.reporting.page import Drawing, Table, strip_paths, write_page


def _plotted(point: Point, points: list[Point]) -> dict[str, Any]:
    """A point for the plot: its validation accuracy or, without validation images, the cross-validated one."""
    values = point.to_dict()
    if any(other.weights != point.weights for other in points if other.backbone == point.backbone):
        values["backbone"] += f" {point.weights}"
    if point.accuracy is None:
        values |= values["cross_validated"] or {"accuracy": 0.0, "low": 0.0, "high": 1.0}
    return values


def write(sweep: Sweep) -> None:
    """`sweep.html` and `plots/trade-off.png`, in the sweep's folder."""
    data, points = Path(sweep.data).resolve(), sweep.points
    note = "Validation accuracy with 95% intervals, against images per second and file size; "
    note += "numbers are places in the table, and heads that share a backbone are drawn next to each other."
    rows = [[str(place), *p.cells] for place, p in enumerate(points, 1)]
    write_page(
        sweep.path / "sweep.html",
        {"trade-off": Drawing(plots.trade_off([_plotted(p, points) for p in points], winner=0), note, 1040)},
        title=f"{data.name} · sweep of {len(points)} run{'s' if len(points) > 1 else ''}",
        chosen=sweep.verdict,
        best=points[0].run,
        runs=Table(["", *COLUMNS], rows, "Best first; 95% intervals in brackets.", mark=0),
        failed=[f"{f['point']}: {strip_paths(f['error'], [data.parent])}" for f in sweep.failed],
    )
