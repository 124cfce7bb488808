"""JPEG files decoded by simplejpeg, with Pillow's pixels, straight into the memory of a Pillow image.

Both decode by libjpeg-turbo. Pillow clears the memory of the image first, hands the file over in parts, and copies each
row of pixels to where it belongs; simplejpeg does none of this.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from featx.errors import FeatxWarning
from featx.pixels.readers import opened

SAMPLINGS = ("444", "422", "420", "440", "411")


def load(image: Any, data: bytes) -> None:
    """Decode a JPEG image of which Pillow has read the header, or leave it as it is, for Pillow to decode.

    Pillow decides about damage: simplejpeg gives up at the first thing that is not as it should be. Progressive files
    are Pillow's too, since libjpeg makes up what their last scans do not say, and each version does it in its own way.
    """
    if image.mode != "RGB" or image.info.get("progressive") or image.decoderconfig not in ((), (1, 0)):
        return
    if decode := _trusted():
        put(image, data, decode)


def put(image: Any, data: bytes, decode: Any) -> bool:
    """Decode into the memory of an RGB image, and say whether that went without a complaint."""
    width, height = image.size
    pixels = np.empty((height, width, 4), np.uint8)
    try:
        found = decode(data, "RGBX", buffer=pixels, strict=True)
    except (ValueError, RuntimeError):
        return False
    if found.shape != pixels.shape:  # by its own reading of the header
        return False
    image.im = Image.core.map_buffer(pixels, image.size, "raw", 0, ("RGB", 0, 1))  # type: ignore[attr-defined]
    image.tile = []  # nothing is left to be decoded
    return True


@cache
def _trusted() -> Any:
    """simplejpeg's decoder; None where it is not installed or decodes otherwise than Pillow."""
    try:
        from simplejpeg import decode_jpeg, encode_jpeg
    except ImportError:  # an application has Pillow alone
        return None
    if same(decode_jpeg, encode_jpeg):
        return decode_jpeg
    warnings.warn(
        "simplejpeg's libjpeg gives other pixels than Pillow's, so Pillow decodes all JPEGs, which takes longer; "
        "install the versions of both that featx's constraints.txt names",
        FeatxWarning,
        stacklevel=2,
    )
    return None


def same(decode: Any, encode: Any) -> bool:
    """Whether a decoder gives Pillow's pixels of a small picture in all ways to sample chroma."""
    y, x = np.mgrid[:61, :83]
    picture = np.stack([x * y // 9, 5 * x + 3 * y, (x // 4 + y // 4) % 2 * 255], axis=2).astype(np.uint8)
    for sampling in SAMPLINGS:
        data = encode(picture, 85, colorsubsampling=sampling)
        ours, pillows = opened(data), opened(data)
        if not put(ours, data, decode) or ours.tobytes() != pillows.tobytes():
            return False
    return True
