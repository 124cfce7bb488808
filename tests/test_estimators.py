"""The heads and the cache under scikit-learn's own contract."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from sklearn import config_context
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.ensemble import AdaBoostClassifier, VotingClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from featx import HeadClassifier, ImageFeatures
from featx.errors import HeadError, ImageError


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


@pytest.fixture(scope="module")
def rare() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X, labels of which one is rare, and whole weights, 0 among them."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 8)).astype(np.float32)
    return X, np.where(X[:, 0] + rng.normal(size=60) > 0.8, "rare", "usual"), rng.integers(0, 4, 60)


@pytest.mark.parametrize("head", ["logreg", "linear", "ridge", "ncm"])
def test_sample_weights_are_repeated_rows_bit_for_bit(head: str, rare: tuple[np.ndarray, ...]) -> None:
    X, y, weights = rare
    settings = {"epochs": 3, "weight_decay": 0.01} if head == "linear" else None
    repeated = np.random.default_rng(1).permutation(np.repeat(np.arange(60), weights))
    weighted = HeadClassifier(head, settings=settings).fit(X, y, weights)
    again = HeadClassifier(head, settings=settings).fit(X[repeated], y[repeated])
    plain = HeadClassifier(head, settings=settings).fit(X, y)
    ones = HeadClassifier(head, settings=settings).fit(X, y, sample_weight=np.ones(60))
    assert np.array_equal(weighted.predict_proba(X), again.predict_proba(X))
    assert np.array_equal(plain.predict_proba(X), ones.predict_proba(X))
    assert not np.allclose(weighted.predict_proba(X), plain.predict_proba(X), atol=1e-3)


def test_weights_pass_through_scikit_learns_own(rare: tuple[np.ndarray, ...]) -> None:
    X, y, weights = rare
    alone = HeadClassifier("ridge").fit(X, y, sample_weight=weights)
    pipeline = make_pipeline("passthrough", HeadClassifier("ridge")).fit(X, y, headclassifier__sample_weight=weights)
    assert np.array_equal(pipeline.predict_proba(X), alone.predict_proba(X))
    vote = VotingClassifier([("one", HeadClassifier("ridge"))], voting="soft").fit(X, y, sample_weight=weights)
    assert np.array_equal(vote.predict_proba(X), alone.predict_proba(X))
    assert alone.score(X, y, sample_weight=weights) != alone.score(X, y)
    assert AdaBoostClassifier(HeadClassifier("ridge"), n_estimators=3).fit(X, y).score(X, y) > 0.7
    with config_context(enable_metadata_routing=True):
        routed = HeadClassifier("ridge").set_fit_request(sample_weight=True, groups=True)
        routed.set_score_request(sample_weight=True)
        given = {"sample_weight": weights, "groups": np.arange(60) // 2}
        assert cross_validate(routed, X, y, params=given, cv=3)["test_score"].min() > 0.6


def test_classes_are_weighted_by_their_own_names(rare: tuple[np.ndarray, ...]) -> None:
    X, y, _ = rare
    words = HeadClassifier(settings={"strengths": 0.1, "class_weight": {"rare": 5.0}}).fit(X, y)
    numbers = HeadClassifier(settings={"strengths": 0.1, "class_weight": {7: 5.0}}).fit(X, np.where(y == "rare", 7, 3))
    by_row = HeadClassifier(settings={"strengths": 0.1}).fit(X, y, np.where(y == "rare", 5.0, 1.0))
    assert np.array_equal(words.predict_proba(X), numbers.predict_proba(X)[:, ::-1])
    np.testing.assert_allclose(words.predict_proba(X), by_row.predict_proba(X), atol=0.05)  # other means and deviations
    with pytest.raises(HeadError, match=r"class_weight names 'rear', .* Did you mean rare"):
        HeadClassifier(settings={"class_weight": {"rear": 5.0}}).fit(X, y)


def test_the_logarithms_of_probabilities_are_given(rare: tuple[np.ndarray, ...]) -> None:
    X, y, _ = rare
    model = HeadClassifier("ncm").fit(X, y)
    np.testing.assert_array_equal(model.predict_log_proba(X), np.log(model.predict_proba(X)))
    assert model.predict_log_proba(1e9 * X).min() == -np.inf


@pytest.fixture(scope="module")
def column(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, ImageFeatures]:
    """Twelve paths, `object [12, 1]`, and a transformer."""
    root = tmp_path_factory.mktemp("column")
    paths = sorted(write_images(root / "images").glob("*/*.png"))
    features = ImageFeatures("small:backbone_normed", weights="random", cache=root / "cache", seed=np.int64(2))
    return np.array([[str(path)] for path in paths], dtype=object), features


def test_a_column_of_paths_goes_through_a_pipeline(column: tuple[np.ndarray, ImageFeatures]) -> None:
    paths, features = column
    expected = features.transform(list(paths[:, 0]))
    assert expected.shape == (12, 8) and np.array_equal(features.transform(paths), expected)
    assert np.array_equal(features.transform(Path(paths[0, 0])), expected[:1])
    assert expected.flags.writeable  # the next step may work in place
    table = np.concatenate([paths, np.arange(12)[:, None].astype(object)], axis=1)
    columns = ColumnTransformer([("images", features, [0])], remainder="passthrough")
    assert np.array_equal(columns.fit_transform(table).astype(np.float32)[:, :8], expected)
    assert cross_val_score(make_pipeline(features, HeadClassifier("ncm")), paths, ["c"] * 6 + ["w"] * 6, cv=3).min() > 0
    table[3, 0] = None
    with pytest.raises(ImageError, match=r"1 of 12 images cannot be used; the first is row 3: a missing cell"):
        columns.fit_transform(table)


def test_names_of_features_are_known_before_any_image_is_read(column: tuple[np.ndarray, ImageFeatures]) -> None:
    paths, features = column
    names = [f"imagefeatures{i}" for i in range(8)]
    assert clone(features).get_feature_names_out().tolist() == names
    assert make_pipeline(features, StandardScaler()).fit(paths).get_feature_names_out().tolist() == names
    pandas = pytest.importorskip("pandas")
    frame = clone(features).set_output(transform="pandas").fit_transform(pandas.DataFrame({"path": paths[:, 0]}))
    assert frame.columns.tolist() == names and frame.shape == (12, 8)
