"""`Engine`: the interface for running a backbone on batches of pixels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

CPU_BATCH = 32

SPEED_SECONDS = 1.0  # for which throughput is measured, after a warm-up batch


class Engine(Protocol):
    """A backbone, ready to run. An image's row does not depend on the rest of its batch."""

    name: str
    """`onnxruntime`, `torch-cpu`, `torch-cuda` or one of your own; a store records it."""
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


def measure_speed(engine: Engine, crop: int) -> float:
    """Images per second of an engine alone, on this machine: decoding depends on the photographs."""
    images = np.random.default_rng(0).integers(0, 256, (engine.batch_size, 3, crop, crop), dtype=np.uint8)
    engine(images)
    begin, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - begin < SPEED_SECONDS:
        engine(images)
        done += 1
    return round(done * len(images) / (time.perf_counter() - begin), 1)
