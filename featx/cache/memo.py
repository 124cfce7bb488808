"""The stat memo: which content key a file had when it was last read, so that it is not read again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from featx.errors import StoreError
from featx.files import MOST_NETWORK_BYTES, make_folder, read_plain, write_chunks

MAGIC = b"featx memo 1\n"
# A file that changed this shortly before it was looked at can change again without another timestamp
# (2 s on FAT, 1 s on old network file systems, 4-10 ms on ext4): its key is not remembered.
CLOCK_NS = 2_000_000_000
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
AT_ONCE = 1 << 12  # paths that are encoded at a time


class KeyMemo:
    """Keys of the files under one root, by path, size, mtime, ctime and inode.

    One file, `cache/memo/<hash of the root>`; it can be deleted at any time: files are then read again.
    A damaged one counts as deleted. If several processes write it, the last one wins.
    """

    def __init__(self, cache: Path, root: Path) -> None:
        root = Path(os.path.abspath(root))
        self.path = Path(cache) / "memo" / hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
        # files are read, and their keys recorded, after this moment
        self._opened = time.time_ns()
        self._names = b""
        self._stats = np.zeros((0, 4), np.int64)
        self._keys = np.zeros((0, 32), np.uint8)
        self._load()

    def lookup(self, ids: Sequence[str], stats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys `uint8 [N, 32]` of files, and which of them are known, `bool [N]`; the others' are zeros.

        ids: paths under the root, with `/`; stats: `int64 [N, 4]`, size, mtime_ns, ctime_ns, inode.
        """
        count = len(ids)
        at = self._find(ids)
        if at is None:  # the same paths as last time, maybe with others behind them
            saved, keys, known = self._stats[:count], self._keys[:count].copy(), np.ones(count, bool)
        else:
            known = at >= 0
            at[~known] = 0
            empty = np.zeros((count, 4), np.int64), np.zeros((count, 32), np.uint8)
            saved, keys = (self._stats[at], self._keys[at]) if len(self._stats) else empty
        known &= (saved == stats).all(axis=1)
        keys[~known] = 0
        return keys, known

    def record(self, ids: Sequence[str], stats: np.ndarray, keys: np.ndarray, known: np.ndarray) -> None:
        """Remember `keys` (`uint8 [N, 32]`) where `known` (`bool [N]`); stats are those listed before reading.

        Files changed within 2 s before this memo was opened, or after, are left out: they could have
        changed again unseen. On a read-only cache nothing is remembered. Raises `StoreError` on a full disk.
        """
        changed = stats[:, 2] if os.name != "nt" else stats[:, 1:3].max(axis=1)  # on Windows, ctime is creation
        keep = known & (changed < self._opened - CLOCK_NS)
        at = self._find(ids)
        if at is None and keep.all() and np.array_equal(self._stats, stats) and np.array_equal(self._keys, keys):
            return

        names = ids if keep.all() else [ids[i] for i in np.flatnonzero(keep).tolist()]
        # files of another data set under the same root, as long as they are not many
        others = np.ones(len(self._stats), bool)
        others[slice(len(ids)) if at is None else at[at >= 0]] = False
        other = np.flatnonzero(others)[: 4 * len(ids) + 100_000]
        old = self._names.split(b"\0") if len(other) else []
        if len(other) or len(names) < len(ids):  # else no copies: with a million images they are the peak of memory
            stats = np.concatenate([stats[keep], self._stats[other]])
            keys = np.concatenate([keys[keep], self._keys[other]])
        arrays = [np.ascontiguousarray(array, dtype).reshape(-1) for array, dtype in ((stats, "<i8"), (keys, "u1"))]
        head: list[bytes | memoryview] = [len(stats).to_bytes(8, "little"), *(array.data for array in arrays)]
        behind = [old[i] for i in other.tolist()]
        digest = hashlib.sha256()
        for part in chain(head, _parts(names, behind)):
            digest.update(part)
        try:
            make_folder(self.path.parent)
            body = chain([MAGIC, digest.digest()], head, _parts(names, behind))
            write_chunks(self.path.parent, body, lambda: self.path.name)
        except OSError as error:
            if error.errno not in READ_ONLY:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                what = "make room and run the same command again" if full else "give another --cache"
                raise StoreError(f"cannot write {self.path} ({error.strerror}): {what}") from error

    def _find(self, ids: Sequence[str]) -> np.ndarray | None:
        """Where each path is in the memo, -1 where it is not; None where they are its first, in order."""
        if not len(self._stats):
            return np.full(len(ids), -1, np.int64)
        joined = _joined(ids)
        if ids and self._names.startswith(joined) and self._names[len(joined) : len(joined) + 1] in (b"", b"\0"):
            return None
        index = {name: place for place, name in enumerate(self._names.split(b"\0"))}
        return np.fromiter((index.get(id.encode("utf-8", "surrogatepass"), -1) for id in ids), np.int64, len(ids))

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            data = read_plain(self.path, MOST_NETWORK_BYTES)
            start = len(MAGIC) + 32
            body = memoryview(data)[start:]
            if data[: len(MAGIC)] != MAGIC or hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
                return
            count = int.from_bytes(body[:8], "little")
            keys_at = 8 + 32 * count
            names = bytes(body[keys_at + 32 * count :])
            if names.count(b"\0") + 1 != count:
                return
            self._stats = np.frombuffer(body[8:keys_at], "<i8").reshape(count, 4)
            self._keys = np.frombuffer(body[keys_at : keys_at + 32 * count], np.uint8).reshape(count, 32)
            self._names = names


def _parts(names: Sequence[str], others: list[bytes]) -> Iterator[bytes]:
    """The paths with a NUL between each two, some thousand at a time: a million are not copied at once."""
    between = b""
    for start in range(0, len(names), AT_ONCE):
        yield between + _joined(names[start : start + AT_ONCE])
        between = b"\0"
    if others:
        yield between + b"\0".join(others)


def _joined(ids: Sequence[str]) -> bytes:
    return "\0".join(ids).encode("utf-8", "surrogatepass")
