"""Draws figures: plain numbers in, a matplotlib `Figure` out, which becomes SVG in a page or a PNG file."""

from __future__ import annotations

from featx.reporting.fonts import FONTS  # before matplotlib

# isort: split

import html
import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from featx.files import write_atomic
from featx.metrics import wilson
from featx.state import FILTERS
from featx.text import printable

# Drawn as such in PNG files; in a page `svg` makes CSS variables of them, which follow light and dark.
INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#d0d7de", "#fefefe"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--paper)"}
GOOD, BAD = "#2f7de1", "#d9622b"
# Told apart by most colour-blind people (after Okabe and Ito 2008) and on white as on black; shapes help.
COLOURS = ("#2f7de1", "#d9622b", "#1f9e77", "#b5569b", "#c99a06", "#4fb3d9", "#8a6d3b", "#7a7f87", "#c0392b", "#5b5fc7")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
NUMBER = "{x:,.10g}"  # `2,000` and not `2 x 10^3`
LABELLED, NUMBERED = 60, 20  # classes up to which a confusion matrix has names, and numbers
# Fonts with other scripts, used for names that DejaVu Sans has no letters for, where they are installed.
FALLBACKS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari", "Arial Unicode MS")
STYLE: dict[Any, Any] = {
    "font.size": 10, "text.color": INK, "text.parse_math": False,  # a class may be called `$x$`
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.axisbelow": True, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "legend.frameon": False, "legend.fontsize": 9, "svg.fonttype": "none",
    "font.family": ["DejaVu Sans", *(font for font in FALLBACKS if font in FONTS)],
}  # fmt: skip


