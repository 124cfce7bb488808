"""From an image file's bytes to an upright 8-bit RGB image, within bounds of memory and time."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import Image

from featx.devices import free_memory
from featx.errors import ImageError
from featx.pixels import memory
from featx.pixels.readers import BITS, PHOTOMETRIC, limit, opened

# What decoding one image may take, in bytes: RGB with alpha of `MAX_PIXELS` fits.
MOST_BYTES = 3 << 29
LARGE_BYTES = 1 << 28
# Encoders write about 10 scans of a progressive JPEG. Each one passes over all the pixels.
MOST_SCANS, SCANNED_PIXELS = 100, 1 << 29
# in or behind a scan, where 0xff 0x00 is a byte of the scan and 0xff 0xd0 to 0xd7 divide it
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# what turns an image upright, by the value of EXIF's orientation tag
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Room:
    """Memory that images may take while they are decoded and used, on all threads together."""

    def __init__(self, size: int) -> None:
        self.size = self.free = size
        self._changed = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait until so many bytes are free. A thread that has taken some must not take more."""
        assert size <= self.size
        with self._changed:
            self._changed.wait_for(lambda: self.free >= size)
            self.free -= size
        if size > LARGE_BYTES:
            with suppress(AttributeError, OSError, TypeError):  # not Linux
                ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what a thread has freed for that thread
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                self._changed.notify_all()


ROOM = Room(max(MOST_BYTES, int(free_memory() / 16)))
if hasattr(os, "register_at_fork"):  # a child has none of the threads that hold some of it
    os.register_at_fork(after_in_child=lambda: ROOM.__init__(ROOM.size))  # type: ignore[misc]


def decode(data: bytes | Image.Image | np.ndarray, short: int | None = None) -> Image.Image:
    """`decoded`, for an image that is kept: only while it is decoded does it wait for other threads."""
    with decoded(data, short) as image:
        return image if image is data else image._new(image.im)


@contextmanager
def decoded(data: bytes | Image.Image | np.ndarray, short: int | None = None) -> Iterator[Image.Image]:
    """An upright 8-bit RGB Pillow image, the same when it is decoded again. GIF and other animations: the first frame.

    short: decode a JPEG at 1/2, 1/4 or 1/8 of its size, which its cosine transform gives nearly free, as
    long as the short side keeps this many pixels. With twice the pixels that are needed, aliasing is small, and
    an augmented view of a quarter of the image is still not enlarged.

    The orientation of EXIF or XMP is applied, alpha is dropped as `Image.convert("RGB")` drops it, 12- and 16-bit grey
    is scaled to 8 bits (Pillow alone would clip it). Large images wait for each other: until the block is left, the
    image counts in `ROOM`, and must not be used after it. No global setting of Pillow changes what the bytes give.
    Raises `ImageError`.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or 0 in data.shape:
            raise ImageError(f"expected uint8 [H, W, 3] RGB, got {data.dtype} {list(data.shape)}")
        yield Image.fromarray(data)
        return
    with _named():
        image = opened(data) if isinstance(data, bytes) else data
        size = _prepared(image, data, short)

    with ROOM.take(size):
        with _named():
            if hasattr(image, "to_pillow"):
                image = image.to_pillow()
            if isinstance(data, bytes) and image.format == "JPEG":
                memory.load(image, data)
            image.load()  # TIFF files are turned here
            image = _upright(_eight_bits(image))
            if image.mode == "P" and "transparency" in image.info:  # of which Pillow would warn
                image = image.copy() if image is data else image
                del image.info["transparency"]
            image = image if image.mode == "RGB" else image.convert("RGB")
        if image is not data:  # `data` itself belongs to the caller, and was upright
            image.info.clear()  # Pillow copies EXIF and XMP to what it turns: decoding that would turn it again
        try:
            yield image
        finally:
            if image is not data and size > LARGE_BYTES:
                image.close()  # before others take its room
                vars(image).pop("featx_array", None)


@contextmanager
def _named() -> Iterator[None]:
    """Raise what Pillow raises as an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error ...
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from error


