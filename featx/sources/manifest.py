"""Lists a manifest: a CSV, JSONL or Parquet table of path, label and split."""

from __future__ import annotations

import csv
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import SourceError
from featx.files import stat_row
from featx.sources.names import SPLITS
from featx.sources.source import NO_STAT, Source
from featx.text import from_json, near, printable, some

PATH_COLUMNS = ("path", "file_name", "image")
# joins the labels of one image
SEPARATOR = "|"
Row = tuple[int, Any, Any, Any]  # line or row number, path, label, split


def open_manifest(path: str) -> Source:
    """List the images that a manifest names, in its order.

    Columns: `path` (or `file_name`, or `image`), relative to the manifest's folder or absolute;
    `label`, which may be empty; `split`, optional. A missing file is listed, noted, and
    skipped when it is read. Raises `SourceError`, which names the row, for a manifest in another form.
    """
    root = os.path.dirname(path)
    shown = printable(path)
    ids: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    stats: list[tuple[int, int, int, int]] = []
    first: dict[str, int] = {}  # id -> its place
    numbers: list[int] = []
    missing: list[str] = []
    repeated: list[str] = []
    multilabel = False
    for number, name, label, split in _rows(path):
        where = f"{shown}, row {number}"
        identity = _identity(name, root, where)
        text, joined = _label(label, where)
        part = _split(split, where)
        if (place := first.setdefault(identity, len(ids))) < len(ids):
            if (labels[place], splits[place]) != (text, part):
                raise SourceError(
                    f"{where} names {printable(identity)} as row {numbers[place]} does, with another label "
                    f"or split ({text or 'no label'}, {part or 'no split'} against "
                    f"{labels[place] or 'no label'}, {splits[place] or 'no split'}). Keep one row; several "
                    f"labels of one image go into one cell, a{SEPARATOR}b"
                )
            repeated.append(identity)
            continue
        multilabel |= joined
        ids.append(identity)
        labels.append(text)
        splits.append(part)
        numbers.append(number)
        try:
            found = os.stat(os.path.join(root, identity))
            stats.append(stat_row(found) if stat.S_ISREG(found.st_mode) else NO_STAT)
        except OSError:
            stats.append(NO_STAT)
        except ValueError as error:
            raise SourceError(f"{where}: {name!r} cannot be a path ({error})") from error
        if stats[-1] is NO_STAT:
            missing.append(f"{identity} (row {number})")
    notes = _remarks(path, ids, labels if multilabel else [], missing, repeated)
    return Source(
        uri=path,
        root=Path(root),
        ids=ids,
        labels=labels if any(labels) else None,
        splits=splits if any(splits) else None,
        stats=np.array(stats, np.int64).reshape(-1, 4),
        notes=notes,
        multilabel=multilabel,
    )


def _remarks(path: str, ids: list[str], several: list[str], missing: list[str], repeated: list[str]) -> list[str]:
    """Notes on a manifest, for the user. Raises `SourceError` where none of its files exists."""
    shown, root = printable(path), os.path.dirname(path)
    if not ids:
        raise SourceError(f"{shown} has no rows; give one row per image: path, label, and split if you like")
    if len(missing) == len(ids):
        windows = "; its paths hold backslashes, write them with /" if "\\" in ids[0] else ""
        raise SourceError(
            f"none of the {len(ids):,} files that {shown} names is there: {some(missing)}. Paths are "
            f"relative to the manifest's folder, {printable(root) or '.'}{windows}"
        )
    notes = []
    if missing:
        notes.append(f"{len(missing):,} of {len(ids):,} files are not there and will be skipped: {some(missing)}")
    if repeated:
        notes.append(f"rows that repeat another count once: {some(repeated)}")
    if several:
        example = max(several, key=lambda text: text.count(SEPARATOR))
        notes.append(f"images may have several labels each, separated by {SEPARATOR!r}, as in {example!r}")
    return notes


