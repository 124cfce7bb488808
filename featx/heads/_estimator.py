"""Owns the heads' scikit-learn face: `HeadClassifier` on plain `[N, D]` arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from featx import heads
from featx.errors import HeadError


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """Any trained head as a scikit-learn classifier: `fit`, `predict`, `predict_proba`, `score`, clone.

    head: `logreg`, `linear`, `ridge` or `ncm`; settings: its own keyword arguments, by name (`{"folds": 3}`),
    else its defaults. After `fit`: `head_` (the affine map), `info_` (how it came to be), `classes_`,
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
        module = heads.module(self.head)
        if self.head == "pretrained":
            raise HeadError("the pretrained head is not fitted to data; use linear, logreg, ncm or ridge")
        fitted = module.fit(
            X,
            numbers.astype(np.int64),
            [str(i) for i in range(len(self.classes_))],
            groups=groups,
            seed=self.random_state or 0,
            device=self.device,
            **(self.settings or {}),
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
        return self.head_.probabilities(logits)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row, `[N]`; a head's threshold rejects nothing here."""
        answers = self._logits(X).argmax(axis=1)
        return self.classes_[answers]

    def _logits(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "head_")
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        # in double precision, so that a row's answer does not depend on the rows beside it
        return np.asarray(X, np.float64) @ self.head_.weight.T.astype(np.float64) + self.head_.bias
