"""Owns the lookup of keys: where in the cache the row of a content key is."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from featx.errors import StoreError

KEY_BYTES = 32
# Keys looked up at a time, so that a million of them need little memory beside themselves.
AT_ONCE = 1 << 16


class KeyIndex:
    """Keys `uint8 [N, 32]` in the order they are stored, searchable. Takes 48 bytes a key."""

    def __init__(self, parts: Iterable[np.ndarray] = ()) -> None:
        self._parts = list(parts)
        self._sorted: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def plus(self, keys: np.ndarray) -> KeyIndex:
        """An index with `keys` stored behind all others."""
        return KeyIndex([*self._parts, keys])

    @property
    def keys(self) -> np.ndarray:
        """`uint8 [N, 32]`, maybe with repeats: two writers may have stored the same."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *self._parts])]
        return self._parts[0]

    def __len__(self) -> int:
        """The number of distinct keys."""
        return len(self.first())

    def first(self) -> np.ndarray:
        """Ascending places, `int64 [M]`, of the first row of each distinct key."""
        keys, prefix, order = self._index()
        same = prefix[1:] == prefix[:-1]
        if not same.any():
            return np.arange(len(keys))
        keep = np.ones(len(keys), bool)
        near = np.zeros(len(keys), bool)
        near[1:] |= same
        near[:-1] |= same
        doubtful = np.sort(order[near])
        keep[doubtful] = False
        keep[doubtful[distinct(keys[doubtful])]] = True
        return np.flatnonzero(keep)

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """The place of the first row of each key, counting through all rows; -1 for none. `int64 [N]`."""
        if 0 < len(keys) <= len(self.keys) and np.array_equal(self.keys[: len(keys)], keys):
            return np.arange(len(keys))  # a data set in the order it was stored in: nothing to search
        known, prefix, order = self._index()
        found = np.full(len(keys), -1, np.int64)
        words = known.view(np.uint64)
        for start in range(0, len(keys) if len(known) else 0, AT_ONCE):
            asked = keys[start : start + AT_ONCE].view(np.uint64)
            at = np.searchsorted(prefix, asked[:, 0])
            rest = np.arange(len(asked))
            while len(rest):  # once, but for different keys that share their first 8 bytes
                rest = rest[at[rest] < len(prefix)]
                rest = rest[prefix[at[rest]] == asked[rest, 0]]
                candidate = order[at[rest]]
                hit = (words[candidate] == asked[rest]).all(axis=1)
                found[start + rest[hit]] = candidate[hit]
                rest = rest[~hit]
                at[rest] += 1
        return found

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys as stored, their first 8 bytes sorted, and the permutation that sorts them."""
        if self._sorted is None:
            keys = self.keys
            first = keys.view(np.uint64)[:, 0]
            order = np.argsort(first, kind="stable")
            self._sorted = keys, first[order], order
        return self._sorted


def as_keys(keys: np.ndarray) -> np.ndarray:
    """Keys as `uint8 [N, 32]`, contiguous. Raises `StoreError` for anything else."""
    keys = np.ascontiguousarray(keys)
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
        raise StoreError(f"keys are uint8 [N, {KEY_BYTES}], not {keys.dtype} {list(keys.shape)}")
    return keys


def distinct(keys: np.ndarray) -> np.ndarray:
    """Ascending places, `int64 [M]`, of the first of each distinct key."""
    first = np.sort(np.ascontiguousarray(keys).view(np.uint64)[:, 0])
    if not (first[1:] == first[:-1]).any():  # nearly always, and in an eighth of the memory
        return np.arange(len(keys))
    opaque = np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").ravel()
    return np.sort(np.unique(opaque, return_index=True)[1])
