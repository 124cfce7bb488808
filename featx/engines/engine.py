"""`Engine`: the interface for running a backbone on batches of pixels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from featx.devices import available_threads

CPU_BATCH = 32

SPEED_SECONDS = 1.0  # for which throughput is measured, after a warm-up batch


class Engine(Protocol):
    """A backbone, ready to run. An image's row does not depend on the rest of its batch."""

    name: str
    """`onnxruntime`, `openvino`, `torch-cpu`, `torch-cuda` or one of your own; a store records it."""
    batch_size: int
    """The largest number of images per call, and the fastest."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]`, 0 < B <= batch_size -> `float32 [B, *row_shape]`.

        An engine on a GPU takes a tensor on that GPU as well.
        """
        ...

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Start on a batch; the function returned waits for its rows, and `images` must not change until then.

        Call `submit` for the next batch before you ask for the rows of the last one, so that onnxruntime's
        threads and the GPU always have work. torch on the CPU has finished when this returns.
        """
        ...

    def close(self) -> None:
        """Drop what has not started, and end the engine's threads."""
        ...


class PiecewiseEngine:
    """Cuts a batch into pieces, and one thread runs each piece from the first layer to the last.

    A runtime by itself puts all threads on one batch; in pieces no thread waits for another after every layer, and a
    piece's activations stay in the processor's cache.
    """

    def __init__(self, most: int, batch_size: int | None, threads: int | None) -> None:
        """most: images in a piece. batch_size, threads: by default as many as this machine is fast with."""
        self.threads, self.process = threads or available_threads(), os.getpid()
        self.batch_size = batch_size or max(CPU_BATCH, 4 * self.threads)
        most = min(most, -(-self.batch_size // self.threads))
        self.piece = -(-self.batch_size // -(-self.batch_size // most))  # pieces of one size, none small at the end
        self._open()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]` -> `float32 [B, *row_shape]`."""
        return self.submit(images)()

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Queue the batch's pieces; the function returned waits for their rows."""
        if self.process != os.getpid():  # a fork has left the threads behind
            self.process = os.getpid()
            self._open()
        starts = range(0, len(images), self.piece)
        pieces = [self.executor.submit(self._run, images[start : start + self.piece]) for start in starts]
        return lambda: np.concatenate([piece.result() for piece in pieces])

    def close(self) -> None:
        """End the threads; pieces that have not started are dropped."""
        self.executor.shutdown(cancel_futures=True)

    def _open(self) -> None:
        """Start what a fork leaves behind."""
        self.executor = ThreadPoolExecutor(self.threads, thread_name_prefix="featx-embed")

    def _run(self, images: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def measure_speed(engine: Engine, crop: int) -> float:
    """Images per second of an engine alone, on this machine: decoding depends on the photographs."""
    images = np.random.default_rng(0).integers(0, 256, (engine.batch_size, 3, crop, crop), dtype=np.uint8)
    engine(images)
    begin, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begin < SPEED_SECONDS:
        engine(images)
        done += 1
    return round(done * len(images) / (time.perf_counter() - begin), 1)
