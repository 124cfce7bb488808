"""What featx reads back from files: JSON, safetensors and arrays, each checked in full before any of it is used.

Types are checked by msgspec against the dataclass or `TypedDict` that the values become. Files may be anyone's: nothing
here runs code, recurses without a bound, or takes more memory than the file is long.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import warnings
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from featx.errors import FeatxWarning
from featx.files import read_plain, write_atomic
from featx.seals import BLANK, MARK, SEAL, escape, is_current, is_sealed, seal
from featx.text import from_json, to_json

T = TypeVar("T")
TENSOR_SEAL = {name: str(value) for name, value in SEAL.items()}
"""What a safetensors file holds among its metadata before it is sealed."""
# The header that `np.save` writes. numpy's own reader evaluates it as Python, and lets its tokenizer's errors through.
NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|]?\w+)', 'fortran_order': False, 'shape': \(([\d, ]{1,60})\), \} *\n", re.S
)


def convert(values: Any, kind: type[T]) -> T:
    """JSON values as a dataclass, a `TypedDict` or any other type. Raises `ValueError`, which names the field."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).rpartition(" - at `$")
        raise ValueError(f"{place.strip('.`')}: {text}" if text else place) from None


def write_record(path: Path, values: dict[str, Any]) -> None:
    """A JSON object that carries its own digest, by `write_atomic`."""
    body, mark, digits = to_json(values | SEAL).rpartition(MARK.decode())
    write_atomic(path, seal(f"{escape(body)}{mark}{digits}\n".encode()))


def opened(data: bytes) -> tuple[dict[str, Any], bool]:
    """The object that `write_record` wrote, and whether it has a digest, as all but older ones do.

    Raises `ValueError`.
    """
    sealed, values = is_sealed(data), convert(from_json(data), dict[str, Any])
    values.pop("seal", None)
    return values, is_current(values.pop("format", None), sealed)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """The cache's own records, in which the SHA-256 is that of the values, by `write_atomic`."""
    write_atomic(path, json.dumps({**values, "sha256": _digest(values)}, indent=1).encode())


def unsealed(data: bytes) -> dict[str, Any]:
    """The values that `write_sealed` wrote. Raises `ValueError` for any other bytes."""
    values = convert(from_json(data), dict[str, Any])
    if values.pop("sha256", None) != _digest(values):
        raise ValueError("it does not have the SHA-256 that it was written with")
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_record(path: Path, kind: Any = dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """`opened`, whose values fit `kind`. Raises `OSError` and `ValueError`."""
    values, sealed = opened(read_plain(path))
    convert(values, kind)
    return values, sealed


def tensor_metadata(data: bytes) -> tuple[dict[str, str], bool]:
    """The metadata of a safetensors file, and whether it carries a digest, as all but older ones do.

    Raises `ValueError`.
    """
    sealed, length = is_sealed(data), struct.unpack("<Q", data[:8].ljust(8, b"\xff"))[0]
    if length > len(data) - 8:
        raise ValueError("it is not a safetensors file, or cut short")
    metadata = convert(from_json(data[8 : 8 + length]), dict[str, Any]).get("__metadata__", {})
    values = convert(metadata, dict[str, str])
    values.pop("seal", None)
    version = values.pop("format", None)
    return values, is_current(int(version) if version and version.isdigit() else version, sealed)


def array_bytes(values: np.ndarray) -> bytes:
    """An array as an `.npy` file, with its own digest behind it."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return seal(file.getvalue() + BLANK.encode())


def array_of(data: bytes, dtype: Any, ndim: int, *, sealed: bool = True) -> np.ndarray:
    """The array in `array_bytes`; sealed: False for one of before there were digests. Raises `ValueError`."""
    if is_sealed(data) != sealed:
        raise ValueError("it has lost the SHA-256 that it was written with")
    header = NPY.match(data)
    found, shape = header.groups() if header else (b"", b"")
    sizes = [int(size) for size in shape.split(b",") if size.strip()]
    if header is None or found.decode() != np.dtype(dtype).str or len(sizes) != ndim:
        raise ValueError(f"it is not an .npy file of {np.dtype(dtype)} in {ndim} dimensions")
    if math.prod(sizes) * np.dtype(dtype).itemsize > len(data) - header.end():
        raise ValueError(f"it is cut short: its header promises {sizes}")
    return np.frombuffer(data, dtype, math.prod(sizes), header.end()).reshape(sizes)


def warn_older(path: Path) -> None:
    """Say once, wherever it is read, that a file is of a format in which damage cannot be found."""
    text = f"{path} was written by an older featx, without a digest: damage in it cannot be found. Fit or export again"
    warnings.warn(text, FeatxWarning, stacklevel=1)  # Python shows a text once for each line that gives it
