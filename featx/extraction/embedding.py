"""The one batching loop: images on their way to the backbone become batches of rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from featx.cache.writing import Writer
from featx.engines.engine import Engine
from featx.errors import FeatxError
from featx.extraction.loader import Loaded
from featx.sources.source import Source
from featx.text import printable

if TYPE_CHECKING:
    from featx.extraction.loader import Pixels


class View(NamedTuple):
    """One view of an image on its way to the engine."""

    number: int
    key: bytes
    view: int
    pixels: Pixels
    last: bool
    """Whether it is its image's last view."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """One batch of rows, in the order of its pixels."""

    rows: np.ndarray
    """`float32 [B, *row_shape]`."""
    keys: np.ndarray
    """`uint8 [B, 32]`."""
    views: np.ndarray
    """`int [B]`: the view's number."""
    numbers: np.ndarray
    """`int [B]`: the image's number in its source."""
    images: int
    """Images whose last view is in this batch."""
    waited: float
    """Seconds that the reader waited for the engine."""


def embed(images: Iterable[Loaded], engine: Engine) -> Iterator[Embedded]:
    """Run the engine on the views of `images`. It computes a batch while the caller has the rows of the one before."""
    views = (
        View(image.number, image.key, view, pixels, last=view == image.views[-1][0])
        for image in images
        for view, pixels in image.views
    )
    running: deque[tuple[list[View], Callable[[], np.ndarray]]] = deque()

    while batch := list(islice(views, engine.batch_size)):
        running.append((batch, engine.submit(stack([view.pixels for view in batch], engine))))
        if len(running) > 1:
            yield _finish(*running.popleft())

    while running:
        yield _finish(*running.popleft())


def _finish(batch: list[View], result: Callable[[], np.ndarray]) -> Embedded:
    begin = time.perf_counter()
    rows = result()
    waited = time.perf_counter() - begin
    keys = np.frombuffer(b"".join(view.key for view in batch), np.uint8).reshape(-1, 32)
    views, numbers = (np.array([getattr(view, name) for view in batch]) for name in ("view", "number"))
    return Embedded(rows, keys, views, numbers, sum(view.last for view in batch), waited)


def stack(pixels: list[Pixels], engine: Engine) -> Any:
    """One batch for an engine: a tensor on the GPU if the engine and some of the images are there, else an array."""
    arrays = [p for p in pixels if isinstance(p, np.ndarray)]
    if len(arrays) == len(pixels):
        return np.stack(arrays)
    if engine.name != "torch-cuda":
        return np.stack([p if isinstance(p, np.ndarray) else p.cpu().numpy() for p in pixels])
    from featx.pixels import nvjpeg

    return nvjpeg.stacked(pixels)


def keep(batch: Embedded, stores: Sequence[Writer], source: Source) -> None:
    """Hand a batch's rows to the stores of their views; raise `FeatxError` if one is not finite.

    Once cached, such a row would come back however often its image is extracted again.
    """
    finite = np.isfinite(batch.rows.reshape(len(batch.rows), -1)).all(axis=1)
    if not finite.all():
        reduced = stores[0].spec.precision != "fp32"
        remedy = "use --precision fp32" if reduced else "its weights are damaged or another network's, so use others"
        raise FeatxError(
            f"the backbone gives NaN or infinity for {printable(source.ids[batch.numbers[~finite][0]])} "
            f"({(~finite).sum()} of the {len(finite)} images in its batch, which is not stored); {remedy}"
        )

    for view in np.unique(batch.views):
        stores[view].append(batch.keys[batch.views == view], batch.rows[batch.views == view])
