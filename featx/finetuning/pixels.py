"""Owns the images that training sees again and again: decoded once, kept as `uint8` while they fit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from featx.devices import available_threads
from featx.errors import TrainingError
from featx.extraction.result import Extraction
from featx.features import content_key
from featx.finetuning.augment import Augmentation, Draws, apply, crop, mirror
from featx.finetuning.memory import free_memory
from featx.pixels.preprocess import RESAMPLE
from featx.pixels.views import CENTER, augmented, pixels

# of the memory that is free: the rest is for activations, gradients and everybody else
SHARE = 0.4

Look = Callable[[Image.Image, bytes, int], np.ndarray]


class Pixels:
    """Some images of a data set, `uint8 [3, S, S]` each, in one or several views.

    Where all of them fit into memory (into the GPU's, if that has room), every image is decoded once.
    Otherwise they are decoded as they are asked for, on threads, the next batch while one is trained on.
    """

    def __init__(
        self,
        extraction: Extraction,
        rows: np.ndarray,
        look: Look,
        shape: tuple[int, ...],
        device: torch.device,
        workers: int | None = None,
        room: float | None = None,
    ) -> None:
        """rows: `int [N]`, as of `extraction.numbers`. look: image, content key and view number -> pixels.

        shape: `(views, 3, S, S)`. room: bytes to keep decoded images in; by default a share of free memory.
        """
        self.extraction, self.rows, self.look, self.shape = extraction, rows, look, shape
        self.aspects = np.ones(len(rows))
        """`float64 [N]`: width / height of each image; known once it was decoded."""
        self._executor = ThreadPoolExecutor(workers or available_threads(), thread_name_prefix="featx-pixels")
        self._ahead: tuple[bytes, list[Future[np.ndarray]]] | None = None
        self.table: Tensor | None = None
        size = len(rows) * int(np.prod(shape))
        if size <= (free_memory(torch.device("cpu")) * SHARE if room is None else room):
            self.table = self._all()
            if device.type == "cuda" and size <= free_memory(device) * SHARE:
                self.table = self.table.to(device)
        self.device = device

    def take(
        self,
        which: np.ndarray,
        views: np.ndarray | None = None,
        then: tuple[np.ndarray, np.ndarray | None] | None = None,
    ) -> Tensor:
        """Images `which` (`int [B]`, counting `rows`), each in one view -> `uint8 [B, 3, S, S]` on the device.

        then: what will be asked for next, to be decoded meanwhile.
        """
        views = np.zeros(len(which), np.int64) if views is None else views
        if self.table is not None:
            index = torch.from_numpy(which).to(self.table.device)
            return self.table[index, torch.from_numpy(views).to(self.table.device)].to(self.device)
        asked = which.tobytes() + views.tobytes()
        if self._ahead is None or self._ahead[0] != asked:
            self._ahead = asked, self._submit(which, views)
        waiting = self._ahead[1]
        self._ahead = None
        if then is not None:
            following = np.zeros(len(then[0]), np.int64) if then[1] is None else then[1]
            self._ahead = then[0].tobytes() + following.tobytes(), self._submit(then[0], following)
        return torch.from_numpy(np.stack([f.result() for f in waiting])).to(self.device)

    def close(self) -> None:
        """End the threads and let go of the pixels."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self.table = None

    def _submit(self, which: np.ndarray, views: np.ndarray) -> list[Future[np.ndarray]]:
        pairs = zip(which.tolist(), views.tolist(), strict=True)
        return [self._executor.submit(self._decode, i, view) for i, view in pairs]

    def _all(self) -> Tensor:
        table = torch.empty((len(self.rows), *self.shape), dtype=torch.uint8)

        def fill(i: int) -> None:
            image, key = self._open(i)
            for view in range(self.shape[0]):
                table[i, view] = torch.from_numpy(self.look(image, key, view))

        filled = self._executor.map(fill, range(len(self.rows)))
        for _ in tqdm(filled, "decode", len(self.rows), unit=" images", disable=None):
            pass
        return table

    def _decode(self, i: int, view: int) -> np.ndarray:
        image, key = self._open(i)
        return self.look(image, key, view)

    def _open(self, i: int) -> tuple[Image.Image, bytes]:
        number = int(self.rows[i])
        row = int(self.extraction.numbers[number])
        data = self.extraction.source.read(row)
        key = content_key(data)
        if key != self.extraction.keys[number].tobytes():
            raise TrainingError(f"{self.extraction.source.ids[row]} changed while featx was running; start again")
        image = self.extraction.info.preprocess.decode(data)
        self.aspects[i] = image.width / image.height
        return image, key


class Pictures:
    """What an uncached network is trained on: augmented pixels, and centre crops to measure on."""

    def __init__(
        self,
        extraction: Extraction,
        train: np.ndarray,
        held: np.ndarray,
        augmentation: Augmentation,
        *,
        views: int,
        min_area: float,
        seed: int,
        device: torch.device,
        workers: int | None = None,
        room: float | None = None,
    ) -> None:
        """train, held: `int [N]`, `int [M]`, row numbers of `extraction`. views: of `views`."""
        self.augmentation, self.min_area, self.seed = augmentation, min_area, seed
        self.functions = augmentation.functions()
        preprocess = extraction.info.preprocess
        self.side = preprocess.crop
        side, whole = preprocess.crop, preprocess.resize
        names = [augmented(extraction.request.seed, k) for k in range(1, views + 1)]

        def center(image: Image.Image, key: bytes, view: int) -> np.ndarray:
            return pixels(preprocess, image, key, CENTER)

        def stretched(image: Image.Image, key: bytes, view: int) -> np.ndarray:
            square = image.resize((whole, whole), RESAMPLE[preprocess.interpolation])
            return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

        def fixed(image: Image.Image, key: bytes, view: int) -> np.ndarray:
            return pixels(preprocess, image, key, names[view])

        self.views = views if augmentation.geometry == "views" else 1
        look: Look = {"views": fixed, "crop-flip": stretched}.get(augmentation.geometry, center)
        size = whole if augmentation.geometry == "crop-flip" else side
        self._train = Pixels(extraction, train, look, (self.views, 3, size, size), device, workers, room)
        self._held = Pixels(extraction, held, center, (1, 3, side, side), device, workers, room)
        self._draws: tuple[int, Draws] | None = None

    def draws(self, epoch: int) -> Draws:
        if self._draws is None or self._draws[0] != epoch:
            self._draws = epoch, Draws.of(len(self._train.rows), self.seed, epoch)
        return self._draws[1]

    def train(self, rows: np.ndarray, epoch: int, then: np.ndarray | None = None) -> Tensor:
        """Training images `rows`, `int [B]`, as this epoch sees them -> `uint8 [B, 3, crop, crop]`."""
        draws = self.draws(epoch)
        following = None if then is None else (then, self._views(draws, then))
        images = self._train.take(rows, self._views(draws, rows), following)
        if self.augmentation.geometry == "crop-flip":
            boxes = draws.boxes(rows, self._train.aspects[rows], self.min_area)
            images = crop(images, boxes, draws.flips[rows], self.side)
        elif self.augmentation.geometry == "flip":
            images = mirror(images, draws.flips[rows])
        return apply(self.functions, images, rows, self.seed, epoch)

    def held(self, rows: np.ndarray, then: np.ndarray | None = None) -> Tensor:
        """Centre crops of the images that select, `int [B]` -> `uint8 [B, 3, crop, crop]`."""
        return self._held.take(rows, None, None if then is None else (then, None))

    def close(self) -> None:
        self._train.close()
        self._held.close()

    def _views(self, draws: Draws, rows: np.ndarray) -> np.ndarray:
        return (draws.views[rows] * self.views).astype(np.int64)
