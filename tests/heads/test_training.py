"""What every trained head shares: checks of the input, folds, thresholds; and each head on bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from featx import heads
from featx.errors import HeadError
from featx.heads import _training

TRAINED = ["linear", "logreg", "ncm", "ridge"]
QUICK: dict[str, dict[str, Any]] = {"linear": {"epochs": 15}}


def clouds(rows: int = 90, classes: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(rows, size)) + 2 * rng.normal(size=(classes, size))[y]
    return X.astype(np.float32), y, [f"c{i}" for i in range(classes)]


def test_the_trained_heads_are_the_files_that_are_there() -> None:
    assert heads.names() == sorted([*TRAINED, "pretrained"])


@pytest.mark.parametrize("name", TRAINED)
class TestEveryHead:
    """The contract of a trained head."""

    def fit(self, name: str, X: Any, y: Any, names: Any, **settings: Any) -> heads.Fitted:
        return heads.module(name).fit(X, y, names, **QUICK.get(name, {}), **settings)

    def test_it_learns(self, name: str) -> None:
        X, y, names = clouds()
        fitted = self.fit(name, X, y, names)
        assert fitted.head.class_names == tuple(names) and fitted.head.weight.dtype == np.float32
        assert (fitted.head(X).argmax(axis=1) == y).mean() > 0.9

    def test_the_same_seed_gives_the_same_head(self, name: str) -> None:
        X, y, names = clouds()
        first, second = (self.fit(name, X, y, names, seed=1).head for _ in range(2))
        assert (first.weight == second.weight).all() and (first.bias == second.bias).all()

    def test_float16_features_are_taken(self, name: str) -> None:
        X, y, names = clouds()
        assert (self.fit(name, X.astype(np.float16), y, names).head(X).argmax(axis=1) == y).mean() > 0.9

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_bad_feature_is_an_error_that_names_the_row(self, name: str, value: float) -> None:
        X, y, names = clouds()
        X[41, 3] = value
        with pytest.raises(HeadError, match=r"NaN.*row 41"):
            self.fit(name, X, y, names)

    def test_one_class_is_an_error(self, name: str) -> None:
        X, _, names = clouds()
        with pytest.raises(HeadError, match="all 90 training images are 'c1'"):
            self.fit(name, X, np.ones(90, np.int64), names)

    def test_constant_columns_get_no_weight(self, name: str) -> None:
        X, y, names = clouds()
        X[:, 2], X[:, 5] = 7.7, 0.0
        fitted = self.fit(name, X, y, names)
        assert any("2 of 8 feature columns are constant" in note for note in fitted.info["notes"])
        if name != "linear":  # whose initial weights decay, but not to nothing
            assert np.abs(fitted.head.weight[:, [2, 5]]).max() < 1e-5
        assert (fitted.head(X).argmax(axis=1) == y).mean() > 0.9

    def test_features_that_are_all_constant_are_an_error(self, name: str) -> None:
        _, y, names = clouds()
        with pytest.raises(HeadError, match="all features are constant"):
            self.fit(name, np.full((90, 8), 2.5, np.float32), y, names)

    def test_more_classes_than_images_to_learn_from_is_said(self, name: str) -> None:
        rng = np.random.default_rng(0)
        y = np.array([0, 1, 2, 3, 4, 4])
        X = 5 * np.eye(12, dtype=np.float32)[y] + 0.1 * rng.normal(size=(6, 12)).astype(np.float32)
        fitted = self.fit(name, X, y, [f"c{i}" for i in range(9)])
        notes = " ".join(fitted.info["notes"])
        assert "5 classes for 6 training images" in notes
        assert "4 classes cannot be learned from these training images: 'c5', 'c6', 'c7', 'c8'" in notes
        assert fitted.head.class_names == ("c0", "c1", "c2", "c3", "c4")
        assert (fitted.head(X).argmax(axis=1) == y).all()

    def test_a_class_with_one_image_is_learned(self, name: str) -> None:
        X, y, names = clouds()
        keep = (y < 2) | (np.arange(90) == 2)
        fitted = self.fit(name, X[keep], y[keep], names)
        assert fitted.head.class_names == tuple(names)
        assert name == "ridge" or any("one distinct training image" in n for n in fitted.info["notes"])

    def test_labels_that_do_not_fit_are_named(self, name: str) -> None:
        X, y, names = clouds()
        for bad, says in ((y[:-1], "89 labels"), (y + 1, r"in \[0, 3\)"), (y - 1, r"in \[0, 3\)")):
            with pytest.raises(HeadError, match=says):
                self.fit(name, X, bad, names)
        with pytest.raises(HeadError, match=r"features \[N, D\]"):
            self.fit(name, X[:0], y[:0], names)


def test_columns_are_scaled_as_scikit_learn_scales_them() -> None:
    X, y, names = clouds(500)
    X = X * 0.01 + 300  # a spread that squares in float32 would lose
    task = _training.check(X, y, names)
    scaler = StandardScaler().fit(X.astype(np.float64))
    assert task.mean == pytest.approx(scaler.mean_, rel=1e-7)
    assert task.scale == pytest.approx(scaler.scale_, rel=1e-5)
    assert task.standard() == pytest.approx(scaler.transform(X.astype(np.float64)), abs=0.02)


def test_folds_are_stratified_and_even() -> None:
    y = np.repeat([0, 1, 2], [50, 31, 7])
    fold, notes = _training.folds(y, 5, seed=4)
    assert not notes and set(fold) == set(range(5))
    for label, count in enumerate((50, 31, 7)):
        per_fold = np.bincount(fold[y == label], minlength=5)
        assert per_fold.max() - per_fold.min() <= 1 and per_fold.sum() == count
    assert (fold != _training.folds(y, 5, seed=5)[0]).any()


def test_no_fold_parts_a_group() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 300)
    y = groups % 3
    fold, _ = _training.folds(y, 5, groups=groups)
    assert all(len(set(fold[groups == g])) == 1 for g in np.unique(groups))
    sizes = np.bincount(fold)
    assert len(sizes) == 5 and sizes.min() > 40
    assert all((np.bincount(y[fold == k], minlength=3) > 5).all() for k in range(5))


def test_a_class_with_one_image_is_always_trained_on() -> None:
    y = np.array([0] * 10 + [1] * 10 + [2])
    fold, notes = _training.folds(y, 5)
    assert fold[-1] == -1 and (fold[:-1] >= 0).all()
    assert "1 classes have one distinct training image" in notes[0]
    doubled, _ = _training.folds(np.append(y, 2), 5, groups=np.append(np.arange(21), 20))
    assert (doubled[-2:] == -1).all()


def test_too_few_images_are_not_cross_validated() -> None:
    fold, notes = _training.folds(np.array([0, 1, 2]), 5)
    assert (fold == -1).all() and "too few images to cross-validate" in notes[-1]
    fold, notes = _training.folds(np.array([0, 0, 1]), 5)
    assert fold.tolist().count(-1) == 1 and "with 2 folds instead of 5" in notes[-1]


def test_folds_for_several_labels_spread_the_rarest() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 3)) < [0.5, 0.3, 0.05]).astype(np.int64)
    fold, _ = _training.folds(targets, 5)
    per_fold = [int(targets[fold == k, 2].sum()) for k in range(5)]
    assert max(per_fold) - min(per_fold) <= 1 and sum(per_fold) >= 5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.5}, r"in \[0, 1\]"),
        ({"threshold": 0.5, "reject": 0.9}, "not both"),
        ({"reject": 1.5}, "accuracy to reach"),
        ({"class_weight": "heavy"}, "None or 'balanced'"),
        ({"strengths": [0.0, 1.0]}, "strengths are positive"),
        ({"solver": "magic"}, "featx or scikit-learn"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        heads.module("logreg").fit(*clouds(), **settings)


def test_calibration_without_held_out_images_is_an_error() -> None:
    X, y, names = clouds(3)
    with pytest.raises(HeadError, match="too few training images"):
        heads.module("logreg").fit(X, y, names, calibrate=True)


@pytest.mark.parametrize(
    ("head", "settings", "says"),
    [
        ("logreg", {"Cs": 5}, r"--head logreg has no setting 'Cs'; there are strengths, folds"),
        ("linear", {"epoch": 2}, r"Did you mean epochs\?"),
        ("linear", {"lr": "abc"}, r"the setting lr of --head linear is float.*, not 'abc'"),
        ("ridge", {"restrict": True}, r"--restrict and --map are for --head pretrained"),
        ("pretrained", {"folds": 3}, r"--head pretrained has no setting 'folds'; there are mapping, restrict"),
    ],
)
def test_settings_that_a_head_does_not_have_are_named(head: str, settings: dict[str, object], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        heads.check_settings(head, settings)


@pytest.mark.parametrize("head", ["logreg", "linear", "ridge", "ncm"])
def test_settings_that_a_head_has_are_taken(head: str) -> None:
    assert {"threshold", "reject"} <= set(heads.settings_of(head))
    heads.check_settings(head, {"threshold": 0.5, **({"class_weight": "balanced"} if head == "logreg" else {})})
