"""RGB images whose pixels lie in an array: JPEGs are decoded into it, and parts of it are images without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

core: Any = vars(Image)["core"]  # Pillow's code in C


def load(image: Any, data: bytes) -> None:
    """Decode an RGB JPEG of which Pillow has read the header, or leave it as it is, for Pillow to say what is wrong.

    Pillow's decoder does it, without the memory that Pillow would clear first. The file comes in Pillow's blocks: a
    damaged file's pixels depend on them, and whether it is refused.
    """
    if image.mode != "RGB" or len(image.tile) != 1:
        return
    pixels = np.empty((image.height, image.width, 4), np.uint8)
    try:
        memory = core.map_buffer(pixels, image.size, "raw", 0, ("RGB", 0, 1))
        _, extents, _, arguments = image.tile[0]
        decoder = core.jpeg_decoder("RGB", *arguments, *image.decoderconfig)
    except (AttributeError, TypeError, ValueError):  # a Pillow of other inner workings gives the same pixels by itself
        return
    view, begin, end, used, error = memoryview(data), 0, 0, 0, 0

    try:
        decoder.setimage(memory, extents)
        while used >= 0 and end < len(data):
            begin, end = begin + used, end + image.decodermaxblock
            used, error = decoder.decode(view[begin:end])
    finally:
        decoder.cleanup()

    if used < 0 and error == 0:
        image.im, image.featx_array, image.tile = memory, (memory, pixels), []


def rows(image: Image.Image, first: int, last: int, edge: int) -> Image.Image:
    """The rows `first` to `last` of an RGB image, up to the column `edge`. No copy where `load` has loaded it."""
    memory, pixels = getattr(image, "featx_array", (None, None))
    if pixels is None or memory is not image.im:  # changed in place, an image has other memory
        return image.crop((0, first, edge, last))
    return image._new(core.map_buffer(pixels[first:last], (edge, last - first), "raw", 0, ("RGB", 4 * image.width, 1)))
