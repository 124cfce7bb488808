"""The work of the `featx cache` commands: list, inspect, verify, compact, remove and export."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache import shards, writing
from featx.cache.index import distinct
from featx.cache.memo import SEGMENT
from featx.cache.shards import Form, StaleError
from featx.cache.store import FeatureStore
from featx.errors import DamageError, NewerError, StoreError
from featx.features import Features
from featx.files import aside_name, make_folder, sweep, sync_folder, write_chunks
from featx.sources.own import MADE_AGAIN
from featx.text import near, printable

# Bytes of rows copied at a time when shards are merged.
COPY_BYTES = 8 << 20
# What featx calls an entry, and what it writes into an entry's folder or into those of MADE_AGAIN.
ENTRY = re.compile(r"[\w.-]*-[0-9a-f]{16}", re.ASCII)
WRITTEN = re.compile(r"spec\.json|verified\.json|damaged|[0-9a-f]{16}-[0-9a-f]{64}\.h5|[0-9a-f]{32}.*|\.(~|nfs).*")
WITHIN = re.compile(rf"{SEGMENT.pattern}|\.(~|nfs).*")


@dataclass(frozen=True)
class Entry:
    """One spec's folder in a cache."""

    name: str
    """The folder's name, `resnet18-0123456789abcdef`; a unique beginning of it will do, too."""
    path: Path
    form: Form | None
    """None where `spec.json` is lost or damaged (the next run with this spec writes it again), or a newer featx's."""
    shards: int
    bytes: int
    """All files in the folder, with those set aside."""
    damaged: int
    """Files set aside in `damaged/`."""

    def to_dict(self) -> dict[str, Any]:
        form = self.form.to_dict() if self.form else dict.fromkeys(("spec", "engine", "tolerance", "row_shape"))
        sizes = {"shards": self.shards, "bytes": self.bytes, "damaged": self.damaged}
        return {"name": self.name, "path": str(self.path)} | form | sizes


@dataclass(frozen=True)
class Contents:
    """What one entry holds."""

    entry: Entry
    rows: int
    """Committed, repeats included."""
    distinct: int
    files: list[str]
    """The shards' names, in the order of their commits."""
    notes: list[str]
    """Sentences about damage."""
    used: int | None = None
    """Rows that the given data set uses; this and the next two are None without a data set."""
    unused: int | None = None
    missing: int | None = None
    """Its distinct images without a row."""

    def to_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if value is not None}
        del found["entry"]
        return self.entry.to_dict() | found


@dataclass(frozen=True)
class Verified:
    """One entry, after every byte of it was read."""

    name: str
    shards: int
    rows: int
    bytes: int
    notes: list[str]
    """What was damaged, set aside, and kept; empty where nothing was."""

    def text(self) -> str:
        state = "; ".join(self.notes) or "every byte is as it was committed"
        return f"{self.name}: {self.rows} rows in {self.shards} shards, {self.bytes / 1e6:.1f} MB: {state}"


@dataclass(frozen=True)
class Compacted:
    """An entry before and after its shards were merged."""

    shards_before: int
    rows_before: int
    bytes_before: int
    shards_after: int
    rows_after: int
    bytes_after: int
    done: bool
    """False where there was nothing to do."""


def entries(cache: Path) -> list[Entry]:
    """The entries of a cache, by name. Reads no features and changes nothing. Raises `StoreError`."""
    if not Path(cache).is_dir():
        raise StoreError(f"there is no cache at {cache}; featx extract makes one")
    root = Path(cache) / "features"
    try:
        paths = sorted(root.iterdir()) if root.is_dir() else []
        return [_entry(path) for path in paths if path.is_dir() and ENTRY.fullmatch(path.name)]
    except OSError as error:
        raise StoreError(f"the cache {cache} cannot be read ({error.strerror})") from error


def find(cache: Path, name: str) -> Entry:
    """The entry of this name, or the only one whose name starts so. Raises `StoreError`."""
    every = entries(cache)
    matches = [e for e in every if e.name == name] or [e for e in every if name and e.name.startswith(name)]
    if len(matches) != 1:
        names = [e.name for e in matches or every]
        what = f"{len(matches)} entries start with {name!r}" if matches else f"there is no entry {name!r}"
        raise StoreError(f"{what} in {cache}; there are {', '.join(names) or 'none'}.{near(name, names)}")
    return matches[0]


