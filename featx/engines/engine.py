"""`Engine`: what runs a backbone on batches of pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

ENGINES = ("onnxruntime", "torch-cpu", "torch-cuda")


CPU_BATCH = 32


class Engine(Protocol):
    """A backbone, ready to run. Rows do not depend on what else is in the batch."""

    name: str
    """One of `ENGINES`; a store records it."""
    batch_size: int
    """The most images of one call, and the best number."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`uint8 [B, 3, crop, crop]`, 0 < B <= batch_size -> `float32 [B, *row_shape]`.

        An engine on a GPU takes a tensor on that GPU as well.
        """
        ...

    def submit(self, images: np.ndarray) -> Callable[[], np.ndarray]:
        """Start on a batch; what is returned waits for its rows, and `images` must stay as it is until then.

        Call `submit` for the next batch before asking for the rows of the last: onnxruntime's threads and
        the GPU then never run dry. torch on the CPU is done when this returns.
        """
        ...

    def close(self) -> None:
        """Drop what has not begun, and end the engine's threads."""
        ...
