"""Takes in rows, and writes keys and rows as one shard, an immutable, hashed HDF5 file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from featx.cache import shards
from featx.cache.index import KEY_BYTES, as_keys, distinct
from featx.cache.shards import BLOCK_BYTES, Form, Shard, StaleError
from featx.errors import DamageError, NewerError, StoreError
from featx.features import FeatureSpec
from featx.files import READ_ONLY, stat_row, sweep, write_chunks

# A killed run loses at most so many bytes of rows, or so many seconds of work.
SHARD_BYTES = 16 << 20
SHARD_SECONDS = 20.0
# How often a folder is listed again while other processes change it.
MAX_LISTINGS = 20
CHANGING = "{} changes faster than it can be read; try again"


class Writer(ABC):
    """Takes in rows of one `FeatureSpec`, at `cache/features/<name>-<digest>/`, and knows which are there.

    Any number of processes, on any number of machines, may write to one folder at once: nothing that
    is there is ever changed, so there are no locks. A kill at any moment leaves every committed shard whole.

    cache: the cache's folder. engine: what computes the rows that will be appended; the first writer's
    is recorded. Opening reads, and creates nothing before the first `append`. shard_bytes, shard_seconds:
    commit when so many bytes of rows are buffered, or when the first of them has waited so long.
    Raises `StoreError` where the folder's rows came from another engine.
    """

    def __init__(
        self,
        cache: Path,
        spec: FeatureSpec,
        *,
        engine: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.spec = spec
        self.folder = Path(cache) / "features" / spec.folder_name
        self.notes: list[str] = []
        """Sentences about what was found damaged or left behind, for the user."""
        self._asked = engine
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
        self._buffered, self._since = 0, 0.0
        self._swept = False
        self._refreshing = threading.Lock()
        self.form: Form | None = None
        """What all rows have in common; None before the first append."""
        self._forget()
        self.refresh()
        self._check_engine()

    @property
    def engine(self) -> str | None:
        """What computed the rows, as the folder records it; None before the first append."""
        return self.form.engine if self.form else None

    def computed_by(self, engine: str) -> None:
        """Name the engine of the rows to come. Raises `StoreError` where the stored rows are another engine's."""
        self._asked = engine
        self._check_engine()

    @property
    @abstractmethod
    def empty(self) -> bool:
        """Whether no row is committed."""

    @abstractmethod
    def contains(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: which of the keys, `uint8 [N, 32]`, have a committed row."""

    @abstractmethod
    def confirm(self, keys: np.ndarray) -> np.ndarray:
        """`contains`, `bool [N]`, exactly."""

    @abstractmethod
    def _forget(self) -> None:
        """Know of no shard."""

    @abstractmethod
    def _relist(self, form: Form | None, trust: bool) -> None:
        """Find out which shards are there. Raises `StaleError`, `OSError`."""

    @abstractmethod
    def _has(self, keys: np.ndarray) -> np.ndarray:
        """`bool [N]`: which of the keys need not be stored."""

    @abstractmethod
    def _took(self, shard: Shard, keys: np.ndarray) -> None:
        """Know of a shard that this writer has committed."""

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Take in keys `uint8 [B, 32]` and rows `[B, *row_shape]`; they are safe once `commit` returns.

        Commits by itself once the buffer is full or old. Rows under keys that are there are dropped.
        Raises `StoreError` for another row shape, another engine, rows that float16 cannot hold, and a
        folder that cannot be written; the rows then stay buffered.
        """
        keys, rows = as_keys(keys), np.asarray(rows)
        if len(keys) != len(rows) or rows.dtype.kind != "f":
            raise StoreError(f"expected {len(keys)} rows of floats, got {rows.dtype} {list(rows.shape)}")
        if len(keys) == 0:
            return
        if rows[0].size == 0:
            raise StoreError(f"rows of shape {list(rows.shape[1:])} hold nothing")
        form = self._claim(rows.shape[1:])
        if not self._buffer:
            self._since = time.monotonic()
        self._buffer.append((keys.copy(), cast(rows, form.dtype)))
        self._buffered += rows.size * form.dtype.itemsize
        if self._buffered >= self._shard_bytes or time.monotonic() - self._since >= self._shard_seconds:
            self.commit()

    def commit(self) -> None:
        """Write what is buffered as one shard, durably. Raises `StoreError`; the rows then stay buffered."""
        if not self._buffer:
            return
        keys = np.concatenate([k for k, _ in self._buffer])
        first = distinct(keys)
        first = first[~self._has(keys[first])]
        if len(first):
            rows = [r for _, r in self._buffer]
            form = self._claim(rows[0].shape[1:])  # made again, where it was removed since the last commit failed
            if len(first) < len(keys):
                keys, rows = keys[first], [np.concatenate(rows)[first]]
            with self._writing():
                self._took(write(self.folder, form, keys, rows), keys)
        # an interrupt before this line leaves the rows in the buffer, and `_has` drops them next time
        self._buffer.clear()
        self._buffered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.commit()  # also when interrupted: what was computed is kept
        except (KeyboardInterrupt, StoreError):
            self.commit()  # once more: the folder may have been removed, and is made again
            raise

    def _claim(self, row_shape: tuple[int, ...]) -> Form:
        """Make the folder, or join it; the first of several writers names the engine and the row shape."""
        if self.form is None:
            with self._writing():
                shards.create(self.folder, Form(self.spec, self._asked or "unnamed", tuple(row_shape)))
                self.refresh()  # another writer may have been first
                if self.form is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._check_engine()
        if tuple(row_shape) != self.form.row_shape:
            raise StoreError(
                f"rows of shape {list(row_shape)} do not belong to {self.folder.name}, whose rows have shape "
                f"{list(self.form.row_shape)}; remove it (featx cache remove) if the backbone was changed by hand"
            )
        if not self._swept:
            with self._writing():
                # fail before a batch is computed for nothing
                if not os.access(self.folder.resolve(strict=True), os.W_OK):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                sweep(self.folder)
                sweep(self.folder.parent)
            self._swept = True
        return self.form

    def _check_engine(self) -> None:
        if self.form and self._asked and self._asked != self.form.engine:
            raise StoreError(
                f"the features in {self.folder} come from the engine {self.form.engine!r}, not "
                f"{self._asked!r}, and two engines differ in the last bits of a row; use that engine, another "
                "--cache, or remove these features first (featx cache remove)"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = "all that was committed before is kept; make room and run the same command again"
            if error.errno in READ_ONLY:
                what = "it is read-only; give --cache a folder you can write to"
            elif error.errno == errno.ENOENT:
                what = "it was removed meanwhile; run the same command again"
                self.refresh()  # its rows are gone; what is buffered is committed to a new folder
            raise StoreError(f"cannot write to the cache {self.folder} ({error.strerror}): {what}") from error

    def refresh(self, *, trust: bool = True) -> None:
        """List the folder again, and find other processes' shards.

        trust: believe the shards whose size, mtime, ctime and inode are as when their bytes were last
        verified; else read every byte.
        """
        with self._refreshing:
            for _ in range(MAX_LISTINGS):
                try:
                    form = self._read_form() if self.folder.is_dir() else None
                    self._relist(form, trust)
                    self.form = form
                    return
                except (StaleError, FileNotFoundError):
                    continue  # a shard went between listing and reading: another process compacts or removes
                except OSError as error:
                    raise StoreError(f"the cache {self.folder} cannot be read ({error.strerror})") from error
        raise StoreError(CHANGING.format(self.folder))

    def _read_form(self) -> Form | None:
        """What `spec.json` says; where it is lost or damaged, what a valid shard says, written again."""
        path = self.folder / "spec.json"
        try:
            return shards.read_form(path, self.spec)
        except (DamageError, StaleError) as error:
            reason, there = str(error), not isinstance(error, StaleError)

        for name in shards.list_shards(self.folder):
            with contextlib.suppress(DamageError, NewerError, StaleError):
                form = shards.check(self.folder, name, None).form
                if form.spec == self.spec:
                    with contextlib.suppress(OSError):  # read-only: the shard is asked again next time
                        shards.write_form(path, form)
                    self._note(f"{path} was lost ({reason}) and is written again from a shard")
                    return form
        if there:
            with contextlib.suppress(OSError):  # no row depends on it; the next writer makes a new one
                os.unlink(path)
        return None

    def _note(self, note: str) -> None:
        if note not in self.notes:  # a read-only cache says the same at every listing
            self.notes.append(note)


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
