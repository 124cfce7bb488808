"""RGB images whose pixels lie in an array, so that Pillow decodes into it and parts of it are images without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def load(image: Any, data: bytes) -> None:
    """Decode a JPEG image of which Pillow has read the header.

    Pillow would clear the memory first, and take the file in blocks. The decoder's decision about a damaged file
    depends on these blocks: behind the last row it looks for mistakes up to the end of one. So all at once is tried
    first, and what fails is decoded as Pillow does it.
    """
    before = image.tile, image.fp, image.decodermaxblock
    if image.mode == "RGB":
        image.pixels = np.empty((image.height, image.width, 4), np.uint8)
        image.im = rows(image, 0, image.height, image.width).im
    image.decodermaxblock = len(data)
    try:
        image.load()
    except OSError:
        image.tile, image.fp, image.decodermaxblock = before
        image.load()


def rows(image: Image.Image, first: int, last: int, edge: int) -> Image.Image:
    """The rows `first` to `last` of an RGB image, up to the column `edge`. No copy where `load` has loaded it."""
    pixels: np.ndarray | None = getattr(image, "pixels", None)
    if pixels is None:
        return image.crop((0, first, edge, last))
    arguments = (edge, last - first), "raw", 0, ("RGB", pixels.strides[0], 1)
    return image._new(Image.core.map_buffer(pixels[first:last], *arguments))  # type: ignore[attr-defined]
