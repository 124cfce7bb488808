"""One read gathers what statistics need, exactly, whatever the columns' scales and the order of the rows."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from tables import Counted

from featx.errors import HeadError
from featx.heads import ncm, ridge
from featx.solvers import moments as _moments
from featx.solvers import training as _training
from featx.solvers.examples import Examples
from featx.solvers.moments import Asked

NAMES = ["a", "b", "c"]


def hard(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Columns of unlike scales and offsets up to 10,000 times their spread, two constant; class by class, after a first
    row that is like no other: `float32 [N, 8]`, `[N]`.
    """
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, 3, rows))
    X = rng.normal(size=(rows, 8)) + rng.normal(size=(3, 8))[y]
    X = X @ rng.normal(size=(8, 8)) * 10.0 ** np.array([0, -6, 6, 0, 0, 0, -3, 3])
    X += np.array([1e4, 0, 1e9, -1e4, 0, 3, 1, 0])
    X[:, 4:6] = 0, 7.7
    X[0, [0, 3]] = 0
    return X.astype(np.float32), y


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [3000, 40_000])  # one block, and several threads' blocks
def test_means_products_and_sums_of_one_read_are_numpys(rows: int, weighted: bool) -> None:
    X, y = hard(rows)
    own = np.random.default_rng(1).uniform(0.5, 3, rows) if weighted else None
    fold = np.arange(rows) % 4 - 1
    table = Counted(X)
    task, sums, totals = _training.summed(_training.labelled(table, y, NAMES, own), fold, gram=True)
    assert table.reads == 1

    Z, share = X.astype(np.float64), np.ones(rows) if own is None else own / own.mean()
    mean = share @ Z / share.sum()
    scale = np.sqrt(share @ (Z - mean) ** 2 / share.sum())
    there = np.array([0, 1, 2, 3, 6, 7])
    np.testing.assert_allclose(task.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(task.scale[there], scale[there], rtol=2e-6)
    assert np.isinf(task.scale[4:6]).all() and "2 of 8 feature columns are constant" in task.notes[0]

    Z = (Z - task.mean) / task.scale
    assert task.gram is not None
    np.testing.assert_allclose(task.gram, (Z * share[:, None]).T @ Z, atol=3e-6 * rows)
    for k, held in enumerate((0, 1, 2, -1)):
        for c in range(3):
            mine = (fold == held) & (y == c)
            np.testing.assert_allclose(sums[k, c], share[mine] @ Z[mine], atol=1e-6 * rows)
            assert totals[k, c] == pytest.approx(share[mine].sum(), rel=1e-6)


def test_several_labels_are_summed_with_their_absences() -> None:
    X, y = hard(2000)
    targets = np.stack([y > 0, y > 1, np.arange(2000) % 3 == 0], axis=1).astype(np.int64)
    task = _training.labelled(X, targets, NAMES, None)
    task, sums, totals = _training.summed(task, np.arange(2000) % 2)
    Z = task.standard().astype(np.float64)
    for k in range(2):
        both = np.concatenate([targets, 1 - targets], axis=1)[np.arange(2000) % 2 == k]
        np.testing.assert_allclose(sums[k], both.T @ Z[np.arange(2000) % 2 == k], atol=2e-3)
        assert totals[k] == pytest.approx(both.sum(axis=0))
    assert (sums[2] == 0).all() and (totals[2] == 0).all()  # every row is held out in one of the folds


def test_rows_are_kept_as_they_pass() -> None:
    X, _ = hard(40_000)
    wanted = np.flatnonzero(np.random.default_rng(2).random(40_000) < 0.1)
    table = Counted(X)
    assert np.array_equal(_moments.moments(table, None, Asked(kept=wanted))[1], X[wanted]) and table.reads == 1


@pytest.mark.parametrize(("value", "row"), [(np.nan, 31_234), (-np.inf, 9), (3e38, 39_999)])
def test_the_first_row_that_cannot_be_squared_is_named(value: float, row: int) -> None:
    X, y = hard(40_000)
    X[[row, 39_999], 1] = value
    with pytest.raises(HeadError, match=rf"beyond float32 \(row {row}\)"):
        _training.check(Counted(X), y, NAMES)


@pytest.mark.parametrize("kind", ["classes", "labels", "groups"])
@pytest.mark.parametrize("head", [ridge, ncm])
def test_two_reads_of_a_table_give_the_head_that_memory_gives(head: ModuleType, kind: str) -> None:
    X, y = (each[1:] for each in hard(6001))
    y = np.where(np.random.default_rng(3).random(6000) < 0.2, (y + 1) % 3, y)
    if kind == "labels":
        y = np.stack([y > 0, y == 1, y == 2], axis=1).astype(np.int64)
    groups = np.random.default_rng(4).permutation(6000) // 2 if kind == "groups" else None
    table = Counted(X)
    streamed, held = (head.fit(Examples(x, y, groups), NAMES) for x in (table, X))
    # rows that are left out together are read together, too
    assert table.reads == (3 if head is ridge and kind == "groups" else 2)
    assert streamed.info.get("penalty") == held.info.get("penalty")
    ours, theirs = (each.info["calibration"]["temperature"] for each in (streamed, held))
    assert ours == pytest.approx(theirs, rel=1e-3)
    np.testing.assert_allclose(streamed.head(X), held.head(X), atol=0.02)
    assert held.head(X).std() > 0.3


@pytest.mark.parametrize("first", [0, 1])  # the first row fits no plane: what is expected of the others is wrong
def test_ridge_takes_the_best_penalty_whatever_was_expected(first: int) -> None:
    X, y = (each[first:] for each in hard(1000))
    y = np.where(np.random.default_rng(3).random(len(y)) < 0.3, (y + 1) % 3, y)
    table = Counted(X)
    fitted = ridge.fit(Examples(table, y), NAMES)
    alone = [ridge.fit(Examples(X, y), NAMES, penalties=[p]).info["leave_one_out"] for p in ridge.PENALTIES]
    best = int(np.argmin([each["mean_squared_error"][0] for each in alone]))
    assert fitted.info["penalty"] == ridge.PENALTIES[best] and 0 < best < 36
    assert table.reads == (2 if first else 4)
