"""What every trained head shares: checks of the input, folds, thresholds; and each head on bad input."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn.preprocessing import StandardScaler

from featx import learning, metrics
from featx.cache.streaming import Stacked
from featx.errors import HeadError
from featx.head import Fitted
from featx.solvers import finishing
from featx.solvers import training as _training
from featx.solvers.examples import Examples

TRAINED = ["linear", "logreg", "ncm", "ridge"]
QUICK: dict[str, dict[str, Any]] = {"linear": {"epochs": 15}}


def clouds(rows: int = 90, classes: int = 3, size: int = 8) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(rows, size)) + 2 * rng.normal(size=(classes, size))[y]
    return X.astype(np.float32), y, [f"c{i}" for i in range(classes)]


def test_the_trained_heads_are_the_files_that_are_there() -> None:
    assert learning.names() == sorted([*TRAINED, "pretrained"])


@pytest.mark.parametrize("name", TRAINED)
class TestEveryHead:
    """The contract of a trained head."""

    def fit(
        self, name: str, X: Any, y: Any, names: Any, groups: Any = None, scored: Any = None, **settings: Any
    ) -> Fitted:
        fitted: Fitted = learning.module(name).fit(
            Examples(X, y, groups, scored), names, **QUICK.get(name, {}), **settings
        )
        return fitted

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
        assert (fitted.head.weight[:, [2, 5]] == 0).all() and np.abs(fitted.head.weight).max() > 0.1
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
        assert any("one distinct training image" in n for n in fitted.info["notes"])

    def test_only_scored_rows_are_measured(self, name: str) -> None:
        X, y, names = clouds()
        wrong = np.random.default_rng(1).permutation(y)  # beside each image, a view with another's label
        both, labels = np.concatenate([X, X + 0.1]), np.concatenate([y, wrong])
        first = np.arange(180) < 90
        groups = np.tile(np.arange(90), 2)
        share = {
            rows: self.fit(name, both, labels, names, groups=groups, scored=scored, threshold=0.0).info["rejection"]
            for rows, scored in (("scored", first), ("others", ~first), ("all", None))
        }
        right = {rows: figures["accuracy_without"] for rows, figures in share.items()}
        assert right["scored"] > 0.85 and right["others"] < 0.5
        assert right["others"] + 0.1 < right["all"] < right["scored"] - 0.1

    def test_a_mask_of_scored_rows_that_does_not_fit_is_named(self, name: str) -> None:
        X, y, names = clouds()
        for scored in (np.ones(89, bool), np.arange(90)):
            with pytest.raises(HeadError, match=r"scored marks the rows to measure on, bool \[90\], not"):
                self.fit(name, X, y, names, scored=scored)

    def test_images_that_are_all_one_group_are_not_measured(self, name: str) -> None:
        X, y, names = clouds()
        fitted = self.fit(name, X, y, names, groups=np.zeros(90, np.int64))
        assert "too few images to cross-validate" in fitted.info["notes"]
        assert "calibration" not in fitted.info and (fitted.head(X).argmax(axis=1) == y).mean() > 0.9
        with pytest.raises(HeadError, match="too few training images"):
            self.fit(name, X, y, names, groups=np.zeros(90, np.int64), reject=0.9)

    def test_labels_that_do_not_fit_are_named(self, name: str) -> None:
        X, y, names = clouds()
        for bad, says in ((y[:-1], "89 labels"), (y + 1, r"in \[0, 3\)"), (y - 1, r"in \[0, 3\)")):
            with pytest.raises(HeadError, match=says):
                self.fit(name, X, bad, names)
        with pytest.raises(HeadError, match=r"features \[N, D\]"):
            self.fit(name, X[:0], y[:0], names)


@pytest.mark.parametrize("name", ["logreg", "ncm", "ridge"])
def test_scored_rows_of_a_table_read_by_slices_are_the_same(name: str) -> None:
    class Slices:
        def __init__(self, X: np.ndarray) -> None:
            self.X, self.shape = X, X.shape

        def __getitem__(self, rows: slice) -> np.ndarray:
            return self.X[rows]

    X, y, names = clouds(300)
    settings = {"threshold": 0.5} | ({"calibrate": True} if name == "logreg" else {})
    held, streamed = (
        learning.module(name).fit(Examples(x, y, scored=np.arange(300) < 150), names, **settings)
        for x in (X, Slices(X))
    )
    assert streamed.info["calibration"]["temperature"] == pytest.approx(
        held.info["calibration"]["temperature"], rel=1e-2
    )
    assert streamed.info["rejection"]["coverage"] == pytest.approx(held.info["rejection"]["coverage"], abs=0.01)
    assert streamed.head.probabilities(streamed.head(X)) == pytest.approx(
        held.head.probabilities(held.head(X)), abs=3e-3
    )


def test_a_head_says_what_it_can_do() -> None:
    X, y, names = clouds()
    table = Examples(Stacked([X]), y)
    assert [name for name in learning.names() if learning.module(name).LEARNS] == TRAINED
    for name in TRAINED:
        assert learning.learn(name, Examples(X, y), names, settings=QUICK.get(name)).head.class_names == tuple(names)
        if learning.module(name).STREAMS:
            assert learning.learn(name, table, names).head.class_names == tuple(names)
    with pytest.raises(
        HeadError, match=r"linear holds the features in memory, and 90 rows of 8.*\(logreg, ncm, ridge\)"
    ):
        learning.learn("linear", table, names)
    with pytest.raises(HeadError, match="pretrained head learns nothing"):
        learning.learn("pretrained", table, names)


def gaussians(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes in 64 columns, 8 of which tell them apart, with 2 % of mistakes at best."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % 2
    X = rng.normal(size=(rows, 64)).astype(np.float32)
    X[:, :8] += (2 * y - 1)[:, None]
    return X, y


# what the temperature of the least log-loss alone would give: 0.566, 0.473
@pytest.mark.parametrize(("name", "most"), [("logreg", 0.09), ("ncm", 0.06)])
def test_a_few_images_told_apart_without_a_mistake_make_no_answer_certain(name: str, most: float) -> None:
    X, y = gaussians(40, seed=0)
    fitted = learning.module(name).fit(Examples(X, y), ["a", "b"], **({"calibrate": True} if name == "logreg" else {}))
    assert 0.1 < fitted.info["calibration"]["temperature"] < 1
    X_new, y_new = gaussians(4000, seed=1)
    assert metrics.losses(fitted.head(X_new), y_new).mean() < most


def test_the_temperature_is_the_most_probable_one() -> None:
    rng = np.random.default_rng(0)
    for count, apart in ((12, 9.0), (12, 0.5), (200, 2.0)):
        y = np.arange(count) % 3
        z, several = rng.normal(size=(count, 3)) + apart * np.eye(3)[y], np.eye(3)[y]

        def one(u: float, z: np.ndarray = z, y: np.ndarray = y) -> float:  # u: log T
            s = z / np.exp(u)
            return float((logsumexp(s, axis=1) - s[np.arange(len(y)), y]).sum() + u**2 / 2)

        def each(u: float, z: np.ndarray = z, several: np.ndarray = several) -> float:
            s = z / np.exp(u)
            return float((np.logaddexp(0, s) - s * several).sum() + u**2 / 2)

        for loss, labels in ((one, y), (each, several)):
            best = minimize_scalar(loss, bounds=(-6.5, 6.5), method="bounded", options={"xatol": 1e-6}).x
            assert finishing._temperature(z, labels, np.ones(len(z))) == pytest.approx(np.exp(best), rel=1e-4)


def test_many_images_with_mistakes_among_them_set_the_temperature_alone() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5000, 4))
    y = (z + rng.gumbel(size=z.shape)).argmax(axis=1)  # drawn with the softmax of z
    for true in (0.2, 1.0, 5.0):
        assert finishing._temperature(z * true, y, np.ones(len(z))) == pytest.approx(true, rel=0.05)
        several = rng.random(z.shape) < 1 / (1 + np.exp(-z))
        assert finishing._temperature(z * true, several.astype(np.float32), np.ones(len(z))) == pytest.approx(
            true, rel=0.05
        )


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
        ({"reject": 1.5}, r"at least 0.5 and below 1, not 1.5: with reject=0.95 the images"),
        ({"reject": 0.05}, r"at least 0.5 and below 1, not 0.05: with reject=0.95 the images"),
        ({"reject": 95}, "not 95: with reject=0.95"),
        ({"class_weight": "heavy"}, "None or 'balanced'"),
        ({"strengths": [0.0, 1.0]}, "strengths are positive"),
        ({"folds": 1}, r"folds is a whole number of at least 2 \(5 is usual\), not 1"),
        ({"folds": 2.5}, r"folds is a whole number of at least 2 \(5 is usual\), not 2.5"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        X, y, names = clouds()
        learning.module("logreg").fit(Examples(X, y), names, **settings)


def test_calibration_without_held_out_images_is_an_error() -> None:
    X, y, names = clouds(3)
    with pytest.raises(HeadError, match="too few training images"):
        learning.module("logreg").fit(Examples(X, y), names, calibrate=True)


@pytest.mark.parametrize(
    ("head", "settings", "says"),
    [
        ("logreg", {"Cs": 5}, r"--head logreg has no setting 'Cs'; there are strengths, folds"),
        ("linear", {"epoch": 2}, r"Did you mean epochs\?"),
        ("linear", {"lr": "abc"}, r"the setting lr of --head linear is float.*, not 'abc'"),
        ("logreg", {"folds": 2.5}, r"the setting folds of --head logreg is int, not 2.5"),
        ("logreg", {"folds": True}, r"the setting folds of --head logreg is int, not True"),
        ("logreg", {"calibrate": 1}, r"the setting calibrate of --head logreg is bool, not 1"),
        ("logreg", {"strengths": "0.1"}, r"the setting strengths of --head logreg is Sequence\[float\], not '0.1'"),
        ("linear", {"momentum": None}, r"the setting momentum of --head linear is float, not None"),
        ("linear", {"schedule": 3}, r"the setting schedule of --head linear is str \| None, not 3"),
        ("ridge", {"restrict": True}, r"restrict is for --head pretrained\."),
        ("pretrained", {"folds": 3}, r"--head pretrained has no setting 'folds'; there are mapping, restrict"),
    ],
)
def test_settings_that_a_head_does_not_have_are_named(head: str, settings: dict[str, object], says: str) -> None:
    with pytest.raises(HeadError, match=says):
        learning.check_settings(head, settings)


@pytest.mark.parametrize("head", ["logreg", "linear", "ridge", "ncm"])
def test_settings_that_a_head_has_are_taken(head: str) -> None:
    assert {"threshold", "reject"} <= set(learning.settings_of(head))
    learning.check_settings(head, {"threshold": 0.5, **({"class_weight": "balanced"} if head == "logreg" else {})})


def test_a_setting_may_be_any_value_of_its_kind() -> None:
    linear = {"lr": Decimal("0.1"), "momentum": np.float32(0.5), "epochs": np.int64(3), "recipe": None}
    learning.check_settings("linear", linear)
    learning.check_settings("logreg", {"strengths": [0.1], "calibrate": True, "reject": None})
    learning.check_settings("ridge", {"penalties": np.array([0.1, 1.0])})
    learning.check_settings("pretrained", {"mapping": {"ants": "ant"}, "restrict": True})
    assert learning.check_settings("logreg", {"strengths": [Decimal("0.5")]}) == {"strengths": [0.5]}
