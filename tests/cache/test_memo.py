"""The stat memo: what it spares, what it must never be wrong about."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from storekit import fork, leftovers, make_read_only, wait

from featx.cache import caching
from featx.cache import memo as memo_module
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
    (path,) = store.folder.iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()
    path.write_bytes(data[:100])
    assert not KeyMemo(tmp_path, root).lookup(ids, stats)[1].any()
    path.unlink()
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
    (path,) = KeyMemo(tmp_path, root).folder.iterdir()
    inode = path.stat().st_ino
    KeyMemo(tmp_path, root).record(ids, stats, keys, np.ones(5, bool))
    assert list(path.parent.iterdir()) == [path] and path.stat().st_ino == inode


def files(count: int, seed: int = 0) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, stats and keys of files that nobody needs to write."""
    rng = np.random.default_rng(seed)
    ids = [f"class{i % 7}/{'deep/' * (i % 3)}{i}.jpg" for i in range(count)]
    return ids, rng.integers(1, 10**12, (count, 4)), rng.integers(0, 256, (count, 32), np.uint8)


def record(cache: Path, ids: list[str], stats: np.ndarray, keys: np.ndarray) -> KeyMemo:
    memo = KeyMemo(cache, Path("/data"))
    memo.record(ids, stats, keys, np.ones(len(ids), bool))
    return memo


def expect(cache: Path, ids: list[str], stats: np.ndarray, keys: np.ndarray) -> None:
    found, known = KeyMemo(cache, Path("/data")).lookup(ids, stats)
    assert known.all(), f"{(~known).sum()} of {len(ids)} are forgotten"
    assert np.array_equal(found, keys)


def test_what_is_recorded_of_some_files_forgets_no_others_and_is_merged_into_few_segments(tmp_path: Path) -> None:
    ids, stats, keys = files(3000)
    memo = record(tmp_path, ids[:2000], stats[:2000], keys[:2000])
    (whole,) = memo.folder.iterdir()
    for start in range(2000, 3000, 10):
        record(tmp_path, ids[start : start + 10], stats[start : start + 10], keys[start : start + 10])
        assert len(list(memo.folder.iterdir())) <= 6
    expect(tmp_path, ids, stats, keys)
    assert not whole.exists()  # a segment is written again once a quarter as much has come
    assert sum(path.stat().st_size for path in memo.folder.iterdir()) < 3100 * 72


def test_the_newest_entry_of_a_path_counts_before_and_after_a_merge(tmp_path: Path) -> None:
    ids, stats, keys = files(200)
    record(tmp_path, ids, stats, keys)
    record(tmp_path, ids[:5], stats[:5], keys[5:10])
    for segments in (2, 1):
        memo = KeyMemo(tmp_path, Path("/data"))
        assert len(list(memo.folder.iterdir())) == segments
        assert memo.lookup(ids[5:], stats[5:])[1].all()
        expect(tmp_path, [*ids[:5], *ids[:5]], np.vstack([stats[:5]] * 2), np.vstack([keys[5:10]] * 2))
        record(tmp_path, [f"{i}.png" for i in range(99)], stats[:99], keys[:99])


def test_two_processes_that_record_half_of_the_files_each_keep_all(tmp_path: Path) -> None:
    ids, stats, keys = files(1396)
    start = time.time() + 0.1

    def work(half: int) -> None:
        memo = KeyMemo(tmp_path, Path("/data"))
        mine = ids[half::2], stats[half::2]
        memo.lookup(*mine)  # both have opened it before either records
        time.sleep(max(0.0, start - time.time()))
        memo.record(*mine, keys[half::2], np.ones(698, bool))

    assert [wait(child) for child in [fork(lambda half=half: work(half)) for half in (0, 1)]] == [0, 0]  # type: ignore
    expect(tmp_path, ids, stats, keys)


def test_killed_at_any_moment_writers_forget_nothing_that_any_of_them_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    ids, stats, keys = files(3600)
    rng, kills = random.Random(0), 0
    done = [0, 0, 0]  # entries that each writer has recorded, of its 1,200
    while min(done) < 1200:
        writers = [writer for writer in range(3) if done[writer] < 1200]
        progress = [tmp_path / f"{writer}.progress" for writer in writers]

        def work(writer: int, start: int, progress: Path) -> None:
            progress.write_text("")
            with progress.open("a", buffering=1) as file:
                for at in range(start, 1200, 12):
                    part = slice(1200 * writer + at, 1200 * writer + at + 12)
                    record(tmp_path, ids[part], stats[part], keys[part])
                    file.write(f"{at + 12}\n")

        children = [
            fork(lambda writer=writer, path=path: work(writer, done[writer], path))  # type: ignore[misc]
            for writer, path in zip(writers, progress, strict=True)
        ]
        time.sleep(rng.uniform(0.02, 0.2))
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        kills += [wait(child) for child in children].count(-signal.SIGKILL)
        for writer, path in zip(writers, progress, strict=True):
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            done[writer] = int(lines[-1]) if lines else done[writer]
        there = np.concatenate([np.arange(1200 * writer, 1200 * writer + done[writer]) for writer in range(3)])
        expect(tmp_path, [ids[i] for i in there.tolist()], stats[there], keys[there])
    memo = record(tmp_path, *files(3700))
    assert kills > 2 and leftovers(tmp_path) == [] and len(list(memo.folder.iterdir())) < 10


