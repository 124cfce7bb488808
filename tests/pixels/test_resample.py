"""The resize in torch against `Preprocess.render`, which is Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featx.pixels.preprocess import Box, Preprocess
from featx.pixels.resample import TOGETHER, resized


def differences(preprocess: Preprocess, images: list[Image.Image], boxes: list[Box], device: str = "cpu") -> np.ndarray:
    """`int [N, 3, crop, crop]`: levels between the two; every second box is mirrored."""
    crop, mirrored = preprocess.crop, [i % 2 == 1 for i in range(len(images))]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device) for image in images]
    asked = [(b[2], b[1], b[0], b[3]) if m else b for m, b in zip(mirrored, boxes, strict=True)]
    found = [view.cpu() for view in resized(tensors, asked, crop, preprocess.interpolation)]
    assert all(view.shape == (3, crop, crop) and view.dtype == torch.uint8 for view in found)
    pairs = zip(images, boxes, mirrored, strict=True)
    exact = np.stack([preprocess.render(image, box, crop, mirror) for image, box, mirror in pairs])
    return np.abs(np.stack(found).astype(int) - exact.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_are_within_two_levels(interpolation: str, photos: Path) -> None:
    preprocess = Preprocess(interpolation=interpolation)
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("val/*/*.jpg"))[::4]]
    assert len(images) > TOGETHER  # images of many sizes, in more than one call
    apart = differences(preprocess, images, [preprocess.box(*image.size, 224) for image in images])
    assert apart.max() <= 2 and (apart > 0).mean() < 0.005


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_any_box_of_noise_enlarged_or_not_is_within_some_levels(interpolation: str) -> None:
    rng = np.random.default_rng(5)
    images, boxes = [], []
    for _ in range(40):
        width, height = rng.integers(16, 300, 2).tolist()
        images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        left, top = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
        boxes.append((left, top, rng.uniform(left + 1, width), rng.uniform(top + 1, height)))
    apart = differences(Preprocess(36, 32, interpolation), images, boxes)
    assert apart.max() <= 3 and (apart > 0).mean() < 0.005


@pytest.mark.gpu
def test_the_gpu_resizes_as_the_cpu_does(photos: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the resize is untested on one")
    images = [Image.open(path).convert("RGB") for path in sorted(photos.glob("val/*/*.jpg"))[::8]]
    for preprocess in (Preprocess(), Preprocess(interpolation="bicubic")):
        boxes = [preprocess.box(*image.size, 224) for image in images]
        apart = differences(preprocess, images, boxes, "cuda:0")
        assert apart.max() <= 2 and (apart > 0).mean() < 0.01
