"""The feature cache: rows under content keys, in immutable shards, one folder per spec."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featx.cache import shards, writing
from featx.cache.index import KEY_BYTES, KeyIndex, as_keys, distinct
from featx.cache.memo import CLOCK_NS, READ_ONLY
from featx.cache.reading import READERS, ShardTable
from featx.cache.shards import Form, Shard, StaleError
from featx.errors import DamageError, NewerError, StoreError
from featx.features import FeatureSpec
from featx.files import make_folder, sweep, sync_folder
from featx.threads import ahead

# A killed run loses at most so many bytes of rows, or so many seconds of work.
SHARD_BYTES = 16 << 20
SHARD_SECONDS = 20.0
# How often a folder is listed again while other processes change it.
MAX_LISTINGS = 4
CHANGING = "{} changes faster than it can be read; try again"


class FeatureStore:
    """The rows of one `FeatureSpec`, at `cache/features/<name>-<digest>/`.

    Any number of processes, on any number of machines, may write to one folder at once: nothing that
    is there is ever changed, so there are no locks. A kill at any moment leaves every committed shard whole.
    A damaged shard is moved to `damaged/` and named in `notes`; its intact rows are kept, the others are missing.

    cache: the cache's folder. engine: what computes the rows that will be appended; the first writer's
    is recorded. Opening reads, and creates nothing before the first `append`. shard_bytes, shard_seconds:
    commit when so many bytes of rows are buffered, or when the first of them has waited so long.
    Raises `StoreError` where the folder's rows came from another engine.
    """

    def __init__(
        self,
        cache: Path,
        spec: FeatureSpec,
        *,
        engine: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.spec = spec
        self.folder = Path(cache) / "features" / spec.folder_name
        self.notes: list[str] = []
        """Sentences about what was found damaged or left behind, for the user."""
        self._asked = engine
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._buffered, self._since = 0, 0.0
        self._swept = False
        self._refreshing = threading.Lock()
        self._table = ShardTable(self.folder, None, [], KeyIndex(np.zeros((0, KEY_BYTES), np.uint8)))
        """Replaced as a whole, since other threads may read: they see the old listing or the new one."""
        self.refresh()
        self._check_engine()

    @property
    def form(self) -> Form | None:
        """What all rows have in common; None before the first append."""
        return self._table.form

    @property
    def engine(self) -> str | None:
        """What computed the rows, as the folder records it; None before the first append."""
        return self.form.engine if self.form else None

    def computed_by(self, engine: str) -> None:
        """Name the engine of the rows to come. Raises `StoreError` where the stored rows are another engine's."""
        self._asked = engine
        self._check_engine()

    def __len__(self) -> int:
        """The number of distinct keys that have a committed row."""
        return len(self._table.index)

    def listing(self) -> dict[str, int]:
        """Names and sizes in bytes of the shards that were found intact, in the order of their rows."""
        return {shard.name: shard.stat[0] for shard in self._table.shards}

    def stored(self) -> np.ndarray:
        """The keys of all rows, `uint8 [N, 32]`, as they are stored, repeats included."""
        return self._table.index.keys

    def keys(self) -> np.ndarray:
        """The distinct keys that have a committed row, `uint8 [N, 32]`, in the order they are stored."""
        index = self._table.index
        return index.keys.take(index.first(), axis=0)

    # --- writing

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Take in keys `uint8 [B, 32]` and rows `[B, *row_shape]`; they are safe once `commit` returns.

        Commits by itself once the buffer is full or old. Rows under keys that are there are dropped.
        Raises `StoreError` for another row shape, another engine, rows that float16 cannot hold, and a
        folder that cannot be written; the rows then stay buffered.
        """
        keys, rows = as_keys(keys), np.asarray(rows)
        if len(keys) != len(rows) or rows.dtype.kind != "f":
            raise StoreError(f"expected {len(keys)} rows of floats, got {rows.dtype} {list(rows.shape)}")
        if len(keys) == 0:
            return
        if rows[0].size == 0:
            raise StoreError(f"rows of shape {list(rows.shape[1:])} hold nothing")
        form = self._claim(rows.shape[1:])
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer.append((keys.copy(), writing.cast(rows, form.dtype)))
        self._buffered += rows.size * form.dtype.itemsize
        if self._buffered >= self._shard_bytes or time.monotonic() - self._since >= self._shard_seconds:
            self.commit()

    def commit(self) -> None:
        """Write what is buffered as one shard, durably. Raises `StoreError`; the rows then stay buffered."""
        if not self._buffer:
            return
        keys = np.concatenate([k for k, _ in self._buffer])
        first = distinct(keys)
        first = first[~self.contains(keys[first])]
        if len(first):
            rows = [r for _, r in self._buffer]
            form = self._claim(rows[0].shape[1:])  # made again, where it was removed since the last commit failed
            if len(first) < len(keys):
                keys, rows = keys[first], [np.concatenate(rows)[first]]
            with self._writing():
                shard = writing.write(self.folder, form, keys, rows)
            # one assignment: an interrupt must not leave a shard without its keys
            self._table = self._table.plus([shard], keys)
        # an interrupt before this line leaves the rows in the buffer, and `contains` drops them next time
        self._buffer.clear()
        self._buffered = 0

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.commit()  # also when interrupted: what was computed is kept
        except (KeyboardInterrupt, StoreError):
            self.commit()  # once more: the folder may have been removed, and is made again
            raise

    def _claim(self, row_shape: tuple[int, ...]) -> Form:
        """Make the folder, or join it; the first of several writers names the engine and the row shape."""
        if self.form is None:
            with self._writing():
                shards.create(self.folder, Form(self.spec, self._asked or "unnamed", tuple(row_shape)))
                self.refresh()  # another writer may have been first
                if self.form is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._check_engine()
        if tuple(row_shape) != self.form.row_shape:
            raise StoreError(
                f"rows of shape {list(row_shape)} do not belong to {self.folder.name}, whose rows have shape "
                f"{list(self.form.row_shape)}; remove it (featx cache remove) if the backbone was changed by hand"
            )
        if not self._swept:
            with self._writing():
                # fail before a batch is computed for nothing
                if not os.access(self.folder.resolve(strict=True), os.W_OK):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                sweep(self.folder)
                sweep(self.folder.parent)
            self._swept = True
        return self.form

    def _check_engine(self) -> None:
        if self.form and self._asked and self._asked != self.form.engine:
            raise StoreError(
                f"the features in {self.folder} come from the engine {self.form.engine!r}, not "
                f"{self._asked!r}, and two engines differ in the last bits of a row; use that engine, another "
                "--cache, or remove these features first (featx cache remove)"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = "all that was committed before is kept; make room and run the same command again"
            if error.errno in READ_ONLY:
                what = "it is read-only; give --cache a folder you can write to"
            elif error.errno == errno.ENOENT:
                what = "it was removed meanwhile; run the same command again"
                self.refresh()  # its rows are gone; what is buffered is committed to a new folder
            raise StoreError(f"cannot write to the cache {self.folder} ({error.strerror}): {what}") from error

    # --- reading

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: which of the keys, `uint8 [N, 32]`, have a committed row."""
        return self._table.index.locate(keys) >= 0

    def read(self, keys: np.ndarray, *, mapped: bool = True) -> np.ndarray:
        """The rows of `keys`, `uint8 [N, 32]`, in that order, with repeats: `[N, *row_shape]` as stored.

        A read-only `numpy.memmap` where the rows lie in one run in one file (as after a compact in this
        order) and `mapped` allows it, else an array. Raises `StoreError` with the number of keys that have no row.
        """
        if len(keys) == 0:
            return np.zeros((0, *(self.form.row_shape if self.form else ())), self.spec.dtype)
        for _ in range(MAX_LISTINGS):
            table, places = self.locate(keys)
            with contextlib.suppress(StaleError):  # another process compacts
                return table.read(places, mapped=mapped)
            self.refresh()
        raise StoreError(CHANGING.format(self.folder))

    def locate(self, keys: np.ndarray) -> tuple[ShardTable, np.ndarray]:
        """The rows as they are listed now, and the place of each key among them, `int64 [N]`.

        Raises `StoreError` with the number of keys that have no row.
        """
        for attempt in (1, 2):
            table = self._table
            places = table.index.locate(keys)
            if not (missing := int((places < 0).sum())):
                return table, places
            if attempt == 1:
                self.refresh()  # another process may have stored them meanwhile
        raise StoreError(
            f"{missing} of {len(keys)} features are not in {self.folder}; extract them first (featx extract)"
        )

    # --- the listing

    def refresh(self, *, trust: bool = True) -> None:
        """List the folder again: find other processes' shards, and set damaged ones aside.

        trust: believe the shards whose size, mtime, ctime and inode are as when their bytes were last
        verified; else read every byte.
        """
        with self._refreshing:
            for _ in range(MAX_LISTINGS):
                try:
                    form = self._read_form() if self.folder.is_dir() else None
                    self._table = self._tabled(form, [] if form is None else self._list(form, trust))
                    return
                except (StaleError, FileNotFoundError):
                    continue  # a shard went between listing and reading: another process compacts or removes
                except OSError as error:
                    raise StoreError(f"the cache {self.folder} cannot be read ({error.strerror})") from error
        raise StoreError(CHANGING.format(self.folder))

    def _tabled(self, form: Form | None, found: list[Shard]) -> ShardTable:
        """The rows of these shards. Those listed before keep their places, and only the keys of new ones are read."""
        table, left = self._table, set(found)
        if table.form != form or not left.issuperset(table.shards):  # one has gone
            table = ShardTable(self.folder, form, [], KeyIndex(np.zeros((0, KEY_BYTES), np.uint8)))
        left.difference_update(table.shards)
        new = [shard for shard in found if shard in left]
        return table.plus(new, shards.read_keys(self.folder, new)) if new else table

    def _list(self, form: Form, trust: bool) -> list[Shard]:
        """The folder's valid shards. Sets damaged ones aside."""

        def check(name: str) -> tuple[str, Shard | DamageError]:
            try:
                return name, shards.check(self.folder, name, form).shard
            except DamageError as error:
                return name, error

        verified, listed = shards.read_verified(self.folder), shards.list_shards(self.folder)
        known = {name: shard for name, shard in verified.items() if trust and listed.get(name) == shard.stat}
        unknown, now = [name for name in listed if name not in known], time.time_ns()
        checked: dict[str, Shard | DamageError] = {}
        if unknown:
            checked |= ahead(check, unknown, threads=READERS, window=2 * READERS, name="featx-check")

        kept: dict[str, Shard] = {}
        found: list[Shard] = []
        for name in listed:
            shard = known.get(name) or checked[name]
            if isinstance(shard, DamageError):
                found += self._set_aside(name, form, str(shard))
                continue
            if name in known or shard.stat[2] < now - CLOCK_NS:
                kept[name] = shard
            found.append(shard)
        if kept != verified:
            shards.write_verified(self.folder, kept)
        return found

    def _set_aside(self, name: str, form: Form, reason: str) -> list[Shard]:
        """Move a damaged shard to `damaged/`; return the new shard of its intact rows, if there are any."""
        where, salvaged = f"the shard {self.folder.name}/{name}", []
        try:
            parts = list(shards.intact_rows(self.folder, name, form))
            if parts:
                keys = np.concatenate([keys for keys, _ in parts])
                salvaged = [writing.write(self.folder, form, keys, [rows for _, rows in parts])]
            make_folder(self.folder / "damaged")
            os.replace(self.folder / name, self.folder / "damaged" / name)
            sync_folder(self.folder)
        except (OSError, StaleError) as error:
            self._note(f"{where} is damaged ({reason}) and left out; it cannot be set aside ({error})")
        else:
            kept = f"; {salvaged[0].count} intact rows of it are kept" if salvaged else ""
            self._note(f"{where} was damaged ({reason}) and is set aside in damaged/{kept}")
        return salvaged

    def _read_form(self) -> Form | None:
        """What `spec.json` says; where it is lost or damaged, what a valid shard says, written again."""
        path = self.folder / "spec.json"
        try:
            return shards.read_form(path, self.spec)
        except (DamageError, StaleError) as error:
            reason, there = str(error), not isinstance(error, StaleError)

        for name in shards.list_shards(self.folder):
            with contextlib.suppress(DamageError, NewerError, StaleError):
                form = shards.check(self.folder, name, None).form
                if form.spec == self.spec:
                    with contextlib.suppress(OSError):  # read-only: the shard is asked again next time
                        shards.write_form(path, form)
                    self._note(f"{path} was lost ({reason}) and is written again from a shard")
                    return form
        if there:
            with contextlib.suppress(OSError):  # no row depends on it; the next writer makes a new one
                os.unlink(path)
        return None

    def _note(self, note: str) -> None:
        if note not in self.notes:  # a read-only cache says the same at every listing
            self.notes.append(note)
