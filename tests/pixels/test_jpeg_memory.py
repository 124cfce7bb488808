"""JPEGs decoded into an array: Pillow's own pixels, and Pillow's own decision about every damaged file."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpegs import encoded, photo
from PIL import Image, ImageOps

from featx.errors import ImageError
from featx.pixels import memory
from featx.pixels.decoding import decode, decoded
from featx.pixels.preprocess import COPIED, REACH, RESAMPLE, Preprocess

BLOCK = 1 << 16  # what Pillow takes of a file at a time


def pillows(data: bytes, short: int | None = None) -> np.ndarray | str:
    """What Pillow makes of a file by itself, or why it refuses it."""
    try:
        image = Image.open(io.BytesIO(data))
        if short:
            image.draft(None, (short, short))
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        return str(error)


def ours(data: bytes) -> np.ndarray | str:
    try:
        return np.asarray(decode(data))
    except ImageError as error:
        return str(error)


def test_photographs_have_pillows_pixels(photos: Path) -> None:
    paths = sorted(photos.glob("*/*/*.jpg"))
    assert len(paths) > 300
    for path in paths:
        assert np.array_equal(ours(path.read_bytes()), pillows(path.read_bytes())), path


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *(("RGB", {"subsampling": sampling}) for sampling in ("4:4:4", "4:2:2", "4:2:0")),
        *(("RGB", {"subsampling": sampling, "restart_marker_blocks": 3}) for sampling in ("4:4:4", "4:2:0")),
        *(("RGB", {"progressive": True}), ("RGB", {"keep_rgb": True}), ("RGB", {"optimize": True, "quality": 20})),
        *(("RGB", {"orientation": n}) for n in (2, 5, 6)),
        *(("RGB", {"format": "MPO"}), ("RGB", {"comment": b"\xff\xd8" * 40})),
        *(("L", {}), ("L", {"progressive": True}), ("CMYK", {})),
    ],
    ids=str,
)
def test_every_kind_of_jpeg_has_pillows_pixels(mode: str, options: dict[str, Any]) -> None:
    for size in ((1, 1), (1, 40), (17, 1), (8, 8), (15, 33), (83, 61), (300, 200)):
        data = encoded(photo(*size, mode=mode), **options)
        assert np.array_equal(ours(data), pillows(data)), size
        assert np.array_equal(ours(data + b"behind it"), pillows(data)), size
    for short in (20, 60, 300):
        assert np.array_equal(np.asarray(decode(data, short)), pillows(data, short)), short


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, added, taken away, or a marker put in, mostly where one of Pillow's blocks ends."""
    out, kind = bytearray(data), rng.integers(6)
    at = int(rng.integers(BLOCK - 3000, BLOCK + 500) if rng.random() < 0.7 else rng.integers(2, len(out)))
    if kind == 0:
        out[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        out[at : at + 2] = bytes([255, rng.integers(0xC0, 256)])
    elif kind == 2:
        del out[at : at + int(rng.integers(1, 2000))]
    elif kind == 3:
        out[at:at] = rng.bytes(int(rng.integers(1, 2000)))
    else:
        out = out[:at] if kind == 4 else out[:-2] + rng.bytes(int(rng.integers(3)))
    return bytes(out)


def test_a_damaged_file_is_refused_for_pillows_reason_or_has_pillows_pixels() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (290, 310, 3), np.uint8))
    kinds: list[dict[str, Any]] = [{}, {"restart_marker_blocks": 2}, {"progressive": True}]
    files = [encoded(noise, quality=50, subsampling=0, **options) for options in kinds]
    assert all(BLOCK + 1000 < len(data) < 2 * BLOCK for data in files)
    rng, refused, read = np.random.default_rng(2), 0, 0
    for number in range(300):
        data = damaged(files[number % 3], rng)
        expected, found = pillows(data), ours(data)
        if isinstance(expected, str):
            assert isinstance(found, str) and (expected in found or "cannot identify" in expected), number
            refused += 1
        else:
            assert np.array_equal(found, expected), number
            read += 1
    assert refused > 30 and read > 100


