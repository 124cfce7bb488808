"""What a JPEG's header says, against Pillow's answers, and which files are left to Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from jpegs import encoded, photo

from featx.pixels import jpeg
from featx.pixels.decoding import decode
from featx.pixels.jpeg import Header, header


@pytest.mark.parametrize(
    ("subsampling", "sampling"), [("4:4:4", (1, 1)), ("4:2:2", (2, 1)), ("4:2:0", (2, 2)), (None, (2, 2))]
)
def test_a_baseline_colour_jpeg_is_known_by_its_size_and_sampling(
    subsampling: str | None, sampling: tuple[int, int]
) -> None:
    data = encoded(photo(), **({"subsampling": subsampling} if subsampling else {}))
    assert header(data) == Header(61, 37, sampling, 1)


def test_a_grey_jpeg_and_one_with_trailing_bytes_are_taken() -> None:
    assert header(encoded(photo(mode="L"))) == Header(61, 37, (1, 1), 1)
    assert header(encoded(photo()) + b"\0" * 1000) == Header(61, 37, (2, 2), 1)
    icc = encoded(photo(), icc_profile=b"\xff\xd9\xff\xc2" * 40_000, comment=b"\xff\xda")
    assert header(icc) == Header(61, 37, (2, 2), 1)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_the_upright_size_is_pillows_for_every_orientation(orientation: int) -> None:
    data = encoded(photo(), orientation=orientation)
    found = header(data)
    assert found is not None
    assert found.orientation == (orientation if 2 <= orientation <= 8 else 1)
    assert found.upright == decode(data).size


def test_the_orientation_in_xmp_counts_as_it_does_for_pillow() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    found = header(encoded(photo(), xmp=xmp))
    assert found is not None
    assert found.upright == decode(encoded(photo(), xmp=xmp)).size == (37, 61)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_says_nothing() -> None:
    found = header(encoded(photo(), exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\x01\x12\xff\xff"))
    assert found == Header(61, 37, (2, 2), 1)


def rgb_by_adobe() -> bytes:
    return encoded(photo(), keep_rgb=True)


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        encoded(photo(), progressive=True),
        encoded(photo(mode="CMYK")),
        rgb_by_adobe(),
        encoded(photo(), "PNG"),
        encoded(photo(15, 200)),
        encoded(photo())[:-2],
        encoded(photo())[: len(encoded(photo())) // 2],
        encoded(photo())[:300],
        changed(encoded(photo()), b"\xff\xc0", b"\xff\xc1"),
        changed(
            encoded(photo()), b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01", b"\x03\x01\x41\x00\x02\x11\x01\x03\x11\x01"
        ),
        changed(encoded(photo()), b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01"),
        changed(encoded(photo()), b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
        changed(encoded(photo()), b"\xff\xdb", b"\x00\xdb"),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_everything_else_is_left_to_pillow(data: bytes) -> None:
    assert header(data) is None


def test_what_is_too_large_for_a_group_is_left_to_pillow() -> None:
    data, size = encoded(photo()), b"\xff\xc0\x00\x11\x08" + bytes([0, 37, 0, 61])
    for side, taken in ((1 << 13, True), ((1 << 13) + 1, False)):  # 2**26 pixels, and some more
        said = size[:5] + side.to_bytes(2, "big") * 2
        assert (header(changed(data, size, said)) is not None) == taken
    filled = data + b"\xff\xd9" * ((jpeg.MAX_BYTES - len(data)) // 2)
    assert header(filled) is not None and header(filled + b"\xff\xd9") is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_bytes_make_the_header_fail() -> None:
    rng = np.random.default_rng(1)
    data = encoded(photo(), orientation=6)
    taken = 0
    for _ in range(3000):
        bad = bytearray(data[: rng.integers(4, 700)] if rng.random() < 0.3 else data)
        for at in rng.integers(2, min(len(bad), 700), rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        found = header(bytes(bad))
        taken += found is not None
        assert found is None or (found.width >= 16 and found.sampling in jpeg.SAMPLINGS)
    assert 0 < taken < 3000