def _prepared(image: Any, data: Any, short: int | None) -> int:
    """Set the scale that an image is decoded at, and return the bytes that this takes, `MOST_BYTES` at most."""
    limit(image.size)
    width, height = image.size
    if 0 in image.size:
        raise ImageError(f"an image of {width} x {height} pixels")

    size: int = _buffer(image)
    format = getattr(image, "format", "HEIF")
    if format == "JPEG" and isinstance(data, bytes) and _scans(image, data):
        size += 2 * image.layers * width * height
    if short is not None and format in ("JPEG", "MPO"):
        image.draft(None, (short, short))
    turned = format in ("PNG", "TIFF") or "exif" in image.info or "xmp" in image.info  # or may be
    each = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode[:4] == "I;16" else 4)
    each += 4 * (image.mode != "RGB" or turned)
    if format in ("WEBP", "AVIF", "HEIF"):
        each += 16  # their decoders give bytes, which Pillow copies
    elif any(tile[0] in ("ppm", "ppm_plain", "bmp_rle") for tile in getattr(image, "tile", ())):
        each += 8  # written in Python
    size += image.size[0] * image.size[1] * each

    if size > MOST_BYTES:
        raise ImageError(
            f"{width} x {height} pixels ({format}, {image.mode}) take {size / 1e9:.1f} GB to decode, more "
            f"than the {MOST_BYTES / 1e9:.1f} GB of one image; scale the image down if you trust it"
        )
    return size


def _scans(image: Any, data: bytes) -> bool:
    """Whether a JPEG has several scans, for which libjpeg keeps all coefficients. Raises `ImageError` for very many."""
    at = image.fp.tell()  # behind the header of the first scan
    begin = at - 8 - 2 * image.layers
    if data[begin : begin + 2] == b"\xff\xda" and not image.info.get("progressive"):
        return False  # all components in one scan
    most = min(1000, MOST_SCANS + SCANNED_PIXELS // (image.width * image.height))
    found = 1
    while (marker := MARKER.search(data, at)) and marker[0] != b"\xff\xd9":  # up to the end marker
        found += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    if found > most:
        raise ImageError(f"a JPEG of {found:,} scans, which would take very long to decode; save it again")
    return True


def _buffer(image: Any) -> int:
    """Bytes that libtiff takes for a strip or tile of the file, which may be larger than the image."""
    if not getattr(image, "use_load_libtiff", False):
        return 0
    tags = image.tag_v2
    wide, high = tags.get(322, image.width), tags.get(323, min(tags.get(278, image.height), image.height))
    samples = 1 if tags.get(284) == 2 else len(tags.get(BITS, (1,)))
    bits = 32 if tags.get(PHOTOMETRIC) == 6 else samples * max(tags.get(BITS, (1,)))
    return int(wide * high * bits // 8)


def _upright(image: Image.Image) -> Image.Image:
    # not ImageOps.exif_transpose: it copies upright images, and fails where the EXIF block is broken
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # a broken block says nothing about the pixels
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, or its 12- or 16-bit grey as 8 bits. Raises `ImageError` for 32 bits."""
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in ("I", "F") and (image.mode == "F" or image.format not in ("PNG", "PPM")):
        raise ImageError(f"32-bit pixels (mode {image.mode}) have no agreed white; convert to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image

    tags, out = getattr(image, "tag_v2", {}), Image.new("L", image.size)
    white, rows = 4095 if tags.get(BITS) == (12,) else 65535, max(1, (1 << 18) // image.width)
    for top in range(0, image.height, rows):  # part by part, since these take 12 bytes a pixel
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        grey = ((np.asarray(part).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
        out.paste(Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey), (0, top))
    out.info = dict(image.info)
    return out