def sizes(cache: Path) -> dict[str, int]:
    """Bytes in each folder of a cache: `features`, those of `MADE_AGAIN`, which can be removed at any time, and
    `calibrations`, which int8 features and runs need: others would be made of other images."""
    return {path.name: _bytes(path) for path in sorted(Path(cache).iterdir()) if path.is_dir()}


def info(cache: Path, name: str, against: np.ndarray | None = None) -> Contents:
    """Describe one entry. against: keys of a data set, `uint8 [N, 32]`: which rows does it use?"""
    entry = find(cache, name)
    store = _open(cache, entry)
    found = Contents(entry, len(store.stored()), len(store), list(shards.list_shards(entry.path)), store.notes)
    if against is None:
        return found
    wanted = against[distinct(against)]
    used = int(store.contains(wanted).sum())
    return replace(found, used=used, unused=len(store) - used, missing=len(wanted) - used)


def verify(cache: Path, name: str | None = None) -> list[Verified]:
    """Read every byte of one entry, or of all. What is damaged is set aside, and its intact rows are kept."""
    done = []
    for entry in entries(cache) if name is None else [find(cache, name)]:
        try:
            store = _open(cache, entry)
            store.refresh(trust=False)
        except (StoreError, NewerError) as error:
            done.append(Verified(entry.name, 0, 0, 0, [str(error)]))
            continue
        stats = shards.list_shards(entry.path).values()
        done.append(Verified(entry.name, len(stats), len(store), sum(size for size, *_ in stats), store.notes))
    return done


def compact(cache: Path, name: str, order: np.ndarray | None = None, *, only: bool = False) -> Compacted:
    """Merge an entry's shards into one file, whose rows can be memory-mapped as one array.

    order: keys of a data set, `uint8 [N, 32]`: its rows come first and in this order, so that reading
    them takes no copy; else the order of commits. only: drop the rows that are not in `order`.

    The merged file is durable and read back before a shard is removed, and only shards whose rows it
    holds are: a crash leaves rows twice, never none. Others may read and write meanwhile.
    """
    assert order is not None or not only
    store = _open(cache, find(cache, name))
    merged, chosen = store.listing(), store.keys()
    if order is not None:
        first = order[distinct(order)]
        first = first[store.contains(first)]
        both = np.concatenate([first, chosen])
        chosen = first if only else both[distinct(both)]
    before = len(merged), len(store.stored()), sum(merged.values())

    same = len(merged) <= 1 and np.array_equal(chosen, store.stored())
    if not same:
        sweep(store.folder)
        new = _merge(store, chosen) if len(chosen) else {}
        for shard in merged:
            with contextlib.suppress(FileNotFoundError):  # another process compacts too
                os.unlink(store.folder / shard)
        sync_folder(store.folder)
        store.refresh()
        merged = new
    return Compacted(*before, len(merged), len(store.stored()), sum(merged.values()), done=not same)


