"""One shard: how keys and rows become an immutable, hashed HDF5 file, and when such a file is valid."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache.folders import Form, Shard, StaleError, open_regular, parsing, read_into
from featx.cache.index import KEY_BYTES
from featx.errors import DamageError, StoreError
from featx.features import FeatureSpec
from featx.files import stat_row, write_chunks

# Rows are hashed in blocks of about this size too, so that one flipped byte costs one block, not the shard.
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Inside:
    """What the headers of a shard say."""

    shard: Shard
    form: Form
    digests_at: int
    block: int
    """Rows per digest."""


def write(
    folder: Path, form: Form, keys: np.ndarray, rows: Iterable[np.ndarray], block_bytes: int = BLOCK_BYTES
) -> Shard:
    """Commit one shard and return it; it is durable when this returns.

    keys: `uint8 [N, 32]`, N > 0; rows: arrays `[n, *row_shape]` of the stored dtype, N rows in all.
    The name is the time, so that names sort in the order of commits, and the SHA-256 of the file's bytes.
    Raises `OSError`: nothing is left behind.
    """
    from featx.cache.hdf5 import plan

    keys, block = np.ascontiguousarray(keys), max(1, block_bytes // form.row_bytes)
    digests: list[bytes] = []
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...], Iterable[Any]]] = {
        "keys": (keys.dtype, keys.shape, [keys]),
        "rows": (form.dtype, (len(keys), *form.row_shape), _digested(form, keys, rows, block, digests)),
        "digests": (keys.dtype, (-(-len(keys) // block), KEY_BYTES), digests),
    }
    chunks, offsets = plan(arrays, form.attributes() | {"block": str(block).encode()})
    whole = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            whole.update(chunk)
            yield chunk

    path = write_chunks(folder, hashed(), lambda: f"{time.time_ns():016x}-{whole.hexdigest()}.h5")
    return Shard(path.name, stat_row(os.lstat(path)), len(keys), offsets["keys"], offsets["rows"])


def _digested(
    form: Form, keys: np.ndarray, rows: Iterable[np.ndarray], block: int, digests: list[bytes]
) -> Iterator[np.ndarray]:
    """Pass the rows through, and append the SHA-256 of every block of rows and their keys to `digests`."""
    done, digest = 0, hashlib.sha256()
    for part in rows:
        assert part.dtype == form.dtype and part.shape[1:] == form.row_shape
        part = np.ascontiguousarray(part)
        yield part
        while len(part):
            piece = part[: block - done % block]
            digest.update(piece.data)
            part, done = part[len(piece) :], done + len(piece)
            if done % block == 0 or done == len(keys):
                digest.update(keys[(done - 1) // block * block : done].data)
                digests.append(digest.digest())
                digest = hashlib.sha256()


def cast(rows: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """A copy of rows as `dtype`, or a `StoreError` where float16 cannot hold them to 1 part in 1,000."""
    with np.errstate(over="ignore", under="ignore"):
        cast = np.array(rows, dtype, order="C")
    if dtype.itemsize == 2 and rows.dtype.itemsize > 2:
        finite = np.isfinite(rows)  # NaN and infinity are stored as they are
        exact, stored = (np.where(finite, x, 0).reshape(len(rows), -1).astype(np.float64) for x in (rows, cast))
        bad = np.linalg.norm(stored - exact, axis=1) > 1e-3 * np.linalg.norm(exact, axis=1)
        if bad.any():
            raise StoreError(
                f"float16 cannot hold {int(bad.sum())} of {len(rows)} rows (largest value "
                f"{np.abs(exact[bad]).max():.4g}; float16 holds 65504 and loses small ones); store float32"
            )
    return cast


def check(folder: Path, name: str, form: Form | None) -> Inside:
    """Read every byte of a shard, and say what is in it if it is valid; else raise `DamageError` with the reason.

    Its bytes must have the SHA-256 in its name, and `inspect` must accept its headers.
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
        inside = inspect(file, name, form)
    if inside.shard.stat != before:
        raise StaleError(f"{name} changed while it was read")
    return inside


def inspect(file: FileIO, name: str, form: Form | None) -> Inside:
    """What the headers of a shard say. They must fit together, and `form` if given. Raises `DamageError`."""
    from featx.cache.hdf5 import headers

    texts, (keys, rows, digests) = headers(file, ("kind", "spec", "engine", "block"), ("keys", "rows", "digests"))
    if form is None:
        with parsing("its spec cannot be read"):
            spec, engine = json.loads(texts["spec"]), json.loads(texts["engine"])
            form = Form(FeatureSpec.from_dict(spec), str(engine), rows.shape[1:])
    for text, expected in form.attributes().items():
        if texts[text] != expected:
            found = texts[text][:300].decode("ascii", "replace")
            raise DamageError(f"its {text} is {found}, not {expected.decode()[:300]}")

    count = rows.shape[0] if rows.shape else 0
    block = int(texts["block"]) if re.fullmatch(rb"[0-9]{1,12}", texts["block"]) else 0
    if count == 0 or not 0 < block * form.row_bytes <= max(form.row_bytes, 64 * BLOCK_BYTES):
        raise DamageError(f"it holds {count} rows in blocks of {block}")

    u1 = np.dtype(np.uint8)
    for what, array, dtype, shape in (
        ("keys", keys, u1, (count, KEY_BYTES)),
        ("rows", rows, form.dtype, (count, *form.row_shape)),
        ("digests", digests, u1, (-(-count // block), KEY_BYTES)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise DamageError(f"its {what} are {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}")
    shard = Shard(name, stat_row(os.fstat(file.fileno())), count, keys.offset, rows.offset)
    return Inside(shard, form, digests.offset, block)


def intact_rows(folder: Path, name: str, form: Form) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys `[n, 32]` and rows of every block of a damaged shard that still has its SHA-256."""
    with contextlib.suppress(DamageError), open_regular(folder / name) as file:
        inside = inspect(file, name, form)
        shard, block = inside.shard, inside.block
        for number, start in enumerate(range(0, shard.count, block)):
            n = min(block, shard.count - start)
            keys = _read(file, shard.keys_at + start * KEY_BYTES, n * KEY_BYTES)
            rows = _read(file, shard.rows_at + start * form.row_bytes, n * form.row_bytes)
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
