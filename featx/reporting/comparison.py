"""The page of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featx.files import write_atomic
from featx.reporting import page, plots
from featx.sweeping import COLUMNS, Point, Sweep


def _plotted(point: Point) -> dict[str, Any]:
    """A point for the plot: validation accuracy, or where nothing was held for that, cross-validated."""
    values = point.to_dict()
    if point.accuracy is not None:
        return values
    return {**values, **(values["cross_validated"] or {"accuracy": 0.0, "low": 0.0, "high": 1.0})}


def write_page(sweep: Sweep) -> None:
    """`sweep.html` and `plots/trade-off.png`, in the sweep's folder."""
    data = Path(sweep.data).resolve()
    title = f"{data.name} · sweep of {len(sweep.points)} runs"
    figure = plots.trade_off([_plotted(p) for p in sweep.points], winner=0)
    drawing = plots.svg(figure, "trade-off", "Accuracy against images per second and file size, with intervals.")
    link = f'<p><a href="{page.text(sweep.points[0].run)}/report.html">The report of the first</a></p>'
    failures = [f"{f['point']}: {f['error'].replace(str(data.parent), '')}" for f in sweep.failed]
    html = page.page(
        title,
        f'<header><h1>{page.text(title)}</h1><p class="lead">{page.text(sweep.verdict)}</p>{link}</header>',
        page.section(
            "Accuracy, speed and size",
            page.figure(drawing, 1040),
            note="Validation accuracy with 95% intervals; heads on one backbone are set side by side.",
        ),
        page.section(
            "All runs",
            page.table(COLUMNS, [p.cells for p in sweep.points], "Best first; 95% intervals in brackets.", mark=0),
        ),
        page.section("Failed", page.notes(failures)),
    )
    write_atomic(sweep.path / "sweep.html", html)
    plots.png(figure, sweep.path / "plots" / "trade-off.png", dpi=130)
