"""Owns one shard: how keys and rows become an immutable hashed HDF5 file, and when one is believed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import DamageError, FeatxError
from featx.features import FeatureSpec
from featx.files import write_chunks

KIND = "featx features 1"
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.h5")
KEY_BYTES = 32
# Rows are hashed in blocks of about this size too, so that one flipped byte costs one block, not the shard.
BLOCK_BYTES = 1 << 20
# One version of the file format for all, read by every HDF5 since 1.8; arrays start at a multiple of 512.
LAYOUT: dict[str, Any] = {
    "libver": ("v108", "v108"),
    "alignment_threshold": 1,
    "alignment_interval": 512,
    "track_times": False,
}


@dataclass(frozen=True)
class Form:
    """What all shards of one folder have in common."""

    spec: FeatureSpec
    engine: str
    """What computed the rows; rows of two engines differ in their last bits."""
    row_shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.row_shape:
            count *= size
        return count

    def attributes(self) -> dict[str, bytes]:
        """What every shard says of itself, ASCII."""
        spec = json.dumps(self.spec.to_dict(), sort_keys=True)
        return {"kind": KIND.encode(), "spec": spec.encode(), "engine": json.dumps(self.engine).encode()}


@dataclass(frozen=True)
class Shard:
    """A shard whose bytes were checked, and where its arrays lie in the file."""

    name: str
    stat: tuple[int, int, int, int]
    """Size, mtime and ctime in ns, inode, as they were when its bytes were checked."""
    count: int
    keys_at: int
    rows_at: int

    def open(self, folder: Path) -> FileIO:
        """The file, for reading. Raises `StaleError` where it is not the one that was checked."""
        file = open_regular(folder / self.name)
        if stat_of(os.fstat(file.fileno())) != self.stat:
            file.close()
            raise StaleError(f"{self.name} changed since it was checked")
        return file


class StaleError(Exception):
    """The folder is not what it was when it was listed: list it again."""


def stat_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Size, mtime and ctime in ns, inode: what must not have changed for bytes to be the same."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def open_regular(path: Path) -> FileIO:
    """Open a plain file: no link, no device, no pipe. Raises `DamageError`, `StaleError`."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise StaleError(f"{path.name} is gone") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EIO):
            raise DamageError(f"it is no plain file that can be read ({error.strerror})") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamageError("it is no plain file")
    return FileIO(handle)


def write(folder: Path, form: Form, keys: np.ndarray, rows: Iterable[np.ndarray]) -> Shard:
    """Commit one shard and return it; it is durable when this returns.

    keys: `uint8 [N, 32]`, N > 0; rows: arrays `[n, *row_shape]` of the stored dtype, N rows in all.
    The name is the time, so that names sort in the order of commits, and the SHA-256 of the file's bytes.
    Raises `OSError`: nothing is left behind.
    """
    block = _block_rows(form)
    digests = _Digests(form, keys, block)
    arrays = {
        "keys": (np.dtype(np.uint8), keys.shape, lambda: [np.ascontiguousarray(keys)]),
        "rows": (form.dtype, (len(keys), *form.row_shape), lambda: digests.watch(rows)),
        "digests": (np.dtype(np.uint8), (-(-len(keys) // block), KEY_BYTES), lambda: [digests.result()]),
    }
    attributes = {name: np.bytes_(value) for name, value in form.attributes().items()}
    attributes["block"] = np.bytes_(str(block))

    def fill(file: Any) -> None:
        for name, value in attributes.items():
            file.attrs[name] = value

    chunks, offsets = plan(arrays, fill)
    whole = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            whole.update(chunk)
            yield chunk

    path = write_chunks(folder, hashed(), lambda: f"{time.time_ns():016x}-{whole.hexdigest()}.h5")
    return Shard(path.name, stat_of(os.lstat(path)), len(keys), offsets["keys"], offsets["rows"])


def plan(
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...], Callable[[], Iterable[np.ndarray]]]],
    fill: Callable[[Any], None],
) -> tuple[Iterator[bytes | memoryview], dict[str, int]]:
    """An HDF5 file as a stream of bytes, first to last, and the offset of each array in it.

    HDF5 only lays the file out: `arrays` (name -> dtype, shape, parts) are left empty by it and filled in
    by us, and `fill` adds what is small. So nothing but `write` can fail on a full disk, which HDF5
    survives badly, no array has to fit into memory, and equal rows give equal bytes.
    """
    import h5py

    sketch = _Sketch()
    offsets = {}
    with h5py.File(sketch, "w", **LAYOUT) as file:
        for name, (dtype, shape, _) in arrays.items():
            create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            create.set_layout(h5py.h5d.CONTIGUOUS)
            create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            create.set_obj_track_times(False)
            space = h5py.h5s.create_simple(shape)
            made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, create)
            offsets[name] = made.get_offset()
        fill(file)
    pieces: list[tuple[int, int, Callable[[], Iterable[Any]]]] = []
    for at, data in sketch.pieces():
        pieces.append((at, len(data), lambda data=data: [data]))  # type: ignore[misc]
    for name, (dtype, shape, parts) in arrays.items():
        pieces.append((offsets[name], int(np.prod(shape, dtype=object)) * dtype.itemsize, parts))
    return _stream(sorted(pieces, key=lambda piece: piece[0]), sketch.size), offsets


