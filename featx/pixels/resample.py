"""Pillow's antialiased resize of a box in torch, on any device: to within 2 levels, measured on photographs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featx.pixels.preprocess import Box

# Boxes whose weights are computed together: 230 MB for images of 8,000 pixels, 15 MB for ones of 500.
TOGETHER = 32


def resized(
    images: Sequence[Tensor], boxes: Sequence[Box], side: int, interpolation: str, fill: Sequence[int] | None = None
) -> list[Tensor]:
    """A box of each image, `uint8 [3, H, W]` -> `uint8 [3, side, side]`, on their device.

    A box whose left is beyond its right is mirrored. First across, then down, each rounded to 8 bits, as
    `Preprocess.square` does it. fill: the colour of what boxes show beyond the image; None where they show none.
    """
    out: list[Tensor] = []
    for start in range(0, len(images), TOGETHER):
        some = images[start : start + TOGETHER]
        left, top, right, bottom = torch.tensor(boxes[start : start + TOGETHER], device=some[0].device).T
        across = _weights(left, right, [image.shape[2] for image in some], side, interpolation)
        down = _weights(top, bottom, [image.shape[1] for image in some], side, interpolation)

        for image, x, y in zip(some, across, down, strict=True):
            _, height, width = image.shape
            narrow = (image.float() @ x[:, :width].T).add_(0.5).floor_().clamp_(0, 255)
            made = (y[:, :height] @ narrow).add_(0.5).clamp_(0, 255).to(torch.uint8)
            if fill is not None:
                inside = (y.sum(1) > 0)[:, None] & (x.sum(1) > 0)
                made = made.where(inside, torch.tensor(fill, dtype=torch.uint8, device=made.device)[:, None, None])
            out.append(made)
    return out


def _weights(starts: Tensor, stops: Tensor, sizes: list[int], side: int, interpolation: str) -> Tensor:
    """`float32 [B, side, max(sizes)]`: the weight of each pixel of an axis in each of `side` pixels of a box.

    All are 0 for those beyond the image.
    """
    pixels = torch.arange(max(sizes), device=starts.device)
    scale = ((stops - starts) / side)[:, None]
    centres = starts[:, None] + (torch.arange(side, device=starts.device) + 0.5) * scale
    x = ((pixels + 0.5 - centres[..., None]) / scale.abs().clamp(min=1)[..., None]).abs_()

    if interpolation == "bilinear":
        weights = (1 - x).clamp_(min=0)
    else:
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, far.masked_fill_(x >= 2, 0))
    ends = torch.tensor(sizes, device=starts.device)[:, None]
    weights *= (pixels < ends[..., None]) & ((centres > 0) & (centres < ends))[..., None]
    return weights.div_(weights.sum(2, keepdim=True).clamp_(min=1e-6))
