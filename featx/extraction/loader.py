"""Reads, identifies and decodes images on threads, ahead of the backbone."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from featx.cache.writing import Writer
from featx.errors import ImageError
from featx.features import content_key
from featx.pixels.jpeg import Encoded, header
from featx.pixels.preprocess import Preprocess
from featx.pixels.views import look, pixels
from featx.sources.source import Source
from featx.threads import ahead

if TYPE_CHECKING:
    from torch import Tensor

    Pixels = np.ndarray | Tensor

# Decoded images that may wait for the backbone, in bytes: memory does not grow with the data set.
WAITING_BYTES = 96 << 20
# Files that may wait where they are not decoded here.
ENCODED = 64
# Keys of images in flight that are remembered before the first check which of them are stored.
CLAIMS = 1 << 11


@dataclass(frozen=True, eq=False)
class Loaded:
    """One image on its way to the backbone, or the reason why it goes no further."""

    number: int
    """The image's number in its source."""
    key: bytes
    """The content key, 32 bytes; empty where the file could not be read."""
    views: list[tuple[int, Pixels]]
    """View number and `uint8 [3, H, W]` of each view that no store has; empty for a duplicate."""
    error: str = ""
    encoded: Encoded | None = None
    """Set instead of `views` when the caller decodes JPEGs (`--decode gpu`)."""


class Loader:
    """Decodes what the stores lack, in order, on `workers` threads, never far ahead of its reader."""

    def __init__(
        self,
        source: Source,
        preprocess: Preprocess,
        stores: Sequence[Writer],
        workers: int,
        *,
        waiting_bytes: int = WAITING_BYTES,
        claims: int = CLAIMS,
    ) -> None:
        """waiting_bytes: the most that decoded images may take while they wait. claims: in place of `CLAIMS`."""
        self.source = source
        self.preprocess = preprocess
        self.stores = stores
        self.workers = workers
        self.read_seconds = self.decode_seconds = 0.0
        """The threads' processor time, so that waiting does not count."""
        self.file_seconds = 0.0
        """The threads' time in reading and hashing, waiting included."""
        self.decoded = self.large = 0
        """Images decoded, and how many of them `--decode fast` would decode at a smaller scale."""
        self.decoded_on_gpu = 0
        """Images that the GPU decoded."""
        self.device_seconds = 0.0
        """Wall time of decoding on the GPU, waiting for it included."""
        self.cosine: float | None = None
        """Least cosine between features of the GPU's pixels and of Pillow's; None where none were compared."""
        self._claimed: set[bytes] = set()
        self._waiting_bytes, self._claims = waiting_bytes, claims
        self._most_claimed = claims
        self._lock = threading.Lock()

    def __call__(self, numbers: np.ndarray, *, encoded: bool = False) -> Generator[Loaded]:
        """Yield a `Loaded` for every image number, `int [M]`, in order. Closing the iterator ends the threads.

        encoded: leave the JPEGs that a GPU can decode as they are.
        """
        window = self._waiting_bytes // (3 * self.preprocess.crop**2 * len(self.stores))
        window = max(2 * self.workers, min(window, ENCODED if encoded else 512))
        load = partial(self._load, encoded=encoded)
        return ahead(load, map(int, numbers), threads=self.workers, window=window, name="featx-load")

    def counted(self) -> tuple[float, float, float, float]:
        """`read_seconds`, `decode_seconds`, `file_seconds` and `device_seconds` of this moment."""
        with self._lock:
            return self.read_seconds, self.decode_seconds, self.file_seconds, self.device_seconds

    def count_gpu(self, images: int, seconds: float) -> None:
        """Count images that the GPU has decoded, in so many seconds."""
        with self._lock:
            self.decoded += images
            self.decoded_on_gpu += images
            self.device_seconds += seconds

    def seen(self, image: Image.Image, key: bytes, view: int) -> np.ndarray:
        """One view of a decoded image."""
        return pixels(self.preprocess, image, key, self.stores[view].spec.view)

    def _load(self, number: int, *, encoded: bool) -> Loaded:
        key = b""
        begin, middle, opened, read = time.thread_time(), None, time.perf_counter(), None
        large = None
        try:
            data = self.source.read(number)
            key = content_key(data)
            missing = self._claim(key)
            middle, read = time.thread_time(), time.perf_counter()
            if not missing:
                return Loaded(number, key, [])
            if encoded and (found := header(data)):
                names = [self.stores[v].spec.view for v in missing]
                looks = [look(self.preprocess, *found.upright, key, name) for name in names]
                whole = [(v, *drawn) for v, drawn in zip(missing, looks, strict=True)]
                return Loaded(number, key, [], encoded=Encoded(data, found, whole))
            with self.preprocess.decoded(data) as image:
                large = self.preprocess.shrinks(data, image.size)
                return Loaded(number, key, [(v, self.seen(image, key, v)) for v in missing])
        except ImageError as error:
            return Loaded(number, key, [], str(error))
        finally:
            end = time.thread_time()
            middle, read = middle or end, read or time.perf_counter()
            with self._lock:
                self.read_seconds += middle - begin
                self.decode_seconds += end - middle
                self.file_seconds += read - opened
                self.decoded += large is not None
                self.large += bool(large)

    def _claim(self, key: bytes) -> list[int]:
        """The views that are still to be computed for a key; empty for all but the first caller."""
        with self._lock:
            if key in self._claimed:
                return []
            if len(self._claimed) >= self._most_claimed:
                self._forget()
            self._claimed.add(key)
            one = np.frombuffer(key, np.uint8)[None]
            return [v for v, store in enumerate(self.stores) if not store.contains(one)[0]]

    def _forget(self) -> None:
        """Drop the claims on keys that are stored by now: memory does not grow with the data set."""
        keys = np.frombuffer(b"".join(self._claimed), np.uint8).reshape(-1, 32)
        waiting = ~np.logical_and.reduce([store.contains(keys) for store in self.stores])
        self._claimed = {key.tobytes() for key in keys[waiting]}
        self._most_claimed = 2 * len(self._claimed) + self._claims
