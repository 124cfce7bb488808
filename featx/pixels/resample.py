"""Owns Pillow's antialiased resize in torch, bit for bit, on any device: the same whole-number arithmetic."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featx.pixels.preprocess import REACH, Box, Preprocess

# Bits behind the point of Pillow's coefficients: sums of their products with 8-bit pixels stay below 2**31.
BITS = 32 - 8 - 2
# Images share a call when their windows and taps round up to the same sizes; it makes products of so many bytes.
WINDOW, TAPS = 64, 4
PRODUCTS = 256 << 20


@dataclass(frozen=True, eq=False)
class Taps:
    """One pass along one axis: which pixels make each pixel, and their parts in 1 / 2**BITS."""

    first: int
    """The first pixel that is used at all."""
    length: int
    """How many are, from there on."""
    index: np.ndarray
    """`int32 [taps, side]`, counted from `first`; 0 where fewer pixels make one."""
    parts: np.ndarray
    """`int32 [taps, side]`; 0 there."""


@dataclass(frozen=True, eq=False)
class Resize:
    """A box of one image and the two passes that make it `side` x `side`."""

    across: Taps
    down: Taps

    @classmethod
    def of(cls, preprocess: Preprocess, width: int, height: int, box: Box, mirrored: bool = False) -> Resize:
        """As `Preprocess` resizes a box: first across, then down, each pass rounded to 8 bits."""
        side = preprocess.crop
        first, last = preprocess.rows(box, side, height)
        across = taps(width, box[0], box[2], side, preprocess.interpolation)
        down = taps(last - first, box[1] - first, min(box[3] - first, last - first), side, preprocess.interpolation)
        if mirrored:
            across = Taps(across.first, across.length, across.index[:, ::-1], across.parts[:, ::-1])
        return cls(across, Taps(down.first + first, down.length, down.index, down.parts))


@functools.lru_cache(4096)
def taps(size: int, start: float, stop: float, side: int, interpolation: str) -> Taps:
    """What Pillow computes for `side` pixels out of [start, stop) of an axis of `size` pixels.

    Pillow keeps the box in single precision and the weights in double, and cuts numbers off at the point
    where C does.
    """
    begin, end = np.float32(start), np.float32(stop)
    scale = float(end - begin) / side
    stretch = max(scale, 1.0)
    support = REACH[interpolation] * stretch
    centre = float(begin) + (np.arange(side) + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support + 0.5).astype(np.int64), size)
    index = low + np.arange(int((high - low).max()))[:, None]
    weights = np.where(index < high, _weight((index - centre + 0.5) * (1.0 / stretch), interpolation), 0.0)
    total = np.cumsum(weights, axis=0)[-1]  # in order, as a loop adds
    weights = np.divide(weights, total, out=weights, where=total != 0) * (1 << BITS)
    parts = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    first, last = int(low.min()), int(high.max())
    return Taps(first, last - first, np.where(index < high, index - first, 0).astype(np.int32), parts)


def resized(images: Sequence[Tensor], resizes: Sequence[Resize]) -> list[Tensor]:
    """`uint8 [3, H, W]` each, on one device, and how to resize each -> `uint8 [3, side, side]` each, there.

    Images of like sizes are padded to the same one and share the launches of a few operations. Written
    without a GPU at hand: its speed is not measured.
    """
    out: list[Tensor | None] = [None] * len(images)
    for members, rows, columns in _together(resizes):
        padded = images[0].new_empty((len(members), 3, rows, columns))  # what is not filled has no part in anything
        for place, i in zip(padded, members, strict=True):
            x, y = resizes[i].across, resizes[i].down
            window = images[i][:, y.first : y.first + y.length, x.first : x.first + x.length]
            place[:, : y.length, : x.length] = window
        half = _pass(padded, [resizes[i].across for i in members], 3)
        for i, made in zip(members, _pass(half, [resizes[i].down for i in members], 2), strict=True):
            out[i] = made
    return [made for made in out if made is not None]


def _together(resizes: Sequence[Resize]) -> Iterator[tuple[list[int], int, int]]:
    """The numbers of images that share a call, and the rows and columns that they are padded to."""
    alike = defaultdict(list)
    for i, resize in enumerate(resizes):
        x, y = resize.across, resize.down
        sizes = (
            rounded_up(y.length, WINDOW),
            rounded_up(x.length, WINDOW),
            rounded_up(len(x.index), TAPS),
            rounded_up(len(y.index), TAPS),
        )
        alike[sizes].append(i)
    for (rows, columns, wide, _), members in alike.items():
        most = max(1, PRODUCTS // (12 * rows * wide * resizes[members[0]].across.index.shape[1]))
        for start in range(0, len(members), most):
            yield members[start : start + most], rows, columns


def _pass(images: Tensor, each: list[Taps], axis: int) -> Tensor:
    """`uint8 [B, 3, rows, columns]` -> the same with `side` rows (axis 2) or columns (axis 3)."""
    count, side = max(len(t.index) for t in each), each[0].index.shape[1]
    tables = np.zeros((2, len(each), count, side), np.int32)
    for i, t in enumerate(each):
        tables[:, i, : len(t.index)] = t.index, t.parts
    index, parts = torch.from_numpy(tables).to(images.device).unbind()
    flat, shape = [len(each), 1, 1, 1], list(images.shape)
    flat[axis] = shape[axis] = count * side
    taken = images.gather(axis, index.long().view(flat).expand(shape)).unflatten(axis, (count, side))
    parts = parts[:, None, None] if axis == 3 else parts[:, None, :, :, None]
    total = (taken * parts).sum(axis, dtype=torch.int32)
    return total.add_(1 << (BITS - 1)).bitwise_right_shift_(BITS).clamp_(0, 255).to(torch.uint8)


def _weight(x: np.ndarray, interpolation: str) -> np.ndarray:
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.where(x < 1.0, 1.0 - x, 0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def rounded_up(number: int, step: int) -> int:
    """The least multiple of `step` that is not below `number`."""
    return -(-number // step) * step
