"""From an image file's bytes to the `uint8 [3, crop, crop]` pixels that a backbone sees."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from featx.errors import FeatxError, ImageError
from featx.identity import Identity
from featx.pixels.decoding import decoded

# The largest short side that images are resized to; networks of today take up to 1,024.
MAX_SIDE = 8192
# Long side over short side. An exported model resizes the whole image, and this bounds its memory.
MAX_ASPECT = 64
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
REACH = {"bilinear": 1, "bicubic": 2}  # radius of each kernel where the size stays the same, in pixels
# The decoders, by their names in a spec, and what people call them (`--decode`).
EXACT, FAST, GPU = "pillow/1", "pillow-draft/1", "nvjpeg/1"
DECODERS = {"exact": EXACT, "fast": FAST, "gpu": GPU}
# The least cosine between an image's features by `GPU` and by `EXACT`: a run that finds less stops.
CLOSE = 0.999
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the image
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess(Identity):
    """Resize the short side, crop the centre, and (inside the model) scale and normalise.

    The same arithmetic as torchvision's `ImageClassification` preset on a Pillow image, except that
    only the crop's box is resampled; the pixels differ from the whole image's by at most 1 level on
    photographs, 2 on noise.
    """

    resize: int = 256
    """Short side after resizing, in pixels; the long side is `int(resize * long / short)`."""
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

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLE:
            raise FeatxError(f"interpolation {self.interpolation!r} is not one of {', '.join(RESAMPLE)}")
        if not 0 < self.crop <= self.resize <= MAX_SIDE:
            raise FeatxError(
                f"a crop of {self.crop} px does not fit into a short side of {self.resize} px, {MAX_SIDE} at most"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise FeatxError(f"mean and std need three numbers, std above 0; got {self.mean} and {self.std}")

    def __call__(self, data: bytes | Image.Image | np.ndarray) -> np.ndarray:
        """Bytes of an image file, a Pillow image or `uint8 [H, W, 3]` -> `uint8 [3, crop, crop]`, RGB.

        Raises `ImageError` for what is not a readable image.
        """
        with self.decoded(data) as image:
            return np.ascontiguousarray(self.square(image, self.crop).transpose(2, 0, 1))

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

    def square(self, image: Image.Image, side: int) -> np.ndarray:
        """The `uint8 [side, side, 3]` around the crop, `crop <= side <= resize`, after resizing.

        Its centre `crop` holds the same pixels for every `side`, to at most 1 level (Pillow keeps the
        box in single precision). An exported model that resizes by itself leaves a square of side
        `resize` as it is, so images of many sizes can share a batch. Raises `ImageError` as `box` does.
        """
        return self.render(image, self.box(*image.size, side), side)

    def box(self, width: int, height: int, side: int) -> Box:
        """The box that `square` shows of an upright image of this size, in the image's pixels.

        Raises `ImageError` beyond an aspect ratio of 1:64, where the centre crop would show next to
        nothing of the image.
        """
        assert self.crop <= side <= self.resize
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError(
                f"{width} x {height} pixels are beyond the aspect ratio of 1:{MAX_ASPECT} "
                "that featx takes; cut the image to the part that matters"
            )
        wide, high = self.resized(width, height)
        margin = round((side - self.crop) / 2)
        left = round((wide - self.crop) / 2) - margin
        top = round((high - self.crop) / 2) - margin
        across, down = width / wide, height / high
        # rounding may put the far edge one ulp outside the image, which Pillow refuses
        right, bottom = min((left + side) * across, width), min((top + side) * down, height)
        return left * across, top * down, right, bottom

    def render(self, image: Image.Image, box: Box, side: int, mirrored: bool = False) -> np.ndarray:
        """A box of the image as `uint8 [side, side, 3]`: the one place where the pixels of features are resampled.

        First across, then down, as Pillow before 13 and onnxruntime do; each pass rounds to 8 bits. Pillow 13
        takes the cheaper order, which depends on the box. Measured on photographs, bicubic pixels then differ by
        up to 13 levels. Bilinear ones differ by 1, but 8 times as often: probabilities were 7e-3 from the exported
        model's, instead of 2e-3.
        """
        left, top, right, bottom = box
        resample, reach = RESAMPLE[self.interpolation], REACH[self.interpolation] * max((bottom - top) / side, 1) + 1
        first, last = max(0, int(top - reach)), min(image.height, int(bottom + reach) + 1)  # rows that matter

        across = image.resize((side, last - first), resample, box=(left, first, right, last))
        down = (0, top - first, side, min(bottom - first, last - first))
        array = np.asarray(across.resize((side, side), resample, box=down))
        return array[:, ::-1] if mirrored else array

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the resize, in pixels, rounded as torchvision rounds them."""
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize
