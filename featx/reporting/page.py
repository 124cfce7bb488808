"""Renders HTML pages from templates: each is one file that needs nothing else, and every name in it is escaped."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from featx.files import write_atomic
from featx.reporting import plots
from featx.runs import own_folder
from featx.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; the first column names the row, `mark` is the row to set off."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    mark: int | None = None

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only, and are aligned right."""
        columns = ([str(_number(row[i])) for row in self.rows] for i in range(len(self.columns)))
        return [i > 0 and all(cell[:1] in "0123456789–-+" for cell in cells) for i, cells in enumerate(columns)]


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure, its note (shown above it, and for screen readers), and its greatest width in pixels."""

    figure: Figure
    note: str = ""
    width: int = 640

    def svg(self, name: str) -> Markup:
        return Markup(plots.svg(self.figure, name, self.note))


@dataclass(frozen=True, eq=False)
class Picture:
    """A photograph `uint8 [H, W, 3]` (None: it cannot be read any more), its label, and an answer, if any."""

    pixels: np.ndarray | None
    label: str
    answer: str = ""
    sure: str = ""
    detail: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.answer) and self.answer != self.label

    @property
    def title(self) -> str:
        """For a drawing of several pictures."""
        label = plots.short(self.label, 20)
        if not self.answer:
            return ", ".join(filter(None, (label, self.detail)))
        return f"{plots.short(self.answer)} {self.sure}" + (f"\nlabelled {label}" if self.wrong else "")


def write_page(path: Path, drawings: Mapping[str, Drawing | None], **values: Any) -> Path:
    """Write a page from the template of its name, and `drawings` as `plots/<name>.png`.

    Where one is None, a former page's is removed. Raises `RunError` where `plots` is a link.
    """
    folder, drawn = own_folder(path.parent, "plots"), {name: d for name, d in drawings.items() if d is not None}
    html = _pages().get_template(path.name).render(drawings=drawn, **values)
    for name in drawings.keys() - drawn.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)

    for name, drawing in drawn.items():
        plots.png(drawing.figure, folder / f"{name}.png")
    write_atomic(path, f"{html}\n".encode())
    return path


def strip_paths(sentence: str, folders: Iterable[str | Path]) -> str:
    """`sentence` without this machine's folders: `folders`, the working and home folder, and any absolute one."""
    known = {str(folder).rstrip("/") for folder in (*folders, os.getcwd(), os.path.expanduser("~"))}
    for folder in sorted(known - {""}, key=len, reverse=True):
        sentence = sentence.replace(folder + "/", "")
    return re.sub(r"(?<![\w.:/<])/(?:[^\s/'\":]+/)+", "", sentence)


@cache
def _pages() -> Environment:
    def shown(value: Any) -> str:
        # names come from files, and may hold what UTF-8 cannot encode
        return value if isinstance(value, Markup) else printable(str(value))

    loader = PackageLoader("featx.reporting")
    made = Environment(loader=loader, finalize=shown, undefined=StrictUndefined, autoescape=True)
    made.trim_blocks = made.lstrip_blocks = True
    made.filters |= {"jpeg": _jpeg, "number": _number, "percent": _percent}
    return made


def _percent(value: float, places: int = 1) -> str:
    return f"{value:.{places}%}"


def _jpeg(pixels: np.ndarray) -> str:
    """`uint8 [H, W, 3]` as a data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _number(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else value
