"""Pillow's readers of image files, as copies that belong to featx alone.

Pillow's modules have global switches. With `ImageFile.LOAD_TRUNCATED_IMAGES`, which many notebooks set, a damaged file
reads as if it were whole; `Image.MAX_IMAGE_PIXELS` and `TiffImagePlugin.READ_LIBTIFF` are others. Features must not
depend on what other code in the process has set, and changing a switch for a moment would change it for other threads.
So the code of these modules is run a second time, in modules that nobody else can reach.
"""

from __future__ import annotations

import builtins
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any

from PIL import Image, TiffImagePlugin, features

from featx.errors import ImageError

# What people use for photographs, instead of the 40 formats that Pillow knows. JPEG includes MPO, the stereo files of
# some cameras.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "HEIF")
# Pillow itself raises beyond this; checked in the header, before a pixel is allocated.
MAX_PIXELS = 178_956_970
HEAD_BYTES = 64  # what `kind` looks at
TIFF_STARTS = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
PLAIN, SIGNED, FLOAT = (1,), (2,), (3,)  # sample formats
PHOTOMETRIC, BITS, PLANES, SUBSAMPLING, SAMPLE_FORMAT = 262, 258, 284, 530, 339


def kind(head: bytes) -> str | None:
    """Which of `FORMATS` the first `HEAD_BYTES` bytes of a file are of; None for any other file."""
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIF" if any(brand in brands for brand in (b"hei", b"hev", b"mif1", b"msf1")) else None
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    starts = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"BM": "BMP", b"GIF87a": "GIF", b"GIF89a": "GIF"}
    starts |= dict.fromkeys(TIFF_STARTS, "TIFF") | {b"P%c" % kind: "PPM" for kind in b"0123456fy"}
    return next((name for start, name in starts.items() if head.startswith(start)), None)


def opened(data: bytes) -> Any:
    """The image in a file: a Pillow image of which only the header has been read. Raises `ImageError`, and what Pillow
    raises on damage."""
    found = kind(data[:HEAD_BYTES])
    if found is None:
        what = "an empty file" if not data else f"not an image in a format of {', '.join(FORMATS)}"
        raise ImageError(what)
    if found == "HEIF":
        return _heif(data)
    if found == "AVIF" and not features.check("avif"):
        raise ImageError("an AVIF image, which this Pillow was built without; `pip install --upgrade pillow` reads it")
    if found == "TIFF":
        return _tiff(data)
    return READERS[found](io.BytesIO(data))


def limit(size: Sequence[int], **options: Any) -> None:
    """Raise `ImageError` for more than `MAX_PIXELS`."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that featx "
            "decodes; scale the image down if you trust it"
        )


def _heif(data: bytes) -> Any:
    try:
        from pillow_heif import open_heif
    except ImportError:
        raise ImageError("a HEIC (HEIF) image, which Pillow alone does not read; `pip install pillow-heif`") from None
    return open_heif(io.BytesIO(data), convert_hdr_to_8bit=True, reload_size=False)


def _tiff(data: bytes) -> Any:
    """Pillow itself decodes what is not compressed, but not all kinds of it rightly: libtiff takes those."""
    for module in (TIFF, LIBTIFF):
        with suppress(SyntaxError):
            image = module.TiffImageFile(io.BytesIO(data))
            tags = image.tag_v2
            apart = tags.get(PLANES) == 2 or (tags.get(PHOTOMETRIC) == 6 and tags.get(SUBSAMPLING) != (1, 1))
            if module is LIBTIFF or not apart:
                return image
    raise ImageError(_unread(data))


def _unread(data: bytes) -> str:
    """Why a TIFF is not read: what its samples are."""
    tags = TIFF.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    bits, means = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, PLAIN)[0]
    what = {1: "unsigned", 2: "signed", 3: "floating point"}.get(means, "of an unknown kind")
    pixels = f"{max(bits)}-bit pixels (TIFF, {what}, {len(bits)} a pixel, photometric {tags.get(PHOTOMETRIC)})"
    if means == 1 and max(bits) <= 16:
        return f"{pixels} are not read by Pillow; convert to 8 bits, grey or RGB"
    return f"{pixels} have no agreed white; convert to 8 or 16 bits, unsigned"


def _own(name: str, **given: Any) -> Any:
    """A module from the code of one of Pillow's. given: what it imports from Pillow, instead of Pillow's own."""
    spec = find_spec(f"PIL.{name}")
    assert spec is not None and spec.loader is not None

    def imported(
        what: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        names: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        found = builtins.__import__(what, globals, locals, names or (), level)
        return found if what else SimpleNamespace(**{**vars(found), **given})  # `from . import Image, ImageFile`

    module = module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": imported}
    spec.loader.exec_module(module)
    return module


def _nothing(*values: Any) -> None:
    """In place of Pillow's registration."""


Image.preinit()  # registers the decoders that Pillow has in Python
_IMAGE = SimpleNamespace(**vars(Image))
vars(_IMAGE).update({name: _nothing for name in vars(Image) if name.startswith("register_")})
_IMAGE._decompression_bomb_check = limit
_FILES = {"Image": _IMAGE, "ImageFile": _own("ImageFile", Image=_IMAGE)}
TIFF, LIBTIFF = _own("TiffImagePlugin", **_FILES), _own("TiffImagePlugin", **_FILES)
LIBTIFF.READ_LIBTIFF = True
for module in (TIFF, LIBTIFF):  # `Image.getexif` asserts that a TIFF image is of Pillow's own class
    mask = {"__class__": property(lambda self: TiffImagePlugin.TiffImageFile)}
    module.TiffImageFile = type("TiffImageFile", (module.TiffImageFile,), mask)
# Signed samples and floats have no agreed black and white. More bits than 8 with 0 as white are turned by `decode`;
# 12 bits are packed alike in both byte orders.
for order, mode in ((b"II", "I;16"), (b"MM", "I;16B")):
    known = {key: modes for key, modes in TIFF.OPEN_INFO.items() if key[2] == PLAIN and max(key[4]) <= 16}
    for white in (0, 1):
        known |= {
            (order, white, PLAIN, 1, (16,), ()): (mode, mode),
            (order, white, PLAIN, 1, (12,), ()): ("I;16", "I;12"),
        }
    TIFF.OPEN_INFO = known
LIBTIFF.OPEN_INFO = {key: modes for key, modes in known.items() if modes[0] != "La"}  # its alpha would be lost
READERS = {
    "JPEG": _own("JpegImagePlugin", **_FILES).JpegImageFile,
    "PNG": _own("PngImagePlugin", **_FILES).PngImageFile,
    "WEBP": _own("WebPImagePlugin", **_FILES).WebPImageFile,
    "BMP": _own("BmpImagePlugin", **_FILES).BmpImageFile,
    "PPM": _own("PpmImagePlugin", **_FILES).PpmImageFile,
    "GIF": _own("GifImagePlugin", **_FILES).GifImageFile,
    "AVIF": _own("AvifImagePlugin", **_FILES).AvifImageFile,
}
