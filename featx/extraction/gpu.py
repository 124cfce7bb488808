"""Decodes JPEGs on a GPU, between the loader and the engine; imports torch for the first one."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.devices import decoding_device
from featx.engines.engine import Engine
from featx.errors import FeatxError, ImageError
from featx.extraction.embedding import stack
from featx.extraction.loader import Loaded, Loader
from featx.features import cosines
from featx.pixels.jpeg import Encoded
from featx.pixels.preprocess import CLOSE
from featx.state import FILTERS
from featx.threads import ahead

if TYPE_CHECKING:
    from featx.extraction.loader import Pixels
    from featx.pixels.nvjpeg import Gpu

# Images that go to the GPU together, and groups that may wait there: memory does not grow with the data set.
GROUP, GROUPS = 64, 2
GROUP_BYTES = 64 << 20  # a group of large files is smaller
# Images at the start of a run that are decoded both ways, to compare their features.
SAMPLE = 16


class GpuDecoder:
    """Decodes those JPEGs of a `Loader` that a GPU can decode; all others have the loader's own pixels.

    One thread of its own waits for the GPU. Pillow decodes what the GPU cannot decode after all, or gives the error.
    """

    def __init__(
        self,
        loader: Loader,
        device: str,
        engine: Engine,
        *,
        gpu: Gpu | None = None,
        group: int = GROUP,
        group_bytes: int = GROUP_BYTES,
    ) -> None:
        """engine: embeds the images that are decoded both ways. gpu: by default one on `device`, opened for the
        first JPEG that it can decode. group, group_bytes: the most that goes to it together."""
        self.loader, self.device, self.engine = loader, device, engine
        self.group, self.group_bytes = group, group_bytes
        self._gpu = gpu
        self._sample: list[tuple[Pixels, Pixels]] | None = None  # None: not taken yet; empty: compared

    def __call__(self, numbers: np.ndarray) -> Generator[Loaded]:
        """Yield what the loader yields, in its order, with the views of every image decoded.

        Closing the iterator ends the thread, and the loader's. Raises `FeatxError` where there is no GPU, and where
        its pixels give other features than Pillow's.
        """
        with closing(self.loader(numbers, encoded=True)) as loaded, FILTERS, warnings.catch_warnings():
            # torchvision warns that its decoders will move, and torch that a file's bytes are read-only
            warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            groups = iter(lambda: list(self._grouped(loaded)), [])
            decoded = ahead(self._decode, groups, threads=1, window=GROUPS + 1, name="featx-decode")
            with closing(decoded):
                for group in decoded:
                    self._compare_with_pillow()
                    yield from group

    def _compare_with_pillow(self) -> None:
        """Compare the features of the run's first images by both decoders; raise `FeatxError` if they are far apart.

        Does nothing before there are such images, nor once they have been compared.
        """
        if not self._sample:
            return
        sample, self._sample = self._sample, []
        rows = []
        size = self.engine.batch_size
        for images in zip(*sample, strict=True):
            parts = [list(images[i : i + size]) for i in range(0, len(images), size)]
            rows.append(np.concatenate([self.engine(stack(part, self.engine)) for part in parts]))

        self.loader.cosine = cosine = float(cosines(*rows).min())
        if not cosine >= CLOSE:
            raise FeatxError(
                f"features of images decoded on the GPU differ from Pillow's: of {len(sample)} images the worst has a "
                f"cosine of {cosine:.5f}, less than {CLOSE}; none of them was stored. Use --decode exact"
            )

    def _decode(self, group: list[Loaded]) -> list[Loaded]:
        """The images with `views` in place of `encoded`."""
        encoded = [image.encoded for image in group if image.encoded]
        if not encoded:
            return group
        if self._gpu is None:
            from featx.pixels.nvjpeg import Gpu

            self._gpu = Gpu(self.loader.preprocess, decoding_device(self.device))
        begin = time.perf_counter()
        made = iter(self._gpu(encoded))
        out = [self._finished(image, next(made)) if image.encoded else image for image in group]
        if self._sample is None:
            self._sample = list(islice(self._both(group, out), SAMPLE)) or None
        decoded = sum(not isinstance(image.views[0][1], np.ndarray) for image in out if image.views)
        self.loader.count_gpu(decoded, time.perf_counter() - begin)
        return out

    def _finished(self, loaded: Loaded, views: list[Any] | None) -> Loaded:
        """The image with the GPU's views, or with Pillow's where the GPU made none."""
        encoded = loaded.encoded
        assert encoded is not None
        try:
            seen = self._by_pillow(loaded.key, encoded) if views is None else views
        except ImageError as error:
            return replace(loaded, error=str(error), encoded=None)
        return replace(loaded, views=[(n, v) for (n, _, _), v in zip(encoded.looks, seen, strict=True)], encoded=None)

    def _by_pillow(self, key: bytes, encoded: Encoded) -> list[np.ndarray]:
        with self.loader.preprocess.decoded(encoded.data) as image:
            return [self.loader.seen(image, key, view) for view, _, _ in encoded.looks]

    def _both(self, group: list[Loaded], out: list[Loaded]) -> Iterator[tuple[Pixels, Pixels]]:
        """The first view of each image that the GPU decoded, by it and by Pillow."""
        for before, after in zip(group, out, strict=True):
            if before.encoded and after.views and not isinstance(after.views[0][1], np.ndarray):
                with contextlib.suppress(ImageError):  # the GPU may decode a damaged file that Pillow refuses
                    yield after.views[0][1], self._by_pillow(before.key, before.encoded)[0]

    def _grouped(self, loaded: Iterator[Loaded]) -> Iterator[Loaded]:
        """The images of the next group."""
        size = 0
        for image in islice(loaded, self.group):
            yield image
            size += len(image.encoded.data) if image.encoded else 0
            if size > self.group_bytes:
                return