def _identity(name: Any, root: str, where: str) -> str:
    """A path cell as an id: `/` between parts, without `.` parts; relative where it lies under root."""
    if isinstance(name, (dict, bytes)):
        raise SourceError(f"{where}: images inside a manifest are not read; give the path of a file")
    if not isinstance(name, str) or not name.strip():
        raise SourceError(f"{where}: the path is {name!r}; give the path of an image, or leave the row out")
    path: str = name.replace(os.sep, "/")
    if os.path.isabs(path):
        base = os.path.abspath(root).replace(os.sep, "/").rstrip("/") + "/"
        if not path.startswith(base):
            return path
        path = path[len(base) :]
    # `..` stays as it is: behind a link it leads elsewhere than it seems
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _label(value: Any, where: str) -> tuple[str, bool]:
    """A label cell as text, and whether it is one of several labels per image."""
    if isinstance(value, (list, tuple)):
        parts = [_label(part, where) for part in value]
        if any(several or not text for text, several in parts):
            raise SourceError(f"{where}: labels in a list are non-empty texts without {SEPARATOR!r}; got {value!r}")
        return SEPARATOR.join(dict.fromkeys(text for text, _ in parts)) or SEPARATOR, True
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "", False
    if isinstance(value, bool):
        return str(value).lower(), False
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), False  # tables with gaps turn whole numbers into floats
    if not isinstance(value, (str, int, float)):
        raise SourceError(f"{where}: a label is a text, a number or a list of these; got {value!r}")
    text = printable(str(value)).strip()
    if SEPARATOR not in text:
        return text, False
    names = [part.strip() for part in text.split(SEPARATOR)]
    return SEPARATOR.join(dict.fromkeys(name for name in names if name)) or SEPARATOR, True


def _split(value: Any, where: str) -> str:
    if value is None or value != value:
        return ""
    text = str(value).strip().lower()
    if text and text not in SPLITS:
        raise SourceError(f"{where}: the split {value!r} is not one of {', '.join(SPLITS)}.{near(text, SPLITS)}")
    return SPLITS.get(text, "")


def _columns(found: list[str], path: str) -> tuple[str, str, str | None]:
    """The names of the path, label and split columns among those found; upper and lower case are the same."""
    by_name: dict[str, str] = {}
    for name in found:
        by_name.setdefault(str(name).strip().lower(), name)
    paths = [by_name[name] for name in PATH_COLUMNS if name in by_name]
    if len(paths) == 1 and "label" in by_name:
        return paths[0], by_name["label"], by_name.get("split")
    if len(paths) > 1:
        problem = f"has several columns for the path, {' and '.join(paths)}; keep one."
    elif not paths:
        problem = f"has no column `path`, nor `file_name` or `image`.{near('path', by_name)}"
    else:
        problem = f"has no column `label`; add one, which may be empty.{near('label', by_name)}"
    cells = " Separate its cells with commas." if len(found) == 1 and set(found[0]) & set(";\t") else ""
    columns = ", ".join(repr(name) for name in found) or "none"
    raise SourceError(f"{printable(path)} {problem} Its columns: {columns}.{cells}")


def _read_csv(path: str) -> Iterator[Row]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            name, label, split = _columns(header, path)
            at = header.index(name), header.index(label), header.index(split) if split else None
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise SourceError(
                        f"{printable(path)}, row {reader.line_num} has {len(cells)} cells, the header "
                        f"{len(header)}; put cells that hold a comma in double quotes"
                    )
                yield reader.line_num, cells[at[0]], cells[at[1]], cells[at[2]] if at[2] is not None else None
    except csv.Error as error:
        raise SourceError(f"{printable(path)}, row {reader.line_num}: not a CSV table ({error})") from error


def _read_jsonl(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = from_json(line)
            except ValueError as error:
                raise SourceError(
                    f"{printable(path)}, row {number}: not JSON ({error}); each line is one object, "
                    '{"path": "a.jpg", "label": "ant"}'
                ) from error
            if not isinstance(row, dict):
                raise SourceError(f"{printable(path)}, row {number}: {line.strip()[:40]} is not a JSON object")
            name, label, split = _columns(list(row), f"{path}, row {number}")
            yield number, row[name], row[label], row[split] if split else None


def _read_parquet(path: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SourceError(f"reading {printable(path)} needs pyarrow: pip install featx[parquet]") from error
    try:
        with pq.ParquetFile(path) as file:
            name, label, split = _columns(file.schema_arrow.names, path)
            number = 0
            for batch in file.iter_batches(columns=[c for c in (name, label, split) if c]):
                columns = [batch.column(c).to_pylist() if c else [None] * len(batch) for c in (name, label, split)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield number, *cells
    except pa.ArrowException as error:
        raise SourceError(f"{printable(path)} is not a Parquet file that can be read ({error})") from error


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _rows(path: str) -> Iterator[Row]:
    """A manifest's rows, by its suffix. Raises `SourceError` for a file that cannot be read."""
    try:
        yield from READERS[os.path.splitext(path)[1].lower()](path)
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{printable(path)} is not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8. File "
            'names that are not UTF-8 themselves can be written in a .jsonl as escapes, "caf\\udce9.jpg"'
        ) from error
    except OSError as error:
        raise SourceError(f"{printable(path)} cannot be read ({error.strerror or error})") from error
