"""Owns the chroma of subsampled JPEGs: interpolated as libjpeg does it, for a decoder that repeats each sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from featx.pixels.resample import rounded_up

# Pixels that one chroma sample covers, across and down, which can be interpolated here.
SAMPLINGS = ((2, 1), (2, 2))
# Images of one sampling share a call when they round up to the same size, up to so many pixels together.
SIZE, PIXELS = 128, 1 << 23


def interpolated(images: Sequence[Tensor], samplings: Sequence[tuple[int, int]]) -> list[Tensor]:
    """`uint8 [3, H, W]` each, as decoded with repeated chroma -> the same with libjpeg's interpolation.

    samplings: the pixels that a chroma sample covers, across and down; (1, 1) leaves an image as it is.
    nvJPEG repeats samples where Pillow's libjpeg interpolates them. A block's pixels share one sample,
    so that it can be told from their colours again (exactly, but where colours are cut off at 0 or 255),
    and what the interpolation would have added is added. Written without a GPU at hand: its speed is
    not measured.
    """
    out = list(images)
    alike = defaultdict(list)
    for i, (image, sampling) in enumerate(zip(images, samplings, strict=True)):
        if sampling != (1, 1):
            assert sampling in SAMPLINGS
            # one sample more on the far sides, which repeats the last one
            alike[sampling, rounded_up(image.shape[1] + 3, SIZE), rounded_up(image.shape[2] + 3, SIZE)].append(i)
    for (sampling, rows, columns), members in alike.items():
        most = max(1, PIXELS // (rows * columns))
        for start in range(0, len(members), most):
            some = members[start : start + most]
            padded = images[0].new_empty((len(some), 3, rows, columns))
            for place, i in zip(padded, some, strict=True):
                _, height, width = images[i].shape
                place[:, :height, :width] = images[i]
                place[:, :height, width : width + 3] = images[i][:, :, -1:]
                place[:, height : height + 3, : width + 3] = place[:, height - 1 : height, : width + 3]
            for made, i in zip(_smooth(padded, *sampling), some, strict=True):
                out[i] = made[:, : images[i].shape[1], : images[i].shape[2]]
    return out


def _smooth(images: Tensor, across: int, down: int) -> Tensor:
    """`uint8 [B, 3, H, W]`, H and W whole blocks -> the same, with the chroma of its blocks interpolated."""
    red, green, blue = images.to(torch.float32).unbind(1)
    estimates = torch.stack(
        [0.5 * blue - 0.168736 * red - 0.331264 * green, 0.5 * red - 0.418688 * green - 0.081312 * blue], 1
    )
    whole = ((images > 0) & (images < 255)).all(1, keepdim=True)  # not cut off
    weights = whole.to(torch.float32) + 1e-4
    samples = (_blocks(estimates * weights, across, down) / _blocks(weights, across, down)).round().to(torch.int32)
    fine = samples
    if down == 2:
        fine = _between(fine, 2)
    fine = _between(fine, 3)
    # the sums are of 16ths or 4ths; libjpeg rounds them so that halves go either way in turn
    left, right, bits = (8, 7, 4) if down == 2 else (1, 2, 2)
    fine[..., 0::2] += left
    fine[..., 1::2] += right
    fine = fine.bitwise_right_shift(bits)
    coarse = samples.repeat_interleave(down, 2).repeat_interleave(across, 3)
    added = [a - b for a, b in zip(_offsets(fine), _offsets(coarse), strict=True)]
    return (images + torch.stack(added, 1)).clamp_(0, 255).to(torch.uint8)


def _blocks(x: Tensor, across: int, down: int) -> Tensor:
    """The sum of each block of pixels."""
    return x.unflatten(3, (-1, across)).unflatten(2, (-1, down)).sum((3, 5))


def _between(x: Tensor, axis: int) -> Tensor:
    """Two for each one: 3 of it and 1 of its neighbour, on that side; the border is its own neighbour."""
    sides = (1, 1, 0, 0) if axis == 3 else (0, 0, 1, 1)
    padded = pad(x.to(torch.float32), sides, mode="replicate").to(torch.int32)
    before, after = padded.narrow(axis, 0, x.shape[axis]), padded.narrow(axis, 2, x.shape[axis])
    return torch.stack([3 * x + before, 3 * x + after], axis + 1).flatten(axis, axis + 1)


def _offsets(chroma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Cb and Cr, `int32 [B, 2, H, W]` around 0, add to luma for red, green and blue, in 16 bits as libjpeg."""
    blueness, redness = chroma.unbind(1)
    half = 1 << 15
    red = (91881 * redness + half).bitwise_right_shift(16)
    green = (-22554 * blueness - 46802 * redness + half).bitwise_right_shift(16)
    blue = (116130 * blueness + half).bitwise_right_shift(16)
    return red, green, blue
