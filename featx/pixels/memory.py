"""RGB images whose pixels lie in an array: JPEGs are decoded into it, and parts of it are images without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

core: Any = vars(Image)["core"]  # Pillow's code in C
DECODED = -1, 0  # no byte more is needed, no error


def load(image: Any, data: bytes) -> None:
    """Decode an RGB JPEG of which Pillow has read the header, or leave it as it is, for Pillow to decode.

    Pillow's decoder does it, without what is around it: memory that is cleared first, and blocks of 64 kB, which
    decide about a damaged file, since behind the last row mistakes are found up to the end of a block. So what the
    decoder does not take as a whole is left to Pillow.
    """
    if image.mode != "RGB":
        return
    pixels = np.empty((image.height, image.width, 4), np.uint8)
    memory = core.map_buffer(pixels, image.size, "raw", 0, ("RGB", 0, 1))
    (_, extents, _, arguments), *_ = image.tile
    decoder = core.jpeg_decoder("RGB", *arguments, *image.decoderconfig)
    try:
        decoder.setimage(memory, extents)
        decoded = decoder.decode(data) == DECODED
    finally:
        decoder.cleanup()
    if decoded:
        image.im, image.pixels, image.tile = memory, pixels, []


def rows(image: Image.Image, first: int, last: int, edge: int) -> Image.Image:
    """The rows `first` to `last` of an RGB image, up to the column `edge`. No copy where `load` has loaded it."""
    pixels: np.ndarray | None = getattr(image, "pixels", None)
    if pixels is None:
        return image.crop((0, first, edge, last))
    return image._new(core.map_buffer(pixels[first:last], (edge, last - first), "raw", 0, ("RGB", 4 * image.width, 1)))
