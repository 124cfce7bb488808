"""The resize in torch is Pillow's, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featx.pixels import resample, views
from featx.pixels.preprocess import RESAMPLE, Preprocess
from featx.pixels.resample import Resize, resized


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if rng.random() < 0.3:  # as far over and under the ends as it goes
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    return Image.fromarray(pixels)


def centres(preprocess: Preprocess, images: list[Image.Image]) -> list[np.ndarray]:
    made = [Resize.of(preprocess, *i.size, preprocess.box(*i.size, preprocess.crop)) for i in images]
    return [found.numpy() for found in resized([tensor(i) for i in images], made)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 224), (36, 32), (60, 33)])
def test_the_centre_crop_of_noise_in_any_size_is_pillows(interpolation: str, resize: int, crop: int) -> None:
    preprocess = Preprocess(resize, crop, interpolation)
    rng = np.random.default_rng(resize + crop)
    sizes = [*rng.integers(16, 500, (20, 2)).tolist(), (256, 256), (crop, crop), (17, 1000), (1000, 17), (2000, 1400)]
    images = [noise(rng, *size) for size in sizes]
    for image, found in zip(images, centres(preprocess, images), strict=True):
        expected = preprocess.square(image, crop).transpose(2, 0, 1)
        assert found.shape == (3, crop, crop) and found.dtype == np.uint8
        assert (found == expected).all(), image.size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_centre_crop_of_photographs_is_pillows(interpolation: str, photos: Path) -> None:
    preprocess = Preprocess(interpolation=interpolation)
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("val/*/*.jpg"))[::10]]
    assert len(images) > 10
    for image, found in zip(images, centres(preprocess, images), strict=True):
        assert (found == preprocess.square(image, 224).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_box_is_pillows_two_passes(interpolation: str) -> None:
    preprocess = Preprocess(36, 32, interpolation)
    rng = np.random.default_rng(5)
    for _ in range(40):
        width, height = rng.integers(16, 300, 2).tolist()
        image = noise(rng, width, height)
        left, right = np.sort(rng.uniform(0, width, 2)).tolist()
        top, bottom = np.sort(rng.uniform(0, height, 2)).tolist()
        box = (left, top, max(right, left + 0.5), max(bottom, top + 0.5))
        if box[2] > width or box[3] > height:
            continue
        across = image.resize((32, height), RESAMPLE[interpolation], box=(box[0], 0, box[2], height))
        first, last = preprocess.rows(box, 32, height)
        down = (0, box[1] - first, 32, min(box[3] - first, last - first))
        expected = np.asarray(across.crop((0, first, 32, last)).resize((32, 32), RESAMPLE[interpolation], box=down))
        found = resized([tensor(image)], [Resize.of(preprocess, width, height, box)])[0]
        assert (found.numpy() == expected.transpose(2, 0, 1)).all()


def test_augmented_views_are_the_loaders_up_to_the_order_of_the_passes() -> None:
    """Pillow 13 goes down first where that is cheaper; each pass rounds, by at most one level each."""
    preprocess = Preprocess(36, 32)
    rng = np.random.default_rng(6)
    mirrored = 0
    for k in range(30):
        image = noise(rng, *rng.integers(40, 200, 2).tolist())
        key = rng.bytes(32)
        box, mirror = views.look(preprocess, *image.size, key, views.augmented(0, k))
        expected = views.pixels(preprocess, image, key, views.augmented(0, k)).astype(int)
        found = resized([tensor(image)], [Resize.of(preprocess, *image.size, box, mirror)])[0].numpy()
        assert np.abs(found - expected).max() <= 1
        mirrored += mirror
    assert 5 < mirrored < 25


def test_calls_that_are_cut_into_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocess = Preprocess(36, 32)
    rng = np.random.default_rng(7)
    images = [noise(rng, 60 + i % 3, 50) for i in range(12)]
    whole = centres(preprocess, images)
    monkeypatch.setattr(resample, "PRODUCTS", 1)
    assert all((a == b).all() for a, b in zip(whole, centres(preprocess, images), strict=True))


@pytest.mark.gpu
def test_the_gpu_resizes_as_the_cpu_does() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the resize is untested on one")
    rng = np.random.default_rng(8)
    for interpolation in ("bilinear", "bicubic"):
        preprocess = Preprocess(interpolation=interpolation)
        images = [noise(rng, *size) for size in rng.integers(100, 900, (20, 2)).tolist()]
        made = [Resize.of(preprocess, *i.size, preprocess.box(*i.size, 224)) for i in images]
        found = resized([tensor(i).cuda() for i in images], made)
        for image, one in zip(images, found, strict=True):
            assert (one.cpu().numpy() == preprocess.square(image, 224).transpose(2, 0, 1)).all()
