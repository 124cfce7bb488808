"""Augmented views: what they are called, what they show, and that their pixels are pinned."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from jpegs import photo
from PIL import Image

from featx.pixels.preprocess import RESAMPLE, Preprocess
from featx.pixels.views import CENTER, augmented, look, pixels, view_names

KEY = bytes(range(32))


def test_a_view_is_named_by_seed_number_and_revision() -> None:
    """Rows are cached by these names."""
    assert view_names(7, 2) == ["center", "crop-flip/seed=7/1/pixels=2", "crop-flip/seed=7/2/pixels=2"]


def test_what_is_drawn_is_pinned_and_the_revision_has_no_part_in_it() -> None:
    drawn = [look(Preprocess(), 500, 375, KEY, augmented(0, k)) for k in range(1, 5)]
    assert drawn == [
        ((249, 34, 497, 333), False),
        ((39, 20, 363, 301), True),
        ((12, 60, 295, 276), False),
        ((21, 106, 270, 323), False),
    ]
    assert drawn == [look(Preprocess(), 500, 375, KEY, f"crop-flip/seed=0/{k}") for k in range(1, 5)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_is_its_box_resized_across_then_down(interpolation: str) -> None:
    """By two calls that see the whole image: Pillow 13 alone might take the other order."""
    preprocess, resample = Preprocess(36, 32, interpolation), RESAMPLE[interpolation]
    for k in range(1, 21):
        image = photo(60 + 7 * k, 200 - 5 * k, seed=k)
        (left, top, right, bottom), mirrored = look(preprocess, *image.size, KEY, augmented(0, k))
        across = image.resize((32, image.height), resample, box=(left, 0, right, image.height))
        expected = np.asarray(across.resize((32, 32), resample, box=(0, top, 32, bottom)))
        found = pixels(preprocess, image, KEY, augmented(0, k)).transpose(1, 2, 0)
        assert (found == (expected[:, ::-1] if mirrored else expected)).all()


def test_golden_pixels_of_views() -> None:
    """If this fails, the pixels of views have changed: raise `REVISION`, then pin it again."""
    y, x = np.mgrid[0:300, 0:401]
    rgb = np.stack([x * y // 97, x * 5 + y * 3, (x // 20 + y // 20) % 2 * 255], axis=2) % 256
    preprocess = Preprocess(interpolation="bicubic")
    image = Image.fromarray(rgb.astype(np.uint8))
    views = [pixels(preprocess, image, KEY, augmented(0, k)) for k in range(1, 5)]
    assert hashlib.sha256(b"".join(view.tobytes() for view in views)).hexdigest()[:16] == "308459163f5cea0d"
    assert (pixels(preprocess, image, KEY, CENTER) == preprocess(image)).all()
