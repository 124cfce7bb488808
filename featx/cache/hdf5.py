"""HDF5 files written as a plain stream of bytes, and the headers of files that others wrote.

Only what writes or checks a file imports this: reading a warm cache needs no h5py.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featx.errors import DamageError

# One version of the file format for all, read by every HDF5 since 1.8; arrays start at a multiple of 512,
# each after the one made before it, and the same content gives the same bytes.
LAYOUT: dict[str, Any] = dict(libver=("v108", "v108"), alignment_threshold=1, alignment_interval=512, track_times=False)
# What an array may hold: keys and digests, features.
DTYPES = tuple(np.dtype(name) for name in ("u1", "<f4", "<f2"))
TEXT_BYTES = 1 << 16


def plan(
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...], Iterable[Any]]],
    attributes: dict[str, bytes],
    small: dict[str, np.ndarray] | None = None,
) -> tuple[Iterator[bytes | memoryview], dict[str, int]]:
    """An HDF5 file as a stream of bytes, first to last, and the offset of each array in it.

    HDF5 only lays the file out and writes `attributes` and the arrays in `small`. It leaves `arrays`
    (name -> dtype, shape, parts) empty, and we fill them in: the stream takes their parts in turn, as it
    reaches them. So only `write` can fail on a full disk, which HDF5 handles badly, no array has to fit into
    memory, and equal rows give equal bytes.
    """
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
            offsets[name] = made.get_offset() or 0  # None where it holds nothing
        for name, value in attributes.items():
            file.attrs[name] = np.bytes_(value)
        for name, data in (small or {}).items():
            file.create_dataset(name, data=data)

    pieces: list[tuple[int, int, Iterable[Any]]] = [(at, len(data), [data]) for at, data in sketch.pieces]
    for name, (dtype, shape, parts) in arrays.items():
        length = math.prod(shape) * dtype.itemsize
        pieces += [(offsets[name], length, parts)] if length else []
    return _stream(sorted(pieces, key=lambda piece: piece[0]), sketch.size), offsets


def _stream(pieces: list[tuple[int, int, Iterable[Any]]], size: int) -> Iterator[bytes | memoryview]:
    at = 0
    for start, length, parts in pieces:
        assert start >= at, "HDF5 laid two arrays over each other"
        yield bytes(start - at)
        at = start
        for part in parts:
            view = memoryview(part).cast("B")
            at += len(view)
            yield view
        assert at == start + length, "a shard got fewer or more rows than keys"
    yield bytes(size - at)


class _Sketch(io.RawIOBase):
    """A file that keeps the few bytes that HDF5 writes, with their offsets, and not the gaps between them."""

    def __init__(self) -> None:
        self.size = 0
        self.pieces: list[tuple[int, bytearray]] = []
        """Offset and content of what was written; no two of them touch."""
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def write(self, data: Any) -> int:
        start, stop = self._at, self._at + len(data)
        touched = [(at, old) for at, old in self.pieces if at <= stop and start <= at + len(old)]
        first = min([start, *(at for at, _ in touched)])
        piece = bytearray(max([stop, *(at + len(old) for at, old in touched)]) - first)
        for at, part in [*touched, (start, data)]:  # later over earlier
            piece[at - first : at - first + len(part)] = part
        self.pieces = [(first, piece), *(old for old in self.pieces if old not in touched)]
        self._at, self.size = stop, max(self.size, stop)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size


def attribute_names(path: Path) -> set[str]:
    """The attributes of an HDF5 file; none of any other file."""
    try:
        with h5py.File(path) as file:
            return set(file.attrs)
    except OSError:
        return set()


def utf8(texts: list[str]) -> np.ndarray:
    """Texts as an array of fixed-length UTF-8, which every reader of HDF5 knows."""
    data = [text.encode("utf-8", "surrogateescape") for text in texts]
    return np.array(data, h5py.string_dtype("utf-8", max(map(len, data), default=1) or 1))


@dataclass(frozen=True)
class Array:
    """A plain array that lies whole inside the file: `size` bytes at `offset`."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


def headers(file: FileIO, texts: tuple[str, ...], arrays: tuple[str, ...]) -> tuple[dict[str, bytes], list[Array]]:
    """The attributes `texts` and the arrays `arrays` of a file that holds nothing else.

    HDF5 is asked for headers alone; data is only ever read at offsets inside this very file. So external
    storage, links and virtual data sets (which read other files of the host), filters (which run code)
    and shapes larger than the file (which take memory) are refused before they do anything.
    Raises `DamageError`.
    """
    try:
        with h5py.File(file, "r") as opened:
            if h5py.h5a.get_num_attrs(opened.id) != len(texts) or len(opened) != len(arrays):
                raise DamageError(f"it holds other things than {', '.join((*texts, *arrays))}")
            size = os.fstat(file.fileno()).st_size
            found = {name: _text(opened, name) for name in texts}
            return found, [_array(opened, name, size) for name in arrays]
    except DamageError:
        raise
    except Exception as error:  # HDF5 reports what it cannot parse as almost any of Python's errors
        raise DamageError(f"it is not an HDF5 file that featx wrote ({type(error).__name__}: {error})") from None


def _text(opened: Any, name: str) -> bytes:
    attribute = h5py.h5a.open(opened.id, name.encode())
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or kind.is_variable_str() or attribute.shape != ():
        raise DamageError(f"its attribute {name} is not a fixed-length text")
    if kind.get_size() > TEXT_BYTES:
        raise DamageError(f"its attribute {name} has {kind.get_size()} bytes")
    value = np.zeros((), f"S{kind.get_size()}")
    attribute.read(value)
    return bytes(value)


def _array(opened: Any, name: str, size: int) -> Array:
    if opened.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise DamageError(f"{name} is a link to somewhere else")
    data = h5py.h5d.open(opened.id, name.encode())
    create = data.get_create_plist()
    if create.get_layout() != h5py.h5d.CONTIGUOUS or create.get_external_count() or create.get_nfilters():
        raise DamageError(f"{name} is not stored plainly in the file itself")
    dtype = next((d for d in DTYPES if data.get_type().equal(h5py.h5t.py_create(d))), None)
    if dtype is None:
        raise DamageError(f"{name} holds none of {', '.join(map(str, DTYPES))}")
    shape = tuple(int(n) for n in data.shape)
    needed = math.prod(shape) * dtype.itemsize
    offset = data.get_offset()
    if needed and (offset is None or offset + needed > size):
        raise DamageError(f"{name} claims {needed} bytes in a file of {size}")
    return Array(dtype, shape, offset or 0)
