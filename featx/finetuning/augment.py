"""Training augmentation: drawn for a whole epoch at once, applied to each batch on the training device."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featx.errors import TrainingError
from featx.pixels.views import RATIO
from featx.text import near

GEOMETRY = ("none", "flip", "crop-flip", "views")
# the usual policies, as package.module:factory
POLICIES = {
    "trivialaugment": "torchvision.transforms.v2:TrivialAugmentWide",
    "randaugment": "torchvision.transforms.v2:RandAugment",
    "autoaugment": "torchvision.transforms.v2:AutoAugment",
    "augmix": "torchvision.transforms.v2:AugMix",
}
_ATTEMPTS = 10  # a box that fits is drawn so often at most, as in RandomResizedCrop


@dataclass(frozen=True)
class Augmentation:
    """Steps joined by `+`: one of `GEOMETRY` first (else `none`), then `POLICIES` or `package.module:factory`.

    `none`: the centre crop, as at inference. `flip`: it or its mirror image. `crop-flip`: a random resized
    crop, flipped half of the time. `views`: one of a few fixed crops per image, like the feature cache's
    augmented views. A factory is called without arguments and returns a function from one image,
    `uint8 [3, crop, crop]` on the training device, to another; torch is seeded before each call of it.
    """

    geometry: str
    policies: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Raises `TrainingError` for unknown steps."""
        steps = text.split("+")
        geometry = steps.pop(0) if steps[0] in GEOMETRY else "none"
        for step in steps:
            if step not in POLICIES and ":" not in step:
                known = [*GEOMETRY, *POLICIES]
                raise TrainingError(
                    f"unknown augmentation {step!r} in {text!r}; there are {', '.join(known)} (a geometry comes "
                    f"first) and your own as package.module:factory.{near(step, known)}"
                )
        return cls(geometry, tuple(steps))

    def functions(self) -> list[Callable[[Tensor], Tensor]]:
        """Call the policies' factories. Raises `TrainingError` where a module or factory is missing."""
        return [_load(name) for name in self.policies]


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2**63), derived from what it is used for."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, eq=False)
class Draws:
    """One epoch's random numbers, one row per training image: independent of order, batch and process."""

    seed: int
    epoch: int
    shapes: np.ndarray
    """`float32 [N, attempts, 2]` in [0, 1): area and aspect ratio of a box."""
    places: np.ndarray
    """`float32 [N, 2]` in [0, 1): position of a box."""
    flips: np.ndarray
    """`bool [N]`: whether an image is mirrored."""
    views: np.ndarray
    """`float32 [N]` in [0, 1): which of the fixed views."""

    @classmethod
    def of(cls, count: int, seed: int, epoch: int) -> Draws:
        rng = np.random.default_rng(seed_of(seed, "augment", epoch))
        shapes, places = rng.random((count, _ATTEMPTS, 2), np.float32), rng.random((count, 2), np.float32)
        flips, views = rng.random(count, np.float32) < 0.5, rng.random(count, np.float32)
        return cls(seed, epoch, shapes, places, flips, views)

    def choose_views(self, numbers: np.ndarray, views: int) -> np.ndarray:
        """`int64 [B]`: which of the fixed views, in [0, views), the images `numbers` are shown in."""
        chosen: np.ndarray = (self.views[numbers] * views).astype(np.int64)
        return chosen

    def boxes(self, numbers: np.ndarray, aspect: np.ndarray, min_area: float) -> np.ndarray:
        """`float64 [B, 4]`: left, top, right, bottom as shares of an image of `aspect` (width / height).

        Area (`min_area` to 1, as a share of the image's) and aspect ratio (3/4 to 4/3) are drawn as
        `RandomResizedCrop` draws them; where ten attempts do not fit, the box is the largest centred one.
        """
        area = min_area + (1 - min_area) * self.shapes[numbers, :, 0].astype(np.float64)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = np.exp(low + (high - low) * self.shapes[numbers, :, 1].astype(np.float64))
        width = np.sqrt(area * ratio / aspect[:, None])
        height = np.sqrt(area / ratio * aspect[:, None])

        fits = (width <= 1) & (height <= 1)
        each, first = np.arange(len(numbers)), fits.argmax(axis=1)
        width, height = width[each, first], height[each, first]
        none = ~fits.any(axis=1)
        width[none] = np.minimum(1, RATIO[1] / aspect[none])
        height[none] = np.minimum(1, aspect[none] / RATIO[0])

        place = np.where(none[:, None], 0.5, self.places[numbers].astype(np.float64))
        left, top = (1 - width) * place[:, 0], (1 - height) * place[:, 1]
        return np.stack([left, top, left + width, top + height], axis=1)


def crop(images: Tensor, boxes: np.ndarray, flips: np.ndarray, side: int) -> Tensor:
    """Cut a box out of every image, resize it to `side` x `side` with antialiasing, and mirror some.

    images: `uint8 [B, 3, S, S]`, each a whole photograph stretched to a square; boxes: as `Draws.boxes`.
    Cropping, resizing and mirroring are one linear map of the rows and one of the columns, so a batch of
    different boxes is two matrix products, on any device, with Pillow's weights (bilinear).
    """
    size = images.shape[-1]
    across = _weights(boxes[:, 0], boxes[:, 2], size, side)
    across[flips] = across[flips, ::-1]
    down = torch.from_numpy(_weights(boxes[:, 1], boxes[:, 3], size, side)).to(images.device)
    right = torch.from_numpy(across).to(images.device).transpose(1, 2)
    rows = torch.matmul(down[:, None], images.to(torch.float32))
    return torch.matmul(rows, right[:, None]).round_().clamp_(0, 255).to(torch.uint8)


def _weights(low: np.ndarray, high: np.ndarray, size: int, side: int) -> np.ndarray:
    """`float32 [B, side, size]`: how much each of `size` pixels counts for each of `side` in [low, high]."""
    scale = (high - low) * size / side
    centre = (low * size)[:, None] + (np.arange(side) + 0.5) * scale[:, None]
    support = np.maximum(scale, 1.0)[:, None, None]
    distance = np.abs(np.arange(size) + 0.5 - centre[:, :, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    normed: np.ndarray = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)
    return normed


def mirror(images: Tensor, flips: np.ndarray) -> Tensor:
    """`uint8 [B, 3, H, W]`, mirrored where `flips`."""
    which = torch.from_numpy(flips).to(images.device)
    return torch.where(which[:, None, None, None], images.flip(3), images)


def apply(
    functions: list[Callable[[Tensor], Tensor]], images: Tensor, numbers: np.ndarray, seed: int, epoch: int
) -> Tensor:
    """Run the policies on every image of a batch, each from its own seed; changes torch's global seed."""
    if not functions:
        return images

    out = []
    for image, number in zip(images, numbers.tolist(), strict=True):
        torch.manual_seed(seed_of(seed, "policy", epoch, number))
        for function in functions:
            shape, image = image.shape, function(image)
            if image.shape != shape or image.dtype != torch.uint8:
                raise TrainingError(
                    f"the augmentation gave {image.dtype} {list(image.shape)} for uint8 {list(shape)}; it must "
                    "keep both"
                )
        out.append(image)
    return torch.stack(out)


def _load(name: str) -> Callable[[Tensor], Tensor]:
    module, _, factory = POLICIES.get(name, name).partition(":")
    try:
        made: Callable[[Tensor], Tensor] = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"the augmentation {name} cannot be loaded ({error})") from error
    if not callable(made):
        raise TrainingError(f"the augmentation factory {name} gave {type(made).__name__}, not a function")
    return made
