"""Heads read the cache in the order in which rows are stored, and learn the same as in any other order."""

from __future__ import annotations

import numpy as np
import pytest
from storekit import SPEC, fill

from featx import learning
from featx.cache.store import FeatureStore
from featx.cache.streaming import StoredRows
from featx.features import groups
from featx.solvers.examples import Examples, in_stored_order


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoredRows, np.ndarray, np.ndarray]:
    """1,200 listed images, 60 of them a copy of another with a label of its own, stored in another order."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 1200)
    X = (rng.normal(size=(1200, 8)) + 0.6 * rng.normal(size=(3, 8))[y]).astype(np.float32)
    keys = rng.integers(0, 256, (1200, 32), dtype=np.uint8)
    place = tmp_path_factory.mktemp("stored")
    order = rng.permutation(1200)
    fill(place, keys[order], X[order], shard_bytes=4000)
    copied = np.concatenate([np.arange(1140), rng.integers(0, 1140, 60)])
    return StoredRows(FeatureStore(place, SPEC), keys[copied]), y, groups(keys[copied])


def test_rows_labels_and_groups_come_in_stored_order(stored: tuple[StoredRows, np.ndarray, np.ndarray]) -> None:
    table, y, group = stored
    ordered, order = in_stored_order(table)
    assert isinstance(ordered, StoredRows) and (np.diff(ordered.places) >= 0).all()
    assert not (np.diff(table.places) >= 0).all()
    assert np.array_equal(ordered[0:1200], table[0:1200][order])

    both = Examples.of_views([table, table.take(np.arange(1200))], y, group)
    assert np.array_equal(both.X[0:2400], np.concatenate([table[0:1200][order]] * 2))
    assert np.array_equal(both.y, np.tile(y[order], 2)) and both.scored is not None
    assert np.array_equal(both.groups, np.tile(group[order], 2)) and both.scored.sum() == 1200
    held = Examples.of_views([table[0:1200]], y, group)
    assert held.groups is not None and np.array_equal(held.groups, group) and np.array_equal(held.y, y)


@pytest.mark.parametrize(
    ("head", "settings"), [("logreg", {}), ("logreg", {"part": 200}), ("ridge", {}), ("ncm", {"threshold": 0.5})]
)
def test_the_order_of_the_rows_changes_no_head(
    stored: tuple[StoredRows, np.ndarray, np.ndarray], head: str, settings: dict[str, float]
) -> None:
    table, y, group = stored
    listed, ordered = (
        learning.learn(head, examples, ["a", "b", "c"], settings=settings)
        for examples in (Examples(table, y, group), Examples.of_views([table], y, group))
    )
    for name in ("strength", "penalty"):
        assert listed.info.get(name) == ordered.info.get(name)
    ours, theirs = (each.info.get("calibration", {}).get("temperature", 1.0) for each in (listed, ordered))
    assert ours == pytest.approx(theirs, rel=1e-4)
    apart = np.abs(ordered.head.weight - listed.head.weight).max()
    assert apart < 2e-4 * np.abs(listed.head.weight).max()
