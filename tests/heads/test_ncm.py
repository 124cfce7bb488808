"""The nearest class mean against scikit-learn's, and with few images."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestCentroid

from featx.heads import ncm
from featx.solvers import training as _training
from featx.solvers.examples import Examples


def clouds(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 4
    X = rng.normal(size=(rows, 30)) + 0.8 * np.random.default_rng(9).normal(size=(4, 30))[y]
    return X.astype(np.float32), y, list("abcd")


def test_answers_are_scikit_learns_nearest_centroid() -> None:
    X, y, names = clouds(200)
    X += np.random.default_rng(2).normal(size=X.shape).astype(np.float32) * 2
    fitted = ncm.fit(Examples(X, y), names)
    Z = _training.check(X, y, names).standard()
    expected = NearestCentroid().fit(Z, y).predict(Z)
    assert (fitted.head(X).argmax(axis=1) == expected).all()
    assert 0.7 < (expected == y).mean() < 1


def test_temperature_makes_held_out_probabilities_honest() -> None:
    X, y, names = clouds(200)
    X = np.tile(X, (1, 8))  # columns that repeat each other make distances look surer than they are
    figures = ncm.fit(Examples(X, y), names).info["calibration"]
    assert figures["ece_after"] < figures["ece_before"] and figures["ece_after"] < 0.1


def test_one_image_per_class_is_enough() -> None:
    X, y, names = clouds(4)
    fitted = ncm.fit(Examples(X, y), names)
    assert any("too few images to cross-validate" in note for note in fitted.info["notes"])
    assert (fitted.head(X).argmax(axis=1) == y).all()
    X_new, y_new, _ = clouds(400, seed=1)
    assert (fitted.head(X_new).argmax(axis=1) == y_new).mean() > 0.5


def test_several_labels_each_against_its_absence() -> None:
    X, y, _ = clouds(300)
    targets = np.stack([y % 2, y > 1], axis=1).astype(np.int64)
    fitted = ncm.fit(Examples(X, targets), ["odd", "high"])
    assert ((fitted.head(X) > 0) == targets).mean() > 0.75
