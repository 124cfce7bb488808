"""The chroma of subsampled JPEGs, interpolated as libjpeg does it, for a decoder that repeats each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from featx.pixels.resample import padded, together

# Cb and Cr from red, green and blue; and what Cb and Cr add to luma for each of these.
TO_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
FROM_CHROMA = ((0.0, 1.402), (-0.344136, -0.714136), (1.772, 0.0))


def interpolated(images: Sequence[Tensor], sampling: tuple[int, int]) -> list[Tensor]:
    """`uint8 [3, H, W]`, as decoded with repeated chroma -> the same with libjpeg's interpolation, to about 1 level.

    sampling: pixels per chroma sample, across and down; (1, 1) leaves images as they are.
    The pixels of a block share one sample. It is computed back from their colours (exactly, unless these were
    clipped at 0 or 255), and what interpolation would have added is added.
    """
    if sampling == (1, 1):
        return list(images)
    block, out = sampling[::-1], []
    for some in together(images):
        batch, sizes = padded(images[some])
        ends = torch.tensor(sizes, device=batch.device)[:, :, None]
        rows, columns = (torch.arange(n, device=batch.device) < e for n, e in zip(batch.shape[2:], ends, strict=True))
        mended = _mended(batch, rows[:, :, None] & columns[:, None], block)
        out += [image[:, :height, :width] for image, height, width in zip(mended, *sizes, strict=True)]
    return out


def _mended(batch: Tensor, inside: Tensor, block: tuple[int, int]) -> Tensor:
    """`uint8 [B, 3, H, W]` -> the same with interpolated chroma; inside: `bool [B, H, W]`, pixels of the images."""
    pixels = batch.float()
    weights = ((batch > 0) & (batch < 255)).all(1, keepdim=True) + 1e-4  # clipped colours say little
    weights *= inside[:, None]
    chroma = torch.einsum("kc,bchw->bkhw", pixels.new_tensor(TO_CHROMA), pixels)
    sums = avg_pool2d(torch.cat([chroma * weights, weights], 1), block, ceil_mode=True)
    samples = (sums[:, :2] / sums[:, 2:].clamp(min=1e-9)).round()
    known = sums[:, 2] > 0
    y, x = (known.any(axis).cumsum(1).sub_(1) for axis in (2, 1))  # beyond an image's edge its last sample goes on
    first = torch.arange(len(batch), device=batch.device)[:, None, None]
    samples = samples[first, :, y[:, :, None], x[:, None]].permute(0, 3, 1, 2)

    # each rounded as libjpeg rounds it
    fine, coarse = (
        interpolate(samples, scale_factor=block, mode="bilinear").round_(),
        interpolate(samples, scale_factor=block),
    )
    colours = pixels.new_tensor(FROM_CHROMA)
    added, already = (torch.einsum("ck,bkhw->bchw", colours, kind).round_() for kind in (fine, coarse))
    added = added.sub_(already)[:, :, : batch.shape[2], : batch.shape[3]]
    return pixels.add_(added).clamp_(0, 255).to(torch.uint8)
