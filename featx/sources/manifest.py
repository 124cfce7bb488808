"""Lists a manifest: a CSV, JSONL or Parquet table of path, label and split."""

from __future__ import annotations

import csv
import math
import os
import re
import stat
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import SourceError
from featx.files import stat_row
from featx.sources.names import class_name, differ_in_case
from featx.sources.source import NO_STAT, Source
from featx.sources.splits import says_split, split_cell, split_columns, split_folders
from featx.text import from_json, near, printable, some

# the names of the columns that must be there; the later ones, which other tools write, count where no first one is
PATHS = (("path", "file_name", "image"), ("filename", "filepath", "image_path", "file"))
LABELS = (("label",), ("class", "class_name", "category"))
# joins the labels of one image
SEPARATOR = "|"
_DECIMAL = re.compile(r"\s*-?(0|[1-9]\d{0,14})\.\d{0,15}\s*", re.ASCII)
Row = tuple[int, Sequence[str], Sequence[Any]]  # line or row number, the columns' names, its cells


def open_manifest(path: str) -> Source:
    """List the images that a manifest names, in its order.

    Columns: `path` (or `file_name`, or `image`), relative to the manifest's folder or absolute;
    `label`, which may be empty; `split`, optional, or another column that says the split (`split_columns`). A missing
    file is listed, noted, and skipped when it is read. Raises `SourceError`, which names the row, for another form.
    """
    root = os.path.dirname(path)
    above, shown = os.path.join(root, ""), printable(path)
    ids: list[str] = []
    labels: list[str] = []
    splits: list[str] = []
    stats = array("q")
    first: dict[str, int] = {}  # id -> its place
    numbers: list[int] = []
    missing: list[str] = []
    repeated: list[str] = []
    multilabel, header = False, None
    saying, remarks = split_columns(path, _rows(path), {name for names in (*PATHS, *LABELS) for name in names})
    for number, names, cells in _rows(path):
        where = f"{shown}, row {number}"
        if names is not header:
            header, (at, label_at) = names, _columns(names, where if path.lower().endswith(".jsonl") else shown)
            splits_at = [(names.index(name), means) for name, means in saying.items() if name in names]
        identity, row = _found(cells[at], above, where)
        text, joined = _label(cells[label_at], where)
        part = split_cell([(cells[i], means) for i, means in splits_at], where) if splits_at else ""
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
        stats.extend(row)
        if row is NO_STAT:
            missing.append(f"{identity} (row {number})")
    if not saying and (found := split_folders(ids))[0]:
        splits, remarks = found[0], remarks + found[1]
    notes = remarks + _remarks(path, ids, labels if multilabel else [], missing, repeated)
    notes += differ_in_case(filter(None, labels))
    return Source(
        uri=path,
        root=Path(root),
        ids=ids,
        labels=labels if any(labels) else None,
        splits=splits if any(splits) else None,
        stats=np.frombuffer(stats, np.int64).reshape(-1, 4),
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
        example = max(several, key=lambda text: (text.count(SEPARATOR), len(text)))
        notes.append(f"images may have several labels each, separated by {SEPARATOR!r}, as in {example!r}")
    return notes


def _found(name: Any, root: str, where: str) -> tuple[str, tuple[int, int, int, int]]:
    """The id and the `stat_row` of the file that a path cell names; `NO_STAT` where none is there. root: ends in `/`.

    A blank at an end, and an accent written as a letter of its own, may be in the file's name or in the cell alone.
    """
    if isinstance(name, str) and _is_plain(name):  # most are, and many rows must list fast
        try:
            found = os.stat(root + name)
            return name, stat_row(found) if stat.S_ISREG(found.st_mode) else NO_STAT
        except (OSError, ValueError):
            pass
    if isinstance(name, (dict, bytes)):
        raise SourceError(f"{where}: images inside a manifest are not read; give the path of a file")
    if not isinstance(name, str) or not name.strip():
        raise SourceError(f"{where}: the path is {name!r}; give the path of an image, or leave the row out")
    bare, ways = name.strip(), [name] if name != name.strip() else []
    ways.append(bare)
    if not name.isascii():
        folder, file = os.path.split(bare)
        forms = [[unicodedata.normalize(form, part) for form in ("NFC", "NFD")] for part in (folder, file)]
        ways += [os.path.join(above, own) for above in forms[0] for own in forms[1]]
    for way in ways:
        identity = _identity(way, root)
        try:
            found = os.stat(os.path.join(root, identity))
        except OSError:
            continue
        except ValueError as error:
            raise SourceError(f"{where}: {name!r} cannot be a path ({error})") from error
        return identity, stat_row(found) if stat.S_ISREG(found.st_mode) else NO_STAT
    return _identity(bare, root), NO_STAT


def _is_plain(name: str) -> bool:
    """Whether a path is its own `_identity`, and may be written in one way only."""
    bare = name.isascii() and name.strip() is name and os.sep == "/"
    return bare and name[:1] not in "/" and name[-1] not in "/." and "//" not in name and "./" not in name


def _identity(name: str, root: str) -> str:
    """A path as an id: `/` between parts, without `.` parts; relative where it lies under root."""
    path = name.replace(os.sep, "/")
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
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        value = float(value)  # one number is one class, in text as in JSON; `007` and `1e3` are names
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), False  # tables with gaps turn whole numbers into floats
    if not isinstance(value, (str, int, float)):
        raise SourceError(f"{where}: a label is a text, a number or a list of these; got {value!r}")
    if SEPARATOR not in str(value):
        return class_name(str(value)), False
    names = [_label(part, where)[0] for part in str(value).split(SEPARATOR)]
    return SEPARATOR.join(dict.fromkeys(name for name in names if name)) or SEPARATOR, True


