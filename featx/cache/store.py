"""The feature cache: rows under content keys, in immutable shards, one folder per spec."""

from __future__ import annotations

import contextlib
import os
import time

import numpy as np

from featx.cache import shards, writing
from featx.cache.index import KeyIndex
from featx.cache.reading import READERS, ShardTable
from featx.cache.shards import Form, Shard, StaleError
from featx.cache.writing import CHANGING, MAX_LISTINGS, Writer
from featx.errors import DamageError, StoreError
from featx.files import CLOCK_NS, make_folder, sync_folder
from featx.threads import ahead


class FeatureStore(Writer):
    """The rows of one `FeatureSpec`: `Writer` takes them in, and this finds and reads them.

    A damaged shard is moved to `damaged/` and named in `notes`; its intact rows are kept, the others are missing.
    """

    def _forget(self) -> None:
        self._table = ShardTable(self.folder, None, [], KeyIndex())
        """Replaced as a whole, since other threads may read: they see the old listing or the new one."""

    @property
    def empty(self) -> bool:
        return not self._table.shards

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

    # --- reading

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: which of the keys, `uint8 [N, 32]`, have a committed row."""
        return self._table.index.locate(keys) >= 0

    confirm = _has = contains

    def _took(self, shard: Shard, keys: np.ndarray) -> None:
        # one assignment: an interrupt must not leave a shard without its keys
        self._table = self._table.plus([shard], keys)

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

    def _relist(self, form: Form | None, trust: bool) -> None:
        found = [] if form is None else self._list(form, trust)
        table, left = self._table, set(found)
        if table.form != form or not left.issuperset(table.shards):  # one has gone
            table = ShardTable(self.folder, form, [], KeyIndex())
        left.difference_update(table.shards)
        new = [shard for shard in found if shard in left]  # the others keep their places, and their keys are not read
        self._table = table.plus(new, shards.read_keys(self.folder, new)) if new else table

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
