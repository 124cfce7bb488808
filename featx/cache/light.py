"""A writer that keeps 4 bytes of each key that is stored, not the keys: for one of many processes that fill a cache."""

from __future__ import annotations

import contextlib

import numpy as np

from featx.cache import shards
from featx.cache.index import KeyIndex, as_keys, distinct
from featx.cache.shards import Form, Shard, StaleError
from featx.cache.writing import CHANGING, MAX_LISTINGS, Writer
from featx.errors import DamageError, StoreError


class LightStore(Writer):
    """Appends rows, and reads none. Opening it takes about 4 bytes of memory for each row that is stored.

    The bytes of other writers' shards are not verified, only their headers: one that cannot be parsed is left out, and
    left where it is. The next `FeatureStore` verifies them.
    """

    _absent: KeyIndex
    """Keys of which `confirm` said that other writers have not stored them."""

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: which of the keys, `uint8 [N, 32]`, have a committed row.

        It finds every stored key. Of keys that are not stored it says yes for about one in 2**32 / n, where other
        writers have stored n rows (10**7: one in 430), until `confirm` was asked. It is exact for the rows that this
        store has appended.
        """
        found = self._others.maybe(keys)
        found &= self._absent.locate(keys) < 0
        found |= self._has(keys)
        return found

    def confirm(self, keys: np.ndarray) -> np.ndarray:
        """`contains`, `bool [N]`, exactly: reads the keys of all shards, unless all are found before.

        What is found absent is remembered, until another writer stores it.
        """
        keys = as_keys(keys)
        for _ in range(MAX_LISTINGS):
            asked = keys[self.contains(keys) & ~self._has(keys)]
            asked = asked[distinct(asked)]
            index, there = KeyIndex(asked), np.zeros(len(asked), bool)
            begin = np.zeros(1 << 16, bool)
            begin[asked.view(np.uint16)[:, 0]] = True
            with contextlib.suppress(StaleError):  # another process compacts
                for shard in [shard for name, shard in self._shards.items() if shard and name not in self._mine]:
                    if there.all():
                        break
                    part = shards.read_keys(self.folder, [shard])
                    places = index.locate(part[begin[part.view(np.uint16)[:, 0]]])  # of few keys, nearly none begin so
                    there[places[places >= 0]] = True
                self._absent = self._absent.plus(asked[~there])
                return self._has(keys) | (KeyIndex(asked[there]).locate(keys) >= 0)
            self.refresh()
        raise StoreError(CHANGING.format(self.folder))

    @property
    def empty(self) -> bool:
        return not any(self._shards.values())

    def _forget(self) -> None:
        self._shards: dict[str, Shard | None] = {}
        """All shards by their names; None for one that cannot be parsed."""
        self._others = KeyFilter()
        self._mine: set[str] = set()
        self._own = KeyIndex()
        """The keys of the shards that this store has written."""
        self._absent = KeyIndex()

    def _relist(self, form: Form | None, trust: bool) -> None:
        listed = shards.list_shards(self.folder) if form else {}
        if any(shard and listed.get(name) != shard.stat for name, shard in self._shards.items()):
            self._forget()  # one has gone
        names = [name for name in listed if name not in self._shards]
        verified = shards.read_verified(self.folder) if names else {}
        new: dict[str, Shard | None] = {}
        for name in names:
            shard = verified.get(name)
            new[name] = shard if shard and shard.stat == listed[name] else self._inspect(name, form)

        there = [shard for shard in new.values() if shard]
        first, end = np.empty(sum(shard.count for shard in there), np.uint32), 0
        stored = np.zeros(len(self._absent.keys), bool)
        for shard in there:
            part = shards.read_keys(self.folder, [shard])
            first[end : end + len(part)] = part.view(np.uint32)[:, 0]
            end += len(part)
            if len(stored):
                places = self._absent.locate(part)
                stored[places[places >= 0]] = True
        self._absent = KeyIndex(self._absent.keys[~stored])
        self._others, self._shards = self._others.plus(first), self._shards | new

    def _inspect(self, name: str, form: Form | None) -> Shard | None:
        try:
            with shards.open_regular(self.folder / name) as file:
                return shards.inspect(file, name, form).shard
        except DamageError as error:
            self._note(f"the shard {self.folder.name}/{name} is damaged ({error}) and left out")
            return None

    def _has(self, keys: np.ndarray) -> np.ndarray:
        return self._own.locate(keys) >= 0

    def _took(self, shard: Shard, keys: np.ndarray) -> None:
        # in this order, so that an interrupt leaves the shard as another writer's
        self._own, self._shards = self._own.plus(keys), self._shards | {shard.name: shard}
        self._mine.add(shard.name)


class KeyFilter:
    """Which keys may be among others: their first 4 bytes, sorted, in runs at least four times as long as the next."""

    def __init__(self, runs: tuple[np.ndarray, ...] = ()) -> None:
        self._runs = runs

    def plus(self, run: np.ndarray) -> KeyFilter:
        """A filter with more first 4 bytes, `uint32 [n]`, which are sorted in place; this one stays as it is."""
        runs = list(self._runs)
        run.sort()
        while runs and len(runs[-1]) < 4 * len(run):
            run = np.concatenate([runs.pop(), run])
            run.sort()
        return KeyFilter((*runs, run) if len(run) else self._runs)

    def maybe(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: False only for keys that are not among them."""
        first = as_keys(keys).view(np.uint32)[:, 0].copy()
        found = np.zeros(len(first), bool)
        for run in self._runs:
            at = np.searchsorted(run, first)
            found |= run[np.minimum(at, len(run) - 1)] == first
        return found
