"""The chroma of subsampled JPEGs, interpolated as libjpeg does it, for a decoder that repeats each sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

# Cb and Cr from red, green and blue; and what Cb and Cr add to luma for each of these.
TO_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
FROM_CHROMA = ((0.0, 1.402), (-0.344136, -0.714136), (1.772, 0.0))


def interpolated(image: Tensor, sampling: tuple[int, int]) -> Tensor:
    """`uint8 [3, H, W]`, as decoded with repeated chroma -> the same with libjpeg's interpolation, to about 1 level.

    sampling: pixels per chroma sample, across and down; (1, 1) leaves an image as it is.
    The pixels of a block share one sample. It is computed back from their colours (exactly, unless these were
    clipped at 0 or 255), and what interpolation would have added is added.
    """
    if sampling == (1, 1):
        return image
    block, pixels = sampling[::-1], image.float()
    weights = ((image > 0) & (image < 255)).all(0, keepdim=True) + 1e-4  # clipped colours say little
    chroma = torch.tensordot(pixels.new_tensor(TO_CHROMA), pixels, 1)
    sums = avg_pool2d(torch.cat([chroma * weights, weights])[None], block, ceil_mode=True)
    samples = (sums[:, :2] / sums[:, 2:]).round()

    # each rounded as libjpeg rounds it
    fine, coarse = (
        interpolate(samples, scale_factor=block, mode="bilinear").round_(),
        interpolate(samples, scale_factor=block),
    )
    colours = pixels.new_tensor(FROM_CHROMA)
    added = torch.tensordot(colours, fine[0], 1).round_() - torch.tensordot(colours, coarse[0], 1).round_()
    mended: Tensor = (pixels + added[:, : image.shape[1], : image.shape[2]]).clamp_(0, 255).to(torch.uint8)
    return mended
