"""A spec's folder: its `spec.json`, its shards, and which of them are valid."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from featx.cache.index import KEY_BYTES
from featx.errors import DamageError, NewerError
from featx.features import FeatureSpec
from featx.files import Stat, aside_name, make_folder, open_plain, stat_row, sync_folder
from featx.records import convert, unsealed, write_sealed
from featx.text import from_json

KIND = "featx features 1"
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.h5")
# Rows are hashed in blocks of about this size too, so that one flipped byte costs one block, not the shard.
BLOCK_BYTES = 1 << 20
# The most bytes of a `spec.json`, which anyone may have written.
FORM_BYTES = 1 << 24


class StaleError(Exception):
    """The folder has changed since it was listed: list it again."""


@dataclass(frozen=True)
class Form:
    """What all shards of one folder have in common."""

    spec: FeatureSpec
    engine: str
    """What computed the rows; rows of two engines differ in their last bits."""
    row_shape: tuple[int, ...]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype).newbyteorder("<")

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        shared = {"spec": self.spec.to_dict(), "engine": self.engine, "tolerance": self.spec.tolerance}
        return shared | {"row_shape": list(self.row_shape)}

    def attributes(self) -> dict[str, bytes]:
        """The attributes of every shard, ASCII."""
        return {"kind": KIND.encode(), "spec": self.spec.canonical, "engine": json.dumps(self.engine).encode()}


@dataclass(frozen=True)
class Shard:
    """A shard whose bytes were verified, and where its arrays are in the file."""

    name: str
    stat: Stat
    """As it was when its bytes were verified."""
    count: int
    keys_at: int
    rows_at: int

    def open(self, folder: Path) -> FileIO:
        """The file, for reading. Raises `StaleError` where it is not the one that was verified."""
        file = open_regular(folder / self.name)
        if stat_row(os.fstat(file.fileno())) != self.stat:
            file.close()
            raise StaleError(f"{self.name} changed since it was verified")
        return file

    def fill(self, target: np.ndarray, file: FileIO, first: int) -> None:
        """Fill an array with the rows from number `first` on. Raises `StaleError`."""
        read_into(file, self.rows_at + first * target[:1].nbytes, target.data.cast("B"))

    def map(self, folder: Path, form: Form) -> np.ndarray:
        """The rows, memory-mapped: `[N, *row_shape]`. Raises `StaleError`."""
        with self.open(folder) as file:
            rows = np.memmap(file, form.dtype, "r", self.rows_at, (self.count, *form.row_shape))
        rows.filename = str((folder / self.name).absolute())  # by which joblib hands maps to other processes
        return rows


@dataclass(frozen=True)
class Inside:
    """What the headers of a shard say."""

    shard: Shard
    form: Form
    digests_at: int
    block: int
    """Rows per digest."""


def create(folder: Path, form: Form) -> None:
    """Make a spec's folder with its `spec.json` in it, in one step; where one exists it stays as it is."""
    make_folder(folder.parent)
    aside = folder.parent / aside_name()
    try:
        aside.mkdir()
        write_form(aside / "spec.json", form)
        os.rename(aside, folder)  # fails where another writer's folder is
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError) or not folder.is_dir():
            raise
        if not (folder / "spec.json").exists():
            write_form(folder / "spec.json", form)


def read_form(path: Path, spec: FeatureSpec | None = None) -> Form:
    """What a `spec.json` says, which must be this `spec`'s if one is given.

    Raises `DamageError`, `NewerError`, `StaleError`, `OSError`.
    """
    values = _unsealed(path, FORM_BYTES)
    with parsing(f"{path} cannot be used"):
        if spec is None:
            spec = FeatureSpec.from_dict(values["spec"])
        elif json.dumps(values["spec"], sort_keys=True).encode() != spec.canonical:
            raise DamageError("it is another spec's")
        form = Form(spec, convert(values["engine"], str), convert(values["row_shape"], tuple[int, ...]))
    if values.get("kind") != KIND or min(form.row_shape, default=1) < 1:
        raise DamageError(f"{path} is of another kind ({values.get('kind')})")
    return form


def write_form(path: Path, form: Form) -> None:
    """Write a `spec.json`. Raises `OSError`."""
    write_sealed(path, {"kind": KIND, **form.to_dict()})


def list_shards(folder: Path) -> dict[str, Stat]:
    """Names and stats of the shards in a folder, in the order of their commits."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = stat_row(os.lstat(entry.path))
    return dict(sorted(found.items()))


def read_verified(folder: Path) -> dict[str, Shard]:
    """The shards whose bytes were verified before. Empty where that is not known: then they are verified again."""
    with contextlib.suppress(OSError, StaleError, KeyError, ValueError):
        values = _unsealed(folder / "verified.json")["shards"]
        rows = convert(values, dict[str, tuple[int, int, int, int, int, int, int]])
        return {name: Shard(name, v[:4], *v[4:]) for name, v in rows.items()}
    return {}


def write_verified(folder: Path, verified: dict[str, Shard]) -> None:
    values = {s.name: [*s.stat, s.count, s.keys_at, s.rows_at] for s in verified.values()}
    with contextlib.suppress(OSError):  # read-only or full: the next opening verifies the bytes again
        write_sealed(folder / "verified.json", {"shards": values})


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
            spec, engine = convert(from_json(texts["spec"]), dict[str, Any]), convert(from_json(texts["engine"]), str)
            form = Form(FeatureSpec.from_dict(spec), engine, rows.shape[1:])
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


def read_keys(folder: Path, shards: list[Shard]) -> np.ndarray:
    """The keys of all rows of these shards, one after the other, `uint8 [N, 32]`. Raises `StaleError`."""
    keys, start = np.empty((sum(shard.count for shard in shards), KEY_BYTES), np.uint8), 0
    for shard in shards:
        with shard.open(folder) as file:
            read_into(file, shard.keys_at, keys[start : start + shard.count].data.cast("B"))
        start += shard.count
    return keys


def open_regular(path: Path) -> FileIO:
    """Open a plain file: no link, no device, no pipe. Raises `DamageError`, `StaleError`."""
    try:
        return open_plain(path, follow=False)
    except FileNotFoundError:
        raise StaleError(f"{path.name} is missing") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EIO, errno.EINVAL):
            raise DamageError(f"it is not a plain file that can be read ({error.strerror})") from None
        raise


def read_into(file: FileIO, at: int, target: memoryview) -> None:
    """Fill `target` with the bytes from offset `at`. Raises `StaleError` where the file ends before."""
    file.seek(at)
    while target:
        got = file.readinto(target[: 1 << 30])
        if not got:
            raise StaleError("a shard ends early")
        target = target[got:]


@contextlib.contextmanager
def parsing(trouble: str) -> Iterator[None]:
    """Raise `DamageError` for whatever parsing raises, but let `NewerError` through."""
    try:
        yield
    except NewerError:
        raise
    except (ValueError, KeyError) as error:
        raise DamageError(f"{trouble}: {error}") from None


def _unsealed(path: Path, most: int | None = None) -> dict[str, Any]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise DamageError(f"{path} has {size:,} bytes, and a record of its kind at most {most:,}")
        data = file.readall()
    with parsing(str(path)):
        return unsealed(data or b"")


def _read(file: FileIO, at: int, size: int) -> bytes:
    target = bytearray(size)
    read_into(file, at, memoryview(target))
    return bytes(target)
