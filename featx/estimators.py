"""Owns `ImageFeatures`: the cache as a scikit-learn transformer over paths, Pillow images or arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags

from featx.errors import ImageError, SourceError
from featx.extraction import sync
from featx.preprocess import decode
from featx.sources import Source


@dataclass(frozen=True, eq=False)
class _Images(Source):
    """Images that are no listing of files: an image in memory is read as the PPM file of its pixels."""

    items: Sequence[Any] = ()

    def read(self, i: int) -> bytes:
        item = self.items[i]
        if isinstance(item, (str, Path)):
            return super().read(i)
        pixels = np.asarray(decode(item))
        return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


class ImageFeatures(TransformerMixin, BaseEstimator):
    """Images -> features `[N, D]`, computed once and cached; for a `Pipeline`, `GridSearchCV` and the like.

    `transform` takes a sequence of paths, Pillow images or `uint8 [H, W, 3]` arrays, or one
    `uint8 [N, H, W, 3]` array. Parameters as for `featx.extract`. There is nothing to fit. An image that
    cannot be read raises `ImageError`, since rows must match labels.

    >>> make_pipeline(ImageFeatures(backbone="resnet18"), LogisticRegression()).fit(paths, y)
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        weights: str = "pretrained",
        layer: str = "features",
        seed: int = 0,
        cache: str | Path = "cache",
        device: str = "auto",
        precision: str = "fp32",
        dtype: str = "float32",
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.layer = layer
        self.seed = seed
        self.cache = cache
        self.device = device
        self.precision = precision
        self.dtype = dtype
        self.batch_size = batch_size
        self.workers = workers

    def fit(self, X: Any, y: Any = None) -> ImageFeatures:
        """Nothing to learn: the backbone is frozen."""
        return self

    def transform(self, X: Any) -> np.ndarray:
        """N images -> `float32 | float16 [N, D]`, in their order."""
        if isinstance(X, (str, bytes, Path, Image.Image)) or (isinstance(X, np.ndarray) and X.ndim not in (1, 4)):
            raise SourceError(
                "expected a sequence of paths, Pillow images or uint8 [H, W, 3] arrays, or one "
                f"uint8 [N, H, W, 3] array; got {type(X).__name__}"
                + (f" {list(X.shape)}; put one image into a list" if isinstance(X, np.ndarray) else "")
            )
        items = list(X)
        ids = [str(item) if isinstance(item, (str, Path)) else f"image {i}" for i, item in enumerate(items)]
        if not items:
            raise SourceError("there are no images to transform")
        source = _Images(uri="the given images", root=Path(), ids=ids, items=items)
        extraction = sync(source, **self.get_params(deep=False))
        skipped = extraction.report["skipped_images"]
        if skipped:
            raise ImageError(
                f"{len(skipped)} of {len(items)} images cannot be used; the first is {skipped[0]['id']}: "
                f"{skipped[0]['reason']}"
            )
        return extraction.features().X

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags
