"""The lookup of keys: where in the cache the row of a content key is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featx.errors import StoreError

KEY_BYTES = 32
NONE = np.zeros((0, KEY_BYTES), np.uint8)
# Keys looked up at a time, so that a million of them need little memory beside themselves.
AT_ONCE = 1 << 16


class KeyIndex:
    """Keys `uint8 [N, 32]` in the order they are stored, searchable. Takes 44 bytes per key, and room to grow.

    Sorted runs of the keys, each at least four times as long as the next, so that what is appended during a
    run of millions of images is not all sorted again with every shard.
    """

    def __init__(self, keys: np.ndarray = NONE) -> None:
        self._buffer, self._count = keys, len(keys)
        self._used = [self._count]  # rows of the buffer that this index, or one that `plus` made of it, has taken
        self._runs: list[_Run] = []

    def plus(self, keys: np.ndarray) -> KeyIndex:
        """An index with `keys` stored behind all others; this one stays as it is."""
        if not self._count:
            return KeyIndex(keys)
        made, end = KeyIndex(self._buffer), self._count + len(keys)
        made._used = self._used
        if end > len(self._buffer) or self._used[0] != self._count:
            made._buffer, made._used = np.empty((end + end // 2, KEY_BYTES), np.uint8), [0]
            made._buffer[: self._count] = self.keys
        made._buffer[self._count : end] = keys
        made._used[0] = made._count = end
        made._runs = self._runs
        return made

    @property
    def keys(self) -> np.ndarray:
        """`uint8 [N, 32]`, maybe with repeats: two writers may have stored the same."""
        return self._buffer[: self._count]

    def __len__(self) -> int:
        """The number of distinct keys."""
        return len(self.first())

    def first(self) -> np.ndarray:
        """Ascending places, `int64 [M]`, of the first row of each distinct key."""
        return distinct(self.keys)

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key among all rows, `int64 [N]`; -1 for none. It is the first of a repeated key, unless
        `keys` are the first keys stored, in their order."""
        keys = as_keys(keys)
        if 0 < len(keys) <= self._count and _same(self.keys, keys):
            return np.arange(len(keys))  # a data set in the order it was stored in: nothing to search
        runs, words = self._sorted(), self.keys.view(np.uint64)
        found = np.full(len(keys), -1, np.int64)
        for start in range(0, len(keys), AT_ONCE):
            asked = keys[start : start + AT_ONCE].view(np.uint64)
            order = np.argsort(asked[:, 0])  # in a large index, neighbours are found in half the time
            asked, part = asked[order], np.full(len(order), -1, np.int64)
            for run in runs:
                todo = np.flatnonzero(part < 0)
                part[todo] = run.find(words, asked[todo])
            found[start + order] = part
        return found

    def _sorted(self) -> list[_Run]:
        """Runs that cover all keys: sorts what was appended since, together with runs not four times as long."""
        runs = list(self._runs)
        start = runs[-1].stop if runs else 0
        if start < self._count:
            while runs and runs[-1].stop - runs[-1].start < 4 * (self._count - start):
                start = runs.pop().start
            runs.append(_Run.of(self.keys, start, self._count))
            self._runs = runs
        return runs


@dataclass(frozen=True, eq=False)
class _Run:
    """The keys from `start` to `stop`, by their first 8 bytes."""

    start: int
    stop: int
    prefix: np.ndarray
    """`uint64 [n]`, ascending."""
    order: np.ndarray
    """`uint32 | int64 [n]`: where each of these lies, counted from `start`; of equals the first comes first."""

    @classmethod
    def of(cls, keys: np.ndarray, start: int, stop: int) -> _Run:
        first = keys[start:stop].view(np.uint64)[:, 0]
        order = np.argsort(first, kind="stable")
        if len(order) < 1 << 32:
            order = order.astype(np.uint32)
        return cls(start, stop, first[order], order)

    def find(self, words: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """The first place of each of `asked`, `uint64 [B, 4]`, among all keys `words` `[N, 4]`; -1 for none."""
        found = np.full(len(asked), -1, np.int64)
        at = np.searchsorted(self.prefix, asked[:, 0])
        rest = np.arange(len(asked))
        while len(rest):  # once, but for different keys that share their first 8 bytes
            rest = rest[at[rest] < len(self.prefix)]
            rest = rest[self.prefix[at[rest]] == asked[rest, 0]]
            candidate = self.start + self.order[at[rest]].astype(np.int64)
            hit = (words[candidate] == asked[rest]).all(axis=1)
            found[rest[hit]] = candidate[hit]
            rest = rest[~hit]
            at[rest] += 1
        return found


def _same(stored: np.ndarray, keys: np.ndarray) -> bool:
    """Whether `keys` are the first of `stored`."""
    parts = (slice(i, min(i + AT_ONCE, len(keys))) for i in range(0, len(keys), AT_ONCE))
    return all(np.array_equal(stored[part], keys[part]) for part in parts)


def as_keys(keys: np.ndarray) -> np.ndarray:
    """Keys as `uint8 [N, 32]`, contiguous. Raises `StoreError` for anything else."""
    keys = np.ascontiguousarray(keys)
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise StoreError(f"keys are uint8 [N, {KEY_BYTES}], not {keys.dtype} {list(keys.shape)}")
    return keys


def distinct(keys: np.ndarray) -> np.ndarray:
    """Ascending places, `int64 [M]`, of the first of each distinct key. Raises `StoreError` for what is not keys."""
    keys = as_keys(keys)
    first = np.sort(keys.view(np.uint64)[:, 0])
    if not (first[1:] == first[:-1]).any():  # nearly always, and in an eighth of the memory
        return np.arange(len(keys))
    return np.sort(np.unique(keys.view(f"V{KEY_BYTES}").ravel(), return_index=True)[1])
