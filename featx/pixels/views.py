"""Augmented views: named, seeded crops of an image, each with a cache row of its own."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image

from featx.pixels.preprocess import Box, Preprocess

CENTER = "center"
# Ends the names of augmented views. Raised when their pixels change, so that no old row is served for a new one;
# the boxes drawn stay the same. Views without it were resized in the order of passes that Pillow happened to choose.
REVISION = "/pixels=2"
# Shares of the image's area. Milder than the 0.08 of ImageNet training from scratch, since a handful of cached
# views replaces hundreds of epochs: a crop that misses the object would stay in the training set for good.
SCALE = (0.25, 1.0)
RATIO = (3 / 4, 4 / 3)


def augmented(seed: int, k: int) -> str:
    """The name of augmented view `k` (1, 2, ...): random resized crop and horizontal flip."""
    return f"crop-flip/seed={seed}/{k}{REVISION}"


def view_names(seed: int, views: int) -> list[str]:
    """The centre crop's name, and after it those of the first `views` augmented views."""
    return [CENTER, *(augmented(seed, k) for k in range(1, views + 1))]


def look(preprocess: Preprocess, width: int, height: int, key: bytes, view: str) -> tuple[Box, bool]:
    """What a view shows of an upright image: a box of its pixels, to be resized to the crop, and whether mirrored.

    The draw depends on the image's content key and on the view's name without its revision, not on the order of
    the images, on threads or on other views. So adding images or views later changes no row.
    """
    if view == CENTER:
        return preprocess.box(width, height, preprocess.crop), False
    drawn = hashlib.sha256(key + view.removesuffix(REVISION).encode())
    seed = int.from_bytes(drawn.digest()[:16], "big")
    rng = np.random.default_rng(seed)
    return _crop(rng, width, height), bool(rng.random() < 0.5)


def pixels(preprocess: Preprocess, image: Image.Image, key: bytes, view: str) -> np.ndarray:
    """`uint8 [3, crop, crop]` of one view of a decoded image."""
    if view == CENTER:
        return preprocess.centre(image)
    return preprocess.planes(image, *look(preprocess, *image.size, key, view))


def _crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """A box of random area and aspect ratio, drawn as torchvision's `RandomResizedCrop` draws it."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * RATIO[1])))
    h = max(1, min(height, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
