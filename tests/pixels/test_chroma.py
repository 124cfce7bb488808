"""Repeated chroma samples become libjpeg's interpolated ones, as Pillow decodes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from jpegs import colours, encoded, photo, repeated
from PIL import Image

from featx.pixels import chroma
from featx.pixels.chroma import interpolated


def halved(image: Image.Image) -> bytes:
    return encoded(image, quality=90, subsampling="4:2:0")


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)


def test_colours_that_are_not_cut_off_become_pillows_for_any_size() -> None:
    rng = np.random.default_rng(0)
    files = [halved(photo(*size, low=90, high=170)) for size in rng.integers(16, 200, (25, 2)).tolist()]
    near = [repeated(data) for data in files]
    found = interpolated([torch.from_numpy(image) for image in near], [(2, 2)] * len(files))
    before, after = [], []
    for data, image, made in zip(files, near, found, strict=True):
        assert image.min() > 0 and image.max() < 255
        before.append(image != pillow(data))
        after.append(np.abs(made.numpy().astype(int) - pillow(data)))
    assert np.mean([apart.mean() for apart in before]) > 0.3
    assert max(apart.max() for apart in after) <= 1
    assert np.mean([(apart > 0).mean() for apart in after]) < 0.002


def test_photographs_come_much_nearer(photos: Path) -> None:
    files = [halved(Image.open(path).convert("RGB")) for path in sorted(photos.glob("val/*/*.jpg"))[::25]]
    near = [repeated(data) for data in files]
    found = interpolated([torch.from_numpy(image) for image in near], [(2, 2)] * len(files))
    for data, image, made in zip(files, near, found, strict=True):
        exact = pillow(data).astype(int)
        before, after = np.abs(image - exact), np.abs(made.numpy().astype(int) - exact)
        assert after.mean() <= 0.4 * before.mean() and after.mean() < 0.3
        whole = ((image > 0) & (image < 255)).all()
        assert not whole or after.max() <= 1


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
    found = interpolated([torch.from_numpy(near)], [(2, 1)])[0].numpy()
    assert (near != expected).mean() > 0.3
    assert np.abs(found.astype(int) - expected).max() <= 1 and (found != expected).mean() < 0.02


def test_an_image_with_a_sample_for_each_pixel_stays_as_it_is_among_others() -> None:
    rng = np.random.default_rng(2)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 50), dtype=np.uint8)) for _ in range(3)]
    found = interpolated(images, [(1, 1), (2, 2), (1, 1)])
    assert found[0] is images[0] and found[2] is images[2]
    assert found[1].shape == (3, 40, 50) and (found[1] != images[1]).any()


def test_grey_stays_grey_and_flat_colours_stay() -> None:
    grey = torch.arange(48, dtype=torch.uint8)[None, None].expand(3, 20, 48) * 5
    flat = torch.tensor([200, 40, 255], dtype=torch.uint8)[:, None, None].expand(3, 20, 48)
    for image in (grey, flat):
        assert (interpolated([image], [(2, 2)])[0] == image).all()


def test_parts_of_a_call_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [torch.from_numpy(repeated(halved(photo(50 + i, 40)))) for i in range(6)]
    whole = interpolated(images, [(2, 2)] * 6)
    monkeypatch.setattr(chroma, "PIXELS", 1)
    assert all((a == b).all() for a, b in zip(whole, interpolated(images, [(2, 2)] * 6), strict=True))
