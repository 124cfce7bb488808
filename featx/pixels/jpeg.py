"""Reads JPEG headers: they tell which files a GPU decodes as Pillow does."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from featx.pixels.decoding import ORIENTATION, UPRIGHT
from featx.pixels.preprocess import Box
from featx.pixels.readers import reader

# Beyond these a file is decoded on the CPU: a group of them has to fit into memory.
MAX_PIXELS, MAX_BYTES = 1 << 26, 8 << 20
MIN_SIDE = 16
# Luma samples per chroma sample, across and down. Other ratios are rare, and not tested here.
SAMPLINGS = ((1, 1), (2, 1), (2, 2))
# The marker that ends the image must be in the last so many bytes of the file.
TAIL = 1 << 16
ADOBE_YCC = 1


@dataclass(frozen=True)
class Header:
    """What the header of a baseline JPEG (grey or YCbCr, 8 bits) says."""

    width: int
    """As stored, in pixels."""
    height: int
    sampling: tuple[int, int]
    """Pixels that one chroma sample covers, across and down."""
    orientation: int = 1
    """EXIF's: 5 to 8 swap width and height."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A JPEG file that a GPU can decode, and the views of it to make."""

    data: bytes
    header: Header
    looks: list[tuple[int, Box, bool]]
    """View number, box of the upright image, and whether mirrored."""


def header(data: bytes) -> Header | None:
    """The header of a JPEG file that a GPU decodes as Pillow does; None for all others, which Pillow decodes.

    Others are progressive, CMYK, RGB by Adobe's mark, oddly subsampled, cut off, very small or very large
    ones, and whatever is not plainly a JPEG. Only the markers are read: this takes microseconds.
    """
    if len(data) > MAX_BYTES or data[:2] != b"\xff\xd8":
        return None
    try:
        return _header(data)
    except IndexError:  # cut off
        return None


def _header(data: bytes) -> Header | None:
    frame, notes, at = b"", [b""], 2
    while True:
        if data[at] != 0xFF:
            return None
        while data[at] == 0xFF:
            at += 1
        marker, at = data[at], at + 1
        if not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:  # these have no length, and no place here
            return None
        length = data[at] << 8 | data[at + 1]
        if marker == 0xDA:
            break
        segment = data[at + 2 : at + length]
        at += length
        if marker == 0xC0:
            if frame:
                return None
            frame = segment
        elif 0xC1 <= marker <= 0xCF and marker != 0xC4:  # progressive, lossless, arithmetic ...
            return None
        elif marker == 0xE1:
            notes.append(segment)
        elif marker == 0xEE and segment[:5] == b"Adobe" and segment[11] != ADOBE_YCC:
            return None
    if not frame or data[at + 2] != frame[5] or data.rfind(b"\xff\xd9", max(at, len(data) - TAIL)) < 0:
        return None  # no frame, a scan of some of its components, or no end
    bits, components = frame[0], frame[5]
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    sampling = frame[7] >> 4, frame[7] & 15
    if bits != 8 or min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        return None
    if components == 3:
        known = sampling in SAMPLINGS and frame[10] == frame[13] == 0x11 and frame[6:15:3] != b"RGB"
    else:
        known = components == 1 and sampling == (1, 1)
    return Header(width, height, sampling, _orientation(data, b"".join(notes))) if known else None


def _orientation(data: bytes, notes: bytes) -> int:
    """EXIF's orientation as Pillow reads it; Pillow is called only where the tag may be present."""
    if b"\x01\x12" in notes or b"\x12\x01" in notes or b"Orientation" in notes:
        with contextlib.suppress(Exception):  # a broken block says nothing about the pixels
            found = reader("JPEG")(io.BytesIO(data)).getexif().get(ORIENTATION)
            return found if found in UPRIGHT else 1
    return 1
