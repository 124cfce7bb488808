"""Augmentation: drawn once per epoch, the same pixels as Pillow's, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from featx.errors import TrainingError
from featx.finetuning.augment import Augmentation, Draws, apply, crop, mirror, seed_of


def photo(size: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth image with structure, `uint8 [size, size, 3]`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def as_tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))


def test_a_batch_of_crops_equals_pillows_box_resize() -> None:
    images = [photo(seed=s) for s in range(4)]
    boxes = np.array([[0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], [0.5, 0.25, 0.75, 0.5], [0.03, 0.4, 0.9, 0.99]])
    got = crop(as_tensor(*images), boxes, np.zeros(4, bool), 32).numpy()
    for image, box, mine in zip(images, boxes * 64, got, strict=True):
        theirs = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR, box=tuple(box))
        difference = np.abs(mine.transpose(1, 2, 0).astype(int) - np.asarray(theirs).astype(int))
        assert difference.max() <= 1 and mine.std() > 20


def test_flipped_crops_are_mirror_images() -> None:
    images, boxes = as_tensor(photo(), photo()), np.array([[0.1, 0.2, 0.6, 0.9]] * 2)
    plain, flipped = crop(images, boxes, np.array([False, True]), 32)
    assert (plain.int() - flipped.flip(2).int()).abs().max() <= 1
    assert not torch.equal(plain, flipped)
    kept, turned = mirror(images, np.array([False, True]))
    assert torch.equal(kept, images[0]) and torch.equal(turned, images[1].flip(2))


def test_boxes_have_the_area_and_shape_that_random_resized_crop_draws() -> None:
    draws = Draws.of(20_000, seed=0, epoch=1)
    aspect = np.full(20_000, 1.5)
    boxes = draws.boxes(np.arange(20_000), aspect, min_area=0.25)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-9
    assert 0.25 <= (width * height).min() < 0.26 and (width * height).max() > 0.85
    ratio = width * 1.5 / height
    assert 0.749 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.334
    assert 0.49 < draws.flips.mean() < 0.51
    # torchvision's own draws, as an independent answer
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    drawn = [RandomResizedCrop(8, scale=(0.25, 1.0)).make_params([torch.empty(3, 400, 600)]) for _ in range(3000)]
    area = np.array([d["height"] * d["width"] for d in drawn]) / (400 * 600)
    assert abs(area.mean() - (width * height).mean()) < 0.015
    assert abs(np.quantile(area, 0.1) - np.quantile(width * height, 0.1)) < 0.015


def test_draws_follow_from_seed_and_epoch_and_from_no_batch() -> None:
    a, b, c = Draws.of(50, 0, 3), Draws.of(50, 0, 3), Draws.of(50, 0, 4)
    assert np.array_equal(a.places, b.places) and not np.array_equal(a.places, c.places)
    rows, aspect = np.array([7, 3, 40]), np.ones(3)
    assert np.array_equal(a.boxes(rows, aspect, 0.1)[1:2], a.boxes(np.array([3]), np.ones(1), 0.1))


def test_a_narrow_image_that_no_box_fits_gives_its_largest_centred_one() -> None:
    box = Draws.of(1, 0, 0).boxes(np.array([0]), np.array([20.0]), min_area=0.9)[0]
    assert box[1] == 0 and box[3] == 1
    assert box[2] - box[0] == pytest.approx(4 / 3 / 20) and (box[0] + box[2]) / 2 == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["trivialaugment", "randaugment", "autoaugment", "augmix"])
def test_a_policy_treats_each_image_by_its_own_seed(name: str) -> None:
    steps = Augmentation.parse(f"crop-flip+{name}")
    assert steps.geometry == "crop-flip" and steps.policies == (name,)
    images = as_tensor(photo(32, 1), photo(32, 2), photo(32, 3))
    functions = steps.functions()
    together = apply(functions, images, np.array([5, 6, 7]), seed=0, epoch=0)
    alone = apply(functions, images[1:2], np.array([6]), seed=0, epoch=0)
    assert together.dtype == torch.uint8 and torch.equal(together[1], alone[0])
    others = [apply(functions, images, np.array([5, 6, 7]), seed=0, epoch=e) for e in range(1, 5)]
    assert any(not torch.equal(together, other) for other in others)


def test_your_own_augmentation_is_a_factory() -> None:
    functions = Augmentation.parse("small:halved").functions()
    images = as_tensor(photo(32))
    assert torch.equal(apply(functions, images, np.array([0]), 0, 0), images // 2)
    with pytest.raises(TrainingError, match="cannot be loaded"):
        Augmentation.parse("small:nothing").functions()


def test_an_augmentation_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(TrainingError, match="must keep both"):
        apply([lambda image: image[:, :8]], as_tensor(photo(32)), np.array([0]), 0, 0)


def test_an_unknown_augmentation_is_refused_with_near_matches() -> None:
    with pytest.raises(TrainingError, match="Did you mean trivialaugment"):
        Augmentation.parse("crop-flip+trivialaugmnt")
    with pytest.raises(TrainingError, match="a geometry comes first"):
        Augmentation.parse("trivialaugment+flip")


def test_seeds_differ_by_what_they_are_for() -> None:
    assert seed_of(0, "order", 1) == seed_of(0, "order", 1)
    assert len({seed_of(s, w, e) for s in (0, 1) for w in ("order", "augment") for e in (0, 1)}) == 8
