"""From bytes to pixels: every format against Pillow's and torchvision's own answers, and every way to be no image."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from featx.errors import FeatxError, ImageError
from featx.pixels.decoding import decode
from featx.pixels.preprocess import MAX_ASPECT, Preprocess
from featx.pixels.readers import MAX_PIXELS

# a 24 x 24 JPEG file, so that the decoder is pinned apart from the encoder
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6j"
    "q62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKT/wAARCAAYABgDASIAAhEBAxEB/8QAGAABAQEBAQAAAAAAAAAAAAAAAAQDAgX/xAAWEAEBAQAAAAAAAAAAAAAAAAAA"
    "AgP/xAAYAQACAwAAAAAAAAAAAAAAAAADBQABBv/EABkRAAMBAQEAAAAAAAAAAAAAAAABAgMRIf/aAAwDAQACEQMRAD8A8OMm8ZNo"
    "yURktMmWpjGQujIETGE6+HMZKIyAFGfyplEZACIYTT4f/9k="
)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image with as much detail as a photograph has."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes | Image.Image) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options"),
    [
        *(("PNG", {}), ("BMP", {}), ("PPM", {}), ("WEBP", {"lossless": True})),
        *(("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_adobe_deflate"})),
    ],
)
def test_lossless_formats_decode_to_the_pixels_written(format: str, options: dict[str, Any]) -> None:
    image = smooth(61, 37)
    assert (pixels(encoded(image, format, **options)) == np.asarray(image)).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchvision hands its decoders to another package
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_jpeg_decodes_as_torchvisions_decoder_does(options: dict[str, Any]) -> None:
    import torch
    from torchvision.io import decode_image

    data = encoded(smooth(130, 97), "JPEG", **options)
    expected = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8)).numpy().transpose(1, 2, 0)
    difference = np.abs(pixels(data).astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.1


def test_lossy_webp_is_what_pillow_reads() -> None:
    data = encoded(smooth(61, 37), "WEBP", quality=70)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_grey_becomes_three_equal_channels(format: str) -> None:
    grey = np.asarray(smooth(61, 37).convert("L"))
    assert (pixels(encoded(Image.fromarray(grey), format)) == grey[:, :, None]).all()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_one_bit_becomes_black_and_white(format: str) -> None:
    bits = np.asarray(smooth(61, 37).convert("L")) > 127
    assert (pixels(encoded(Image.fromarray(bits), format)) == np.where(bits, 255, 0)[:, :, None]).all()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "GIF"])
def test_a_palette_becomes_its_colours(format: str) -> None:
    image = smooth(61, 37).quantize(32)
    assert (pixels(encoded(image, format)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 8))])
def test_a_palette_with_transparency_keeps_the_colours_under_it(transparency: int | bytes) -> None:
    image = smooth(61, 37).quantize(32)
    data = encoded(image, "PNG", transparency=transparency)
    assert Image.open(io.BytesIO(data)).info["transparency"] is not None
    assert (pixels(data) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_alpha_is_dropped_and_the_colours_under_it_stay(format: str, options: dict[str, Any]) -> None:
    image = smooth(61, 37)
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.arange(61 * 37).reshape(37, 61).astype(np.uint8)))
    assert (pixels(encoded(clear, format, **options)) == np.asarray(image)).all()


def test_grey_with_alpha_is_grey() -> None:
    grey = smooth(61, 37).convert("L")
    both = grey.convert("LA")
    both.putalpha(128)
    assert (pixels(encoded(both, "PNG")) == np.asarray(grey)[:, :, None]).all()


@pytest.mark.parametrize(("format", "far"), [("TIFF", 0), ("JPEG", 12)])
def test_cmyk_becomes_rgb(format: str, far: int) -> None:
    image = smooth(61, 37)
    found = pixels(encoded(image.convert("CMYK"), format, **({"quality": 100} if far else {})))
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= far


def grey16() -> np.ndarray:
    return (np.arange(61 * 37, dtype=np.uint32).reshape(37, 61) * 65535 // (61 * 37 - 1)).astype(np.uint16)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(grey16()), "PNG"),
        encoded(Image.fromarray(grey16()), "TIFF"),
        encoded(Image.fromarray(grey16().astype(">u2")), "TIFF"),
        b"P5 61 37 65535\n" + grey16().astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "tiff-big-endian", "pgm"],
)
def test_sixteen_bit_grey_is_scaled_not_clipped(data: bytes) -> None:
    expected = np.rint(grey16() / 257)
    assert (pixels(data) == expected[:, :, None]).all()
    assert (expected.min(), expected.max()) == (0, 255)


def test_ten_bit_pgm_is_scaled_by_its_own_white() -> None:
    grey = (grey16() >> 6).astype(np.uint16)
    found = pixels(b"P5 61 37 1023\n" + grey.astype(">u2").tobytes())
    assert np.abs(found[:, :, 0] - grey * (255 / 1023)).max() < 0.51


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    rgb = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    data = png_file(7, 5, rows, depth=16, colour=2)
    assert (pixels(data) == rgb >> 8).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_pixels_are_refused_with_a_remedy(dtype: type) -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(ImageError, match=r"32-bit pixels .* convert to 8 or 16 bits"):
        decode(data)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_a_film_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == (255, 0, 0)).all()


def test_of_a_stereo_jpeg_the_first_image_counts() -> None:
    data = encoded(smooth(40, 30), "MPO", save_all=True, append_images=[smooth(40, 30, seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(pixels(data).astype(int) - pixels(encoded(smooth(40, 30), "JPEG"))).max() == 0


def tag(format: str, kind: str, orientation: int) -> dict[str, Any]:
    """What Pillow's `save` needs to write an orientation as EXIF, as XMP, or as older programs put EXIF into a PNG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    if kind == "EXIF":
        return {"exif": exif}
    if format == "TIFF":
        return {"tiffinfo": {700: xmp.encode()}}
    if format != "PNG":
        return {"xmp": xmp.encode()}
    text = PngInfo()
    data = exif.tobytes()
    profile = f"\nexif\n{len(data):8}\n{data.hex()}\n"
    text.add_text(*(("Raw profile type exif", profile) if kind == "profile" else ("XML:com.adobe.xmp", xmp)))
    return {"pnginfo": text}