def test_a_file_without_its_end_marker_is_read_or_refused_as_pillows_blocks_have_it() -> None:
    """The second of these Pillow refuses, and would read if it came in one block."""
    for seed in (75, 76):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (290, 310, 3), np.uint8))
        data = encoded(noise, quality=50, subsampling=0)[:-2]
        expected, found = pillows(data), ours(data)
        assert str(expected) in str(found) if isinstance(expected, str) else np.array_equal(found, expected)


def test_a_file_without_the_marker_of_its_start_of_scan_is_refused_for_pillows_reason() -> None:
    data = encoded(photo())
    data = data[: data.index(b"\xff\xda")]
    expected, found = str(pillows(data)), str(ours(data))
    assert "cannot be decoded" in found and (expected in found or "cannot identify" in expected)


def test_rows_of_a_decoded_jpeg_are_no_copy_and_those_of_other_images_the_same() -> None:
    data = encoded(photo(90, 70), quality=95)
    with decoded(data) as image:
        part, other = memory.rows(image, 10, 60, 55), memory.rows(image.copy(), 10, 60, 55)
        assert part.size == other.size == (55, 50) and part.mode == "RGB"
        assert np.array_equal(np.asarray(part), np.asarray(image)[10:60, :55])
        assert np.array_equal(np.asarray(other), np.asarray(part))
        image.featx_array[1][10, 0] = 7  # type: ignore[attr-defined]
        assert part.getpixel((0, 0)) == (7, 7, 7) != other.getpixel((0, 0))


def test_an_image_that_is_kept_keeps_its_pixels() -> None:
    data = encoded(photo(300, 200))
    kept = [decode(data) for _ in range(5)]
    gc.collect()
    noise = [np.full((200, 300, 4), 9, np.uint8) for _ in range(5)]  # where the memory would be used again
    assert all(np.array_equal(np.asarray(image), pillows(data)) for image in kept) and noise


def test_an_image_that_is_changed_in_place_is_seen_as_it_is_now() -> None:
    preprocess, data = Preprocess(64, 64), encoded(photo(300, 200))
    with decoded(data) as image:
        image.paste((9, 9, 9), (0, 0, 300, 200))
        assert np.all(preprocess.centre(image) == 9)
    with decoded(data) as image:
        image.thumbnail((120, 120))
        assert np.array_equal(preprocess.centre(image), preprocess(np.asarray(image)))


def test_the_callers_image_and_what_it_carries_stay_as_they_were() -> None:
    data = encoded(photo(300, 200))
    image: Any = Image.open(io.BytesIO(data))
    image.load()
    image.pixels, image.info["note"] = "the caller's", 1
    assert np.array_equal(Preprocess(64, 64)(image), Preprocess(64, 64)(data))
    assert image.pixels == "the caller's" and image.info["note"] == 1
    assert np.array_equal(np.asarray(image), pillows(data))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 200), (70, 333), (64 * COPIED + 200, 90), (40, 30), (224, 224)])
def test_the_crop_is_the_whole_image_resized_across_then_its_box_down(
    size: tuple[int, int], interpolation: str
) -> None:
    preprocess, resample = Preprocess(72, 64, interpolation), RESAMPLE[interpolation]
    data = encoded(photo(*size), quality=95)
    for given in (data, decode(data).copy(), np.asarray(decode(data))):
        image = decode(given)
        left, top, right, bottom = preprocess.box(*image.size, 64)
        across = image.resize((64, image.height), resample, box=(left, 0, right, image.height))
        # the box is kept in single precision, in which it counts from the first row that matters
        first = max(0, int(top - REACH[interpolation] * max((bottom - top) / 64, 1) - 1))
        rows = across.crop((0, first, 64, image.height))
        down = rows.resize((64, 64), resample, box=(0, top - first, 64, bottom - first))
        found = preprocess(given)
        assert np.array_equal(found, np.asarray(down).transpose(2, 0, 1))
        assert found.flags.c_contiguous and found.flags.writeable and found.dtype == np.uint8
