"""Pillow's readers of image files, as copies that belong to featx alone.

Pillow's modules have global switches. With `ImageFile.LOAD_TRUNCATED_IMAGES`, which many notebooks set, a damaged file
reads as if it were whole; `Image.MAX_IMAGE_PIXELS` and `TiffImagePlugin.READ_LIBTIFF` are others. Features must not
depend on what other code in the process has set, and changing a switch for a moment would change it for other threads.
So the code of these modules is run a second time, in modules that nobody else can reach.
"""

from __future__ import annotations

import builtins
import io
import itertools
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import Any

from PIL import Image

from featx.errors import ImageError

# What people use for photographs, instead of the 40 formats that Pillow knows. JPEG includes MPO, the stereo files of
# some cameras.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "HEIF")
# Pillow itself raises beyond this; checked in the header, before a pixel is allocated.
MAX_PIXELS = 178_956_970
HEAD_BYTES = 64  # what `kind` looks at
STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"BM": "BMP", b"GIF87a": "GIF", b"GIF89a": "GIF"}
STARTS |= dict.fromkeys((b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0"), "TIFF")
STARTS |= {b"P%c" % kind: "PPM" for kind in b"0123456fy"}
BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"hei": "HEIF", b"hev": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF"}
BITS, COMPRESSION, PHOTOMETRIC, PLANES, SAMPLE_FORMAT, SUBSAMPLING = 258, 259, 262, 284, 339, 530  # tags of TIFF


def kind(head: bytes) -> str:
    """Which of `FORMATS` the first `HEAD_BYTES` bytes of a file are of. Raises `ImageError` for any other file."""
    found = next((name for start, name in STARTS.items() if head.startswith(start)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        found = "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        found = next((name for brand, name in BRANDS.items() if brand in brands), None)
    if not found:
        raise ImageError(f"not an image in a format of {', '.join(FORMATS)}" if head else "an empty file")
    return found


def opened(data: bytes) -> Any:
    """The image in a file: a Pillow image of which only the header has been read. Raises `ImageError`, and what Pillow
    raises on damage."""
    found = kind(data[:HEAD_BYTES])
    if found == "HEIF":
        return _heif(data)
    if found == "AVIF" and not _has_avif():
        raise ImageError("an AVIF image, which this Pillow does not read; `pip install --upgrade pillow`")
    if found == "TIFF":
        return _tiff(data)
    return reader(found)(io.BytesIO(data))


def _has_avif() -> bool:
    from PIL import features

    return bool(features.check("avif"))


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
        raise ImageError("a HEIC (HEIF) image, which featx reads after `pip install pillow-heif`") from None
    return open_heif(io.BytesIO(data), convert_hdr_to_8bit=True, reload_size=False)


def _tiff(data: bytes) -> Any:
    """Pillow itself decodes what is not compressed, but not all kinds of it rightly: libtiff takes those."""
    own, libtiff = _tiff_modules()
    for module in (own, libtiff):
        with suppress(SyntaxError):
            image = module.TiffImageFile(io.BytesIO(data))
            tags = image.tag_v2
            apart = tags.get(PLANES) == 2 or (tags.get(PHOTOMETRIC) == 6 and tags.get(SUBSAMPLING, (1, 1)) != (1, 1))
            if module is libtiff or not apart:
                return image
    raise ImageError(_unread(data, own))


def _unread(data: bytes, module: Any) -> str:
    """Why a TIFF is not read: what its samples are."""
    tags = module.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    bits, means = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (1,))[0]
    what = {1: "unsigned", 2: "signed", 3: "floating point"}.get(means, "of an unknown kind")
    kind = f"{what}, {len(bits)} a pixel, photometric {tags.get(PHOTOMETRIC)}, compression {tags.get(COMPRESSION, 1)}"
    pixels = f"{max(bits)}-bit pixels (TIFF: {kind})"
    if means == 1 and max(bits) <= 16:
        return f"{pixels} are not read by Pillow; convert to 8 bits, grey or RGB"
    return f"{pixels} have no agreed white; convert to 8 or 16 bits, unsigned"


def _own(name: str, **given: Any) -> Any:
    """A module from the code of one of Pillow's. given: what it imports from Pillow, instead of Pillow's own."""
    spec = find_spec(f"PIL.{name}")
    assert spec is not None and spec.loader is not None

    def imported(what: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0) -> Any:
        found = builtins.__import__(what, globals, locals, names, level)
        return found if what else SimpleNamespace(**{**vars(found), **given})  # `from . import Image, ImageFile`

    module = module_from_spec(spec)
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": imported}
    spec.loader.exec_module(module)
    return module


@cache
def reader(name: str) -> Any:
    """The class of Pillow's, in a copy of its own, that reads a format."""
    plugin = {"WEBP": "WebP"}.get(name, name.capitalize())
    return getattr(_own(f"{plugin}ImagePlugin", **_files()), f"{plugin}ImageFile")


@cache
def _tiff_modules() -> tuple[Any, Any]:
    """Pillow's TIFF module twice, with the kinds of samples that are decoded rightly; the second always by libtiff."""
    from PIL import TiffImagePlugin

    own, libtiff = _own("TiffImagePlugin", **_files()), _own("TiffImagePlugin", **_files())
    libtiff.READ_LIBTIFF = True
    for module in (own, libtiff):  # `Image.getexif` asserts that a TIFF image is of Pillow's own class
        mask = {"__class__": property(lambda self: TiffImagePlugin.TiffImageFile)}
        module.TiffImageFile = type("TiffImageFile", (module.TiffImageFile,), mask)

    # signed samples and floats have no agreed black and white
    known = {key: modes for key, modes in own.OPEN_INFO.items() if key[2] == (1,) and max(key[4]) <= 16}
    for order, end in itertools.product((b"II", b"MM"), (0, 1)):  # `decode` turns those whose white is 0
        mode = "I;16" if order == b"II" else "I;16B"
        known[order, end, (1,), 1, (16,), ()] = mode, mode
        known[order, end, (1,), 1, (12,), ()] = "I;16", "I;12"  # packed alike in both orders
    own.OPEN_INFO = known
    libtiff.OPEN_INFO = {key: modes for key, modes in known.items() if modes[0] != "La"}  # its alpha would be lost
    return own, libtiff


@cache
def _files() -> dict[str, Any]:
    """What the readers import from Pillow. Made when the first image is read: a run on cached features needs none."""
    Image.preinit()  # registers the decoders that Pillow has in Python
    image = SimpleNamespace(**vars(Image))
    vars(image).update({name: lambda *values: None for name in vars(Image) if name.startswith("register_")})
    image._decompression_bomb_check = limit
    return {"Image": image, "ImageFile": _own("ImageFile", Image=image)}
