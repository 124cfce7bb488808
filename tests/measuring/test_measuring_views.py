"""What views are worth is measured on images that no head has seen, against answers found another way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from featx.errors import HeadError
from featx.extraction.pipeline import sync
from featx.features import groups
from featx.fitting import fit
from featx.head import Head
from featx.heads import logreg
from featx.measuring import views as augmentation
from featx.measuring.evaluation import evaluate_logits
from featx.solvers.examples import Examples


def blobs(count: int = 120, size: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping classes, `float32 [count, size]` and `int64 [count]`."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    return (rng.normal(size=(count, size)) + 0.5 * y[:, None]).astype(np.float32), y.astype(np.int64)


class Table:
    """Rows that are read by slices alone."""

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.shape = X, X.shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.X[rows]

    def take(self, which: np.ndarray) -> Table:
        return Table(self.X[which])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_averaging_gives_the_mean_of_the_probabilities(activation: str):
    rng = np.random.default_rng(0)
    head = Head(rng.normal(size=(3, 5)).astype(np.float32), np.zeros(3, np.float32), ("a", "b", "c"), activation)
    views = [rng.normal(size=(7, 5)).astype(np.float32) for _ in range(4)]
    wanted = np.mean([head.probabilities(head(view)) for view in views], axis=0)
    np.testing.assert_allclose(head.probabilities(augmentation.average(head, views)), wanted, rtol=1e-5)
    one = augmentation.average(head, views[:1])
    np.testing.assert_allclose(head.probabilities(one), head.probabilities(head(views[0])), rtol=1e-5)


def test_averaging_sure_answers_stays_finite():
    for activation in ("softmax", "sigmoid"):
        head = Head(np.array([[1e4], [-1e4]], np.float32), np.zeros(2, np.float32), ("a", "b"), activation)
        assert np.isfinite(augmentation.average(head, [np.array([[1.0], [-1.0]], np.float32)])).all()
    with pytest.raises(HeadError, match="no view"):
        augmentation.average(head, [])


def test_held_out_answers_are_those_of_heads_fitted_on_the_other_folds():
    X, y = blobs()
    fold = np.arange(120) // 2 % 4
    logits, averaged = augmentation.held_out("logreg", [X], y, ["a", "b"], fold, settings={"strengths": [0.1]})
    for k in range(4):
        train, test = fold != k, fold == k
        scaler = StandardScaler().fit(X[train])
        model = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(scaler.transform(X[train]), y[train])
        margin = model.decision_function(scaler.transform(X[test]))
        np.testing.assert_allclose(logits[test, 1] - logits[test, 0], margin, atol=5e-3)
    np.testing.assert_allclose(averaged[:, 1] - averaged[:, 0], logits[:, 1] - logits[:, 0], atol=1e-4)


def test_an_image_in_no_fold_has_no_held_out_answer():
    X, y = blobs()
    fold = np.where(np.arange(120) < 100, np.arange(120) // 2 % 4, -1)
    logits, _ = augmentation.held_out("logreg", [X], y, ["a", "b"], fold, settings={"strengths": [0.1]})
    assert np.isnan(logits[100:]).all()
    assert np.isfinite(logits[:100]).all()


def test_a_class_that_a_fold_lacks_is_never_its_answer():
    X, y = blobs()
    y = y.copy()
    y[:2] = 2
    fold = np.where(y == 2, 0, np.arange(120) // 2 % 3)
    logits, _ = augmentation.held_out("logreg", [X], y, ["a", "b", "c"], fold, settings={"strengths": [0.1]})
    assert (logits[fold == 0].argmax(axis=1) < 2).all()
    assert np.isfinite(logits).all()


def test_views_of_an_image_never_teach_about_itself():
    # features are noise, but the views of one image are the same noise: a leak would answer all of them
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(80, 40)).astype(np.float32), np.arange(80) % 2
    found = augmentation.measure_gain("logreg", [X, X, X], y, ["a", "b"])
    for way in ("center", "views", "averaged"):
        assert 0.3 < getattr(found, way).accuracy < 0.7


def test_duplicates_of_an_image_never_teach_about_it():
    rng = np.random.default_rng(0)
    once, label = rng.normal(size=(40, 40)).astype(np.float32), np.arange(40) % 2
    X, y, group = np.repeat(once, 2, axis=0), np.repeat(label, 2), np.repeat(np.arange(40), 2)
    found = augmentation.measure_gain("logreg", [X, X], y, ["a", "b"], groups=group)
    assert 0.25 < found.views.accuracy < 0.75
    leaky = augmentation.measure_gain("logreg", [X, X], y, ["a", "b"])
    assert leaky.views.accuracy > 0.9  # the test can tell


def test_views_that_average_noise_away_are_found_to_help():
    rng = np.random.default_rng(1)
    y = np.arange(160) % 2
    clean = rng.normal(size=(160, 30)) * 0.3 + 0.25 * y[:, None]
    views = [(clean + rng.normal(size=clean.shape)).astype(np.float32) for _ in range(9)]
    found = augmentation.measure_gain("logreg", views, y, ["a", "b"])
    assert found.better == "averaged"
    assert found.averaged_gain["accuracy"].low > 0
    assert found.averaged_gain["log_loss"].high < 0
    assert found.views_gain["accuracy"].value == pytest.approx(found.views.accuracy - found.center.accuracy)
    assert (found.images, found.folds, found.augmented) == (160, 5, 8)
    text = found.text()
    assert text.startswith("8 views, cross-validated on 160 training images")
    assert f"{found.center.accuracy:.4f} -> {found.views.accuracy:.4f}" in text


def test_a_head_keeps_its_own_folds_and_measures_on_centre_crops():
    # its strength is the one that five folds of its own choose by the centre crops alone, however wrong the views
    X, y = blobs()
    wrong = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    fold = np.arange(120) // 2 % 4
    logits, _ = augmentation.held_out("logreg", [X, wrong], y, ["a", "b"], fold, settings={"folds": 3})
    train, test = np.flatnonzero(fold != 1), np.flatnonzero(fold == 1)
    both, labels = np.concatenate([X[train], wrong[train]]), np.tile(y[train], 2)
    heads = {
        scored: logreg.fit(Examples(both, labels, np.tile(train, 2), mask), ["a", "b"], folds=3).head(X[test])
        for scored, mask in (("centre", np.arange(180) < 90), ("all", None))
    }
    assert np.array_equal(logits[test], heads["centre"])
    assert np.abs(logits[test] - heads["all"]).max() > 0.01  # the test can tell


def test_an_image_is_measured_with_all_its_views_in_memory_or_not():
    X, y = blobs()
    fold = np.arange(120) // 2 % 4
    views = [X, (X + 0.1).astype(np.float32)]
    held = augmentation.held_out("ncm", views, y, ["a", "b"], fold)
    sliced = augmentation.held_out("ncm", [Table(view) for view in views], y, ["a", "b"], fold)
    np.testing.assert_allclose(sliced, held, atol=1e-5)


def test_views_with_several_labels_per_image():
    X, y = blobs()
    targets = np.stack([y, X[:, 0] > 0], axis=1).astype(np.int64)
    found = augmentation.measure_gain("logreg", [X, X], targets, ["a", "b"], settings={"strengths": [0.01, 0.1]})
    assert 0.4 < found.views.accuracy <= 1
    assert found.views.log_loss < np.log(2)


def test_what_cannot_be_measured_is_refused():
    X, y = blobs()
    with pytest.raises(HeadError, match="--views"):
        augmentation.measure_gain("logreg", [X], y, ["a", "b"])
    with pytest.raises(HeadError, match="too few"):
        augmentation.measure_gain("logreg", [X[:2], X[:2]], y[:2], ["a", "b"])


def test_a_paired_interval_is_that_of_the_normal_approximation():
    difference = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    found = augmentation.paired("log_loss", difference, np.zeros(2000))
    half = 1.96 * difference.std() / 2000**0.5
    assert found.value == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_answers_that_agree_on_all_images_leave_room_for_a_difference():
    right = np.ones(40)
    found = augmentation.paired("accuracy", right, right)
    # none of 40 differs: by the rule of three, each side may still be better on 3 of 40 future images
    assert found.value == 0 and found.low == pytest.approx(-found.high)
    assert 1 / 40 < found.high < 4 / 40


def test_ants_and_bees_from_cached_views(photos: Path, squeezenet_weights: Path, photo_run: Path, tmp_path: Path):
    cache = shutil.copytree(photo_run.parent / "cache", tmp_path / "cache")  # the whole photographs are known
    options = {"weights": str(squeezenet_weights), "cache": cache, "views": 2}
    run = fit(photos, "squeezenet1_1", output=tmp_path / "run", **options)
    assert run.report["accuracy"] >= 0.915
    extraction = sync(photos, "squeezenet1_1", **options)
    assert extraction.report.extracted == 0
    features = extraction.features()
    views = [extraction.features(k).X for k in range(3)]
    val = np.flatnonzero(features.splits == "val")
    logits = augmentation.average(run.head, [view[val] for view in views])
    averaged = evaluate_logits(logits, features.y[val], run.head, features.class_names)
    assert averaged.accuracy >= 0.915
    train = np.flatnonzero(features.splits == "train")
    found = augmentation.measure_gain(
        "logreg",
        [v[train] for v in views],
        features.y[train],
        features.class_names,
        groups=groups(features.keys[train]),
    )
    assert found.center.accuracy == pytest.approx(0.893, abs=0.03)
    assert found.views.accuracy > 0.87
