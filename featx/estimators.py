"""featx as scikit-learn estimators: `ImageFeatures`, the cache as a transformer, and `HeadClassifier`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from featx import learning
from featx.errors import HeadError, ImageError, SourceError
from featx.extraction.pipeline import sync
from featx.pixels.preprocess import decode
from featx.solvers.examples import Examples
from featx.sources.source import Source


@dataclass(frozen=True, eq=False)
class _Images(Source):
    """Images given one by one: an image in memory is read as the PPM file of its pixels."""

    items: Sequence[Any] = ()

    def take(self, numbers: np.ndarray) -> Source:
        return replace(super().take(numbers), items=[self.items[i] for i in numbers])  # type: ignore[call-arg]

    def read(self, i: int) -> bytes:
        item = self.items[i]
        if isinstance(item, (str, Path)):
            return super().read(i)
        pixels = np.asarray(decode(item))
        return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
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
        decode: str = "exact",
        size: int | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        interpolation: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        # scikit-learn wants each parameter as an attribute of its name
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

    def fit(self, X: Any, y: Any = None) -> ImageFeatures:
        """Nothing to learn: the backbone is frozen."""
        return self

    def transform(self, X: Any) -> np.ndarray:
        """N images -> `float32 | float16 [N, D]`, in their order."""
        if isinstance(X, (str, bytes, Path, Image.Image)) or (isinstance(X, np.ndarray) and X.ndim not in (1, 4)):
            shape = f" {list(X.shape)}; put one image into a list" if isinstance(X, np.ndarray) else ""
            raise SourceError(
                "expected a sequence of paths, Pillow images or uint8 [H, W, 3] arrays, or one "
                f"uint8 [N, H, W, 3] array; got {type(X).__name__}{shape}"
            )
        items = list(X)
        ids = [str(item) if isinstance(item, (str, Path)) else f"image {i}" for i, item in enumerate(items)]
        if not items:
            raise SourceError("there are no images to transform")
        source = _Images(uri="the given images", root=Path(), ids=ids, items=items)
        extraction = sync(source, **self.get_params(deep=False))
        if skipped := extraction.report.skipped_images:
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


class HeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Any trained head as a scikit-learn classifier: `fit`, `predict`, `predict_proba`, `score`, clone.

    head: `logreg`, `linear`, `ridge` or `ncm`; settings: its own keyword arguments, by name (`{"folds": 3}`),
    else its defaults. After `fit`: `head_` (the affine map), `info_` (how the fit went), `classes_`,
    `n_features_in_`. One label per image; several need the head itself. Features are taken as float32.
    """

    def __init__(
        self,
        head: str = "logreg",
        *,
        settings: dict[str, Any] | None = None,
        random_state: int | None = 0,
        device: str = "auto",
    ) -> None:
        self.head = head
        self.settings = settings
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any, groups: Any = None) -> HeadClassifier:
        """X: `[N, D]`; y: `[N]` of any kind of label; groups: `[N]`, rows that share a fold."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise HeadError(f"classifier cannot be fitted: y holds one class, {self.classes_[0]!r}")
        fitted = learning.learn(
            self.head,
            Examples(X, numbers.astype(np.int64), groups),
            [str(i) for i in range(len(self.classes_))],
            seed=self.random_state or 0,
            device=self.device,
            settings=self.settings,
        )
        self.head_, self.info_ = fitted.head, fitted.info
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `float64 [N, C]`; for two classes their difference, `[N]`."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `float32 [N, C]` in [0, 1], columns in the order of `classes_`."""
        logits = self._logits(X)
        return np.asarray(self.head_.probabilities(logits))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row, `[N]`; a head's threshold rejects nothing here."""
        answers = self._logits(X).argmax(axis=1)
        return np.asarray(self.classes_[answers])

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "head_")
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        # in double precision, so that a row's answer does not depend on the rows beside it
        return np.asarray(np.asarray(X, np.float64) @ self.head_.weight.T.astype(np.float64) + self.head_.bias)
