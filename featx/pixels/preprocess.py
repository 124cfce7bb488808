"""From an image file's bytes to the `uint8 [3, crop, crop]` pixels that a backbone sees."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from PIL import Image

from featx.errors import FeatxError, ImageError
from featx.identity import ADDED, Identity
from featx.options import CropMode
from featx.pixels.decoding import decoded
from featx.pixels.memory import rows as rows_of

# The largest short side that images are resized to; networks of today take up to 1,024.
MAX_SIDE = 8192
# Long side over short side. An exported model resizes the whole image, and this bounds its memory.
MAX_ASPECT = 64
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CROP_MODES = get_args(CropMode)
REACH = {"bilinear": 1, "bicubic": 2}  # radius of each kernel where the size stays the same, in pixels
COPIED = 8  # an image so many times as wide as its resize is not copied to leave out some rows: that would take longer
# The decoders, by their names in a spec, and what people call them (`--decode`).
EXACT, FAST, GPU = "pillow/1", "pillow-draft/1", "nvjpeg/1"
DECODERS = {"exact": EXACT, "fast": FAST, "gpu": GPU}
# The least cosine between an image's features by `GPU` and by `EXACT`: a run that finds less stops.
CLOSE = 0.999
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image, and beyond its edges
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess(Identity):
    """Resize, crop the centre, and (inside the model) scale and normalise.

    The same arithmetic as torchvision's `ImageClassification` preset on a Pillow image, or as timm's evaluation
    transform with its three crop modes, except that only the crop's box is resampled; the pixels differ from the whole
    image's by at most 1 level on photographs, 2 on noise, and not at all where the crop shows the whole image.
    """

    resize: int = 256
    """What the resize aims at, in pixels: see `crop_mode`."""
    crop: int = 224
    """Side of the centre crop, in pixels."""
    interpolation: str = "bilinear"
    """`bilinear` or `bicubic`, always antialiased."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]; applied by the model's first layer, not here."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divides after `mean`; applied by the model's first layer, not here."""
    pixels: str = EXACT
    """The decoder's name and our own revision, raised only when golden pixels change: `pillow/1`,
    `pillow-draft/1`, which decodes large JPEGs at a smaller scale, or `nvjpeg/1`, by which an extraction
    decodes JPEGs on the GPU; here and on any CPU it means the same as `pillow/1`."""
    crop_mode: CropMode = field(default="center", metadata=ADDED)
    """`center`: the short side becomes `resize`, the long one `int(resize * long / short)`. `pad`: the same, for a crop
    that is larger than `resize`. `squash`: both become `resize`. `border`: the long side becomes `resize`. What a crop
    shows beyond the image is the colour `mean` in `border`, and black otherwise."""

    def __post_init__(self) -> None:
        if self.crop_mode not in CROP_MODES:
            raise FeatxError(f"crop mode {self.crop_mode!r} is not one of {', '.join(CROP_MODES)}")
        if self.interpolation not in RESAMPLE:
            raise FeatxError(f"interpolation {self.interpolation!r} is not one of {', '.join(RESAMPLE)}")
        if not 0 < self.crop <= self.resize * (1 if self.crop_mode == "center" else 2) or self.resize > MAX_SIDE:
            raise FeatxError(
                f"a crop of {self.crop} px does not fit into a short side of {self.resize} px, {MAX_SIDE} at most; "
                "crop modes border and pad show up to twice as much, on the colour of the mean or on black"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, self.mean)):
            raise FeatxError(f"mean and std need three numbers; got {self.mean} and {self.std}")
        if not all(0 < value < math.inf for value in self.std):
            raise FeatxError(f"std is above 0; got {self.std}")
        if self.crop_mode == "border" and not all(0 <= value <= 1 for value in self.mean):
            raise FeatxError(f"the border has the colour of the mean, which lies in [0, 1]; got {self.mean}")

    def __call__(self, data: bytes | Image.Image | np.ndarray) -> np.ndarray:
        """Bytes of an image file, a Pillow image or `uint8 [H, W, 3]` -> `uint8 [3, crop, crop]`, RGB.

        Raises `ImageError` for what is not a readable image.
        """
        with self.decoded(data) as image:
            return self.centre(image)

    def decoded(self, data: bytes | Image.Image | np.ndarray) -> AbstractContextManager[Image.Image]:
        """`decoding.decoded` with the decoder that `pixels` names. Raises `FeatxError` for an unknown one."""
        if self.pixels not in DECODERS.values():
            raise FeatxError(
                f"pixels {self.pixels!r} is not one of {', '.join(DECODERS.values())}, the decoders of this featx"
            )
        return decoded(data, 2 * self.resize if self.pixels == FAST else None)

    def shrinks(self, data: bytes, size: tuple[int, int]) -> bool:
        """Whether `FAST` would decode an image file of this width and height at a smaller scale, and does not yet."""
        return self.pixels == EXACT and data[:2] == b"\xff\xd8" and min(size) >= 4 * self.resize

    @property
    def pads(self) -> bool:
        """Whether a crop may show what lies beyond the image."""
        return self.crop > self.resize or self.crop_mode == "border"

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour beyond the image, `uint8` RGB."""
        return tuple(round(255 * value) for value in self.mean) if self.crop_mode == "border" else (0, 0, 0)

    @property
    def target(self) -> str:
        """For people: what the resize brings to `resize` pixels."""
        return {"squash": "both sides", "border": "the long side"}.get(self.crop_mode, "the short side")

    @property
    def beyond(self) -> str:
        """For people: what a crop shows beyond the image; empty where it shows nothing."""
        return f" on a ground of RGB {self.fill}" if self.pads else ""

    def centre(self, image: Image.Image) -> np.ndarray:
        """The crop of an upright RGB image, `uint8 [3, crop, crop]`. Raises `ImageError` as `box` does."""
        if self.crop_mode == "center":
            return self.planes(image, self.box(*image.size, self.crop))
        return np.ascontiguousarray(self.square(image, self.crop).transpose(2, 0, 1))

    def square(self, image: Image.Image, side: int) -> np.ndarray:
        """The `uint8 [side, side, 3]` around the crop, `crop <= side`, and `side <= resize` or `crop`, after resizing.

        Its centre `crop` holds the same pixels for every `side`, to at most 1 level (Pillow keeps the
        box in single precision). Raises `ImageError` as `box` does.
        """
        box = self.box(*image.size, side)
        if self.crop_mode == "center":
            return self.render(image, box, side)
        # whole, as timm does it: most of these crops show all of the image
        whole = np.asarray(self._resampled(image, (0, 0, *image.size), *self.resized(*image.size)))
        canvas = np.full((side, side, 3), self.fill, np.uint8)
        left, top = (self._start(size, side) for size in whole.shape[1::-1])
        part = whole[max(top, 0) :, max(left, 0) :][: side - max(-top, 0), : side - max(-left, 0)]
        canvas[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]] = part
        return canvas

    def fitted(self, image: Image.Image) -> np.ndarray:
        """What an exported model that resizes by itself leaves as it is, and then crops as it would crop the image.

        `uint8 [resize, resize, 3]`, so that images of many sizes can share a batch; where `crop` is larger, the part of
        the resized image that the crop shows, `uint8 [H, W, 3]`. Raises `ImageError` as `box` does.
        """
        if self.crop <= self.resize:
            return self.square(image, self.resize)
        wide, high = (min(size, self.crop) for size in self.resized(*image.size))
        # rounding may have put a side beyond the aspect ratio allowed: two pixels of what lies around it bring it back
        wide, high = (n + 2 * (n * MAX_ASPECT < other) for n, other in ((wide, high), (high, wide)))
        left, top = (self.crop - wide) // 2, (self.crop - high) // 2
        return self.square(image, self.crop)[top : top + high, left : left + wide]

    def box(self, width: int, height: int, side: int) -> Box:
        """The box that `square` shows of an upright image of this size, in the image's pixels.

        Raises `ImageError` beyond an aspect ratio of 1:64, where the centre crop would show next to
        nothing of the image.
        """
        assert self.crop <= side <= max(self.crop, self.resize)
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError(
                f"{width} x {height} pixels are beyond the aspect ratio of 1:{MAX_ASPECT} "
                "that featx takes; cut the image to the part that matters"
            )
        wide, high = self.resized(width, height)
        left, top, across, down = self._start(wide, side), self._start(high, side), width / wide, height / high
        right, bottom = (left + side) * across, (top + side) * down
        # rounding may put the far edge one ulp outside the image, which Pillow refuses
        right, bottom = right if self.pads else min(right, width), bottom if self.pads else min(bottom, height)
        return left * across, top * down, right, bottom

    def _start(self, size: int, side: int) -> int:
        """Where `square` begins in a resized image of this width or height: below 0 where it begins before it."""
        spare = size - self.crop  # rounded as torchvision and timm crop, and as they pad
        return (round(spare / 2) if spare >= 0 else -(-spare // 2)) - round((side - self.crop) / 2)

    def render(self, image: Image.Image, box: Box, side: int, mirrored: bool = False) -> np.ndarray:
        """A box inside the image as `uint8 [side, side, 3]`."""
        array = np.asarray(self._resampled(image, box, side, side))
        return array[:, ::-1] if mirrored else array

    def planes(self, image: Image.Image, box: Box, mirrored: bool = False) -> np.ndarray:
        """A box inside the image as `uint8 [3, crop, crop]`."""
        seen = self._resampled(image, box, self.crop, self.crop)
        array = np.frombuffer(bytearray().join(seen.tobytes("raw", colour) for colour in "RGB"), np.uint8)
        array = array.reshape(3, self.crop, self.crop)
        return np.ascontiguousarray(array[:, :, ::-1]) if mirrored else array

    def _resampled(self, image: Image.Image, box: Box, wide: int, high: int) -> Image.Image:
        """A box, `wide` x `high`: the one place where the pixels of features are resampled.

        First across, then down, as Pillow before 13 and onnxruntime do; each pass rounds to 8 bits. Pillow 13
        takes the cheaper order, which depends on the box. Measured on photographs, bicubic pixels then differ by
        up to 13 levels. Bilinear ones differ by 1, but 8 times as often: probabilities were 7e-3 from the exported
        model's, instead of 2e-3.
        """
        left, top, right, bottom = box
        resample, reach = RESAMPLE[self.interpolation], REACH[self.interpolation]
        beside, above = reach * max((right - left) / wide, 1) + 1, reach * max((bottom - top) / high, 1) + 1
        first, last = max(0, int(top - above)), min(image.height, int(bottom + above) + 1)  # rows that matter
        rows, edge = last - first, min(image.width, int(right + beside) + 1)
        down = (0, top - first, wide, min(bottom - first, rows))

        if rows < image.height and edge <= COPIED * wide:  # or Pillow makes a pass down that changes nothing
            image, first = rows_of(image, first, last, edge), 0
        across = image.resize((wide, rows), resample, box=(left, first, right, first + rows))
        return across.resize((wide, high), resample, box=down)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, in pixels, rounded as torchvision and timm round them."""
        if self.crop_mode == "squash":
            return self.resize, self.resize
        if self.crop_mode == "border":
            ratio = max(width, height) / self.resize
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize
