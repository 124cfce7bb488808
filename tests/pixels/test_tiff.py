"""TIFF in all its kinds of samples, as tifffile reads it: what featx decodes is right, and the rest is named."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin

from featx.errors import ImageError
from featx.pixels.decoding import decode

HEIGHT, WIDTH = 40, 48
Y, X = np.mgrid[:HEIGHT, :WIDTH]
GREY = (X * 5 + Y * 3) % 251 / 250
COLOURS = np.dstack([GREY, X / (WIDTH - 1), Y / (HEIGHT - 1)])
ALPHA = np.full((HEIGHT, WIDTH, 1), 0.75)
PALETTE = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)


def samples(shares: np.ndarray, dtype: type) -> np.ndarray:
    """Shares of white in [0, 1] as whole numbers."""
    return np.rint(shares * np.iinfo(dtype).max).astype(dtype)


# name -> what tifffile writes, how, and which levels of 255 the samples that tifffile reads back mean
def full(raw: np.ndarray) -> np.ndarray:
    return raw / (1 if raw.dtype == bool else np.iinfo(raw.dtype).max) * 255


def negative(raw: np.ndarray) -> np.ndarray:
    return 255 - full(raw)


def under_alpha(raw: np.ndarray) -> np.ndarray:
    return full(raw)[..., :-1] / (full(raw)[..., -1:] / 255)


def printed(raw: np.ndarray) -> np.ndarray:
    return (255 - full(raw)[..., :3]) * (255 - full(raw)[..., 3:]) / 255


def video(raw: np.ndarray) -> np.ndarray:
    y, b, r = (raw[..., i].astype(float) for i in range(3))
    rgb = np.dstack([y + 1.402 * (r - 128), y - 0.344136 * (b - 128) - 0.714136 * (r - 128), y + 1.772 * (b - 128)])
    return rgb.clip(0, 255)


BLACK, WHITE = {"photometric": "minisblack"}, {"photometric": "miniswhite"}
YCC = np.asarray(Image.fromarray(samples(COLOURS, np.uint8)).convert("YCbCr"))
KINDS: dict[str, tuple[np.ndarray, dict[str, Any], Any]] = {
    "1 bit": (GREY > 0.5, BLACK, full),
    "1 bit, 0 is white": (GREY > 0.5, WHITE, negative),
    **{f"grey {t.__name__}": (samples(GREY, t), BLACK, full) for t in (np.uint8, np.uint16)},
    **{f"grey {t.__name__}, 0 is white": (samples(GREY, t), WHITE, negative) for t in (np.uint8, np.uint16)},
    **{f"rgb {t.__name__}": (samples(COLOURS, t), {"photometric": "rgb"}, full) for t in (np.uint8, np.uint16)},
    **{
        f"rgb {t.__name__}, {alpha}": (
            samples(np.dstack([COLOURS * (ALPHA if alpha == "assocalpha" else 1), ALPHA]), t),
            {"photometric": "rgb", "extrasamples": [alpha]},
            under_alpha if alpha == "assocalpha" else lambda raw: full(raw)[..., :3],
        )
        for t, alpha in itertools.product((np.uint8, np.uint16), ("assocalpha", "unassalpha", "unspecified"))
    },
    **{
        f"grey, {alpha}": (
            samples(np.dstack([GREY * (0.75 if alpha == "assocalpha" else 1), ALPHA]), np.uint8),
            BLACK | {"extrasamples": [alpha]},
            under_alpha if alpha == "assocalpha" else lambda raw: full(raw)[..., :1],
        )
        for alpha in ("assocalpha", "unassalpha", "unspecified")
    },
    **{
        f"cmyk {t.__name__}": (samples(np.dstack([1 - COLOURS, GREY / 2]), t), {"photometric": "separated"}, printed)
        for t in (np.uint8, np.uint16)
    },
    "ycbcr": (YCC, {"photometric": "ycbcr", "subsampling": (1, 1)}, video),
    "palette": (
        ((X + Y * WIDTH) % 256).astype(np.uint8),
        {"photometric": "palette", "colormap": PALETTE},
        lambda raw: PALETTE.T[raw] >> 8,
    ),
}


@pytest.mark.parametrize("libtiff", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_tiff_has_the_colours_that_tifffiles_samples_mean(
    name: str, libtiff: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TiffImagePlugin, "READ_LIBTIFF", libtiff)  # as other code may set it
    array, options, meant = KINDS[name]
    named = 0
    plane = ("contig", "separate") if array.ndim == 3 else (None,)
    for order, packed, tile, planes in itertools.product("<>", (None, "zlib"), (None, (16, 16)), plane):
        stored = np.moveaxis(array, 2, 0) if planes == "separate" else array
        buffer = io.BytesIO()
        how = {"byteorder": order, "compression": packed, "tile": tile, "planarconfig": planes}
        tifffile.imwrite(buffer, np.ascontiguousarray(stored), **how, **options)
        raw = tifffile.imread(io.BytesIO(buffer.getvalue()))
        expected = meant(np.moveaxis(raw, 0, 2) if planes == "separate" else raw)
        expected = expected if expected.ndim == 3 else expected[..., None]
        try:
            found = np.asarray(decode(buffer.getvalue())).astype(float)
        except ImageError as error:
            assert "8-bit pixels (TIFF: unsigned, 2 a pixel" in str(error) and "convert to 8 bits" in str(error)
            named += 1
            continue
        assert found.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(found - expected).max() <= (2 if "alpha" in name or "cmyk" in name else 1.01), how
    assert named == (8 if name == "grey, assocalpha" else 0)  # its planes


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("photometric", [0, 1])
def test_twelve_bits_are_a_share_of_4095(order: str, packed: bool, photometric: int) -> None:
    """Written by hand: tifffile packs 12 bits only with another package."""
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 4095 // (HEIGHT * WIDTH - 1)).astype(np.uint16)
    bits = np.unpackbits(grey.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    found = decode(tiff(np.packbits(bits).tobytes(), WIDTH, HEIGHT, 12, order, photometric, packed))
    expected = grey / 4095 * 255
    assert np.abs(np.asarray(found)[:, :, 0] - (expected if photometric else 255 - expected)).max() < 0.51


def tiff(
    data: bytes,
    width: int,
    height: int,
    bits: int,
    order: str = "<",
    photometric: int = 1,
    packed: bool = False,
    tile: int = 0,
) -> bytes:
    data = zlib.compress(data) if packed else data
    place = [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, len(data))]
    strips = [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data))]
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 8 if packed else 1), (262, 3, photometric)]
    tags += [(277, 3, 1), *place] if tile else strips
    rows = [
        struct.pack(f"{order}HHI", tag, kind, 1) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *parts)
        for tag, kind, value in tags
        for parts in [(value, 0) if kind == 3 else (value,)]
    ]
    data += b"\0" * (len(data) % 2)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + b"".join(rows) + b"\0" * 4


@pytest.mark.parametrize(
    ("dtype", "what"),
    [
        *((np.int8, "8-bit .*signed"), (np.int16, "16-bit .*signed"), (np.int32, "32-bit .*signed")),
        *((np.uint32, "32-bit .*unsigned"), (np.float16, "16-bit .*floating"), (np.float32, "32-bit .*floating")),
        (np.float64, "64-bit .*floating"),
    ],
)
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
@pytest.mark.parametrize("order", "<>")
def test_samples_without_an_agreed_white_are_named(dtype: type, what: str, shape: tuple[int, ...], order: str) -> None:
    buffer = io.BytesIO()
    kind = "rgb" if len(shape) == 3 else "minisblack"
    tifffile.imwrite(buffer, np.ones(shape, dtype), photometric=kind, byteorder=order)
    with pytest.raises(ImageError, match=rf"^{what}.* no agreed white; convert to 8 or 16 bits, unsigned"):
        decode(buffer.getvalue())


def test_a_tile_that_is_far_larger_than_its_image_is_refused() -> None:
    with pytest.raises(ImageError, match=r"64 x 64 pixels \(TIFF, L\) take 2\.1 GB to decode, more than the 1\.6 GB"):
        decode(tiff(b"", 64, 64, 8, packed=True, tile=46_000))
