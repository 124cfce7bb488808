"""JPEG files for tests, and what a decoder makes of them that repeats samples of chroma, as nvJPEG does."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from featx.pixels.jpeg import Encoded, header
from featx.pixels.preprocess import Preprocess


def photo(width: int = 61, height: int = 37, mode: str = "RGB", *, seed: int = 0, low: int = 0, high: int = 256) -> Any:
    """A smooth Pillow image of colours between `low` and `high`, and a little beyond."""
    rng = np.random.default_rng(seed)
    small = rng.integers(low, high, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", orientation: int | None = None, **options: Any) -> bytes:
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def colours(luma: np.ndarray, blueness: np.ndarray, redness: np.ndarray) -> np.ndarray:
    """`int [H, W]` each -> `uint8 [3, H, W]`, as JPEG defines it."""
    y, cb, cr = luma.astype(float), blueness - 128.0, redness - 128.0
    planes = [y + np.floor(1.402 * cr + 0.5), y + np.floor(-0.34414 * cb - 0.71414 * cr + 0.5)]
    return np.clip(np.stack([*planes, y + np.floor(1.772 * cb + 0.5)]), 0, 255).astype(np.uint8)


def repeated(data: bytes) -> np.ndarray:
    """A 4:2:0 file as a decoder gives it that repeats samples of chroma: `uint8 [3, H, W]`, as stored.

    libjpeg gives luma alone, and at half the size it gives the samples of chroma as they are.
    """
    whole, half = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    whole.draft("L", whole.size)
    half.draft("YCbCr", (half.width // 2, half.height // 2))
    samples = np.asarray(half).astype(int)
    assert whole.mode == "L" and samples.shape[:2] == ((whole.height + 1) // 2, (whole.width + 1) // 2)
    twice = samples.repeat(2, axis=0).repeat(2, axis=1)[: whole.height, : whole.width]
    return colours(np.asarray(whole).astype(int), twice[..., 1], twice[..., 2])


def asked(files: list[bytes], preprocess: Preprocess) -> list[Encoded]:
    """The files that a GPU may decode, each with its whole crop asked for."""
    found = [(data, header(data)) for data in files]
    return [Encoded(d, h, [(0, preprocess.box(*h.upright, preprocess.crop), False)]) for d, h in found if h]
