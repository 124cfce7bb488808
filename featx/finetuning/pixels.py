"""Decodes the images of a training once, and keeps them as `uint8` while they fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from featx.devices import free_memory
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import content_key
from featx.finetuning.augment import Draws, apply, crop, mirror
from featx.finetuning.recipes import FinetuneConfig
from featx.pixels.views import CENTER, pixels, view_names

# The share of free memory that decoded images may take; activations and gradients need the rest.
SHARE = 0.4
# The name of a view that only training has: the whole image, stretched to a square.
STRETCHED = "stretched"


@dataclass(frozen=True, eq=False)
class Material:
    """What the inputs of a network are made from."""

    extraction: Extraction
    settings: FinetuneConfig
    device: torch.device
    """Where the batches are needed."""
    workers: int
    """Threads that read and decode."""
    train: np.ndarray
    """`int64 [N]`, row numbers of `extraction`: the images that train."""
    held: np.ndarray
    """`int64 [M]`, row numbers: the images that select; none for `last`."""


class Pixels:
    """Some images of a data set in one or several views, `uint8 [3, S, S]` each.

    Where all of them fit into memory (the GPU's, if that has room), every image is decoded once.
    Otherwise threads decode them when they are requested, the next batch while one is trained on.
    """

    def __init__(self, material: Material, numbers: np.ndarray, views: list[str], room: float | None = None) -> None:
        """numbers: `int [N]`, rows of `extraction`. views: names, as in `featx.pixels.views`, or `STRETCHED`.

        room: bytes to keep decoded images in; by default a share of the memory that is free.
        """
        self.extraction, self.numbers, self.views = material.extraction, numbers, views
        self.device = material.device
        preprocess = self.extraction.info.preprocess
        self.side = max(preprocess.resize, preprocess.crop) if STRETCHED in views else preprocess.crop
        self.aspects = np.ones(len(numbers))
        """`float64 [N]`: width / height of each image; known once it was decoded."""
        self._executor = ThreadPoolExecutor(material.workers, thread_name_prefix="featx-pixels")
        self._waiting: dict[int, Future[np.ndarray]] = {}
        self.table: Tensor | None = None
        """`uint8 [N, views, 3, S, S]`; None where images are decoded when they are requested."""
        size = len(numbers) * len(views) * 3 * self.side**2
        if size <= (free_memory() * SHARE if room is None else room):
            self.table = self._decode_all()
            if self.device.type == "cuda" and size <= torch.cuda.mem_get_info(self.device)[0] * SHARE:
                self.table = self.table.to(self.device)

    def take(self, index: np.ndarray, then: np.ndarray | None = None) -> Tensor:
        """Images in views. index: `int [B]`, image * number of views + view.

        then: the index of the next call, decoded meanwhile. Returns `uint8 [B, 3, S, S]` on the device.
        """
        if self.table is not None:
            where = torch.from_numpy(index).to(self.table.device)
            return self.table.flatten(0, 1)[where].to(self.device)

        waiting = self._waiting
        asked = [waiting[i] if i in waiting else self._executor.submit(self._decode, i) for i in index.tolist()]
        following = [] if then is None else then.tolist()
        self._waiting = {i: self._executor.submit(self._decode, i) for i in following}
        return torch.from_numpy(np.stack([future.result() for future in asked])).to(self.device)

    def close(self) -> None:
        """End the threads and let go of the pixels."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.table = None

    def _decode_all(self) -> Tensor:
        table = torch.empty((len(self.numbers), len(self.views), 3, self.side, self.side), dtype=torch.uint8)

        def fill(i: int) -> None:
            with self._opened(i) as (image, key):
                for number, view in enumerate(self.views):
                    table[i, number] = torch.from_numpy(self._see(image, key, view))

        filled = self._executor.map(fill, range(len(self.numbers)))
        for _ in tqdm(filled, "decode", len(self.numbers), unit=" images", disable=None):
            pass
        return table

    def _decode(self, index: int) -> np.ndarray:
        i, view = divmod(index, len(self.views))
        with self._opened(i) as (image, key):
            return self._see(image, key, self.views[view])

    @contextmanager
    def _opened(self, i: int) -> Iterator[tuple[Image.Image, bytes]]:
        source, row = self.extraction.source, int(self.numbers[i])
        number = int(self.extraction.numbers[row])
        data = source.read(number)
        key = content_key(data)
        if key != self.extraction.keys[row].tobytes():
            raise TrainingError(f"{source.ids[number]} changed while featx was running; start again")
        with self.extraction.info.preprocess.decoded(data) as image:
            self.aspects[i] = image.width / image.height
            yield image, key

    def _see(self, image: Image.Image, key: bytes, view: str) -> np.ndarray:
        preprocess = self.extraction.info.preprocess
        if view != STRETCHED:
            return pixels(preprocess, image, key, view)
        whole = preprocess.render(image, (0, 0, image.width, image.height), self.side)
        return np.ascontiguousarray(whole.transpose(2, 0, 1))


class Pictures:
    """Inputs of a whole network: augmented pixels to train on, and centre crops to measure on."""

    def __init__(self, material: Material, room: float | None = None) -> None:
        """room: as in `Pixels`."""
        settings, request = material.settings, material.extraction.request
        self.geometry, self.functions = settings.steps.geometry, settings.steps.functions()
        self.min_area, self.side = settings.min_area, material.extraction.info.preprocess.crop
        views = [STRETCHED if self.geometry == "crop-flip" else CENTER]
        if self.geometry == "views":
            views = view_names(request.seed, settings.views)[1:]
        self.train_pixels = Pixels(material, material.train, views, room)
        self.held_pixels = Pixels(material, material.held, [CENTER], room)

    def train(self, numbers: np.ndarray, draws: Draws, then: np.ndarray | None = None) -> Tensor:
        """Training images `numbers`, `int [B]`, as this epoch sees them -> `uint8 [B, 3, crop, crop]`."""
        images = self.train_pixels.take(self._index(draws, numbers), None if then is None else self._index(draws, then))
        if self.geometry == "crop-flip":
            boxes = draws.boxes(numbers, self.train_pixels.aspects[numbers], self.min_area)
            images = crop(images, boxes, draws.flips[numbers], self.side)
        elif self.geometry == "flip":
            images = mirror(images, draws.flips[numbers])
        return apply(self.functions, images, numbers, draws.seed, draws.epoch)

    def held(self, numbers: np.ndarray, then: np.ndarray | None = None) -> Tensor:
        """Centre crops of the images that select, `int [B]` -> `uint8 [B, 3, crop, crop]`."""
        return self.held_pixels.take(numbers, then)

    def close(self) -> None:
        self.train_pixels.close()
        self.held_pixels.close()

    def _index(self, draws: Draws, numbers: np.ndarray) -> np.ndarray:
        views = len(self.train_pixels.views)
        index: np.ndarray = numbers * views + draws.choose_views(numbers, views)
        return index
