"""Ridge against scikit-learn, and its leave-one-out against leaving rows out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from tables import Counted

from featx.errors import HeadError
from featx.heads import ridge
from featx.solvers import design as _design
from featx.solvers import training as _training
from featx.solvers.examples import Examples


def clouds(rows: int, size: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    X = rng.normal(size=(rows, size)) + 0.8 * rng.normal(size=(classes, size))[y]
    return (3 * X + 1).astype(np.float32), y, [f"c{i}" for i in range(classes)]


@pytest.mark.parametrize(("rows", "size"), [(60, 10), (40, 70)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_leave_one_out_is_what_leaving_out_gives(rows: int, size: int, grouped: bool, some: bool) -> None:
    X, y, names = clouds(rows, size)
    groups = np.arange(rows) // 2 if grouped else np.arange(rows)
    groups[-3:] = groups[-3]
    task = _training.check(X, y, names)
    design = _design.Design(task, np.full(rows, -1))
    T = 2 * task.one_hot() - 1
    penalties = np.array([0.5, 20.0, 400.0])
    T_sorted = T[design.order]
    counted = np.arange(rows) % 3 > 0 if some else np.ones(rows, bool)
    together = groups[design.order] if grouped else None
    errors = ridge.LeftOut(design, T_sorted, together, counted[design.order]).measure(penalties, 0)[0]
    Z = task.standard().astype(np.float64)
    for penalty, error in zip(penalties, errors, strict=True):
        total = 0.0
        for group in np.unique(groups) if grouped else range(rows):
            out = groups == group if grouped else np.arange(rows) == group
            model = Ridge(alpha=penalty).fit(Z[~out], T[~out])
            out &= counted
            if out.any():
                total += ((model.predict(Z[out]) - T[out]) ** 2).sum()
        assert error == pytest.approx(total / T[counted].size, rel=1e-4)


def test_single_precision_and_blocks_change_little() -> None:
    X, y, names = clouds(30_000, 40)  # several blocks of rows
    task = _training.check(X, y, names)
    found = []
    for dtype in (np.float64, np.float32):
        design = _design.Design(task, np.full(30_000, -1))
        left_out = ridge.LeftOut(design, (2 * task.one_hot() - 1)[design.order], dtype=dtype)
        found.append(left_out.measure(np.array([1.0, 3e4, 300.0]), 2))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-4)
    assert found[0][1].std() > 0.1


@pytest.mark.parametrize(("rows", "size"), [(300, 20), (40, 70)])
def test_the_head_is_scikit_learns_ridge(rows: int, size: int) -> None:
    X, y, names = clouds(rows, size)
    fitted = ridge.fit(Examples(X, y), names, penalties=[0.3])
    temperature = fitted.info["calibration"]["temperature"]
    task = _training.check(X, y, names)
    peer = Ridge(alpha=0.3 * rows).fit(task.standard().astype(np.float64), 2 * task.one_hot() - 1)
    scores = peer.predict(task.standard())
    assert fitted.head(X) * temperature == pytest.approx(scores, abs=1e-3)
    assert scores.std() > 0.1


def test_the_penalty_with_the_least_left_out_error_is_taken() -> None:
    X, y, names = clouds(80, 60)
    fitted = ridge.fit(Examples(X, y), names)
    figures = fitted.info["leave_one_out"]
    best = int(np.argmin(figures["mean_squared_error"]))
    assert fitted.info["penalty"] == figures["penalties"][best]
    alone = [ridge.fit(Examples(X, y), names, penalties=[p]).info["leave_one_out"] for p in ridge.PENALTIES]
    errors = [figures["mean_squared_error"][0] for figures in alone]
    assert fitted.info["penalty"] == ridge.PENALTIES[int(np.argmin(errors))] and 0 < np.argmin(errors) < 36


def test_several_labels_are_told_by_sign() -> None:
    X, y, _ = clouds(400, 20, 4)
    targets = np.stack([y % 2, y > 1], axis=1).astype(np.int64)
    fitted = ridge.fit(Examples(X, targets), ["odd", "high"])
    assert fitted.head.activation == "sigmoid"
    assert ((fitted.head(X) > 0) == targets).mean() > 0.9


def test_classes_of_one_group_each_are_fitted_without_measuring() -> None:
    X, y, names = clouds(60, 10)
    fitted = ridge.fit(Examples(X, y, y), names)
    assert fitted.info["penalty"] == ridge.UNMEASURED
    assert not {"leave_one_out", "calibration"} & set(fitted.info)
    notes = " ".join(fitted.info["notes"])
    assert "penalty 0.5 was taken without measuring" in notes and "not calibrated" in notes
    assert (fitted.head(X) == ridge.fit(Examples(X, y, y), names, penalties=[0.5]).head(X)).all()


def test_an_impossible_penalty_is_named() -> None:
    with pytest.raises(HeadError, match="penalties are positive"):
        X, y, names = clouds(30, 5)
        ridge.fit(Examples(X, y), names, penalties=[0.0])


def test_many_labels_of_a_streamed_table_far_from_zero_are_scikit_learns_ridge() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 20))
    y = (X @ rng.normal(size=(20, 100)) + rng.normal(size=(600, 100)) > 0.5).astype(np.int64)
    X = (X + rng.uniform(100, 200, 20)).astype(np.float32)
    found = ridge.fit(Examples(Counted(X), y), [f"c{i:02d}" for i in range(100)], penalties=[0.5])
    Z = (X - X.mean(axis=0, dtype=np.float64)) / X.std(axis=0, dtype=np.float64)
    expected = Ridge(alpha=0.5 * 600).fit(Z, 2.0 * y - 1).coef_ / X.std(axis=0, dtype=np.float64)
    ratio = (found.head.weight * expected).sum() / (expected**2).sum()  # one temperature for all
    np.testing.assert_allclose(found.head.weight / ratio, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
