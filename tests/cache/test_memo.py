"""The stat memo: what it spares, what it must never be wrong about."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from storekit import make_read_only

from featx.cache.memo import KeyMemo
from featx.errors import StoreError
from featx.features import content_key

DAY = 86_400 * 10**9


def listing(root: Path) -> tuple[list[str], np.ndarray]:
    ids = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    status = [os.stat(root / i) for i in ids]
    rows = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in status]
    return ids, np.array(rows, np.int64).reshape(-1, 4)


def hashed(root: Path, ids: list[str]) -> np.ndarray:
    keys = [content_key((root / i).read_bytes()) for i in ids]
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("a/one.jpg", "a/two.jpg", "b/three.jpg", "b/caf\udce9.jpg", "b/née.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"bytes of " + os.fsencode(name))
    return root


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour passes between writing the files and opening the memo."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)


def test_an_unchanged_folder_is_known_and_a_changed_file_is_not(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    keys, known = KeyMemo(tmp_path, root).lookup(ids, stats)
    assert not known.any() and not keys.any() and keys.shape == (5, 32)
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))
    found, known = KeyMemo(tmp_path, root).lookup(ids, stats)
    assert known.all() and np.array_equal(found, hashed(root, ids))
    for column in range(4):  # size, mtime, ctime, inode: each alone is enough
        other = stats.copy()
        other[2, column] += 1
        found, known = KeyMemo(tmp_path, root).lookup(ids, other)
        assert known.tolist() == [True, True, False, True, True] and not found[2].any()


def test_files_added_removed_and_reordered_keep_what_is_known(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    keys = hashed(root, ids)
    KeyMemo(tmp_path, root).record(ids, stats, keys, np.ones(5, bool))
    order = [4, 0, 2]
    found, known = KeyMemo(tmp_path, root).lookup([ids[i] for i in order], stats[order])
    assert known.all() and np.array_equal(found, keys[order])
    found, known = KeyMemo(tmp_path, root).lookup([*ids, "new.jpg"], np.vstack([stats, stats[:1]]))
    assert known.tolist() == [True] * 5 + [False]
    assert KeyMemo(tmp_path, root).lookup(ids[:2], stats[:2])[1].all()
    assert KeyMemo(tmp_path, root).lookup([], stats[:0])[1].shape == (0,)


def test_two_data_sets_under_one_root_share_the_memo(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    keys = hashed(root, ids)
    KeyMemo(tmp_path, root).record(ids[:3], stats[:3], keys[:3], np.ones(3, bool))
    KeyMemo(tmp_path, root).record(ids[3:], stats[3:], keys[3:], np.ones(2, bool))
    found, known = KeyMemo(tmp_path, root).lookup(ids, stats)
    assert known.all() and np.array_equal(found, keys)
    KeyMemo(tmp_path, root).record([], stats[:0], keys[:0], np.ones(0, bool))
    assert KeyMemo(tmp_path, root).lookup(ids, stats)[1].all()


def test_only_known_rows_are_recorded(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    some = np.array([True, False, True, False, False])
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), some)
    assert KeyMemo(tmp_path, root).lookup(ids, stats)[1].tolist() == some.tolist()


def test_a_file_changed_within_the_clocks_granularity_is_read_again(tmp_path: Path, root: Path) -> None:
    ids, stats = listing(root)  # written just now: another write could get the same timestamps
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()


def test_a_change_that_keeps_size_and_mtime_is_noticed(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))
    path = root / ids[0]
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ids, stats = listing(root)
    assert stats[0, 1] == before.st_mtime_ns
    assert KeyMemo(tmp_path, root).lookup(ids, stats)[1].tolist() == [False, True, True, True, True]


def test_a_clock_that_went_backwards_trusts_nothing_from_the_future(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, stats = listing(root)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 30 * DAY)
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()


@pytest.mark.parametrize("at", [0, 20, 48, 60, 200, -1])
def test_a_flipped_byte_in_the_memo_costs_reading_and_nothing_else(
    tmp_path: Path, root: Path, later: None, at: int
) -> None:
    ids, stats = listing(root)
    store = KeyMemo(tmp_path, root)
    store.record(ids, stats, hashed(root, ids), np.ones(5, bool))
    data = bytearray(store.path.read_bytes())
    data[at] ^= 1
    store.path.write_bytes(data)
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()
    store.path.write_bytes(data[:100])
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()
    store.path.unlink()
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()


def test_a_full_disk_is_said_and_a_read_only_cache_is_not(
    tmp_path: Path, root: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, stats = listing(root)
    make_read_only(monkeypatch)
    KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))
    make_read_only(monkeypatch, errno.ENOSPC)
    with pytest.raises(StoreError, match="make room"):
        KeyMemo(tmp_path, root).record(ids, stats, hashed(root, ids), np.ones(5, bool))


def test_an_unchanged_listing_writes_nothing(tmp_path: Path, root: Path, later: None) -> None:
    ids, stats = listing(root)
    keys = hashed(root, ids)
    KeyMemo(tmp_path, root).record(ids, stats, keys, np.ones(5, bool))
    path = KeyMemo(tmp_path, root).path
    inode = path.stat().st_ino
    KeyMemo(tmp_path, root).record(ids, stats, keys, np.ones(5, bool))
    assert path.stat().st_ino == inode
