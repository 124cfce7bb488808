"""Limits of decoding: memory on all threads together, scans, and switches of Pillow that other code sets."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile, PngImagePlugin, TiffImagePlugin, features

from featx.errors import ImageError
from featx.pixels.decoding import Room, decode
from featx.pixels.jpeg import header
from featx.sources.source import MAX_BYTES, read_image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def detailed(width: int = 160, height: int = 120) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of Pillow's switches as another part of the program may have set them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(TiffImagePlugin, "READ_LIBTIFF", True)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1)
    monkeypatch.setattr(GifImagePlugin, "LOADING_STRATEGY", GifImagePlugin.LoadingStrategy.RGB_ALWAYS)
    monkeypatch.setitem(Image.OPEN, "JPEG", (lambda file, name: Image.new("RGB", (1, 1)), None))


SAVED: dict[str, dict[str, Any]] = {
    **{format: {} for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")},
    **({"AVIF": {}} if features.check("avif") else {}),
}


@pytest.mark.parametrize("format", SAVED)
def test_a_damaged_file_is_refused_whatever_pillows_switches_say(format: str, switches: None) -> None:
    data = encoded(detailed(), format)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    for share in (0.34, 0.7, 0.95):
        with pytest.raises(ImageError):
            decode(data[: int(share * len(data))])


@pytest.mark.parametrize("format", SAVED)
def test_a_whole_file_has_the_same_pixels_whatever_pillows_switches_say(format: str, request: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(detailed(), format, **({} if format in ("BMP", "PPM", "GIF") else {"exif": exif}))
    before = np.asarray(decode(data))
    request.getfixturevalue("switches")
    assert (np.asarray(decode(data)) == before).all()
    assert before.shape == ((120, 160, 3) if format in ("BMP", "PPM", "GIF") else (160, 120, 3))
    if format == "JPEG":
        assert (found := header(data)) is not None and found.upright == (120, 160)


def test_a_broken_chunk_beside_the_pixels_of_a_png_is_refused_whatever_pillows_switches_say(switches: None) -> None:
    data = encoded(detailed(), "PNG", dpi=(72, 72))
    at = data.index(b"pHYs")
    with pytest.raises(ImageError, match="bad header checksum"):
        decode(data[: at + 5] + b"\xff" + data[at + 6 :])


def test_pillows_own_readers_stay_as_they_are(switches: None) -> None:
    data = encoded(detailed(), "PNG")
    decode(data)
    assert Image.OPEN["PNG"][0] is PngImagePlugin.PngImageFile
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data), formats=["PNG"])


# --- time and memory ------------------------------------------------------------------------------


def progressive(width: int, height: int, scans: int) -> bytes:
    """A grey JPEG whose last scan is there so many times more."""
    data = encoded(Image.new("L", (width, height), 77), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda"))
    return data[:-2] + data[last:-2] * scans + data[-2:]


def test_a_jpeg_of_very_many_scans_is_named_and_one_of_some_is_read() -> None:
    with pytest.raises(ImageError, match=r"a JPEG of 6,006 scans, which would take very long to decode; save it again"):
        decode(progressive(8000, 8000, 6000))
    assert decode(progressive(300, 200, 50)).size == (300, 200)
    for options in ({"comment": b"\xff\xda" * 5000}, {"progressive": True}):  # in a comment, in a film behind the image
        assert decode(encoded(detailed(), "JPEG", **options) + b"\xff\xda" * 5000).size == (160, 120)


MEASURED = """
import sys, threading
from pathlib import Path
from featx.pixels import decoding
data = Path(sys.argv[1]).read_bytes()
decoding.decode(data[:0] or Path(sys.argv[2]).read_bytes())  # what is imported late
claimed = decoding._prepared(decoding.opened(data), data, None)
decoding.ROOM = decoding.Room(claimed * 3 // 2)
peak = lambda: int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1]) << 10
before = peak()
def one():
    with decoding.decoded(data) as image:
        image.resize((9, 9))
threads = [threading.Thread(target=one) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(claimed, peak() - before)
"""


def png(side: int, depth: int, colour: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    rows = chunk(b"IDAT", zlib.compress(bytes(side * depth // 8 + 1) * side, 1))
    return b"\x89PNG\r\n\x1a\n" + head + palette + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "most"), [("grey 16", 6), ("palette", 5), ("webp", 20), ("progressive", 10), ("jpeg", 4)]
)
def test_four_threads_together_take_no_more_than_one_large_image_is_said_to_take(
    kind: str, most: int, tmp_path: Path
) -> None:
    side = 2400
    plain = Image.new("RGB", (side, side))
    data = {
        "grey 16": lambda: png(side, 16, 0),
        "palette": lambda: png(side, 8, 3),
        "webp": lambda: encoded(plain, "WEBP", method=0),
        "progressive": lambda: encoded(plain, "JPEG", progressive=True, subsampling=0),
        "jpeg": lambda: encoded(plain, "JPEG"),
    }[kind]()
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(encoded(detailed(), "PNG"))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "large"), str(tmp_path / "small")]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc would keep up to 64 MB a thread
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=exact)
    claimed, taken = map(int, run.stdout.split())
    assert most * side**2 <= claimed <= 1.02 * most * side**2
    assert taken < claimed + 10e6  # all four at once would take four times as much


def test_room_is_taken_by_as_many_as_fit_and_given_back_after_an_error() -> None:
    room, held, most = Room(100), [0], [0]
    lock = threading.Lock()

    def hold(size: int) -> None:
        for _ in range(50):
            with room.take(size):
                with lock:
                    held[0] += size
                    most[0] = max(most[0], held[0])
                with lock:
                    held[0] -= size

    threads = [threading.Thread(target=hold, args=(size,)) for size in (100, 60, 50, 40, 30, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ImageError), room.take(70):
        raise ImageError("damaged")
    assert most[0] <= 100 and room.free == 100


@pytest.mark.parametrize("start", [b"", b"MZ\x90\0", b"ftyp" * 4])
def test_a_file_of_two_gigabytes_that_is_no_image_is_named_after_its_first_bytes(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "disk.jpg"
    path.write_bytes(start)
    with open(path, "r+b") as file:
        file.truncate(MAX_BYTES)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(ImageError, match="not an image in a format of JPEG"):
        read_image(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


# --- HEIC -----------------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_a_heic_file_names_the_package_that_reads_it() -> None:
    with pytest.raises(ImageError, match=r"a HEIC \(HEIF\) image, which featx reads after `pip install pillow-heif`"):
        decode(HEIC)


def test_a_heic_file_is_read_where_its_package_is_installed() -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install featx[heif]")
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = detailed()
    pillow_heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    found = decode(buffer.getvalue())
    assert found.size == (120, 160)
    assert np.abs(np.asarray(found).astype(int) - np.rot90(np.asarray(image), -1)).mean() < 10  # samples of chroma
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(buffer.getvalue()[: len(buffer.getvalue()) // 2])
