"""The loss stated for a strength is that of the heads it ships: featx's path against scikit-learn's newton-cg."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference import cross_validated, optimum
from scipy.special import logsumexp

from featx.heads import logreg
from featx.solvers import design as _design
from featx.solvers import path as _solver
from featx.solvers import training as _training
from featx.solvers.examples import Examples

GRID = np.array(logreg.STRENGTHS)


def classes_apart(
    rows: int, size: int, classes: int, apart: float, mistaken: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Classes in columns of falling scale; where none is mistaken and columns are many, planes part them."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, size + 1) ** -0.5
    y = np.arange(rows) % classes
    X = (rng.normal(size=(rows, size)) + 2 * apart * rng.normal(size=(classes, size))[y]) * scale
    y = np.where(rng.random(rows) < mistaken, rng.integers(0, classes, rows), y)
    return X.astype(np.float32), y, [f"c{i}" for i in range(classes)]


DATA = {
    "2 classes, separable": (120, 150, 2, 0.15, 0.0),
    "2 classes, not": (300, 12, 2, 0.3, 0.1),
    "20 classes, separable": (200, 60, 20, 0.25, 0.0),
    "20 classes, not": (400, 10, 20, 0.8, 0.1),
    "100 classes, separable": (250, 30, 100, 0.6, 0.0),
    "100 classes, not": (400, 8, 100, 1.2, 0.05),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_strengths_loss_is_that_of_converged_heads(kind: str) -> None:
    """At every third strength visited, up to eight grid steps beyond the best: 1e-3 per image."""
    X, y, names = classes_apart(*DATA[kind])
    measured = logreg.fit(Examples(X, y), names).info["cross_validation"]
    Z = _training.check(X, y, names).standard().astype(np.float64)
    fold, _ = _training.folds(y, 5)
    best = measured["strengths"][int(np.argmin(measured["log_loss"]))]
    near = [(s, loss) for s, loss in zip(measured["strengths"], measured["log_loss"], strict=True) if s <= best * 101]
    chosen = near.index((best, measured["best_log_loss"]))
    for strength, loss in {*near[::3], near[chosen], near[-1]}:
        assert loss == pytest.approx(cross_validated(Z, y, fold, strength), abs=1e-3), strength


@pytest.mark.parametrize("kind", DATA)
def test_the_chosen_strength_has_the_grids_least_loss(kind: str) -> None:
    X, y, names = classes_apart(*DATA[kind])
    fold, _ = _training.folds(y, 5)
    design = _design.Design(_training.check(X, y, names), fold)
    quick = _solver.Path(design, GRID, np.arange(5), tolerance=logreg.GAP)
    whole = _solver.Path(design, GRID[::3], np.arange(5))
    quick.search()
    whole.whole()
    assert quick.held(quick.best) - whole.held(whole.best) <= 1e-3 * len(y)
    assert all(found.converged.all() for path in (quick, whole) for found in path.solved.values())


@pytest.mark.parametrize("kind", ["2 classes, separable", "20 classes, separable", "20 classes, not"])
def test_a_whole_path_has_real_heads_where_the_prior_is_weak(kind: str) -> None:
    X, y, names = classes_apart(*DATA[kind])
    task = _training.check(X, y, names)
    path = _solver.Path(_design.Design(task, np.full(len(y), -1)), GRID, np.array([-1]))
    path.whole()
    Z = task.standard().astype(np.float64)
    for i in (24, 34, 44):
        assert path.solved[i].converged.all() and path.solved[i].gap.max() <= 1e-5
        heads = (path.design.features_space(path.solved[i].A[:, 0]), optimum(Z, y, GRID[i]))
        ours, theirs = (Z @ weight.T + bias for weight, bias in heads)
        ours, theirs = (a - a.mean(axis=1, keepdims=True) for a in (ours, theirs))
        assert np.abs(ours - theirs).max() <= 0.02 * np.abs(theirs).max()
        loss = (logsumexp(ours, axis=1) - ours[np.arange(len(y)), y]).mean()
        assert loss < 0.9 * np.log(len(names))


def test_one_strength_alone_is_solved_from_nothing() -> None:
    """Weak priors where some answers stay wrong: full steps of Newton's from zero would never arrive."""
    X, y, names = classes_apart(500, 40, 50, 0.5, 0.05)
    Z = _training.check(X, y, names).standard().astype(np.float64)
    for strength in (30.0, 1e5):
        fitted = logreg.fit(Examples(X, y), names, strengths=[strength])
        assert fitted.info["converged"] and fitted.info["relative_gap"] <= 1e-7
        weight, bias = optimum(Z, y, strength)
        ours = fitted.head.probabilities(fitted.head(X))
        logits = Z @ weight.T + bias
        assert np.abs(ours - np.exp(logits - logsumexp(logits, axis=1, keepdims=True))).max() <= 5e-3


def test_twenty_groups_of_photographs(groups: Path) -> None:
    """Features of 339 photographs whose groups planes can part; losses by newton-cg at tol 1e-9."""
    arrays = np.load(groups)
    X, y = arrays["X"][arrays["train"]], arrays["y"][arrays["train"]]
    names = [str(i) for i in range(20)]
    fitted = logreg.fit(Examples(X, y), names)
    measured = fitted.info["cross_validation"]
    assert 3 < fitted.info["strength"] < 32 and fitted.info["converged"]
    stated = dict(zip(measured["strengths"], measured["log_loss"], strict=True))
    converged = {24: 0.83026, 26: 0.80605, 28: 0.79808, 30: 0.80227, 32: 0.81567, 36: 0.86210}
    for i, loss in converged.items():
        if GRID[i] in stated:
            assert stated[GRID[i]] == pytest.approx(loss, abs=1e-3)
    assert measured["best_log_loss"] == pytest.approx(0.798, abs=1e-3)
    fold, _ = _training.folds(y, 5)
    path = _solver.Path(_design.Design(_training.check(X, y, names), fold), GRID[[24, 28, 32, 36, 44]], np.arange(5))
    path.whole()
    for i, loss in enumerate((0.83026, 0.79808, 0.81567, 0.86210, 1.00105)):
        assert path.held(i) / len(y) == pytest.approx(loss, abs=1e-3)