# as a decorator: a function draws in this style and leaves matplotlib's own settings as they were
_styled = matplotlib.rc_context(STYLE)


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, layout: Any = "constrained", **options: Any
) -> tuple[Figure, Any]:
    """A figure of its own, in inches: pyplot, which keeps every figure it made, is never imported."""
    figure = Figure(figsize=(width, height), layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def svg(figure: Figure, name: str, description: str) -> str:
    """An `<svg>` element for a page: text stays text, colours follow the page's, ids start with `name`.

    The same figure and name give the same bytes. description: what a screen reader says.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        text = _saved(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    def in_page(tag: re.Match[str]) -> str:
        own = re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{name}-", tag[0])
        return re.sub(r"(fill|stroke): (#\w+)", lambda m: f"{m[1]}: {THEME.get(m[2], m[2])}", own)

    # in tags alone: a class may be called `id="x"`, and in text matplotlib escapes angle brackets, not quotes
    text = re.sub(r"<[^>]*>", in_page, text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1).strip()


def png(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG file, whole or not at all; black on white."""
    options: dict[str, Any] = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
    write_atomic(path, _saved(figure, format="png", dpi=dpi, facecolor="white", **options))


def _saved(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    with FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a browser has it, a PNG file shows a box
        figure.savefig(file, **options)
    figure.set_layout_engine("none")  # it stays where it is; a layout takes longer than drawing
    return file.getvalue()


@_styled
def confusion(table: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Counts `int [L, L or more]`, true label by answer; shade is the share of the true label's images."""
    table = np.asarray(table)
    size = max(table.shape)
    names = size <= LABELLED
    cell = float(np.clip(6.0 / size, 0.1 if names else 0.0, 0.9))
    longest = max(map(len, [*rows, *columns])) if names else 0
    room = 0.9 + 0.075 * min(longest, 24)
    figure, axes = _figure(cell * table.shape[1] + room + 0.3, cell * table.shape[0] + room)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    colours = np.where(np.eye(*table.shape)[..., None] > 0, to_rgba(GOOD), to_rgba(BAD))
    colours[..., 3] = np.where(table > 0, 0.08 + 0.87 * share, 0.0)
    if names:
        axes.pcolormesh(colours, edgecolors=GRID, linewidth=0.5)
    else:  # as pixels: a thousand classes have a million cells
        axes.imshow(colours, extent=(0, table.shape[1], table.shape[0], 0), interpolation="nearest")
    if size <= NUMBERED:
        for i, j in np.ndindex(*table.shape):
            colour = "white" if share[i, j] > 0.55 else INK if table[i, j] else MUTED
            at = {"ha": "center", "va": "center", "fontsize": max(6, min(13, cell * 16)), "color": colour}
            axes.text(j + 0.5, i + 0.5, f"{table[i, j]:,}", **at)

    axes.grid(False)
    axes.set(aspect="equal", xlabel="answer", ylabel="true label", ylim=(table.shape[0], 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(not names)
    axes.tick_params(length=0)
    if names:
        style = {"color": INK, "fontsize": float(np.clip(cell * 20, 5, 10))}
        turned = 90 if longest > 8 * cell + 2 else 0
        axes.set_xticks(np.arange(len(columns)) + 0.5, [short(c) for c in columns], rotation=turned, **style)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [short(r) for r in rows], **style)
    return figure


@_styled
def reliability(bins: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy against confidence of each bin (`metrics.reliability`), with 95 % Wilson intervals, and counts."""
    figure, (top, bottom) = _figure(4.6, 4.6, 2, 1, sharex=True, height_ratios=[4, 1])
    confidence, accuracy, counts = np.array([(b["confidence"], b["accuracy"], b["count"]) for b in bins]).T
    low, high = np.array([wilson(round(a * n), int(n)) for a, n in zip(accuracy, counts, strict=True)]).T
    between = np.maximum([accuracy - low, high - accuracy], 0)

    top.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--", label="perfectly calibrated")
    top.errorbar(confidence, accuracy, between, fmt="o-", color=GOOD, markersize=5, linewidth=1.4, elinewidth=0.9)
    top.set(ylabel="share correct", ylim=(-0.02, 1.04), xlim=(0, 1.02))
    top.legend(loc="upper left")
    bottom.bar(confidence, counts, width=0.05, color=GOOD)
    bottom.set(xlabel="confidence", ylabel="images")
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    return figure


@_styled
def path(
    strengths: Sequence[float], losses: Sequence[float], chosen: float | None, name: str, loss: str = "log-loss"
) -> Figure:
    """Held-out `loss` against the regularisation `name`, on a logarithmic axis, and the one chosen."""
    figure, axes = _figure(6.0, 3.4)
    axes.plot(strengths, losses, color=GOOD, marker="o", markersize=3, linewidth=1.4)
    chosen = strengths[int(np.argmin(losses))] if chosen is None else chosen
    near = int(np.argmin(np.abs(np.log(strengths) - np.log(chosen))))
    at = strengths[near], losses[near]
    axes.plot(*at, "o", color=BAD, markersize=8)
    axes.annotate(f"{chosen:.3g}", at, (0, 10), textcoords="offset points", ha="center", color=INK)
    axes.set(xscale="log", xlabel=name, ylabel=f"held-out {loss}")
    finite = np.asarray(losses)[np.isfinite(losses)]
    low, high = finite.min(), min(finite.max(), 4 * finite.min() + 0.2)  # a diverging end would hide the valley
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    return figure


@_styled
def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """One panel for each of `panels` (`loss`, `accuracy`, `learning rate`); each line is (epoch, value) pairs."""
    figure, grid = _figure(4.0 * len(panels), 3.2, 1, len(panels), squeeze=False)
    for axes, (title, series) in zip(grid[0], panels.items(), strict=True):
        for number, (name, line) in enumerate(series.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6, "label": short(name)}
            axes.plot(*np.array(line).reshape(-1, 2).T, marker="o" if len(line) < 40 else "", markersize=3, **style)
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(series) > 1:
            axes.legend()
    return figure


@_styled
def feature_map(
    points: np.ndarray, group: np.ndarray, names: Sequence[str], faint: np.ndarray, ringed: np.ndarray
) -> Figure:
    """Points `[N, 2]` by group (`int [N]` into names, -1: grey), `faint` and `ringed` as `bool [N]`.

    Beyond ten groups the ten largest keep a colour, the others are grey.
    """
    figure, axes = _figure(6.4, 5.2)
    counts = np.bincount(group[group >= 0], minlength=len(names))
    shown = sorted(np.argsort(-counts, kind="stable")[: len(COLOURS)].tolist())
    grey = ~np.isin(group, shown)
    if grey.any():
        label = "several or none" if len(names) <= len(COLOURS) else f"{int((counts > 0).sum()) - len(shown)} others"
        axes.scatter(*points[grey].T, s=10, color=MUTED, alpha=0.4, linewidths=0, label=label)
    for number, i in enumerate(shown):
        for soft in (True, False):
            mine = (group == i) & (faint == soft)
            style = {"color": COLOURS[number], "marker": SHAPES[number], "linewidths": 0}
            axes.scatter(*points[mine].T, s=14 if soft else 26, alpha=0.35 if soft else 0.95, **style)
        axes.scatter([], [], s=26, label=short(names[i]), **style)
    if ringed.any():
        style = {"facecolors": "none", "edgecolors": INK, "linewidths": 1.1, "label": "answered wrongly"}
        axes.scatter(*points[ringed].T, s=90, **style)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    axes.margins(0.04)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3)
    return figure


@_styled
def images(pictures: Sequence[np.ndarray], titles: Sequence[str], wrong: Sequence[bool], columns: int = 4) -> Figure:
    """A grid of `uint8 [H, W, 3]` pictures with titles; those of `wrong` answers in another colour."""
    rows = -(-len(pictures) // columns)
    figure, grid = _figure(2.2 * columns, 2.55 * rows, rows, columns, layout=None, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.42 / (2.55 * rows), 0.04, 0.42 / 2.1)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, picture, title, bad in zip(grid.flat, pictures, titles, wrong, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9, color=BAD if bad else INK)
    return figure


@_styled
def trade_off(points: Sequence[Mapping[str, Any]], winner: int | None = None) -> Figure:
    """Accuracy with its interval against images per second and megabytes, a colour for each backbone.

    Each point is numbered by its place in `points`, from 1.

    points: `name`, `backbone`, `accuracy`, `low`, `high`, and `images_per_second` and `megabytes` (or None).
    """
    styles = {
        kind: {"marker": SHAPES[i % len(SHAPES)], "color": COLOURS[i % len(COLOURS)], "markersize": 7, "ls": "none"}
        for i, kind in enumerate(dict.fromkeys(p["backbone"] for p in points))
    }
    figure, grid = _figure(10.0, 4.4, 1, 2, sharey=True)
    for axes, key, label in zip(grid, ("images_per_second", "megabytes"), ("images / s", "file size, MB"), strict=True):
        beside: Counter[tuple[str, float]] = Counter()
        for place, p in enumerate(points):
            if p[key] is None:
                continue
            # heads on one backbone have one speed and size: set side by side, so that each interval shows
            x, y = p[key] * 1.04 ** beside[p["backbone"], p[key]], p["accuracy"]
            beside[p["backbone"], p[key]] += 1
            between = [[max(0.0, y - p["low"])], [max(0.0, p["high"] - y)]]
            axes.errorbar(x, y, between, elinewidth=1, capsize=2, alpha=0.9, **styles[p["backbone"]])
            axes.annotate(f"{place + 1}", (x, p["low"]), (0, -12), textcoords="offset points", ha="center", fontsize=9)
            if place == winner:
                axes.plot(x, y, "o", mfc="none", mec=INK, markersize=15)
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_formatter(NUMBER)
        axes.xaxis.set_minor_formatter(lambda x, _: NUMBER.format(x=x) if f"{x:e}"[0] in "25" else "")
        _mark_values(axes, sorted(value for _, value in beside))
        axes.margins(x=0.15)

    grid[0].set_ylabel("accuracy")
    for kind, style in styles.items():
        grid[1].plot([], [], label=short(kind, 28), **style)
    if winner is not None:
        grid[1].plot([], [], "o", mfc="none", mec=INK, markersize=11, label="winner")
    grid[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@_styled
def learning(rows: Sequence[Mapping[str, float]], forecast: Mapping[str, float] | None = None) -> Figure:
    """Accuracy with intervals against training images (`images`, `accuracy`, `low`, `high`), and the forecast."""
    figure, axes = _figure(6.0, 3.8)
    n, values, low, high = (np.array([row[key] for row in rows]) for key in ("images", "accuracy", "low", "high"))
    axes.fill_between(n, low, high, color=GOOD, alpha=0.18, linewidth=0)
    axes.plot(n, values, "o-", color=GOOD, markersize=5, linewidth=1.6, label="measured")
    if forecast:
        end, expected = forecast["images"], forecast["accuracy"]
        between = [[expected - forecast["low"]], [forecast["high"] - expected]]
        axes.plot([n[-1], end], [values[-1], expected], "--", color=BAD, linewidth=1.4)
        axes.errorbar([end], [expected], between, fmt="s", color=BAD, capsize=3, label="forecast")
        axes.legend(loc="lower right")
    axes.set(xscale="log", xlabel="training images", ylabel="accuracy")
    axes.set_xticks([*n, *([forecast["images"]] if forecast else [])])
    axes.xaxis.set_major_formatter(NUMBER)
    axes.minorticks_off()
    return figure


def short(name: str, most: int = 24) -> str:
    """A name for a label: printable, its middle left out where it is long."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _mark_values(axes: Any, values: list[float]) -> None:
    """Where a logarithmic axis spans less than a decade, which may hold no power of ten: ticks at the values."""
    if values and values[-1] < 10 * values[0]:
        kept = values[:1]
        for value in values:
            kept += [value] if value > 1.2 * kept[-1] else []  # nearer labels would overlap
        axes.set_xticks(kept, [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in kept])
        axes.minorticks_off()