@pytest.mark.parametrize(
    ("format", "kind", "options"),
    [
        *((format, kind, {}) for format in ("PNG", "TIFF") for kind in ("EXIF", "XMP")),
        ("PNG", "profile", {}),
        *(("WEBP", kind, {"lossless": True}) for kind in ("EXIF", "XMP")),
        *(("JPEG", kind, {"quality": 100}) for kind in ("EXIF", "XMP")),
        ("MPO", "EXIF", {"quality": 100}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied_once_however_often_an_image_is_decoded(
    format: str, kind: str, options: dict[str, Any], mode: str, orientation: int
) -> None:
    image = smooth(48, 32).convert(mode)
    stored = np.asarray(image.convert("RGB"))
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: np.rot90(stored, 2),
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    data = encoded(image, format, **tag(format, kind, orientation), **options)
    if format == "MPO":  # alone, Pillow writes such a file as JPEG
        data = encoded(image, format, save_all=True, append_images=[image], **tag(format, kind, orientation), **options)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == turned.shape[1::-1]  # the tag is there
    once = decode(data)
    assert once.size == turned.shape[1::-1]
    assert np.abs(np.asarray(once).astype(int) - turned).mean() < (4 if format in ("JPEG", "MPO") else 1e-9)
    for again in (decode(once), decode(once.copy()), decode(once.convert("L").convert("RGB"), 16)):
        assert again.size == once.size
    assert (pixels(decode(once)) == np.asarray(once)).all()
    assert once.getexif().get(0x0112, 1) == once.copy().getexif().get(0x0112, 1) == 1
    assert (Preprocess(36, 24)(once) == Preprocess(36, 24)(data)).all()


def test_an_image_in_memory_keeps_its_own_tag_and_is_turned_in_what_is_decoded() -> None:
    data = encoded(smooth(48, 32), "PNG", **tag("PNG", "EXIF", 6))
    given = Image.open(io.BytesIO(data))
    once = decode(given)
    assert (np.asarray(once) == np.rot90(np.asarray(given), -1)).all()
    assert given.getexif()[0x0112] == 6 and "exif" in given.info
    assert (pixels(decode(once)) == np.asarray(once)).all()


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_image(format: str, exif: bytes) -> None:
    image = smooth(48, 32)
    assert (pixels(encoded(image, format, exif=exif)) == pixels(encoded(image, format))).all()


def test_arrays_and_pillow_images_give_the_pixels_of_their_files() -> None:
    image = smooth(300, 280)
    expected = Preprocess()(encoded(image, "PNG"))
    assert expected.shape == (3, 224, 224) and expected.dtype == np.uint8 and expected.flags.c_contiguous
    assert (Preprocess()(image) == expected).all()
    assert (Preprocess()(np.asarray(image)) == expected).all()
    assert (Preprocess()(image.convert("RGBA")) == expected).all()


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)[:, :, :2]]
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected uint8 \[H, W, 3\] RGB, got "):
        decode(array)


def test_threads_that_decode_leave_pythons_warnings_as_they_were() -> None:
    data = encoded(smooth(300, 200), "JPEG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decode, [data] * 200))) == 200
    assert warnings.filters == before


# --- files that are not images --------------------------------------------------------------------


def png_file(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_truncated_file_is_an_image_error(format: str, share: float) -> None:
    data = encoded(smooth(160, 120), format)
    assert pixels(data).shape == (120, 160, 3)
    with pytest.raises(ImageError, match=r"cannot be decoded|not an image in a format of"):
        decode(data[: int(share * len(data))])


def test_an_empty_file_says_so() -> None:
    with pytest.raises(ImageError, match=r"^an empty file$"):
        decode(b"")


@pytest.mark.parametrize(
    "data",
    [b"a text file named .jpg\n" * 20, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0" * 4096, b"%PDF-1.7\n"],
)
def test_a_file_that_is_not_an_image_gets_the_formats_named(data: bytes) -> None:
    with pytest.raises(ImageError, match="not an image in a format of JPEG, PNG, WEBP, BMP, TIFF, PPM, GIF"):
        decode(data)


@pytest.mark.parametrize("format", ["ICO", "PCX", "TGA", "EPS", "PDF", "SGI"])
def test_formats_that_nobody_uses_for_photographs_are_not_parsed(format: str) -> None:
    with pytest.raises(ImageError, match="not an image in a format of"):
        decode(encoded(smooth(32, 32), format))


@pytest.mark.parametrize(
    "data",
    [
        png_file(50_000, 50_000, b""),
        b"P6 50000 50000 255\n",
        b"GIF89a" + (size := struct.pack("<HH", 60_000, 60_000)) + b"\0\0\0,\0\0\0\0" + size + b"\0\2\1\0\0;",
        b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, *[0] * 6),
    ],
    ids=["png", "ppm", "gif", "bmp"],
)
@pytest.mark.parametrize("unlimited", [False, True])
def test_a_decompression_bomb_is_refused_by_its_header(
    data: bytes, unlimited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unlimited:  # as programs set it that trust their images
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"pixels.*scale the image down if you trust it"):
        decode(data)


def test_the_bomb_limit_is_pillows_own() -> None:
    assert MAX_PIXELS == 2 * (1024**3 // 4 // 3)


def test_flipped_bits_in_a_png_are_noticed() -> None:
    data = bytearray(encoded(smooth(160, 120), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(bytes(data))


def test_random_damage_gives_pixels_or_an_image_error_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"):
            whole = encoded(smooth(40, 30), format)
            for _ in range(150):
                data = bytearray(whole)
                for at in rng.integers(0, min(len(data), 200 if rng.random() < 0.5 else len(data)), 3):
                    data[at] = rng.integers(256)
                try:
                    found = Preprocess(resize=16, crop=16)(bytes(data))
                    assert found.shape == (3, 16, 16)
                except ImageError:
                    refused += 1
    assert 100 < refused < 1050


# --- resizing and cropping ------------------------------------------------------------------------


def reference(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The whole image resized, then cropped, by torchvision on a Pillow image: `int [3, crop, crop]`."""
    from torchvision.transforms import InterpolationMode, functional

    mode = InterpolationMode(preprocess.interpolation)
    resized = functional.resize(image, [preprocess.resize], interpolation=mode, antialias=True)
    return np.asarray(functional.center_crop(resized, [preprocess.crop])).transpose(2, 0, 1).astype(int)


def test_photographs_give_the_pixels_of_torchvisions_preset(photos: Path) -> None:
    import torch
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(crop_size=224, resize_size=256)
    preprocess = Preprocess()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    paths = sorted((photos / "val").glob("*/*.jpg"))[::8]
    assert len(paths) == 20
    differences = []
    for path in paths:
        expected = preset(Image.open(path).convert("RGB")) * std + mean
        found = preprocess(path.read_bytes())
        difference = np.abs(found.astype(int) - (expected * 255).round().int().numpy())
        assert difference.max() <= 1, path
        differences.append(difference.mean())
    assert np.mean(differences) < 0.01


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess(resize=232), Preprocess(342, 299)], ids=("256", "232", "342")
)
@pytest.mark.parametrize(
    "size",
    [
        *((640, 480), (481, 333), (333, 481), (256, 256), (224, 224), (257, 255), (37, 41), (1999, 1501)),
        *((1, 1), (1, 2), (2, 1), (1, 64), (64, 1), (3, 190), (225, 3000), (3000, 225)),
    ],
)
def test_odd_sizes_give_torchvisions_pixels(preprocess: Preprocess, size: tuple[int, int]) -> None:
    image = smooth(*size)
    found = preprocess(image)
    assert found.shape == (3, preprocess.crop, preprocess.crop)
    difference = np.abs(found - reference(image, preprocess))
    assert difference.max() <= 2 and (difference == 2).mean() < 0.001


@pytest.mark.parametrize("size", [(640, 480), (333, 481), (256, 256), (37, 41), (1, 1), (225, 900)])
def test_bicubic_gives_torchvisions_pixels(size: tuple[int, int]) -> None:
    preprocess = Preprocess(resize=248, interpolation="bicubic")
    image = smooth(*size)
    difference = np.abs(preprocess(image) - reference(image, preprocess))
    assert difference.max() <= 2 and difference.mean() < 0.05


@pytest.mark.parametrize("size", [(1, MAX_ASPECT + 1), (5000, 1), (6500, 100)])
def test_slivers_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels are beyond the aspect ratio of 1:64"):
        Preprocess()(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(640, 480), (333, 481), (37, 41), (256, 300)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_larger_square_has_the_crop_in_its_centre(size: tuple[int, int], interpolation: str) -> None:
    preprocess = Preprocess(interpolation=interpolation)
    image = smooth(*size)
    crop, whole = preprocess.square(image, 224), preprocess.square(image, 256)
    assert crop.shape == (224, 224, 3) and whole.shape == (256, 256, 3)
    assert np.abs(whole[16:240, 16:240].astype(int) - crop).max() <= 1


# --- identity -------------------------------------------------------------------------------------


def golden_png() -> bytes:
    y, x = np.mgrid[0:300, 0:401]
    rgb = np.stack([x * y // 97, x * 5 + y * 3, (x // 20 + y // 20) % 2 * 255], axis=2) % 256
    return encoded(Image.fromarray(rgb.astype(np.uint8)), "PNG")


def test_golden_pixels() -> None:
    """If this fails, the pixels have changed: raise the revision in `Preprocess.pixels`, then pin it again."""
    assert Preprocess().pixels == "pillow/1"
    digests = {
        name: hashlib.sha256(preprocess(data).tobytes()).hexdigest()[:16]
        for name, preprocess, data in (
            ("bilinear", Preprocess(), golden_png()),
            ("bicubic", Preprocess(resize=248, interpolation="bicubic"), golden_png()),
            ("jpeg", Preprocess(), JPEG),
        )
    }
    assert digests == {"bilinear": "54843f723bfd4564", "bicubic": "5553d7e6ec106dec", "jpeg": "4079f57ac06011a4"}


@pytest.mark.parametrize(
    "values", [{"interpolation": "nearest"}, {"crop": 257}, {"crop": 0}, {"mean": (0.5,)}, {"std": (0.2, 0.2, 0.0)}]
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(FeatxError):
        Preprocess(**values)


def test_a_preprocess_survives_json() -> None:
    import json

    preprocess = Preprocess(resize=342, crop=299, interpolation="bicubic", mean=(0.5, 0.5, 0.5))
    again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
    assert again == preprocess and hash(again) == hash(preprocess)
