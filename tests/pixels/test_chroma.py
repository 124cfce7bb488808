"""Repeated chroma samples become libjpeg's interpolated ones, as Pillow decodes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from jpegs import colours, encoded, photo, repeated
from PIL import Image

from featx.pixels.chroma import interpolated
from featx.pixels.resample import TOGETHER, together


def apart(image: Image.Image) -> tuple[np.ndarray, np.ndarray, bool]:
    """Levels from Pillow's pixels of a 4:2:0 file, before and after, and whether no colour is cut off."""
    data = encoded(image, quality=90, subsampling="4:2:0")
    exact = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).astype(int)
    near = repeated(data)
    made = interpolated([torch.from_numpy(near)], (2, 2))[0].numpy()
    return np.abs(near - exact), np.abs(made - exact), bool(((near > 0) & (near < 255)).all())


def test_colours_that_are_not_cut_off_come_within_two_levels_for_any_size() -> None:
    sizes = np.random.default_rng(0).integers(16, 200, (25, 2)).tolist()
    found = [apart(photo(*size, low=90, high=170)) for size in sizes]
    assert all(whole for _, _, whole in found)
    assert np.mean([before.mean() for before, _, _ in found]) > 0.3
    assert max(after.max() for _, after, _ in found) <= 2
    assert np.mean([after.mean() for _, after, _ in found]) < 0.1


def test_photographs_come_much_nearer(photos: Path) -> None:
    for path in sorted(photos.glob("val/*/*.jpg"))[::25]:
        before, after, _ = apart(Image.open(path).convert("RGB"))
        assert after.mean() <= 0.4 * before.mean() and after.mean() < 0.3


def test_samples_across_alone_are_interpolated_across_alone() -> None:
    """4:2:2, sample by sample in whole numbers: 3 of a sample and 1 of its neighbour."""
    rng = np.random.default_rng(1)
    luma = rng.integers(100, 150, (9, 21))
    samples = rng.integers(110, 146, (2, 9, 11))
    fine = np.zeros((2, 9, 22), int)
    for x in range(11):
        before, after = samples[:, :, max(x - 1, 0)], samples[:, :, min(x + 1, 10)]
        fine[:, :, 2 * x] = (3 * samples[:, :, x] + before + 1) >> 2
        fine[:, :, 2 * x + 1] = (3 * samples[:, :, x] + after + 2) >> 2
    near = colours(luma, *samples.repeat(2, axis=2)[:, :, :21])
    expected = colours(luma, *fine[:, :, :21])
    found = interpolated([torch.from_numpy(near)], (2, 1))[0].numpy()
    before, after = np.abs(near.astype(int) - expected), np.abs(found.astype(int) - expected)
    assert after.max() <= 2 and after.mean() < 0.05 * before.mean()


def test_grey_flat_colours_and_whole_samples_stay() -> None:
    grey = torch.arange(48, dtype=torch.uint8)[None, None].expand(3, 20, 48) * 5
    flat = torch.tensor([200, 40, 255], dtype=torch.uint8)[:, None, None].expand(3, 21, 47)
    for image in (grey, flat):
        assert (interpolated([image], (2, 2))[0] == image).all()
    assert interpolated([grey], (1, 1))[0] is grey


def test_images_of_any_sizes_are_interpolated_together_as_alone() -> None:
    sizes = np.random.default_rng(3).integers(16, 90, (40, 2)).tolist()
    near = [torch.from_numpy(repeated(encoded(photo(*size), subsampling="4:2:0"))) for size in sizes]
    assert len(near) > TOGETHER
    alone = [interpolated([image], (2, 2))[0] for image in near]
    assert all(torch.equal(one, other) for one, other in zip(interpolated(near, (2, 2)), alone, strict=True))


def test_what_is_computed_together_is_as_large_as_its_largest_height_and_width_allow() -> None:
    images = [torch.zeros((3, *size)) for size in ((10, 10), (10, 20), (30, 10), (50, 50), (1, 1), (1, 1))]
    assert list(together(images, 400)) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert list(together(images, 1 << 20)) == [slice(0, 6)] and list(together([])) == []
    assert list(together(images[:1] * (TOGETHER + 1))) == [slice(0, TOGETHER), slice(TOGETHER, TOGETHER + 1)]
