"""Which columns of a manifest say the split, whatever they are called, and what a cell of theirs says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from featx.errors import SourceError
from featx.sources.names import PLAIN, SPLITS, split_of, splits_among, words
from featx.text import near, printable, some

# A column with more different values says no split.
MOST = 12
# Words that columns for splits are called by, beside those of the splits; words around them; values of `is_valid`.
_SETS, _FOLDS = {"split", "splits", "set", "subset", "partition", "phase", "usage"}, {"fold", "folds", "kfold"}
_SETS |= {"tvt", "traintest", "trainvaltest", "traintestsplit"}
_AROUND = {"is", "in", "for"}
_SAYING = _SETS | _FOLDS | SPLITS.keys()
# Values that say a split where the column's name does, but which one is a guess; what tables write into empty cells.
_SHORT, _GAPS = {"tr", "trn", "tra", "te", "tst", "ts", "va", "vl", "vld"}, {"nan", "none", "null", "na", "n/a", "<na>"}
_TRUE, _FALSE = {"1", "1.0", "true", "yes", "t", "y"}, {"0", "0.0", "false", "no", "f", "n"}


def says_split(column: str) -> bool:
    """Whether a column's name says nothing but that it holds splits: `set`, `is_valid`, `train_test`."""
    found = set(words(column))
    return found <= PLAIN | _SAYING | _AROUND and not found.isdisjoint(_SAYING)


def split_columns(
    path: str, rows: Iterable[tuple[int, Sequence[str], Sequence[Any]]], others: set[str]
) -> tuple[dict[str, str], list[str]]:
    """The columns that say the split, and sentences about what was understood.

    A column `split` decides alone. Else it is the one column whose values are all called like splits, or those such
    as `is_valid`, with the split that 1 stands for. others: columns that say none. Raises `SourceError` where a column
    may say the split and featx cannot know what: rows that are marked as held out are never learned from.
    """
    seen: dict[str, set[str]] = {}
    header: Sequence[str] | None = None
    for _, names, cells in rows:
        for name, cell in zip(names, cells, strict=True):
            if len(values := seen.setdefault(name, set())) <= MOST:
                values.add(_text(cell))
        if names is not header:
            header, found = names, {str(name).strip().lower() for name in names}
            if "split" in found or (found <= others and not path.lower().endswith(".jsonl")):
                break  # the further rows have no further columns
    if given := [name for name in seen if str(name).strip().lower() == "split"]:
        return dict.fromkeys(given, ""), []

    saying, notes, shown = {}, [], printable(path)
    for name, values in seen.items():
        gaps, lower = "" in values, {value.lower() for value in values} - {""}
        values.discard("")
        if not values or len(values) > MOST or str(name).strip().lower() in others:
            continue
        said, named = {value: split for value in values if (split := _split(value))}, says_split(name)
        means = _split(" ".join(word for word in words(name) if word not in _AROUND))
        numbers = all(value.replace(".", "", 1).isdigit() for value in values)
        unclear = named and (said or lower & _SHORT or (numbers and _FOLDS.isdisjoint(words(name))))
        # nothing but `x` and gaps in `is_test`, or but 1 and gaps in `is_train`: which rows are held out is a guess
        known = _FALSE if means == "train" else _TRUE | _FALSE
        marks = bool(named and means and gaps and len(values) == 1 and not lower <= known)
        if len(said) == len(values):
            saying[name] = ""
        elif named and means and not marks and lower <= _TRUE | _FALSE:
            saying[name] = means
        elif unclear or marks or len(set(said.values())) > 1:
            raise SourceError(
                f"{shown}: the column {name!r} may say the split, and it is unclear what "
                f"{some(sorted(values - said.keys()))} means there{', beside empty cells' * marks}. Add a column "
                "`split`, which decides alone, with train, val, test or nothing in each cell"
            )
        elif named:
            notes.append(f"the column {name!r} says no split ({some(sorted(values))}), and is ignored")
    if len(saying) > 1 and "" in saying.values():
        raise SourceError(f"{shown} has several columns for the split, {some([*saying])}; call the right one `split`")
    told = [f"{name!r}" + (f" (1 is {means})" if means else "") for name, means in saying.items()]
    return saying, [f"the split is read from the column {' and '.join(told)}", *notes] if saying else notes


def split_cell(cells: Sequence[tuple[Any, str]], where: str) -> str:
    """The split that a row's cells say, each with what 1 stands for in its column; empty where they say none."""
    cell, means = cells[0]
    if len(cells) == 1 and not means and isinstance(cell, str) and cell in SPLITS:
        return SPLITS[cell]
    texts = [(_text(cell), means) for cell, means in cells]
    if not any(text for text, _ in texts):
        return ""
    if not texts[0][1]:
        if split := _split(text := texts[0][0]):
            return split
        raise SourceError(f"{where}: the split {text!r} is not one of {', '.join(SPLITS)}.{near(text.lower(), SPLITS)}")
    chosen = [means for text, means in texts if text.lower() in _TRUE]
    left = [split for split in ("train", "val", "test") if split not in {means for _, means in texts}]
    if len(chosen) > 1 or not (chosen or left):
        raise SourceError(f"{where} is in {' and '.join(chosen) or 'no split'}; each image is in one split")
    return (chosen or left)[0]


def split_folders(ids: list[str]) -> tuple[list[str], list[str]]:
    """The splits of paths that lie in folders called like splits, `train/1.jpg` and `test/2.jpg`, with a note."""
    folders = {os.path.dirname(id) for id in ids}
    among = splits_among({part for folder in folders for part in folder.split("/")})
    said = {folder: next((among[part] for part in folder.split("/") if part in among), "") for folder in folders}
    if "" in said.values() or len(set(said.values())) < 2:
        return [], []
    one = {split: folder for folder, split in sorted(said.items())}
    note = ", ".join(f"{printable(folder)} is {split}" for split, folder in sorted(one.items()))
    return [said[os.path.dirname(id)] for id in ids], [f"no column says the split; the folders do: {note}"]


def _text(cell: Any) -> str:
    text = "" if cell is None or cell != cell else str(cell).strip()
    return "" if text.lower() in _GAPS else text


def _split(value: str) -> str:
    split, rest = split_of(value)
    return "" if rest else split
