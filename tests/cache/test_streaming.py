"""Features larger than the memory given: read from the cache by slices, with the same result."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ColourEngine, write_images
from storekit import NAME, SPEC, fill, table

from featx.cache import caching
from featx.cache.store import FeatureStore
from featx.cache.streaming import Stacked, StoredRows
from featx.errors import HeadError
from featx.extraction.pipeline import sync
from featx.fitting import fit
from featx.measuring.curve import learning_curve
from featx.measuring.evaluation import evaluate


def test_stored_rows_are_those_of_the_store_whatever_slice_is_asked_for(tmp_path: Path) -> None:
    keys, rows = table(300)
    fill(tmp_path, keys, rows, shard_bytes=2000)
    order = np.random.default_rng(0).permutation(300)
    stored = StoredRows(FeatureStore(tmp_path, SPEC), keys[order])
    assert stored.shape == (300, 8)
    for part in (slice(0, 300), slice(7, 8), slice(290, 400), slice(5, 5)):
        assert np.array_equal(stored[part], rows[order][part])
    few = stored.take(np.array([3, 1, 299]))
    assert few.shape == (3, 8)
    assert np.array_equal(few[0:3], rows[order][[3, 1, 299]])


def test_threads_read_the_right_rows_while_the_cache_is_compacted(tmp_path: Path) -> None:
    """A read keeps to one listing. When it did not, rows came back in another order, without an error."""
    keys, rows = table(1000, 16)
    fill(tmp_path, keys, rows, batch=50, shard_bytes=3200)
    stored = StoredRows(FeatureStore(tmp_path, SPEC), keys)
    done = threading.Event()
    turns = [threading.Semaphore(0) for _ in range(4)]

    def read(seed: int) -> int:
        rng, count = np.random.default_rng(seed), 0
        while not done.is_set():
            start = int(rng.integers(0, 900))
            stop = start + int(rng.integers(1, 300))
            assert np.array_equal(stored[start:stop], rows[start:stop])
            count += 1
            turns[seed].release()
        return count

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read, seed) for seed in range(4)]
        for seed in range(20):
            caching.compact(tmp_path, NAME, keys[np.random.default_rng(seed).permutation(1000)])
            for found, turn in zip(reads, turns, strict=True):  # each has read since the last compact, or has failed
                while not found.done() and not turn.acquire(timeout=0.05):
                    pass
        done.set()
        assert all(found.result() >= 20 for found in reads)


def test_stacked_tables_are_sliced_across_their_borders() -> None:
    parts = [np.arange(n * 2.0).reshape(n, 2) + 100 * n for n in (3, 1, 4)]
    stacked, whole = Stacked(parts), np.concatenate(parts)
    assert stacked.shape == (8, 2)
    for start in range(9):
        for stop in range(start, 10):
            assert np.array_equal(stacked[start:stop], whole[start:stop]), (start, stop)
    order = np.array([7, 0, 3, 3, 2])
    assert np.array_equal(stacked.take(order), whole[order])


@pytest.mark.parametrize("head", ["logreg", "ridge", "ncm"])
@pytest.mark.parametrize("views", [0, 2])
def test_a_fit_by_slices_is_the_fit_in_memory(head: str, views: int, tmp_path: Path, everywhere: ColourEngine) -> None:
    data = write_images(tmp_path / "data", per_class=40)
    options = {"cache": tmp_path / "cache", "views": views, "gain": False}
    usual = fit(data, "tiny", head, output=tmp_path / "usual", **options)  # type: ignore[arg-type]
    sliced = fit(data, "tiny", head, output=tmp_path / "sliced", memory=100.0, **options)  # type: ignore[arg-type]
    assert np.abs(sliced.head.weight - usual.head.weight).max() < 2e-3 * np.abs(usual.head.weight).max()
    for name in ("accuracy", "train_accuracy", "log_loss"):
        assert sliced.report[name] == pytest.approx(usual.report[name], abs=2e-3), name


def test_features_over_the_limit_are_not_read_before_they_are_sliced(tmp_path: Path, everywhere: ColourEngine) -> None:
    extraction = sync(write_images(tmp_path / "data"), "tiny", cache=tmp_path / "cache")
    stored, held = extraction.features(memory=12 * 48 * 4 - 1), extraction.features(memory=12 * 48 * 4)
    assert isinstance(stored.rows, StoredRows) and isinstance(held.rows, np.ndarray)
    assert isinstance(stored.split("train").rows, StoredRows)
    assert np.array_equal(stored.X, held.X) and np.array_equal(stored.split("val").X, held.split("val").X)


def test_what_views_bring_is_not_measured_beyond_the_memory_given(tmp_path: Path, everywhere: ColourEngine) -> None:
    data = write_images(tmp_path / "data", per_class=40)
    options = {"cache": tmp_path / "cache", "views": 2}
    run = fit(data, "tiny", "ncm", output=tmp_path / "run", memory=100.0, **options)  # type: ignore[arg-type]
    assert "more than" in run.report["views_note"] and "views" not in run.report
    assert run.report["averaged_views"]["views"] == 3
    assert "views" in fit(data, "tiny", "ncm", output=tmp_path / "other", **options).report  # type: ignore[arg-type]


def test_the_linear_head_says_that_it_needs_the_features_in_memory(tmp_path: Path, everywhere: ColourEngine) -> None:
    data = write_images(tmp_path / "data")
    with pytest.raises(HeadError, match=r"--head linear holds the features in memory.*logreg.*--memory"):
        fit(data, "tiny", "linear", cache=tmp_path / "cache", output=tmp_path / "run", memory=100.0)


def test_what_measures_a_run_reads_by_slices_too(tmp_path: Path, everywhere: ColourEngine) -> None:
    data = write_images(tmp_path / "data", per_class=40)
    options = {"cache": tmp_path / "cache", "views": 2, "gain": False}
    run = fit(data, "tiny", "ncm", output=tmp_path / "run", **options)  # type: ignore[arg-type]
    usual, sliced = (evaluate(run, data, split="val", memory=memory) for memory in (None, 100.0))
    assert sliced.to_dict() == usual.to_dict()
    held, stored = (learning_curve(run, sizes=[20, 40], repeats=2, memory=memory) for memory in (None, 100.0))
    assert [point.accuracy for point in stored.points] == pytest.approx([p.accuracy for p in held.points], abs=0.05)
    linear = fit(data, "tiny", "linear", output=tmp_path / "linear", **options)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match=r"with 20 training images: --head linear holds the features in memory"):
        learning_curve(linear, sizes=[20], memory=100.0)
