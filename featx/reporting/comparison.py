"""Owns how a sweep is shown: the table in the terminal, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featx.reporting import plots
from featx.reporting.page import Drawing, Table, signed, strip_paths, write_page
from featx.sources.source import Source

# of the table, in the terminal and in the page
COLUMNS = ["backbone", "head", "views", "cross-validated", "log-loss", "difference to best", "validation"]
COLUMNS += ["images/s", "MB"]


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
        signed(behind) if behind else None,
        _between(point["accuracy"], point["low"], point["high"]) if point["accuracy"] is not None else None,
        None if point["images_per_second"] is None else f"{point['images_per_second']:g}",
        f"{point['megabytes']:.1f}",
    ]


def _between(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _chosen(by: str, points: list[dict[str, Any]]) -> str:
    first, *others = points
    if first["cross_validated"] is None:
        return "Too few training images to cross-validate: nothing was chosen, the first of the grid comes first."
    near = sum(1 for p in others if p["behind"] and p["behind"]["low"] <= 0 <= p["behind"]["high"])
    criterion, images = by.replace("_", "-"), first["cross_validated"]["images"]
    text = f"Chosen by cross-validated {criterion} on {images:,} training images: {first['run']}. "
    text += "Validation images were not used to pick the winner."
    if near:
        few = f"None of the other {near} is" if near == len(others) else f"{near} of the other {len(others)} are not"
        text += f" {few} measurably worse on these images."
    return text


def _plotted(point: dict[str, Any]) -> dict[str, Any]:
    """A point for the plot: validation accuracy, or where nothing was held for that, cross-validated."""
    if point["accuracy"] is not None:
        return point
    return {**point, **(point["cross_validated"] or {"accuracy": 0.0, "low": 0.0, "high": 1.0})}


def write(path: Path, points: list[dict[str, Any]], failed: list[dict[str, str]], by: str, source: Source) -> None:
    """`sweep.html` and `plots/trade-off.png`, in the sweep's folder."""
    data = Path(source.uri).resolve()
    note = "Validation accuracy with 95% intervals, against images per second and file size; "
    note += "numbers are places in the table, and heads that share a backbone are drawn next to each other."
    rows = [[str(place), *_row(p)] for place, p in enumerate(points, 1)]
    write_page(
        path / "sweep.html",
        {"trade-off": Drawing(plots.trade_off([_plotted(p) for p in points], winner=0), note, 1040)},
        title=f"{data.name} · sweep of {len(points)} run{'s' if len(points) > 1 else ''}",
        chosen=_chosen(by, points),
        best=points[0]["run"],
        runs=Table(["", *COLUMNS], rows, "Best first; 95% intervals in brackets.", mark=0),
        failed=[f"{f['point']}: {strip_paths(f['error'], [data.parent])}" for f in failed],
    )