def test_the_one_file_of_an_older_featx_is_read_and_becomes_a_segment(tmp_path: Path) -> None:
    ids, stats, keys = files(50)
    memo = KeyMemo(tmp_path, Path("/data"))
    names = "\0".join(ids).encode()
    body = len(ids).to_bytes(8, "little") + stats.astype("<i8").tobytes() + keys.tobytes() + names
    older = memo.folder.with_suffix("")
    older.parent.mkdir()
    older.write_bytes(b"featx memo 1\n" + hashlib.sha256(body).digest() + body)
    expect(tmp_path, ids, stats, keys)
    record(tmp_path, ids[:3], stats[:3] + 1, keys[3:6])
    assert not older.exists() and len(list(memo.folder.iterdir())) == 1
    expect(tmp_path, [*ids[:3], *ids[3:]], np.vstack([stats[:3] + 1, stats[3:]]), np.vstack([keys[3:6], keys[3:]]))
    older.write_bytes(b"featx memo 1\n" + bytes(32) + body)  # damaged
    record(tmp_path, ids, stats, keys)
    assert not older.exists()
    expect(tmp_path, ids, stats, keys)


def test_what_lies_in_a_memo_and_is_no_segment_changes_nothing(tmp_path: Path) -> None:
    ids, stats, keys = files(60)
    memo = record(tmp_path, ids[:30], stats[:30], keys[:30])
    os.mkfifo(memo.folder / "-".join(["f" * 16] * 2))
    (memo.folder / "-".join(["e" * 16] * 2)).symlink_to(tmp_path / "nowhere")
    (memo.folder / "notes.txt").write_text("mine")
    record(tmp_path, ids[30:], stats[30:], keys[30:])
    expect(tmp_path, ids, stats, keys)
    with pytest.raises(StoreError, match=r"memo holds \w{32}\.2/notes\.txt, which featx did not write"):
        caching.remove(tmp_path, "memo")
    (memo.folder / "notes.txt").unlink()
    caching.remove(tmp_path, "memo")
    assert list(tmp_path.iterdir()) == []
    expect(tmp_path, [], stats[:0], keys[:0])


def test_asking_for_few_files_of_a_large_memo_takes_little_memory(tmp_path: Path) -> None:
    ids, stats, keys = files(300_000)
    record(tmp_path, ids, stats, keys)
    tracemalloc.start()
    expect(tmp_path, ids[::100], stats[::100], keys[::100])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6 < 300_000 * 72 / 3


def test_paths_have_the_same_hash_on_every_machine_and_in_every_run(tmp_path: Path) -> None:
    ids = ["", "a", "a/b.jpg", "b/n\u00e9e.jpg", "caf\udce9.jpg", "x" * 5000, *files(20_000)[0]]
    memo = record(tmp_path, ids, np.ones((len(ids), 4), np.int64), np.zeros((len(ids), 32), np.uint8))
    (path,) = memo.folder.iterdir()
    assert path.stat().st_size == 48 + 72 * len(ids)  # all are different
    found = path.read_bytes()[16:-32]
    assert (
        hashlib.sha256(b"".join(found[i : i + 8] for i in range(0, len(found), 72))).hexdigest()[:16]
        == "d41cb764ad52ae1d"
    )


def test_a_merge_of_what_another_process_has_merged_is_dropped(tmp_path: Path) -> None:
    ids, stats, keys = files(300)
    memo = record(tmp_path, ids, stats, keys)
    (segment,) = memo.folder.iterdir()

    def blocks() -> Iterator[np.ndarray]:
        yield from memo_module._blocks(segment)
        segment.rename(tmp_path / "merged elsewhere")

    with pytest.raises(FileNotFoundError):
        memo_module._write(memo.folder, "f" * 16, blocks(), of=[segment])
    assert not list(memo.folder.iterdir())


def test_a_segment_that_cannot_be_read_any_more_fails_no_record(tmp_path: Path) -> None:
    ids, stats, keys = files(300)
    memo = KeyMemo(tmp_path, Path("/data"))
    memo.lookup(ids, stats)
    (memo.folder / ("f" * 16 + "-" + "0" * 16)).mkdir(parents=True)  # an error of the file system, as on NFS
    memo.record(ids, stats, keys, np.ones(300, bool))
    expect(tmp_path, ids, stats, keys)
