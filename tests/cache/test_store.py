"""The feature cache: what is written is what is read, in the order asked for, under its own spec."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from storekit import NAME, SPEC, extract, fill, leftovers, make_read_only, shard_files, table, tiny_engine

from featx.cache import caching
from featx.cache.index import KeyIndex
from featx.cache.store import FeatureStore
from featx.errors import StoreError
from featx.pixels.views import view_names

GOLDEN = Path(__file__).parent / "golden" / "cache"


@pytest.mark.parametrize(("width", "shard_bytes", "shards"), [(8, 2000, 8), (12_000, 10 << 20, 3)])
def test_rows_come_back_in_the_order_asked_for_with_repeats(
    tmp_path: Path, width: int, shard_bytes: int, shards: int
) -> None:
    """In one thread, and in several pieces per shard by several."""
    keys, rows = table(500, width)
    fill(tmp_path, keys, rows, shard_bytes=shard_bytes)
    store = FeatureStore(tmp_path, SPEC)
    assert len(shard_files(tmp_path)) == shards and len(store) == 500 and np.array_equal(store.keys(), keys)
    assert np.array_equal(store.read(keys), rows)
    order = np.random.default_rng(1).integers(0, 500, 1200)
    assert np.array_equal(store.read(keys[order]), rows[order])
    assert np.array_equal(store.read(keys[::-1]), rows[::-1])
    assert np.array_equal(store.read(keys[3:4]), rows[3:4])
    assert store.read(keys[:0]).shape == (0, width)


@pytest.mark.parametrize("shape", [(), (1,), (512,), (3, 7, 7), (2, 1, 4, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_of_any_shape_come_back_as_they_were(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    keys, _ = table(70)
    rows = np.random.default_rng(2).standard_normal((70, *shape)).astype(dtype)
    spec = replace(SPEC, dtype=dtype)
    with FeatureStore(tmp_path, spec, engine="tiny", shard_bytes=40 * rows[0].nbytes) as store:
        for start in range(0, 70, 16):
            store.append(keys[start : start + 16], rows[start : start + 16])
    again = FeatureStore(tmp_path, spec)
    assert again.form and again.form.row_shape == shape
    for order in (np.arange(70), np.arange(70)[::-1], np.arange(10, 20)):
        found = again.read(keys[order])
        assert found.dtype == dtype and np.array_equal(found, rows[order])


def test_one_run_in_one_file_is_memory_mapped(tmp_path: Path) -> None:
    keys, rows = table(100)
    fill(tmp_path, keys, rows)
    store = FeatureStore(tmp_path, SPEC)
    X = store.read(keys[20:60])
    assert isinstance(X, np.memmap) and not X.flags.writeable and np.array_equal(X, rows[20:60])
    assert not isinstance(store.read(keys[[1, 0]]), np.memmap)


def test_opening_and_asking_create_nothing(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "cache", SPEC, engine="tiny")
    keys, _ = table(3)
    assert len(store) == 0 and not store.contains(keys).any()
    assert store.form is None and store.engine is None
    with store, pytest.raises(StoreError, match="3 of 3 features are not in"):
        store.read(keys)
    assert not (tmp_path / "cache").exists()


def test_missing_keys_are_counted(tmp_path: Path) -> None:
    keys, rows = table(30)
    fill(tmp_path, keys, rows)
    store = FeatureStore(tmp_path, SPEC)
    other, _ = table(4, seed=8)
    with pytest.raises(StoreError, match=r"4 of 34 features.*featx extract"):
        store.read(np.concatenate([keys, other]))
    assert store.contains(np.concatenate([other, keys])).tolist() == [False] * 4 + [True] * 30


def test_a_shard_is_committed_when_it_is_full_or_when_its_first_row_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, rows = table(100)
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    store = FeatureStore(tmp_path, SPEC, engine="tiny")
    store.append(keys[:10], rows[:10])
    assert len(shard_files(tmp_path)) == 0
    clock[0] += 21
    store.append(keys[10:20], rows[10:20])
    assert len(shard_files(tmp_path)) == 1 and len(store) == 20
    store.append(keys[20:30], rows[20:30])
    assert len(shard_files(tmp_path)) == 1
    big = FeatureStore(tmp_path, SPEC, engine="tiny", shard_bytes=10 * 32)
    big.append(keys[30:40], rows[30:40])
    assert len(shard_files(tmp_path)) == 2
    with store:
        pass
    assert len(FeatureStore(tmp_path, SPEC)) == 40


def test_rows_under_keys_that_are_there_are_stored_once(tmp_path: Path) -> None:
    keys, rows = table(20)
    with FeatureStore(tmp_path, SPEC, engine="tiny") as store:
        store.append(np.concatenate([keys[:5], keys[:5]]), np.concatenate([rows[:5], rows[5:10]]))
        store.commit()
        store.append(keys[:10], rows[10:20])
    again = FeatureStore(tmp_path, SPEC)
    assert len(again.stored()) == 10 and np.array_equal(again.read(keys[:10]), np.concatenate([rows[:5], rows[15:20]]))


def test_another_engine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    keys, rows = table(10)
    fill(tmp_path, keys, rows)
    assert FeatureStore(tmp_path, SPEC).engine == "tiny"
    with pytest.raises(StoreError, match=r"engine 'tiny', not 'other'.*featx cache remove"):
        FeatureStore(tmp_path, SPEC, engine="other")
    with pytest.raises(StoreError, match="engine 'tiny', not 'other'"):
        FeatureStore(tmp_path, SPEC).computed_by("other")
    late = FeatureStore(tmp_path / "new", SPEC, engine="other")
    fill(tmp_path / "new", keys, rows)  # another writer comes first
    with pytest.raises(StoreError, match="engine 'tiny', not 'other'"):
        late.append(keys, rows)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", None)])
def test_a_store_says_how_far_rows_of_one_image_may_lie_apart(
    tmp_path: Path, precision: str, tolerance: float | None
) -> None:
    with FeatureStore(tmp_path, replace(SPEC, precision=precision), engine="onnxruntime") as store:
        store.append(*table(3))
    assert json.loads((store.folder / "spec.json").read_text())["tolerance"] == tolerance
    assert caching.info(tmp_path, store.folder.name).to_dict()["tolerance"] == tolerance


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    keys, rows = table(10)
    store = fill(tmp_path, keys, rows)
    with pytest.raises(StoreError, match=r"rows of shape \[4\].*\[8\]"):
        store.append(keys, rows[:, :4])
    with pytest.raises(StoreError, match="expected 10 rows of floats"):
        store.append(keys, rows[:9])
    with pytest.raises(StoreError, match="expected 10 rows of floats, got int64"):
        store.append(keys, np.zeros((10, 8), np.int64))
    with pytest.raises(StoreError, match=r"keys are uint8 \[N, 32\], not uint8 \[10, 31\]"):
        store.append(keys[:, :31], rows)
    with pytest.raises(StoreError, match="hold nothing"):
        store.append(keys, rows[:, :0])
    store.append(keys[:0], rows[:0])
    assert len(FeatureStore(tmp_path, SPEC)) == 10


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    keys, rows = table(10)
    store = FeatureStore(tmp_path, replace(SPEC, dtype="float16"), engine="tiny")
    wrong = rows.copy()
    wrong[3, 4] = 70000.0
    with pytest.raises(StoreError, match=r"float16 cannot hold 1 of 10 rows.*7e\+04.*store float32"):
        store.append(keys, wrong)
    with pytest.raises(StoreError, match="float16 cannot hold 10 of 10 rows"):
        store.append(keys, rows * 1e-8)
    rows[0, :2] = np.nan, np.inf
    with store:
        store.append(keys, rows)
    assert np.array_equal(store.read(keys), rows.astype(np.float16), equal_nan=True)


def test_a_read_only_cache_can_be_read_and_says_that_it_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, rows = table(50)
    fill(tmp_path, keys, rows, shard_bytes=400)
    folder = tmp_path / "features" / NAME
    before = sorted(p.name for p in folder.iterdir())
    make_read_only(monkeypatch)
    store = FeatureStore(tmp_path, SPEC)
    assert np.array_equal(store.read(keys), rows) and store.notes == []
    with pytest.raises(StoreError, match=r"cannot write to the cache.*read-only; give --cache"):
        store.append(*table(5, seed=4))
    with pytest.raises(StoreError, match="read-only; give --cache"):
        FeatureStore(tmp_path / "new", SPEC, engine="tiny").append(keys, rows)
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_view_is_its_own_row_so_adding_views_computes_only_the_new_ones(tmp_path: Path) -> None:
    keys, _ = table(40)
    views = view_names(0, 3)
    computed = []
    for count in (1, 3, 4):
        stores = [FeatureStore(tmp_path, replace(SPEC, view=v), engine="tiny") for v in views[:count]]
        computed.append([extract(store, keys) for store in stores])
    assert computed == [[40], [0, 40, 40], [0, 0, 0, 40]]
    assert len({replace(SPEC, view=v).digest for v in views}) == 4


def test_a_second_store_sees_what_the_first_has_committed_since(tmp_path: Path) -> None:
    keys, rows = table(60)
    fill(tmp_path, keys[:20], rows[:20])
    reader = FeatureStore(tmp_path, SPEC)
    fill(tmp_path, keys[20:], rows[20:])
    assert np.array_equal(reader.read(keys), rows)


def test_a_warm_store_needs_no_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, rows = table(40)
    fill(tmp_path, keys, rows)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10 * 10**9)
    assert len(FeatureStore(tmp_path, SPEC)) == 40  # reads the bytes once more, and remembers it
    code = (
        "import sys, pathlib\nfrom featx.cache.store import FeatureStore\nfrom featx.features import FeatureSpec\n"
        "store = FeatureStore(pathlib.Path(sys.argv[1]), FeatureSpec('torchvision/resnet18', 'ab' * 32))\n"
        "assert len(store.read(store.keys())) == 40\n"
        "assert not {'h5py', 'torch', 'sklearn'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_shard_is_trusted_without_reading_once_it_is_older_than_the_clock_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, rows = table(40)
    fill(tmp_path, keys, rows)
    checked: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: checked.append(a[1]) or real(*a))
    now = time.time_ns()
    for later, times in ((0, 1), (0, 2), (10, 3), (10, 3), (-3600, 3)):
        monkeypatch.setattr(time, "time_ns", lambda t=now + later * 10**9: t)
        assert len(FeatureStore(tmp_path, SPEC)) == 40 and len(checked) == times
    (shard,) = shard_files(tmp_path)
    shutil.copy(shard, shard.with_suffix(".copy"))
    os.replace(shard.with_suffix(".copy"), shard)  # same bytes, another inode
    assert len(FeatureStore(tmp_path, SPEC)) == 40 and len(checked) == 4


def test_a_clock_that_goes_backwards_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, _ = table(200)
    now = time.time_ns()
    for part, shift in enumerate((0, -3600, -7200, 86_400, -86_400 * 400)):
        monkeypatch.setattr(time, "time_ns", lambda t=now + shift * 10**9: t)
        store = FeatureStore(tmp_path, SPEC, engine="tiny", shard_bytes=1000)
        assert extract(store, keys[: 40 * (part + 1)]) == 40
    store = FeatureStore(tmp_path, SPEC)
    assert np.array_equal(store.read(keys), tiny_engine(keys)) and store.notes == [] and not leftovers(tmp_path)


def test_keys_that_share_their_first_bytes_are_told_apart() -> None:
    keys, _ = table(1000)
    keys[:, :8] = keys[0, :8]
    stored = np.concatenate([keys[:600], keys[100:200]])
    index = KeyIndex(stored[:333]).plus(stored[333:])
    assert np.array_equal(index.locate(keys), np.where(np.arange(1000) < 600, np.arange(1000), -1))
    assert len(index) == 600 and np.array_equal(index.first(), np.arange(600))


def test_looking_up_many_keys_takes_little_memory() -> None:
    keys, _ = table(200_000, width=1)
    index = KeyIndex(keys[:100_000])
    asked = keys[np.random.default_rng(0).permutation(200_000)]
    tracemalloc.start()
    found = index.locate(asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found >= 0).sum() == 100_000 and np.array_equal(keys[found[found >= 0]], asked[found >= 0])
    assert peak < 200_000 * 120


def test_the_format_of_version_1_can_be_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "cache")
    store = FeatureStore(tmp_path / "cache", SPEC, engine="golden")
    keys = np.arange(5 * 32, dtype=np.uint8).reshape(5, 32)
    rows = np.arange(15, dtype=np.float32).reshape(5, 3) / 7
    assert np.array_equal(store.read(keys), rows) and store.notes == [] and store.engine == "golden"
    with store:
        store.append(*table(4, width=3))
    assert len(FeatureStore(tmp_path / "cache", SPEC)) == 9
