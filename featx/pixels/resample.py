"""Pillow's antialiased resize of a box in torch, on any device: to within 2 levels, measured on photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from featx.pixels.preprocess import Box

# Images that are computed together: to start a GPU's kernels for each one takes longer than their work. Weights take
# 230 MB for images of 8,000 pixels, 15 MB for ones of 500.
TOGETHER = 32
# Pixels of images that are computed together, each as large as the largest of them.
PADDED = 1 << 25


def resized(
    images: Sequence[Tensor], boxes: Sequence[Box], side: int, interpolation: str, fill: Sequence[int] | None = None
) -> list[Tensor]:
    """A box of each image, `uint8 [3, H, W]` -> `uint8 [3, side, side]`, on their device.

    A box whose left is beyond its right is mirrored. First across, then down, each rounded to 8 bits, as
    `Preprocess.square` does it. fill: the colour of what boxes show beyond the image; None where they show none.
    """
    out: list[Tensor] = []
    for some in together(images):
        batch, (heights, widths) = padded(images[some])
        left, top, right, bottom = torch.tensor(boxes[some], device=batch.device).T
        across = _weights(left, right, widths, side, interpolation)
        down = _weights(top, bottom, heights, side, interpolation)

        count, _, height, width = batch.shape
        lines = batch.float().view(count, 3 * height, width)
        narrow = torch.bmm(lines, across.mT).add_(0.5).floor_().clamp_(0, 255).view(count, 3, height, side)
        made = torch.einsum("bsh,bchw->bcsw", down, narrow).add_(0.5).clamp_(0, 255).to(torch.uint8)
        if fill is not None:
            inside = (down.sum(2) > 0)[:, None, :, None] & (across.sum(2) > 0)[:, None, None, :]
            made = made.where(inside, torch.tensor(fill, dtype=torch.uint8, device=made.device)[:, None, None])
        out += made.unbind()
    return out


def together(images: Sequence[Tensor], most: int = PADDED) -> Iterator[slice]:
    """Which images, in order, are computed together: `most` pixels in all, or one image."""
    start = height = width = 0
    for i, image in enumerate(images):
        size = max(height, image.shape[1]), max(width, image.shape[2])
        if i > start and (i - start == TOGETHER or (i + 1 - start) * size[0] * size[1] > most):
            yield slice(start, i)
            start, size = i, (image.shape[1], image.shape[2])
        height, width = size
    if images:
        yield slice(start, len(images))


def padded(images: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
    """Images, `uint8 [3, H, W]`, as one batch, black beyond their right and lower edges; their heights and widths."""
    sizes = [[image.shape[axis] for image in images] for axis in (1, 2)]
    batch = images[0].new_zeros((len(images), 3, *map(max, sizes)))
    for place, image, height, width in zip(batch, images, *sizes, strict=True):
        place[:, :height, :width] = image
    return batch, sizes


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