def _columns(found: Sequence[str], shown: str) -> tuple[int, int]:
    """The places of the path and label columns among those found; upper and lower case are the same."""
    by_name: dict[str, int] = {}
    for i, name in enumerate(found):
        by_name.setdefault(str(name).strip().lower(), i)
    paths, labels = (
        next(filter(None, ([name for name in names if name in by_name] for names in each)), [])
        for each in (PATHS, LABELS)
    )
    if {"label", "probability"} <= by_name.keys() and by_name.keys() & {"error", "top"}:
        raise SourceError(
            f"{shown} is what `featx predict` wrote: answers, not labels. To learn from answers on purpose, copy the "
            "columns image and label into a file of their own"
        )
    if len(paths) == len(labels) == 1:
        return by_name[paths[0]], by_name[labels[0]]
    for several, what in ((paths, "path"), (labels, "label")):
        if len(several) > 1:
            listed = " and ".join(str(found[by_name[name]]) for name in several)
            raise SourceError(f"{shown} has several columns for the {what}, {listed}; keep one.")
    if not paths:
        problem = "has no column `path`, nor `file_name` or `image`; its first row names the columns."
        problem += near("path", by_name)
    else:
        problem = f"has no column `label`; add one, which may be empty.{near('label', by_name)}"
    cells = " Separate its cells with commas." if len(found) == 1 and set(found[0]) & set(";\t") else ""
    columns = ", ".join(repr(name) for name in found) or "none"
    raise SourceError(f"{shown} {problem} Its columns: {columns}.{cells}")


def _read_csv(path: str) -> Iterator[Row]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            header = next(reader, [])
            _columns(header, printable(path))
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise SourceError(
                        f"{printable(path)}, row {reader.line_num} has {len(cells)} cells, the header "
                        f"{len(header)}; put cells that hold a comma in double quotes"
                    )
                yield reader.line_num, header, cells
    except csv.Error as error:
        raise SourceError(f"{printable(path)}, row {reader.line_num}: not a CSV table ({error})") from error


def _read_jsonl(path: str) -> Iterator[Row]:
    names: list[str] = []
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
            if names != list(row):
                names = list(row)
            yield number, names, list(row.values())


def _read_parquet(path: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SourceError(f"reading {printable(path)} needs pyarrow: pip install featx[parquet]") from error
    try:
        with pq.ParquetFile(path) as file:
            schema, number = file.schema_arrow, 0
            needed = {schema.names[i] for i in _columns(schema.names, printable(path))}
            # and what may say the split: neither images nor features
            needed |= {
                f.name
                for f in schema
                if str(f.type) in ("string", "large_string", "bool")
                or str(f.type).startswith("dictionary")
                or (pa.types.is_primitive(f.type) and says_split(f.name))
            }
            names = [name for name in schema.names if name in needed]
            for batch in file.iter_batches(columns=names):
                columns = [batch.column(name).to_pylist() for name in names]
                for cells in zip(*columns, strict=True):
                    number += 1
                    yield number, names, cells
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
