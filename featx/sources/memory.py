"""Images that a caller holds: paths, bytes, open files, Pillow images and arrays; one, several, a batch or a column."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featx.errors import ImageError, SourceError
from featx.pixels.decoding import decode
from featx.sources.source import Source, read_image

TAKEN = (
    "paths, Pillow images, the bytes of image files, open files or uint8 [H, W, 3] arrays, one or several of them, a "
    "uint8 [N, H, W, 3] array, or a column of a table"
)
MISSING = "a missing cell (None, NaN or NA)"


@dataclass(frozen=True, eq=False)
class Images(Source):
    """Images without labels, in memory or named one by one; pixels are read as the PPM file that holds them."""

    items: Sequence[Any] = ()

    @classmethod
    def of(cls, given: Any) -> Images:
        """The images in `given`, see `one_by_one`. Raises `SourceError`."""
        items = list(one_by_one(given))
        if not items:
            raise SourceError("there are no images among those given")
        named = ((item, "row" if item is None else "image") for item in items)
        ids = [item if isinstance(item, str) else f"{kind} {i}" for i, (item, kind) in enumerate(named)]
        items = [_whole(item) if isinstance(item, str) else item for item in items]
        return cls(uri="the list of images", root=Path(), ids=ids, items=items)

    def take(self, numbers: np.ndarray) -> Source:
        return replace(super().take(numbers), items=[self.items[i] for i in numbers])  # type: ignore[call-arg]

    def read(self, i: int) -> bytes:
        item = self.items[i]
        if item is None:
            raise ImageError(MISSING)
        if isinstance(item, str | bytes):
            return item if isinstance(item, bytes) else read_image(item)
        pixels = np.asarray(decode(item))
        return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _whole(path: str) -> str:
    """A path that other processes, with other working folders, can read; `~` is read as it is."""
    return path if path.startswith("~") else os.path.abspath(path)


def one_by_one(given: Any) -> Iterator[Any]:
    """Single images: each a path as text, `bytes`, a Pillow image, an array, or None for a missing cell.

    An open file is read from its start if it can go back there. Generators and the like are read as they are needed.
    Raises `SourceError` for anything that is not `TAKEN`, with what is near it.
    """
    columns = getattr(given, "column_names", given.columns) if hasattr(given, "columns") else None
    if columns is not None and len(columns) != 1:
        raise SourceError(
            f"a table with the columns {', '.join(map(str, columns))} was given; give the column of images alone, or, "
            "to use labels and splits, write it as a manifest: table.to_csv('data.csv', index=False)"
        )
    given = _array(given) if hasattr(given, "__array__") else given
    several = isinstance(given, np.ndarray) and (given.ndim == 4 or given.dtype.kind in "OUST")
    if not several and (image := _single(given)) is not None:
        yield image
        return

    if isinstance(given, np.ndarray) and given.ndim < 3:  # [N] or [N, 1]
        given = given if given.ndim == 2 and given.shape[1] != 1 else given.ravel()
    if isinstance(given, Mapping | set | frozenset) or not (
        isinstance(given, Iterable) or (hasattr(given, "__getitem__") and hasattr(given, "__len__"))
    ):
        raise SourceError(f"what was given is {_near(given)}; expected {TAKEN}")
    # a data set that has numbers alone may answer any number
    for number, item in enumerate(given if isinstance(given, Iterable) else map(given.__getitem__, range(len(given)))):
        image = _single(item)
        if image is None and not _missing(item):
            raise SourceError(f"image {number} of those given is {_near(item)}; expected {TAKEN}")
        yield _own(image) if isinstance(given, Iterator) else image


def _single(item: Any) -> Any:
    """One image as `one_by_one` gives it; None for anything else."""
    if isinstance(item, str | os.PathLike):
        return str(os.fsdecode(item))
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, Image.Image):
        with suppress(Exception):  # here, since a list may hold it twice, and threads decode; they name the error, too
            item.load()
        return item
    if hasattr(item, "read"):
        return _contents(item)
    array = _array(item) if hasattr(item, "__array__") else np.empty(0)
    if array.ndim == 1 and array.dtype == np.uint8:  # the bytes of a file, as OpenCV and torchvision hold them
        return array.tobytes()
    return array if array.ndim > 1 and array.dtype.kind not in "OUST" else None


def _own(image: Any) -> Any:
    """A copy, where a generator may put its next frame into the same image while threads still read it."""
    with suppress(AttributeError, OSError, SyntaxError, ValueError):  # bytes; what cannot be decoded is named later
        copied = image.copy()
        if isinstance(image, Image.Image):
            copied.format = image.format
        return copied
    return image


def _array(given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except Exception as error:  # such as of a tensor on a GPU
        raise SourceError(f"{type(given).__name__} cannot be read as an array ({error})") from error


def _contents(file: Any) -> bytes:
    with suppress(OSError, ValueError, AttributeError):  # a socket: read what is left
        file.seek(0)
    try:
        data = None if isinstance(file, io.TextIOBase) else file.read()
    except (OSError, ValueError, TypeError) as error:  # such as an archive, which reads by name
        raise SourceError(f"{type(file).__name__} cannot be read ({error})") from error
    if not isinstance(data, bytes):
        raise SourceError(f"{type(file).__name__} gives no bytes; open image files by open(path, 'rb')")
    return data


def _missing(item: Any) -> bool:
    number = isinstance(item, float | np.floating | np.datetime64)
    return item is None or type(item).__name__ in ("NAType", "NaTType") or (number and bool(item != item))


def _near(item: Any) -> str:
    """What something is, and how to get the images out of it."""
    name = "None" if item is None else f"of type {type(item).__name__}"
    if isinstance(item, Mapping):
        return f"{name}, with {', '.join(map(str, list(item)[:5]))} (the images alone may be one of these values)"
    if isinstance(item, tuple):
        return f"{name} and length {len(item)} (images alone would be `[image for image, label in data]`)"
    return f"{name} {list(item.shape)}" if isinstance(item, np.ndarray) else name