def _merge(store: FeatureStore, keys: np.ndarray) -> dict[str, int]:
    """Write these rows as one shard, and read it back."""
    form = store.form
    assert form is not None
    step = max(1, COPY_BYTES // form.row_bytes)
    rows = (np.asarray(store.read(keys[start : start + step])) for start in range(0, len(keys), step))
    try:
        shard = writing.write(store.folder, form, keys, rows)
        shards.check(store.folder, shard.name, form)
    except (OSError, DamageError, StaleError) as error:
        raise StoreError(f"{store.folder} was not compacted and is as it was ({error})") from error
    return {shard.name: shard.stat[0]}


def removable(cache: Path, name: str) -> tuple[Path, int]:
    """The folder that `remove` takes for this name, an entry's or one of `MADE_AGAIN`, and its bytes.

    Raises `StoreError` where it is a link, or holds a file that featx does not write there.
    """
    path = Path(cache) / name
    if name == "calibrations":
        raise StoreError(f"{path} is kept: int8 features and runs need the very files; remove it yourself if none are")
    if name not in MADE_AGAIN or not path.is_dir():
        path = find(cache, name).path
    if path.is_symlink():
        raise StoreError(f"{path} is a link, and featx removes nothing behind a link; remove it yourself")
    found = [each for each in sorted(os.listdir(path)) if not WRITTEN.fullmatch(each)]
    segments = path.glob("*.2/*") if path.name == "memo" else ()
    others = found + [str(each.relative_to(path)) for each in segments if not WITHIN.fullmatch(each.name)]
    if others:
        raise StoreError(f"{path} holds {printable(others[0])}, which featx did not write; move it away first")
    return path, _bytes(path)


def remove(cache: Path, name: str) -> Path:
    """Remove what `removable` names, and return the folder that it was. Raises `StoreError`."""
    path, _ = removable(cache, name)
    aside = path.parent / aside_name()
    try:
        sweep(path.parent)
        os.rename(path, aside)  # gone at once for all others; a crash leaves what a sweep removes
        sync_folder(path.parent)
        shutil.rmtree(aside)
    except OSError as error:
        raise StoreError(f"{path} cannot be removed ({error.strerror})") from error
    return path


def export(features: Features, path: Path, *, overwrite: bool = False) -> Path:
    """Write a data set's features as one plain HDF5 file that h5py, MATLAB or R reads without featx.

    `features` float32 or float16 `[N, D]`, `labels` int64 `[N]` (index into `class_names`, -1 for none),
    `class_names`, `ids` and `splits` UTF-8 text, `keys` uint8 `[N, 32]` (SHA-256 of each image's bytes);
    attributes `spec` (JSON) and `featx` (the version). All stored plainly, without compression; MATLAB
    and R show arrays with their dimensions reversed. overwrite: replace such a file. Raises `StoreError`,
    also where any other file is at `path`.
    """
    from featx import __version__
    from featx.cache.hdf5 import plan, utf8

    check_export(path, overwrite)
    X = features.X
    step = max(1, COPY_BYTES // max(1, X[:1].nbytes))
    parts = (np.ascontiguousarray(X[start : start + step]) for start in range(0, len(X), step))
    attributes = {"featx": __version__.encode(), "spec": json.dumps(features.spec.to_dict(), sort_keys=True).encode()}
    texts = {"class_names": features.class_names, "ids": features.ids, "splits": np.asarray(features.splits).tolist()}
    small = {"labels": np.asarray(features.y, "<i8"), "keys": features.keys}
    small |= {name: utf8(values) for name, values in texts.items()}

    try:
        make_folder(path.parent)
        chunks, _ = plan({"features": (X.dtype, X.shape, parts)}, attributes, small)
        write_chunks(path.parent, chunks, lambda: path.name)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error})") from error
    return path


def check_export(path: Path, overwrite: bool) -> None:
    """Raise `StoreError` where `export` may not write, which is known before any extraction."""
    from featx.cache.hdf5 import attribute_names

    if path.exists() and not overwrite:
        raise StoreError(f"{path} is there already; give another file, or --overwrite to replace it")
    if os.path.lexists(path) and not (path.is_file() and {"featx", "spec"} <= attribute_names(path)):
        raise StoreError(f"{path} is not a file that featx exported, so it is not replaced; give another file")
    if path.suffix.lower() not in (".h5", ".hdf5", ".hdf"):
        raise StoreError(f"{path} would hold HDF5: call it .h5; to save otherwise, `featx.extract(DATA).X` is an array")


def _entry(path: Path) -> Entry:
    form = None
    with contextlib.suppress(DamageError, NewerError, StaleError):
        form = shards.read_form(path / "spec.json")
    aside = path / "damaged"
    damaged = len(list(aside.iterdir())) if aside.is_dir() else 0
    return Entry(path.name, path, form, len(shards.list_shards(path)), _bytes(path), damaged)


def _open(cache: Path, entry: Entry) -> FeatureStore:
    """An entry's store; where `spec.json` is lost, with the spec of its first valid shard.

    Raises `StoreError`, and `NewerError` for what a newer featx wrote.
    """
    spec = entry.form.spec if entry.form else None
    for shard in shards.list_shards(entry.path) if spec is None else []:
        with contextlib.suppress(DamageError, StaleError):
            spec = shards.check(entry.path, shard, None).form.spec
            break
    if spec is None or spec.folder_name != entry.name:
        raise StoreError(f"{entry.path} holds no intact spec and no intact shard; featx cache remove {entry.name}")
    return FeatureStore(Path(cache), spec)


def _bytes(folder: Path) -> int:
    total = 0
    for top, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(top, file)).st_size
    return total
