"""A large table is solved from a part of its rows: in fewer passes, to the same strength and the same optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tables import Counted

from featx.errors import HeadError
from featx.heads import logreg
from featx.solvers import training as _training
from featx.solvers.coarse import stratified
from featx.solvers.design import Design
from featx.solvers.examples import Examples
from featx.solvers.path import Path

NAMES = ["a", "b", "c", "d"]
GRID = np.array(logreg.STRENGTHS)


def data(kind: str, seed: int = 0, rows: int = 3000) -> tuple[Examples, dict[str, Any]]:
    """12 columns of unlike scale and offset; a fifth of the labels are wrong, unless planes part the classes."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2 if kind == "binary" else 4, rows)
    apart = 8 if kind == "separable" else 0.7
    scale = np.arange(1, 13) ** -0.5 * rng.uniform(0.1, 10, 12)
    X = (rng.normal(size=(rows, 12)) + apart * rng.normal(size=(4, 12))[y]) * scale + rng.normal(size=12) * 5
    if kind == "labels":
        logits = (X - X.mean(axis=0)) / X.std(axis=0) @ rng.normal(size=(12, 4))
        y = (logits + 2 * rng.normal(size=(rows, 4)) > 1).astype(np.int64)
    elif kind != "separable":
        y = np.where(rng.random(rows) < 0.2, rng.integers(0, y.max() + 1, rows), y)
    groups = rng.integers(0, rows // 3, rows) if kind == "groups" else None
    settings: dict[str, Any] = {"class_weight": {"a": 0.3, "b": 2.0}} if kind == "weights" else {}
    return Examples(X.astype(np.float32), y, groups), settings


def exact(examples: Examples, class_weight: Any = None) -> Path:
    """Five folds of the strengths from 0.02 to 2, in memory, each to its optimum."""
    task = _training.check(examples.X, examples.y, NAMES[: len(np.unique(examples.y)) if examples.y.ndim == 1 else 4])
    fold, _ = _training.folds(task.y, 5, groups=examples.groups)
    path = Path(Design(task, fold, _training.class_weights(task, class_weight)), GRID, np.arange(5), tolerance=1e-7)
    path.solve(list(range(17, 26)))
    return path


@pytest.mark.parametrize(
    ("kind", "seed"), [("plain", 0), ("plain", 1), ("binary", 0), ("weights", 0), ("groups", 0), ("labels", 0)]
)
def test_the_strength_and_the_optimum_are_those_of_the_whole_table(kind: str, seed: int) -> None:
    examples, settings = data(kind, seed)
    names, table = NAMES[:2] if kind == "binary" else NAMES, Counted(np.asarray(examples.X))
    found = logreg.fit(Examples(table, examples.y, examples.groups), names, part=500, **settings)
    path = exact(examples, settings.get("class_weight"))
    assert found.info["strength"] == GRID[path.best] and 17 < path.best < 25
    assert table.reads <= 20

    measured = found.info["cross_validation"]
    loss = dict(zip(measured["strengths"], measured["log_loss"], strict=True))
    assert set(GRID[path.best - 1 : path.best + 2]) <= set(loss) and len(loss) <= 6
    for i in range(path.best - 1, path.best + 2):
        assert loss[GRID[i]] == pytest.approx(path.held(i) / len(examples.y), abs=2e-5)
    assert 500 <= found.info["coarse_start"]["rows"] <= 600 and found.info["converged"]

    alone = logreg.fit(examples, names, strengths=[found.info["strength"]], **settings).head
    X = np.asarray(examples.X)
    np.testing.assert_allclose(found.head.probabilities(found.head(X)), alone.probabilities(alone(X)), atol=2e-3)


def test_fewer_reads_are_needed_than_without_a_part() -> None:
    examples, _ = data("plain", 1)
    tables = [Counted(np.asarray(examples.X)) for _ in range(2)]
    usual, begun = (
        logreg.fit(Examples(table, examples.y), NAMES, part=part) for table, part in zip(tables, (0, 500), strict=True)
    )
    assert usual.info["strength"] == begun.info["strength"] and "coarse_start" not in usual.info
    assert tables[1].reads <= 0.5 * tables[0].reads


def test_a_best_strength_at_the_end_of_the_grid_is_found() -> None:
    examples, _ = data("separable")
    usual, begun = (
        logreg.fit(Examples(Counted(np.asarray(examples.X)), examples.y), NAMES, part=part) for part in (0, 500)
    )
    assert usual.info["strength"] == begun.info["strength"] == GRID[-1]
    assert any("at the end of the grid" in note for note in begun.info["notes"]) and begun.info["converged"]
    np.testing.assert_allclose(begun.head.weight, usual.head.weight, atol=2e-3 * np.abs(usual.head.weight).max())


def test_a_part_keeps_each_classs_share_of_each_fold_and_parts_no_group() -> None:
    rng = np.random.default_rng(0)
    groups = rng.permutation(9000) // 3
    y = np.where(groups % 100 == 0, 2, groups % 2)  # a hundredth of the groups are of class 2
    fold, _ = _training.folds(y, 5, groups=groups)
    some = stratified(y, groups, fold, 900, 16, seed=1)
    assert some is not None and 900 <= len(some.rows) < 960 and (np.diff(some.rows) > 0).all()
    assert (np.bincount(groups[some.rows], minlength=3000) % 3 == 0).all()
    for c in range(3):
        for k in range(5):
            there, mine = (y == c) & (fold == k), (y[some.rows] == c) & (fold[some.rows] == k)
            assert 0.1 * there.sum() <= mine.sum() <= 0.1 * there.sum() + 3
            assert some.worth[mine].sum() == pytest.approx(there.sum())

    order = rng.permutation(9000)
    same = stratified(y[order], groups[order], fold[order], 900, 16, seed=1)
    other = stratified(y, groups, fold, 900, 16, seed=2)
    assert same is not None and np.array_equal(np.sort(order[same.rows]), some.rows)
    assert other is not None and not np.array_equal(other.rows, some.rows)


def test_a_table_of_fewer_than_four_parts_is_solved_without_one() -> None:
    y, fold = np.arange(400) % 2, np.arange(400) // 2 % 5
    assert stratified(y, None, fold, 100, 16, 0) is not None and stratified(y, None, fold, 101, 16, 0) is None
    assert stratified(y, None, fold, 0, 16, 0) is None
    assert stratified(np.arange(400) % 200, None, fold, 20, 16, 0) is None  # a row of each class is half the table
    with pytest.raises(HeadError, match="part is a number of rows, 0 for none, not -1"):
        stratified(y, None, fold, -1, 16, 0)


def test_a_table_of_more_columns_than_rows_is_solved_without_a_part() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    examples = Examples((rng.normal(size=(120, 200)) + rng.normal(size=(3, 200))[y]).astype(np.float32), y)
    with_part, without = (logreg.fit(examples, NAMES[:3], part=part) for part in (10, 0))
    assert with_part.info["strength"] == without.info["strength"] and "coarse_start" not in with_part.info
    np.testing.assert_array_equal(with_part.head.weight, without.head.weight)
