"""featx as scikit-learn estimators: `ImageFeatures`, the cache as a transformer, and `HeadClassifier`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data

from featx import learning
from featx.backbones.loading import resolve
from featx.errors import HeadError, ImageError
from featx.extraction.job import prepare, request_of
from featx.extraction.pipeline import sync
from featx.options import complete
from featx.solvers.examples import Examples
from featx.sources.memory import Images
from featx.state import ordinary


class ImageFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Images -> features `[N, D]`, computed once and cached; for a `Pipeline`, `GridSearchCV` and the like.

    `transform` takes paths, Pillow images, bytes, open files or `uint8 [H, W, 3]` arrays, one `uint8 [N, H, W, 3]`
    array, or a column of a table, `[N]` or `[N, 1]`. Parameters as for `featx.extract`. There is nothing to fit, and
    the names `imagefeatures0`, ... are known before. An image that cannot be read, or a missing cell, raises
    `ImageError`, since rows must match labels.

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
        calibration: str = "auto",
        runtime: str = "auto",
        batch_size: int | None = None,
        workers: int | None = None,
        on: str | None = None,
        address: str | None = None,
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
        """Nothing to learn: the backbone is frozen. In int8, its calibration is found or made here, on these images,
        and `transform` keeps to it: `calibration_` and `runtime_`.
        """
        for name in ("calibration_", "runtime_"):
            self.__dict__.pop(name, None)
        if self.precision == "int8":
            spec = prepare(Images.of(X), self.backbone, complete(self._options())).specs[0]
            self.calibration_, self.runtime_ = spec.calibration, spec.engine
        return self

    def transform(self, X: Any) -> np.ndarray:
        """N images -> `float32 | float16 [N, D]`, in their order."""
        source = Images.of(X)
        extraction = sync(source, self.backbone, **self._options())
        if skipped := extraction.report.skipped_images:
            raise ImageError(
                f"{extraction.report.skipped} of {len(source)} images cannot be used; the first is {skipped[0]['id']}: "
                f"{skipped[0]['reason']}"
            )
        rows: np.ndarray = extraction.features().X
        return rows if rows.flags.writeable else rows.copy()  # later steps may work in place

    def _options(self) -> dict[str, Any]:
        """Those of `featx.extract`, with what `fit` found."""
        options: dict[str, Any] = self.get_params(deep=False)
        del options["backbone"]
        if hasattr(self, "calibration_"):
            options |= {"calibration": self.calibration_, "runtime": self.runtime_}
        return options

    @property
    def _n_features_out(self) -> int:
        info = resolve(request_of(self.backbone, complete(self._options())), Path(self.cache))
        return int(np.prod(info.row_shape))

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

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, groups: Any = None) -> HeadClassifier:
        """X: `[N, D]`; y: `[N]` of any kind of label; sample_weight: `[N]`, 0 or more: a row counts as so many equal
        rows; groups: `[N]`, rows that share a fold, by default equal rows.
        """
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        check_consistent_length(X, groups)
        weights = np.ones(len(X))
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not (kept := weights > 0).all():
            X, y, weights = X[kept], y[kept], weights[kept]
            groups = None if groups is None else np.asarray(groups)[kept]
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            only = f"one class, {self.classes_[0]!r}" if len(self.classes_) else "no row of a weight above 0"
            raise HeadError(f"classifier cannot be fitted: y holds {only}")
        groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        fitted = learning.learn(
            self.head,
            _distinct(X, numbers.astype(np.int64), groups, weights),
            [str(label) for label in self.classes_.tolist()],
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

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The logarithms of `predict_proba`, `float32 [N, C]`; that of 0 is minus infinity."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row, `[N]`; a head's threshold rejects nothing here."""
        answers = self._logits(X).argmax(axis=1)
        return np.asarray(self.classes_[answers])

    @ordinary()
    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "head_")
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        # in double precision, so that a row's answer does not depend on the rows beside it
        return np.asarray(np.asarray(X, np.float64) @ self.head_.weight.T.astype(np.float64) + self.head_.bias)


def _distinct(X: np.ndarray, y: np.ndarray, groups: np.ndarray | None, weights: np.ndarray) -> Examples:
    """Rows with their labels. Where some are equal, or weighted: each once, with the sum of its weights, in an order
    that depends on their content alone. So weights give the same head as repeated rows, bit for bit.
    """
    bits = np.ascontiguousarray(X).view(f"u{X.itemsize}")
    factors = np.random.default_rng(0).integers(1 << 62, size=bits.shape[1] + 2, dtype=np.uint64) * 2 + 1
    content = np.einsum("nd,d->n", bits, factors[2:], dtype=np.uint64, casting="unsafe")
    own = content if groups is None else groups.astype(np.uint64)
    digest = content + y.astype(np.uint64) * factors[0] + own * factors[1]
    _, first, inverse = np.unique(digest, return_index=True, return_inverse=True)
    if len(first) == len(X) and (weights == 1).all():
        return Examples(X, y, groups)
    shared = np.unique(own[first], return_inverse=True)[1]
    return Examples(X[first], y[first], shared, weights=np.bincount(inverse, weights))
