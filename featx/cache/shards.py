"""Owns one shard: how keys and rows become an immutable hashed HDF5 file, and when one is believed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache.hdf5 import headers, plan
from featx.cache.index import KEY_BYTES
from featx.errors import DamageError, NewerError, StoreError
from featx.features import FeatureSpec
from featx.files import stat_row, write_chunks

KIND = "featx features 1"
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.h5")
# Rows are hashed in blocks of about this size too, so that one flipped byte costs one block, not the shard.
BLOCK_BYTES = 1 << 20


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
    """Its `stat_row` when its bytes were checked."""
    count: int
    keys_at: int
    rows_at: int

    def open(self, folder: Path) -> FileIO:
        """The file, for reading. Raises `StaleError` where it is not the one that was checked."""
        file = open_regular(folder / self.name)
        if stat_row(os.fstat(file.fileno())) != self.stat:
            file.close()
            raise StaleError(f"{self.name} changed since it was checked")
        return file


@dataclass(frozen=True)
class Inside:
    """Rows, the offsets of the three arrays, and rows per digest."""

    count: int
    keys_at: int
    rows_at: int
    digests_at: int
    block: int


class StaleError(Exception):
    """The folder is not what it was when it was listed: list it again."""


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
    return Shard(path.name, stat_row(os.lstat(path)), len(keys), offsets["keys"], offsets["rows"])


def held(rows: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """A copy of rows as `dtype`, or a `StoreError` where float16 cannot hold them to 1 part in 1,000."""
    with np.errstate(over="ignore", under="ignore"):
        held = np.array(rows, dtype, order="C")
    if dtype.itemsize < rows.dtype.itemsize and held.size:
        exact = np.asarray(rows, np.float64).reshape(len(rows), -1)
        finite = np.isfinite(exact)  # NaN and infinity are held as they are
        error = np.where(finite, held.reshape(len(rows), -1), 0) - np.where(finite, exact, 0)
        size = np.linalg.norm(np.where(finite, exact, 0), axis=1)
        bad = np.linalg.norm(error, axis=1) > 1e-3 * size
        if dtype.itemsize == 2 and bad.any():
            raise StoreError(
                f"float16 cannot hold {int(bad.sum())} of {len(rows)} rows (largest value "
                f"{np.abs(exact[bad]).max():.4g}; float16 holds 65504 and loses small ones); store float32"
            )
    return held


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
        before = stat_row(os.fstat(file.fileno()))
        try:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            if error.errno == errno.EIO:
                raise DamageError(f"the disk cannot read it ({error.strerror})") from None
            raise
        if found != name[17:81]:
            raise DamageError(f"its SHA-256 is {found[:12]}..., not the {name[17:29]}... it was committed with")
        inside, form = inspect(file, form)
        if stat_row(os.fstat(file.fileno())) != before:
            raise StaleError(f"{name} changed while it was read")
    return Shard(name, before, inside.count, inside.keys_at, inside.rows_at), form


def inspect(file: FileIO, form: Form | None) -> tuple[Inside, Form]:
    """What the headers of a shard say, and that they fit together and with `form`. Raises `DamageError`."""
    texts, (keys, rows, digests) = headers(file, ("kind", "spec", "engine", "block"), ("keys", "rows", "digests"))
    if form is None:
        form = _form_of(texts, rows.shape[1:])
    for name, expected in form.attributes().items():
        if texts[name] != expected:
            found = texts[name][:300].decode("ascii", "replace")
            raise DamageError(f"its {name} is {found}, not {expected.decode()[:300]}")
    count = rows.shape[0] if rows.shape else 0
    block = int(texts["block"]) if re.fullmatch(rb"[0-9]{1,12}", texts["block"]) else 0
    if rows.dtype != form.dtype or rows.shape != (count, *form.row_shape):
        raise DamageError(f"its rows are {rows.dtype} {list(rows.shape)}, not {form.dtype} {list(form.row_shape)}")
    if count == 0 or block == 0 or block * form.row_bytes > max(form.row_bytes, 64 * BLOCK_BYTES):
        raise DamageError(f"it holds {count} rows in blocks of {block}")
    for name, array, n in (("keys", keys, count), ("digests", digests, -(-count // block))):
        if array.dtype != np.uint8 or array.shape != (n, KEY_BYTES):
            raise DamageError(f"its {name} are {array.dtype} {list(array.shape)}, not uint8 [{n}, {KEY_BYTES}]")
    return Inside(count, keys.offset, rows.offset, digests.offset, block), form


def _form_of(texts: dict[str, bytes], row_shape: tuple[int, ...]) -> Form:
    try:
        spec = FeatureSpec.from_dict(json.loads(texts["spec"]))
        engine = json.loads(texts["engine"])
    except NewerError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamageError(f"its spec cannot be read ({error})") from None
    if not isinstance(engine, str):
        raise DamageError("its engine is no text")
    return Form(spec, engine, row_shape)


def read_keys(folder: Path, shard: Shard) -> np.ndarray:
    """The keys of a shard, `uint8 [N, 32]`. Raises `StaleError`."""
    keys = np.empty((shard.count, KEY_BYTES), np.uint8)
    with shard.open(folder) as file:
        read_into(file, shard.keys_at, keys.data.cast("B"))
    return keys


def intact_rows(folder: Path, name: str, form: Form) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of a damaged shard, keys `[n, 32]` and rows of every block that still has its SHA-256."""
    with contextlib.suppress(DamageError), open_regular(folder / name) as file:
        inside, _ = inspect(file, form)
        for number, start in enumerate(range(0, inside.count, inside.block)):
            n = min(inside.block, inside.count - start)
            keys = _read(file, inside.keys_at + start * KEY_BYTES, n * KEY_BYTES)
            rows = _read(file, inside.rows_at + start * form.row_bytes, n * form.row_bytes)
            digest = _read(file, inside.digests_at + number * KEY_BYTES, KEY_BYTES)
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
