"""Owns how a sweep is shown: the table in the terminal, and its page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featx.files import write_atomic
from featx.reporting import page, plots
from featx.sources.source import Source

# of the table, in the terminal and in the page
COLUMNS = [
    "backbone",
    "head",
    "views",
    "cross-validated",
    "log-loss",
    "behind the first",
    "validation",
    "images/s",
    "MB",
]


def table(points: list[dict[str, Any]], failed: list[dict[str, str]], by: str) -> str:
    """Plain text for people, best first."""
    rows = [COLUMNS, *(_row(p) for p in points)]
    texts = [[str("–" if v is None else v) for v in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(COLUMNS))]
    lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in texts]
    lines += [_chosen(by, points)]
    lines += [f"failed: {f['point']}: {f['error']}" for f in failed]
    return "\n".join(lines)


def _row(point: dict[str, Any]) -> list[Any]:
    found, behind = point["cross_validated"], point["behind"]
    layer = "" if point["layer"] == "features" else f", {point['layer']}"
    return [
        point["backbone"] + layer,
        point["head"],
        point["views"],
        _between(found["accuracy"], found["low"], found["high"]) if found else None,
        f"{found['log_loss']:.3f}" if found else None,
        f"{behind['value']:+.3f} ({behind['low']:+.3f} to {behind['high']:+.3f})" if behind else None,
        _between(point["accuracy"], point["low"], point["high"]) if point["accuracy"] is not None else None,
        None if point["images_per_second"] is None else f"{point['images_per_second']:g}",
        f"{point['megabytes']:.1f}",
    ]


def _between(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _chosen(by: str, points: Iterable[dict[str, Any]]) -> str:
    first, *others = points
    if first["cross_validated"] is None:
        return "Too few training images to cross-validate: nothing was chosen, the first of the grid comes first."
    near = [p for p in others if p["behind"] and p["behind"]["low"] <= 0 <= p["behind"]["high"]]
    text = (
        f"Chosen by cross-validated {by.replace('_', '-')} on {first['cross_validated']['images']:,} training images: "
    )
    text += f"{first['run']}. The validation images chose nothing."
    if near:
        text += f" {len(near)} of the {len(others)} others cannot be told from it on these images."
    return text


def _plotted(point: dict[str, Any]) -> dict[str, Any]:
    """A point for the plot: validation accuracy, or where nothing was held for that, cross-validated."""
    if point["accuracy"] is not None:
        return point
    return {**point, **(point["cross_validated"] or {"accuracy": 0.0, "low": 0.0, "high": 1.0})}


def write_page(path: Path, points: list[dict[str, Any]], failed: list[dict[str, str]], by: str, source: Source) -> None:
    """`sweep.html` and `plots/trade-off.png`, in the sweep's folder."""
    title = f"{Path(source.uri).resolve().name} · sweep of {len(points)} runs"
    figure = plots.trade_off([_plotted(p) for p in points], winner=0)
    drawing = plots.svg(figure, "trade-off", "Accuracy against images per second and file size, with intervals.")
    chosen = _chosen(by, points)
    link = f'<p><a href="{page.text(points[0]["run"])}/report.html">The report of the first</a></p>'
    failures = [f"{f['point']}: {f['error'].replace(str(Path(source.uri).resolve().parent), '')}" for f in failed]
    html = page.page(
        title,
        f'<header><h1>{page.text(title)}</h1><p class="lead">{page.text(chosen)}</p>{link}</header>',
        page.section(
            "Accuracy, speed and size",
            page.figure(drawing, 1040),
            note="Validation accuracy with 95% intervals; heads on one backbone are set side by side.",
        ),
        page.section(
            "All runs",
            page.table(COLUMNS, [_row(p) for p in points], "Best first; 95% intervals in brackets.", mark=0),
        ),
        page.section("Failed", page.notes(failures)),
    )
    write_atomic(path / "sweep.html", html)
    plots.png(figure, path / "plots" / "trade-off.png", dpi=130)
