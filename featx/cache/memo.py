"""The stat memo: which content key a file had when it was last read, so that it is not read again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from featx.errors import StoreError
from featx.files import CLOCK_NS, READ_ONLY, make_folder, open_plain, sweep, write_chunks
from featx.sources.columns import Texts

MAGIC, OLD_MAGIC = b"featx memo 2\n\0\0\0", b"featx memo 1\n"
# One file: a hash of its path; size, mtime_ns, ctime_ns, inode; the SHA-256 of its bytes.
ENTRY = np.dtype([("path", "<u8"), ("stat", "<i8", 4), ("key", "V32")])
SEGMENT = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
# Entries that are read, and paths that are hashed, at a time; entries that are written at a time.
AT_ONCE, MOST = 1 << 14, 1 << 18
# Segments that are merged at a time; each takes an open file.
AT_A_TIME = 64
# How often the folder is listed again while other processes merge its segments.
MOST_LISTINGS = 100


class KeyMemo:
    """Keys of the files under one root, by path, size, mtime, ctime and inode.

    A folder, `cache/memo/<hash of the root>.2`, of segments: files that are never changed, so any number of processes
    may record at once. Small ones are merged, and removed once the merged one is durable. The folder can be deleted at
    any time: files are then read again. A damaged segment counts as deleted.
    """

    def __init__(self, cache: Path, root: Path) -> None:
        name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:32]
        self.folder = Path(cache) / "memo" / f"{name}.2"
        self._older = self.folder.with_suffix("")
        """The one file of an older featx: read as the oldest segment, and merged by the first `record`."""
        # files are read, and their keys recorded, after this moment
        self._opened = time.time_ns()
        self._unread: dict[Path, Exception] = {}
        """Segments that could not be read, and why."""
        self._asked: tuple[Sequence[str], np.ndarray] | None = None
        self._known = np.zeros(0, bool)
        self._found = np.zeros(0, np.uint64)
        """Which of the files last asked for are in the memo, and the first 8 bytes of their keys."""

    def lookup(self, ids: Sequence[str], stats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keys `uint8 [N, 32]` of files, and which of them are known, `bool [N]`; the others' are zeros.

        ids: paths under the root, with `/`; stats: `int64 [N, 4]`, size, mtime_ns, ctime_ns, inode.
        """
        keys, known = np.zeros((len(ids), 32), np.uint8), np.zeros(len(ids), bool)
        paths = _hashes(ids)
        left = np.argsort(paths)
        done: set[Path] = set()
        for _ in range(MOST_LISTINGS):
            segments = self._segments()
            for segment in [each for each in reversed(segments) if each not in done]:
                with contextlib.suppress(FileNotFoundError):  # merged meanwhile
                    known[self._search(segment, paths[left], left, stats, keys)] = True
                    left = left[~known[left]]  # the newest entry counts
                    done.add(segment)
            if done.issuperset(segments):
                break
        self._asked, self._known = (ids, stats), known.copy()
        self._found = np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
        return keys, known

    def expect_none(self, ids: Sequence[str], stats: np.ndarray) -> None:
        """In place of `lookup`, for files that the memo is known to lack: `record` will not read it, either."""
        self._asked, self._known = (ids, stats), np.zeros(len(ids), bool)
        self._found = np.zeros(len(ids), np.uint64)

    def record(self, ids: Sequence[str], stats: np.ndarray, keys: np.ndarray, known: np.ndarray) -> None:
        """Remember `keys` (`uint8 [N, 32]`) where `known` (`bool [N]`); stats are those listed before reading.

        Only what the memo lacks is written. Files changed within 2 s before this memo was opened, or after, are left
        out: they could have changed again unseen. On a read-only cache nothing is remembered. Raises `StoreError` on
        a full disk.
        """
        if self._asked is None or self._asked[0] is not ids or self._asked[1] is not stats:
            self.lookup(ids, stats)
        changed = stats[:, 2] if os.name != "nt" else stats[:, 1:3].max(axis=1)  # on Windows, ctime is creation
        found = np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
        new = known & (changed < self._opened - CLOCK_NS) & ~(self._known & (self._found == found))
        numbers = np.flatnonzero(new)
        if not len(numbers) and not self._older.is_file():
            return

        try:
            make_folder(self.folder)
            sweep(self.folder)
            for path, trouble in self._unread.items():
                if isinstance(trouble, ValueError):
                    path.unlink(missing_ok=True)
            for part in np.array_split(numbers, -(-len(numbers) // MOST) or 1):  # of one length, so they are merged
                entries = _entries(_hashes(Texts.of(ids).take(part)), stats, keys, part)
                _write(self.folder, f"{time.time_ns():016x}", [entries])
            self._merge()
        except OSError as error:
            if error.errno not in READ_ONLY:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                what = "make room and run the same command again" if full else "give another --cache"
                raise StoreError(f"cannot write {self.folder} ({error.strerror}): {what}") from error
        self._known[numbers], self._found[numbers] = True, found[numbers]

    def _segments(self) -> list[Path]:
        """The memo's files, oldest first."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = sorted(name for name in os.listdir(self.folder) if SEGMENT.fullmatch(name))
        return [self._older] * self._older.is_file() + [self.folder / name for name in names]

    def _search(
        self, segment: Path, asked: np.ndarray, numbers: np.ndarray, stats: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """The files, `int64 [M]`, of which a segment has path and stat; their `keys` are filled in.

        asked: hashes of paths, ascending, and `numbers` of the files that have them. Raises `FileNotFoundError`.
        """
        found, whole = [numbers[:0]], keys.view("V32")[:, 0]
        try:
            for block in _blocks(segment):
                which, at = _pairs(asked, block["path"].copy())
                files = numbers[which]
                entries = block if np.array_equal(at, np.arange(len(block))) else block[at]
                equal = (entries["stat"] == stats.take(files, axis=0)).view(np.uint32)[:, 0] == 0x0101_0101  # all four
                found.append(files[equal])
                whole[files[equal]] = entries["key"][equal]
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            self._unread[segment] = error
            keys[np.concatenate(found)] = 0
            return numbers[:0]
        return np.concatenate(found)

    def _merge(self) -> None:
        """Make one of the newest segments, from the newest on while the next is less than 4 times as long as these."""
        merging: list[Path] = []
        size, every = 0, self._older.is_file()
        try:
            for segment in [each for each in reversed(self._segments()) if each not in self._unread]:
                length = segment.stat().st_size
                if len(merging) == AT_A_TIME or (not every and length >= 4 * size > 0):
                    break
                merging.append(segment)
                size += length
            if len(merging) > 1 or self._older in merging:
                newest = f"{0:016x}" if merging == [self._older] else merging[0].name[:16]
                _write(self.folder, newest, _merged(merging[::-1]), of=merging)
                for segment in merging:
                    segment.unlink(missing_ok=True)
        except (OSError, ValueError):
            return  # another process merges them; or one cannot be read: all is recorded, in more segments than need be


def _pairs(asked: np.ndarray, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All `i` and `j`, `int64 [M]` each, with `asked[i] == paths[j]`; both ascend, and only `asked` has repeats."""
    first, last = np.searchsorted(asked, paths), np.searchsorted(asked, paths, "right")
    count = last - first
    at = np.repeat(np.arange(len(paths)), count)
    return np.arange(len(at)) + np.repeat(first - (np.cumsum(count) - count), count), at


def _write(folder: Path, stamp: str, parts: Iterable[np.ndarray], of: Sequence[Path] = ()) -> None:
    """Write a segment of entries, which ascend by the hash of their paths. of: the segments that it merges.

    Raises `OSError`, also where one of these has gone: another process has merged it, and one copy is enough.
    """

    def name() -> str:
        for segment in of:
            segment.stat()
        return f"{stamp}-{secrets.token_hex(8)}"

    def sealed() -> Iterator[bytes | memoryview]:
        digest = hashlib.sha256(MAGIC)
        yield MAGIC
        for part in parts:
            data = part.view(np.uint8).data
            digest.update(data)
            yield data
        yield digest.digest()

    write_chunks(folder, sealed(), name)


def _blocks(segment: Path) -> Iterator[np.ndarray]:
    """The entries of a segment, some thousand at a time; none of them holds where the end raises `ValueError`."""
    with open_plain(segment) as file:
        size = os.fstat(file.fileno()).st_size - len(MAGIC) - 32
        start = file.read(len(MAGIC))
        if start.startswith(OLD_MAGIC):
            yield from _old_entries(start + file.readall())
            return
        digest, count = hashlib.sha256(start), size // ENTRY.itemsize
        if start != MAGIC or size != count * ENTRY.itemsize:
            raise ValueError("not a segment, or cut short")
        for first in range(0, count, AT_ONCE):
            data = file.read(min(AT_ONCE, count - first) * ENTRY.itemsize)
            digest.update(data)
            block = np.frombuffer(data, ENTRY)
            if (block["path"][1:] <= block["path"][:-1]).any():
                raise ValueError("its entries are not in order")
            yield block
        if file.read(33) != digest.digest():
            raise ValueError("it does not have the SHA-256 that it was written with")


def _old_entries(data: bytes) -> list[np.ndarray]:
    """The entries of the one file that a memo was before it had segments."""
    start = len(OLD_MAGIC) + 32
    body = memoryview(data)[start:]
    if hashlib.sha256(body).digest() != data[len(OLD_MAGIC) : start]:
        raise ValueError("it does not have the SHA-256 that it was written with")
    count = int.from_bytes(body[:8], "little")
    names = bytes(body[8 + 64 * count :]).split(b"\0")
    stats = np.frombuffer(body[8 : 8 + 32 * count], "<i8").reshape(count, 4)
    keys = np.frombuffer(body[8 + 32 * count : 8 + 64 * count], np.uint8).reshape(count, 32)
    return [_entries(_hashes([name.decode("utf-8", "surrogatepass") for name in names]), stats, keys, np.arange(count))]


def _entries(paths: np.ndarray, stats: np.ndarray, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The entries of these files, with the hashes `paths` of theirs; made in order, since copies would be the peak of
    memory of a long run."""
    order = np.argsort(paths, kind="stable")
    entries = np.empty(len(paths), ENTRY)
    entries["path"] = paths[order]
    entries["stat"] = stats[numbers[order]]
    entries["key"] = np.ascontiguousarray(keys).view("V32")[numbers[order], 0]
    return _last(entries)


def _newest(entries: np.ndarray) -> np.ndarray:
    """Entries by the hash of their paths; the last one of each path."""
    return _last(entries[np.argsort(entries["path"], kind="stable")])


def _last(ordered: np.ndarray) -> np.ndarray:
    last = np.ones(len(ordered), bool)
    last[:-1] = ordered["path"][1:] != ordered["path"][:-1]
    return ordered if last.all() else ordered[last]


def _merged(segments: list[Path]) -> Iterator[np.ndarray]:
    """The entries of several segments, the oldest first, in one order; of those with one path the newest."""
    streams = [_blocks(segment) for segment in segments]
    blocks = [next(stream, None) for stream in streams]
    while held := [block for block in blocks if block is not None]:
        last = min(block["path"][-1] for block in held)  # up to here, all that there is has been read
        cuts = [0 if block is None else int(np.searchsorted(block["path"], last, "right")) for block in blocks]
        yield _newest(np.concatenate([b[:cut] for b, cut in zip(blocks, cuts, strict=True) if b is not None]))
        for i, (stream, block, cut) in enumerate(zip(streams, blocks, cuts, strict=True)):
            blocks[i] = block[cut:] if block is not None and cut < len(block) else next(stream, None)


# The first bytes of a word of eight, by how many belong to the path.
_WITHIN = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """A hash of each path, `uint64 [N]`, the same in every process. A file is only known by its stat besides."""
    hashes = np.zeros(len(ids), np.uint64)
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE]
        data = "\0".join(part).encode("utf-8", "surrogatepass") + bytes(8)
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)[: len(part)]
        at = np.append(0, ends[:-1] + 1)
        left, found = ends - at, hashes[start : start + AT_ONCE]
        words = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))  # eight bytes from each byte on
        for _ in range((int(left.min()) - 1) // 8):  # as long as all have eight
            found[:] = _mixed(found ^ words[at])
            at, left = at + 8, left - 8
        rows = np.arange(len(part))
        while len(rows):
            found[rows] = _mixed(found[rows] ^ words[at] & _WITHIN[np.minimum(left, 8)])
            rows, at, left = (each[left > 8] for each in (rows, at + 8, left - 8))
    return hashes ^ hashes >> np.uint64(29)


def _mixed(words: np.ndarray) -> np.ndarray:
    words = words * np.uint64(0x9E37_79B9_7F4A_7C15)
    words ^= words >> np.uint64(32)
    words *= np.uint64(0xBF58_476D_1CE4_E5B9)
    return words