def _stream(pieces: list[tuple[int, int, Callable[[], Iterable[Any]]]], size: int) -> Iterator[bytes | memoryview]:
    at = 0
    for start, length, parts in pieces:
        assert start >= at, "HDF5 laid two arrays over each other"
        yield bytes(start - at)
        at = start
        for part in parts():
            view = memoryview(part).cast("B")
            at += len(view)
            yield view
        assert at == start + length, "a shard got fewer or more rows than keys"
    yield bytes(size - at)


class _Sketch(io.RawIOBase):
    """A file that remembers the few bytes HDF5 writes and where, and nothing of what lies between."""

    def __init__(self) -> None:
        self.size = 0
        self._at = 0
        self._written: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        raise io.UnsupportedOperation("HDF5 reads nothing of a file that it only lays out")

    def write(self, data: Any) -> int:
        self._written.append((self._at, bytes(data)))
        self._at += len(self._written[-1][1])
        self.size = max(self.size, self._at)
        return len(self._written[-1][1])

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def pieces(self) -> list[tuple[int, bytes]]:
        """What was written, later over earlier, as pieces that do not touch."""
        merged: list[tuple[int, bytearray]] = []
        for at, data in sorted(self._written, key=lambda piece: piece[0]):
            if merged and at <= merged[-1][0] + len(merged[-1][1]):
                merged[-1][1].extend(bytes(max(0, at + len(data) - merged[-1][0] - len(merged[-1][1]))))
            else:
                merged.append((at, bytearray(len(data))))
        for at, data in self._written:
            start, piece = next(m for m in reversed(merged) if m[0] <= at)
            piece[at - start : at - start + len(data)] = data
        return [(at, bytes(data)) for at, data in merged]


