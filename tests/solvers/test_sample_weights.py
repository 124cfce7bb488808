"""Weights of rows and classes: a row of weight w is w rows, in each head that learns, and scikit-learn agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from featx import learning
from featx.errors import HeadError
from featx.heads import logreg, ncm, ridge
from featx.solvers.examples import Examples
from featx.solvers.finishing import _temperature, _threshold
from featx.solvers.training import check

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module", params=[(60, 12), (40, 70)])
def data(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X, y and whole weights, with more rows than columns and with fewer."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=request.param).astype(np.float32)
    y = (X[:, 0] + rng.normal(size=len(X)) > 0.5).astype(int) + (X[:, 1] > 0.5)
    return X, y, rng.integers(1, 5, len(X))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("classes", [None, "balanced", {"a": 3.0, "c": 0.5}])
def test_logistic_weights_are_scikit_learns_however_large(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], scale: float, classes: Any
) -> None:
    X, y, weights = data[0], data[1], data[2] * scale
    mean = np.average(X, axis=0, weights=weights)
    Z = (X - mean) / np.sqrt(np.average((X - mean) ** 2, axis=0, weights=weights))
    theirs = {0: 3.0, 2: 0.5} if isinstance(classes, dict) else classes
    peer = LogisticRegression(C=0.3 / scale, class_weight=theirs, solver="newton-cg", tol=1e-9, max_iter=500)
    peer.fit(Z, y, sample_weight=weights)
    found = logreg.fit(Examples(X, y, weights=weights), NAMES, strengths=[0.3 / scale], class_weight=classes)
    np.testing.assert_allclose(found.head.probabilities(found.head(X)), peer.predict_proba(Z), atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
def test_ridge_leaves_weighted_rows_out_as_it_does_repeated_ones(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], together: bool
) -> None:
    X, y, weights = data
    group = np.arange(len(y)) // (2 if together else 1)
    repeated = np.repeat(np.arange(len(y)), weights)
    one = ridge.fit(Examples(X, y, group, weights=0.1 * weights), NAMES)
    other = ridge.fit(Examples(X[repeated], y[repeated], group[repeated]), NAMES)
    assert one.info["penalty"] == other.info["penalty"]
    errors, theirs = (dict(zip(*each.info["leave_one_out"].values(), strict=True)) for each in (one, other))
    # with smaller penalties, rows of many columns are fitted exactly, and what is left is rounding
    both = [penalty for penalty in errors if penalty in theirs and penalty > 1e-3]
    assert len(both) >= 6
    for penalty in both:
        assert errors[penalty] == pytest.approx(theirs[penalty], rel=1e-4)
    ratio = other.info["calibration"]["temperature"] / one.info["calibration"]["temperature"]
    np.testing.assert_allclose(other.head(X) * ratio, one.head(X), atol=1e-4)


def test_the_nearest_mean_is_the_weighted_one(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    X, y, weights = data
    task = check(X, y, NAMES, weights)
    Z, own = task.standard(), 0.01 * weights  # sums below 1
    means = [np.average(Z[y == c], axis=0, weights=own[y == c]) for c in range(3)]
    found = ncm.fit(Examples(X, y, weights=own), NAMES).head(X)
    expected = np.stack([-((Z - mean) ** 2).sum(axis=1) for mean in means], axis=1)
    assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    repeated = np.repeat(np.arange(len(y)), weights)
    np.testing.assert_allclose(task.mean, X[repeated].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(task.scale, X[repeated].std(axis=0), rtol=1e-5)


def test_held_out_rows_count_by_their_weights() -> None:
    rng = np.random.default_rng(1)
    z, y, weights = rng.normal(size=(50, 3)) * 3, rng.integers(0, 3, 50), rng.integers(1, 4, 50)
    repeated = np.repeat(np.arange(50), weights)
    ones = np.ones(len(repeated))
    assert _temperature(z, y, weights) == pytest.approx(_temperature(z[repeated], y[repeated], ones), rel=1e-6)
    several = (rng.random((50, 3)) < 0.5).astype(np.float32)
    assert _temperature(z, several, weights) == pytest.approx(_temperature(z[repeated], several[repeated], ones))
    confidence, right = rng.random(50), rng.random(50) < 0.7
    assert _threshold(confidence, right, weights, 0.75) == _threshold(confidence[repeated], right[repeated], ones, 0.75)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"aa": 2.0}, r"class_weight names 'aa', of which there is no training image. Did you mean a\?"),
        ({"a": 0}, r"the weight of a class is a number above 0, not 0"),
        ({"a": True}, r"above 0, not True"),
        ("balance", r"class_weight is None or 'balanced', or weights by class name, not 'balance'"),
        (3, r"class_weight of --head logreg is str \| Mapping"),
    ],
)
def test_weights_that_make_no_sense_are_named(weights: Any, message: str) -> None:
    examples = Examples(np.random.default_rng(0).normal(size=(9, 2)), np.arange(9) % 3)
    with pytest.raises(HeadError, match=message):
        learning.learn("logreg", examples, NAMES, settings={"class_weight": weights})


def test_rows_of_no_weight_are_to_be_left_out() -> None:
    X = np.random.default_rng(0).normal(size=(4, 2))
    for weights in (np.array([1.0, 0, 1, 1]), np.ones(3), np.array([1.0, 1, 1, np.inf])):
        with pytest.raises(HeadError, match="weights are 4 finite numbers above 0"):
            learning.learn("ncm", Examples(X, np.array([0, 1, 0, 1]), weights=weights), ["a", "b"])
