"""Owns what featx's HTML pages share: one self-contained file, escaped text, a style for light and dark."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from featx.text import printable

# Nothing may be fetched and no script may run, whatever a file's or a class's name holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --line: #d0d7de; --paper: #ffffff;
  --back: #f6f8fa; --good: #2f7de1; --bad: #c2501c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9aa4af; --line: #3a424c;
  --paper: #161b22; --back: #0d1117; --good: #5aa0f5; --bad: #f0864a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; } .muted, figcaption { color: var(--muted); font-size: 14px; }
.lead { font-size: 18px; margin: 14px 0 22px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 0 0 18px; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 0 18px; }
.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 0 0 18px; }
.score { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.score dt { color: var(--muted); font-size: 14px; } .score dd { margin: 0; }
.score .value { font-size: 27px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.bar { position: relative; height: 6px; border-radius: 3px; background: var(--line); margin: 10px 0 7px; }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 3px; background: var(--good); opacity: .45; }
.bar b { position: absolute; top: -3px; bottom: -3px; width: 3px; margin-left: -1px; background: var(--good); }
figure { margin: 10px 0 0; } figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; } .long { max-height: 520px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 14px; padding-bottom: 6px; }
th, td { padding: 6px 8px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; max-width: 560px; }
th { font-weight: 600; } thead th { white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.mark { background: color-mix(in srgb, var(--good) 14%, transparent); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 16px; margin: 12px 0 0;
  padding: 0; list-style: none; }
.pictures img { display: block; width: 100%; height: 190px; object-fit: contain; border-radius: 6px;
  background: var(--back); }
.pictures .none { height: 190px; border-radius: 6px; background: var(--back); color: var(--muted); display: grid;
  place-items: center; font-size: 14px; }
.pictures p { font-size: 14px; line-height: 1.4; margin: 6px 0 0; overflow-wrap: anywhere; }
small { color: var(--muted); } .wrong { color: var(--bad); font-weight: 600; }
ul.notes { margin: 8px 0 0; padding-left: 20px; } code { font-size: 14px; overflow-wrap: anywhere; }
a { color: var(--good); } footer { color: var(--muted); font-size: 14px; }
@media print { section, .score { break-inside: avoid; } body { background: #fff; } }
"""


def text(value: Any) -> str:
    """Any value as HTML text or attribute: names come from files and may hold anything."""
    return html.escape(printable(str(value)), quote=True)


def page(title: str, *parts: str) -> bytes:
    """A whole document of already escaped parts; `title` is escaped here."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n'
    )
    return (head + "<body>\n<main>\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n").encode()


def section(title: str, *parts: str, note: str = "") -> str:
    """A titled card; empty where no part says anything."""
    if not any(parts):
        return ""
    below = f'<p class="muted">{text(note)}</p>' if note else ""
    return f"<section>\n<h2>{text(title)}</h2>\n{below}" + "\n".join(filter(None, parts)) + "\n</section>"


def pair(*sections: str) -> str:
    """Cards side by side where there is room."""
    there = [s for s in sections if s]
    return f'<div class="pair">{"".join(there)}</div>' if len(there) > 1 else "".join(there)


def figure(svg: str, width: int = 640, caption: str = "") -> str:
    """A drawing at most `width` pixels wide."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure style="max-width: {width}px; margin-inline: auto">{svg}{below}</figure>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, mark: int | None = None) -> str:
    """A table; the first column names its row, columns of numbers are set right. mark: the row to set off."""
    numbers = [bool(rows) and all(_number(row[i]) for row in rows) for i in range(len(columns))]
    kind = [' class="n"' if n and i else "" for i, n in enumerate(numbers)]
    head = "".join(f'<th scope="col"{k}>{text(c)}</th>' for c, k in zip(columns, kind, strict=True))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td{k}>{_cell(v)}</td>" for v, k in zip(row[1:], kind[1:], strict=True))
        marked = ' class="mark"' if number == mark else ""
        body.append(f'<tr{marked}><th scope="row">{text(_shown(row[0]))}</th>{cells}</tr>')
    long = " long" if len(rows) > 30 else ""
    return (
        f'<div class="scroll{long}" tabindex="0"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def score(name: str, value: float, low: float | None, high: float | None, share: bool) -> str:
    """One headline number with its interval; `share`: it lies in [0, 1] and gets a bar."""
    shown = f"{value:.1%}" if share else f"{value:.3f}"
    bar = between = ""
    if low is not None and high is not None:
        ends = f"{low:.1%} to {high:.1%}" if share else f"{low:.3f} to {high:.3f}"
        between = f'<dd class="muted">{ends}</dd>'
        if share:
            bar = (
                f'<dd class="bar" aria-hidden="true"><i style="left:{low:.2%};width:{high - low:.2%}"></i>'
                f'<b style="left:{value:.2%}"></b></dd>'
            )
    return f'<dl class="score"><dt>{text(name)}</dt><dd class="value">{shown}</dd>{bar}{between}</dl>'


def notes(sentences: Sequence[str]) -> str:
    """A list of sentences; empty for none."""
    items = "".join(f"<li>{text(s)}</li>" for s in sentences)
    return f'<ul class="notes">{items}</ul>' if items else ""


def picture(pixels: np.ndarray | None, alt: str, *lines: str) -> str:
    """One item of `pictures`: `uint8 [H, W, 3]` (None: it cannot be read any more) over escaped lines."""
    if pixels is None:
        shown = '<div class="none">not readable any more</div>'
    else:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        shown = (
            f'<img src="data:image/jpeg;base64,{data}" alt="{text(alt)}" width="{pixels.shape[1]}" '
            f'height="{pixels.shape[0]}">'
        )
    return f"<li>{shown}<p>{'<br>'.join(lines)}</p></li>"


def pictures(items: Sequence[str]) -> str:
    """A grid of `picture` items; empty for none."""
    return f'<ul class="pictures">{"".join(items)}</ul>' if items else ""


def _cell(value: Any) -> str:
    """A value; the interval of `0.9 (0.8 to 1.0)` comes below it, so that tables stay narrow."""
    shown = text(_shown(value))
    value, bracket, interval = shown.partition(" (")
    return f"{value}<br><small>({interval}</small>" if bracket and _number(shown) else shown


def _number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, str) and value[:1] in "0123456789–-+")


def _shown(value: Any) -> Any:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