class _Digests:
    """The SHA-256 of every block of keys and rows, taken while the rows pass by."""

    def __init__(self, form: Form, keys: np.ndarray, block: int) -> None:
        self._keys, self._block = np.ascontiguousarray(keys), block
        self._form = form
        self._done: list[bytes] = []
        self._hash = hashlib.sha256()
        self._row = 0

    def watch(self, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for part in parts:
            assert part.dtype == self._form.dtype and part.shape[1:] == self._form.row_shape
            part = np.ascontiguousarray(part)
            at = 0
            while at < len(part):
                step = min(len(part) - at, self._block - self._row % self._block)
                self._hash.update(part[at : at + step].data)
                at, self._row = at + step, self._row + step
                if self._row % self._block == 0:
                    self._close()
            yield part
        if self._row % self._block:
            self._close()

    def _close(self) -> None:
        start = (self._row - 1) // self._block * self._block
        self._hash.update(self._keys[start : self._row].data)
        self._done.append(self._hash.digest())
        self._hash = hashlib.sha256()

    def result(self) -> np.ndarray:
        return np.frombuffer(b"".join(self._done), np.uint8).reshape(-1, KEY_BYTES)


def _block_rows(form: Form) -> int:
    return max(1, BLOCK_BYTES // max(1, form.row_bytes))


def check(folder: Path, name: str, form: Form | None) -> tuple[Shard, Form]:
    """Read every byte of a shard and believe it, or raise `DamageError` with the reason.

    Its bytes must have the SHA-256 in its name, and it must be what `inspect` accepts.
    Raises `StaleError` where it is gone, `OSError` where it cannot be read today.
    """
    with open_regular(folder / name) as file:
        before = stat_of(os.fstat(file.fileno()))
        try:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            if error.errno == errno.EIO:
                raise DamageError(f"the disk cannot read it ({error.strerror})") from None
            raise
        if found != name[17:81]:
            raise DamageError(f"its SHA-256 is {found[:12]}..., not the {name[17:29]}... it was committed with")
        offsets, found_form = inspect(file, form)
        if stat_of(os.fstat(file.fileno())) != before:
            raise StaleError(f"{name} changed while it was read")
    count, keys_at, rows_at, _, _ = offsets
    return Shard(name, before, count, keys_at, rows_at), found_form


def inspect(file: FileIO, form: Form | None) -> tuple[tuple[int, int, int, int, int], Form]:
    """What the structure of a shard says: rows, offsets of keys, rows and digests, rows per block.

    HDF5 is asked for headers alone; data is only ever read at offsets inside this very file. So external
    storage, links and virtual data sets (which read other files of the host), filters (which run code)
    and shapes larger than the file (which take memory) are refused before they do anything.
    Raises `DamageError`, also where the shard is of another spec or engine than `form`.
    """
    import h5py

    size = os.fstat(file.fileno()).st_size
    try:
        with h5py.File(file, "r") as opened:
            texts = _attributes(opened)
            if form is None:
                form = _form_of(texts, _shape(opened, b"rows")[1:])
            _same(texts, form)
            rows_at, count = _array(opened, b"rows", form.dtype, form.row_shape, size)
            keys_at, keys = _array(opened, b"keys", np.dtype(np.uint8), (KEY_BYTES,), size)
            digests_at, blocks = _array(opened, b"digests", np.dtype(np.uint8), (KEY_BYTES,), size)
            if len(opened) != 3:
                raise DamageError("it holds more than keys, rows and digests")
    except DamageError:
        raise
    except Exception as error:  # HDF5 reports what it cannot parse as almost any of Python's errors
        raise DamageError(f"it is no HDF5 file that featx wrote ({type(error).__name__}: {error})") from None
    block = int(texts["block"]) if re.fullmatch(rb"[0-9]{1,12}", texts["block"]) else 0
    if block * form.row_bytes > max(form.row_bytes, 64 * BLOCK_BYTES):
        raise DamageError(f"it hashes its rows in blocks of {block}")
    if count == 0 or keys != count or block == 0 or blocks != -(-count // block):
        raise DamageError(f"it holds {count} rows, {keys} keys and {blocks} digests, which do not belong together")
    return (count, keys_at, rows_at, digests_at, block), form


def _attributes(opened: Any) -> dict[str, bytes]:
    import h5py

    names = ("kind", "spec", "engine", "block")
    if h5py.h5a.get_num_attrs(opened.id) != len(names):
        raise DamageError(f"it has other attributes than {', '.join(names)}")
    texts = {}
    for name in names:
        attribute = h5py.h5a.open(opened.id, name.encode())
        kind = attribute.get_type()
        if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str() or attribute.shape != ():
            raise DamageError(f"its attribute {name} is no fixed-length text")
        if kind.get_size() > 1 << 16:
            raise DamageError(f"its attribute {name} has {kind.get_size()} bytes")
        value = np.zeros((), f"S{kind.get_size()}")
        attribute.read(value)
        texts[name] = bytes(value)
    return texts


def _form_of(texts: dict[str, bytes], row_shape: tuple[int, ...]) -> Form:
    try:
        spec = FeatureSpec.from_dict(json.loads(texts["spec"]))
        engine = json.loads(texts["engine"])
    except (ValueError, TypeError, KeyError, RecursionError, FeatxError) as error:
        raise DamageError(f"its spec cannot be read ({error})") from None
    if not isinstance(engine, str):
        raise DamageError("its engine is no text")
    return Form(spec, engine, row_shape)


def _same(texts: dict[str, bytes], form: Form) -> None:
    for name, expected in form.attributes().items():
        if texts[name] != expected:
            found = texts[name][:300].decode("ascii", "replace")
            raise DamageError(f"its {name} is {found}, not {expected.decode()[:300]}")


def _shape(opened: Any, name: bytes) -> tuple[int, ...]:
    import h5py

    if opened.id.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise DamageError(f"{name.decode()} is a link to somewhere else")
    return tuple(h5py.h5d.open(opened.id, name).shape)


def _array(opened: Any, name: bytes, dtype: np.dtype[Any], row_shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """The offset and the number of rows of a plain array that lies inside the file."""
    import h5py

    shape = _shape(opened, name)
    data = h5py.h5d.open(opened.id, name)
    create = data.get_create_plist()
    if create.get_layout() != h5py.h5d.CONTIGUOUS or create.get_external_count() or create.get_nfilters():
        raise DamageError(f"{name.decode()} is not stored plainly in the file itself")
    if not data.get_type().equal(h5py.h5t.py_create(dtype)) or shape[1:] != row_shape or not shape:
        raise DamageError(f"{name.decode()} is {list(shape)}, not {dtype} [N, {', '.join(map(str, row_shape))}]")
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    offset = data.get_offset()
    if needed and (offset is None or offset + needed > size):
        raise DamageError(f"{name.decode()} claims {needed} bytes in a file of {size}")
    return offset or 0, shape[0]


def intact_rows(folder: Path, name: str, form: Form) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of a damaged shard, keys `[n, 32]` and rows of every block that still has its SHA-256."""
    with contextlib.suppress(DamageError), open_regular(folder / name) as file:
        (count, keys_at, rows_at, digests_at, block), _ = inspect(file, form)
        for number, start in enumerate(range(0, count, block)):
            n = min(block, count - start)
            keys = _read(file, keys_at + start * KEY_BYTES, n * KEY_BYTES)
            rows = _read(file, rows_at + start * form.row_bytes, n * form.row_bytes)
            digest = _read(file, digests_at + number * KEY_BYTES, KEY_BYTES)
            if hashlib.sha256(rows + keys).digest() == digest:
                yield (
                    np.frombuffer(keys, np.uint8).reshape(n, KEY_BYTES),
                    np.frombuffer(rows, form.dtype).reshape(n, *form.row_shape),
                )


def _read(file: FileIO, at: int, size: int) -> bytes:
    target = bytearray(size)
    read_into(file, at, memoryview(target))
    return bytes(target)


def read_into(file: FileIO, at: int, target: memoryview) -> None:
    """Fill `target` with the bytes from offset `at`. Raises `StaleError` where the file ends before."""
    file.seek(at)
    while target:
        got = file.readinto(target[: 1 << 30])
        if not got:
            raise StaleError("a shard ends early")
        target = target[got:]
