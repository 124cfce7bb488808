"""Writes keys and rows as one shard, an immutable, hashed HDF5 file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache.index import KEY_BYTES
from featx.cache.shards import BLOCK_BYTES, Form, Shard
from featx.errors import StoreError
from featx.files import stat_row, write_chunks


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
