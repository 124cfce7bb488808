"""The digest that a file carries of itself, so that damage is found before anything in the file is used.

A sealed file holds `featx-sha256:` and 64 hex digits: the SHA-256 of all its bytes, with zeros in the place of these
digits. JSON, safetensors and ONNX hold it as a text among their own, `.npy` behind its array, so that every other
reader takes the file as before. It finds damage (a bad disk, a torn copy, an edit by hand), not tampering: whoever
changes a file on purpose can seal it again.
"""

from __future__ import annotations

import hashlib

from featx.errors import NewerError

MARK = b"featx-sha256:"
DIGITS = 64
BLANK = MARK.decode() + "0" * DIGITS
FORMAT = 2
"""The version of what is sealed. A file that states it and has no right seal is damaged; older ones have neither."""
SEAL = {"format": FORMAT, "seal": BLANK}
"""What a file holds among its values before it is sealed."""


def escape(text: str) -> str:
    """JSON that reads the same and does not hold the mark: a class, or an image, may be called like it."""
    return text.replace(MARK.decode(), MARK.decode().replace(":", "\\u003a"))


def seal(data: bytes) -> bytes:
    """`data`, which holds `BLANK` and no other mark, with its SHA-256 in the place of the zeros."""
    at = data.index(BLANK.encode()) + len(MARK)
    assert data.count(MARK) == 1
    return b"".join([data[:at], hashlib.sha256(data).hexdigest().encode(), data[at + DIGITS :]])


def is_sealed(data: bytes) -> bool:
    """Whether a file's bytes hold their own SHA-256. Raises `ValueError` where they hold a wrong one, or several."""
    view, at = memoryview(data), data.find(MARK) + len(MARK)
    if at < len(MARK):
        return False
    digest = hashlib.sha256(view[:at])
    digest.update(b"0" * DIGITS)
    digest.update(view[at + DIGITS :])
    if digest.hexdigest().encode() != view[at : at + DIGITS] or data.find(MARK, at) >= 0:
        raise ValueError("it does not have the SHA-256 that it was written with")
    return True


def is_current(version: object, sealed: bool) -> bool:
    """Whether a file is of today's format, by the `format` it states; False for one of before there were seals.

    Raises `ValueError` for one that has lost its seal, and `NewerError` for a newer featx's.
    """
    if isinstance(version, int) and version > FORMAT:
        raise NewerError(f"it is of format {version}, and this featx reads {FORMAT}; update featx to read it")
    if (version == FORMAT) != sealed:
        raise ValueError("it has lost the SHA-256 that it was written with, or its format")
    return sealed
