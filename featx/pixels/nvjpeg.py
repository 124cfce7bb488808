"""JPEG decoding on a GPU: from files to cropped pixels, as close to Pillow's as nvJPEG can come."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featx.errors import FeatxError
from featx.pixels.chroma import interpolated
from featx.pixels.jpeg import Encoded
from featx.pixels.preprocess import Preprocess
from featx.pixels.resample import resized

# Decoded pixels on the device at a time; a group of larger images is decoded in parts.
PIXELS = 1 << 27
# JPEG files and a device -> `uint8 [3, H, W]` of each, as stored; None for those that fail.
Decode = Callable[[Sequence[bytes], torch.device], list[Tensor | None]]


class Gpu:
    """Decodes and resizes on one device, with torchvision's decoder and a CUDA stream of its own; for one thread.

    The device may be "cpu", for tests: everything but the decoder itself is the same there.
    """

    def __init__(
        self, preprocess: Preprocess, device: str, decode: Decode | None = None, at_once: int | None = None
    ) -> None:
        """decode: in place of torchvision's decoder. at_once: in place of `PIXELS`."""
        self.preprocess = preprocess
        self.device = torch.device(device)
        self.decode, self.at_once = decode or decoded, at_once or PIXELS
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.inference_mode(), torch.cuda.stream(self.stream):  # None changes nothing
            self.repeats = repeats_chroma(self.device, self.decode)

    def __call__(self, images: Sequence[Encoded]) -> list[list[Tensor] | None]:
        """The views of each image, `uint8 [3, crop, crop]`; None for what cannot be decoded. Waits for the device."""
        out: list[list[Tensor] | None] = []
        with torch.inference_mode(), torch.cuda.stream(self.stream):  # None changes nothing
            for part in _parts(images, self.at_once):
                try:
                    out += self._views(part)
                except torch.cuda.OutOfMemoryError:  # Pillow decodes it, like all that fails here
                    out += [None] * len(part)
                if self.stream is not None:
                    # nvJPEG writes on another stream, which does not wait for this one: it would overwrite
                    # memory that was freed here while this stream still reads it
                    self.stream.synchronize()
        return out

    def _views(self, part: list[Encoded]) -> list[list[Tensor] | None]:
        images: list[Tensor | None] = []
        for image, e in zip(self.decode([e.data for e in part], self.device), part, strict=True):
            if image is not None and list(image.shape) != [3, e.header.height, e.header.width]:
                image = None
            images.append(image)
        kinds = {e.header.sampling for e in part} if self.repeats else ()
        for sampling in kinds:
            alike = [i for i, e in enumerate(part) if e.header.sampling == sampling and images[i] is not None]
            mended = interpolated([image for i in alike if (image := images[i]) is not None], sampling)
            for i, image in zip(alike, mended, strict=True):
                images[i] = image
        images = [i if i is None else upright(i, e.header.orientation) for i, e in zip(images, part, strict=True)]

        looks = [
            (image, (right, top, left, bottom) if mirrored else (left, top, right, bottom))
            for image, e in zip(images, part, strict=True)
            if image is not None
            for _, (left, top, right, bottom), mirrored in e.looks
        ]
        crop, interpolation = self.preprocess.crop, self.preprocess.interpolation
        fill = self.preprocess.fill if self.preprocess.pads else None
        views = iter(resized([image for image, _ in looks], [box for _, box in looks], crop, interpolation, fill))
        pairs = zip(part, images, strict=True)
        return [None if image is None else list(islice(views, len(e.looks))) for e, image in pairs]


def decoded(files: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """`uint8 [3, H, W]` of each JPEG file, as stored; None for those that fail.

    All in one call, or one by one where that fails: one bad file fails its whole batch. Raises `FeatxError`
    where torchvision has no such decoder; it has announced the removal.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        raise FeatxError("this torchvision has no decode_jpeg, which --decode gpu needs; use --decode exact") from None

    tensors = [torch.frombuffer(data, dtype=torch.uint8) for data in files]
    try:
        images: list[Tensor | None] = decode_jpeg(tensors, ImageReadMode.RGB, device)
        return images
    except RuntimeError:
        if len(files) == 1:
            return [None]
    return [image for data in files for image in decoded([data], device)]


def repeats_chroma(device: torch.device, decode: Decode) -> bool:
    """Whether the device's decoder repeats samples of chroma, where Pillow's libjpeg interpolates them.

    nvJPEG under torchvision is said to, but may not always: a small picture of many colours is decoded to see.
    Raises `FeatxError` where the decoder does not work at all.
    """
    tints = np.random.default_rng(0).integers(64, 192, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tints).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95, subsampling=2)
    own = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float()
    (made,) = decode([buffer.getvalue()], device)
    if made is None:
        raise FeatxError(
            f"torchvision's JPEG decoder does not work on {device}: not even a plain picture can be decoded. Its "
            "build may be without nvJPEG; use --decode exact"
        )
    (mended,) = interpolated([made], (2, 2))
    return bool((mended.cpu() - own).abs().mean() < (made.cpu() - own).abs().mean())


def upright(image: Tensor, orientation: int) -> Tensor:
    """`uint8 [3, H, W]` as stored -> upright, by EXIF's orientation."""
    if orientation == 1:
        return image
    image = image.transpose(1, 2) if orientation >= 5 else image
    return image.flip([axis for axis, by in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in by])


def stacked(images: Sequence[Tensor | np.ndarray]) -> Tensor:
    """Stack arrays and GPU tensors, `uint8 [3, H, W]` each, into one batch on the GPU."""
    device = next(image.device for image in images if isinstance(image, Tensor))
    here = [torch.from_numpy(image).to(device) if isinstance(image, np.ndarray) else image for image in images]
    if device.type == "cuda":
        for image in here:  # made on another stream, which must not reuse their memory before this one is done
            image.record_stream(torch.cuda.current_stream(device))
    return torch.stack(here)


def _parts(images: Sequence[Encoded], most: int) -> Iterator[list[Encoded]]:
    """The images, in order, in parts of up to so many pixels."""
    part: list[Encoded] = []
    pixels = 0
    for image in images:
        size = image.header.width * image.header.height
        if part and pixels + size > most:
            yield part
            part, pixels = [], 0
        part.append(image)
        pixels += size
    if part:
        yield part
