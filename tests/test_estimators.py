"""The heads under scikit-learn's own contract."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from featx import HeadClassifier
from featx.errors import HeadError


@pytest.mark.parametrize("head", ["logreg", "ncm", "ridge"])
def test_it_passes_scikit_learns_checks(head: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(HeadClassifier(head), on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert len([r for r in results if r["status"] == "passed"]) > 40


def test_the_linear_head_passes_them_with_a_short_schedule() -> None:
    settings = {"epochs": 20, "batch_size": 32, "weight_decay": 1e-3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(HeadClassifier("linear", settings=settings), on_fail=None)
    assert not {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert len(results) > 40


def test_it_predicts_real_digits_in_a_pipeline() -> None:
    X, y = load_digits(return_X_y=True)
    words = np.array([f"digit {i}" for i in y])
    model = make_pipeline(StandardScaler(), HeadClassifier(settings={"strengths": [0.1], "folds": 3}))
    assert cross_val_score(model, X, words, cv=3).min() > 0.85
    model.fit(X, words)
    assert model.predict_proba(X).shape == (1797, 10)
    assert set(model.predict(X)) == set(words) and clone(model).get_params()["headclassifier"] is not None


def test_it_can_be_searched_over() -> None:
    X, y = load_digits(return_X_y=True)
    search = GridSearchCV(HeadClassifier(), {"head": ["ncm", "ridge"]}, cv=3).fit(X[:400], y[:400])
    assert search.best_params_ == {"head": "ridge"} or search.best_score_ > 0.85
    assert not hasattr(clone(search.best_estimator_), "head_")


def test_an_unknown_head_is_named_with_near_ones() -> None:
    with pytest.raises(HeadError, match="Did you mean logreg"):
        HeadClassifier("logregs").fit(np.eye(4), [0, 1, 0, 1])
    with pytest.raises(HeadError, match="learns nothing from training images"):
        HeadClassifier("pretrained").fit(np.eye(4), [0, 1, 0, 1])


def test_a_mistyped_setting_is_named_before_anything_is_fitted() -> None:
    model = HeadClassifier(settings={"strenghts": [0.1]})
    with pytest.raises(HeadError, match=r"no setting 'strenghts'.*Did you mean strengths"):
        model.fit(np.eye(4), [0, 1, 0, 1])
