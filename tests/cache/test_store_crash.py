"""Killed at any moment, by anything: every committed row is there, and the next run ends with the same rows.

The engine needs no torch; `make soak` runs the last test for long.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storekit import NAME, SPEC, extract, fork, leftovers, shard_files, table, tiny_engine, wait

from featx import files
from featx.cache import caching
from featx.cache.light import LightStore
from featx.cache.store import FeatureStore
from featx.errors import StoreError

KEYS = table(600)[0]
ROWS = tiny_engine(KEYS)
SHARD = 16 * 64 * 4 * 2  # two batches


def open_store(cache: Path, **settings: Any) -> FeatureStore:
    return FeatureStore(cache, SPEC, engine="tiny", **{"shard_bytes": SHARD, **settings})


def open_light(cache: Path) -> LightStore:
    return LightStore(cache, SPEC, engine="tiny", shard_bytes=SHARD)


def expect_rows(cache: Path, acknowledged: int) -> FeatureStore:
    """All that was acknowledged is there, and whatever is there is right."""
    store = FeatureStore(cache, SPEC)
    there = store.contains(KEYS)
    assert there[:acknowledged].all(), f"{acknowledged - there[:acknowledged].sum()} committed rows are lost"
    assert right(store, there)
    return store


def right(store: FeatureStore, there: np.ndarray) -> bool:
    """The rows of these keys, `bool [N]`, are the engine's."""
    return not there.any() or np.array_equal(store.read(KEYS[there]), ROWS[there])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what a process wrote outlives it without fsync, only a machine's end does not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def finish(cache: Path, count: int = len(KEYS)) -> None:
    """The next run computes only what is missing and ends with what an undisturbed run has."""
    missing = int((~FeatureStore(cache, SPEC).contains(KEYS[:count])).sum())
    assert extract(open_store(cache), KEYS[:count]) == missing
    assert np.array_equal(FeatureStore(cache, SPEC).read(KEYS[:count]), ROWS[:count])


def undisturbed(work: Callable[[int], None]) -> float:
    """Seconds that a child takes which nobody kills: the moments of a run on this machine."""
    taken = []
    for number in range(3):
        begin = time.monotonic()
        assert wait(fork(lambda number=number: work(number))) == 0  # type: ignore[misc]
        taken.append(time.monotonic() - begin)
    return min(taken)


def killed_after(seconds: float, sign: int, work: Callable[[], None]) -> int:
    """The exit code of a child that gets a signal after some seconds, unless it has ended."""
    # an interrupt before the child is in `work` would unwind into the test runner's own code
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    child = fork(work)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, sign)
    return wait(child)


def test_twenty_killed_runs_lose_no_committed_row(tmp_path: Path, quick: None) -> None:
    rng = random.Random(0)
    kills = runs = 0
    whole = min(0.12, undisturbed(lambda number: extract(open_store(tmp_path / f"whole {number}"), KEYS)))
    while kills < 20:
        runs += 1
        cache = tmp_path / str(runs)
        progress = tmp_path / f"{runs}.progress"
        progress.touch()
        for attempt in itertools.count():
            before = len(FeatureStore(cache, SPEC))

            def work(cache: Path = cache, progress: Path = progress) -> None:
                store = open_store(cache)
                with progress.open("a", buffering=1) as file:
                    extract(store, KEYS, done=lambda: file.write(f"{len(store)}\n"))

            # longer each time, so that one comes to its end however slow the machine has become
            code = killed_after(rng.uniform(0.0, whole) * 1.1**attempt, signal.SIGKILL, work)
            assert code in (0, -signal.SIGKILL)
            lines = progress.read_text().split("\n")[:-1]
            acknowledged = int(lines[-1]) if lines else 0
            store = expect_rows(cache, acknowledged)  # keys are committed in order
            assert len(store) >= before and store.notes == []
            if code == 0:
                break
            kills += 1
        finish(cache)
        open_store(cache).append(*(part[:1] for part in (table(1, seed=3)[0], ROWS)))  # sweeps
        assert leftovers(cache) == []


def test_an_interrupt_at_any_moment_keeps_every_row_that_was_appended(tmp_path: Path, quick: None) -> None:
    rng = random.Random(1)
    interrupted = missed = 0
    whole = undisturbed(lambda number: extract(open_store(tmp_path / f"whole {number}"), KEYS[:320]))
    while interrupted < 15:
        run = interrupted + missed
        cache, progress = tmp_path / str(run), tmp_path / f"{run}.progress"
        progress.touch()

        def work(cache: Path = cache, progress: Path = progress) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            appended = 0
            try:
                with open_store(cache) as store:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                    for start in range(0, 320, 16):
                        store.append(KEYS[start : start + 16], tiny_engine(KEYS[start : start + 16]))
                        appended += 16
                        progress.write_text(str(appended))
            except KeyboardInterrupt:
                os._exit(7)

        # shorter each time that the child had ended, so that the next ones are met
        code = killed_after(rng.uniform(0.0, whole) * 0.8**missed, signal.SIGINT, work)
        interrupted += code == 7
        missed += code != 7
        text = progress.read_text()
        if code in (0, 7) and text:  # else the signal came at the very end or while a progress was written
            expect_rows(cache, int(text) // 16 * 16)
        finish(cache, 320)
        assert leftovers(cache) == []


class Crash(BaseException):
    """The machine stops."""


class Disk:
    """Stands between featx and the system: stops or fails at one call, and writes down what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1, error: int | None = None) -> None:
        self.calls = 0
        self.log: list[tuple[Any, ...]] = []
        self._at, self._error = at, error
        self._paths: dict[int, str] = {}
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "rename")}
        self._also = {name: getattr(os, name) for name in ("unlink", "mkdir", "rmdir")}
        for name in (*self._real, *self._also):
            monkeypatch.setattr(os, name, lambda *a, name=name, **k: self.call(name, *a, **k))

    def call(self, name: str, *a: Any, **k: Any) -> Any:
        reading = name == "open" and not a[1] & os.O_CREAT
        if not reading:
            if self._at >= 0 and self.calls >= self._at and (self._error is None or self.calls == self._at):
                self.calls += 1
                if self._error is not None:
                    raise OSError(self._error, os.strerror(self._error))
                if name == "write":  # torn
                    self._real["write"](a[0], a[1][: len(a[1]) // 2])
                raise Crash
            self.calls += 1
        result = (self._real | self._also)[name](*a, **k) if name != "fsync" else None  # written down, not waited for
        if name == "open":
            self._paths[result] = os.fspath(a[0])
            if not reading:
                self.log.append(("create", os.fspath(a[0])))
        elif name == "write":
            self.log.append(("write", self._paths[a[0]], bytes(a[1][:result])))
        elif name == "fsync":
            self.log.append(("fsync", self._paths[a[0]]))
        else:
            self.log.append((name, *map(os.fspath, a[:2] if name in ("replace", "rename") else a[:1])))
        return result


def short_run(cache: Path, done: list[int]) -> None:
    store = open_store(cache)
    with store:
        for start in range(0, 96, 16):
            store.append(KEYS[start : start + 16], ROWS[start : start + 16])
            done[0] = len(store)


def test_a_crash_at_any_write_fsync_or_rename_loses_nothing_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        short_run(tmp_path / "whole", [0])
    assert disk.calls > 50 and {entry[0] for entry in disk.log} >= {"write", "fsync", "replace", "rename"}
    for at in range(disk.calls):
        cache, done = tmp_path / str(at), [0]
        with monkeypatch.context() as patch:
            stopped = Disk(patch, at)
            with pytest.raises(Crash):
                short_run(cache, done)
        assert stopped.calls > at
        assert expect_rows(cache, done[0]).notes == []
        finish(cache, 96)
        shutil.rmtree(cache)


@pytest.mark.parametrize("number", [28, 5])  # no space left, input/output error
def test_an_error_at_any_write_fsync_or_rename_is_said_and_the_rows_stay_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        whole = Disk(patch)
        short_run(tmp_path / "whole", [0])
    said = 0
    for at in range(0, whole.calls):
        cache, store = tmp_path / f"{number}-{at}", None
        with monkeypatch.context() as patch:
            disk = Disk(patch, at, number)
            store = open_store(cache)
            for start in range(0, 96, 16):
                part = KEYS[start : start + 16], ROWS[start : start + 16]
                try:
                    store.append(*part)
                except StoreError as error:
                    assert "cannot write to the cache" in str(error) and "make room" in str(error)
                    said += 1
                    store.append(*part)  # rows that were taken in before the error are stored once
            store.commit()
        assert disk.calls > at
        assert np.array_equal(FeatureStore(cache, SPEC).read(KEYS[:96]), ROWS[:96])
        shutil.rmtree(cache)
    assert said > whole.calls // 2


def test_a_power_cut_at_any_moment_loses_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not fsynced survives in part, torn or not at all: files and names alike."""
    cache = tmp_path / "cache"
    marks: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        with open_store(cache) as store:
            for start in range(0, 96, 16):
                store.append(KEYS[start : start + 16], ROWS[start : start + 16])
                marks.append((len(disk.log), len(store)))
    rng = random.Random(2)
    states = 0
    for point in range(len(disk.log) + 1):
        acknowledged = max([rows for at, rows in marks if at <= point], default=0)
        for _ in range(3):
            after = tmp_path / "after"
            shutil.rmtree(after, ignore_errors=True)
            replay(disk.log[:point], cache, after, rng)
            store = expect_rows(after, acknowledged)
            states += 1
        finish(after, 96)
    assert states > 150


def replay(log: list[tuple[Any, ...]], cache: Path, after: Path, rng: random.Random) -> None:
    """The disk after a power cut behind `log`: names since a folder's last fsync may be old or new."""
    content: dict[int, bytes] = {}  # by inode, as in the page cache
    durable: dict[int, int] = {}  # bytes that were fsynced
    names: dict[str, int | None] = {}  # None: a folder
    kept: dict[str, int | None] = {}
    pending: list[tuple[str, ...]] = []

    def apply(table: dict[str, int | None], entry: tuple[Any, ...]) -> None:
        if entry[0] == "create":
            table[entry[1]] = entry[2]
        elif entry[0] == "mkdir":
            table[entry[1]] = None
        elif entry[0] in ("unlink", "rmdir"):
            table.pop(entry[1], None)
        else:
            for name in [n for n in table if n == entry[1] or n.startswith(entry[1] + "/")]:
                table[entry[2] + name[len(entry[1]) :]] = table.pop(name)

    for entry in log:
        if entry[0] == "create":
            entry = (*entry, len(content))
            content[entry[2]] = b""
        if entry[0] == "write":
            content[names[entry[1]]] += entry[2]  # type: ignore[index]
        elif entry[0] == "fsync" and names.get(entry[1]) is not None:
            durable[names[entry[1]]] = len(content[names[entry[1]]])  # type: ignore[index]
        elif entry[0] == "fsync":
            mine = [e for e in pending if any(os.path.dirname(p) == entry[1] for p in map(str, e[1:]))]
            for e in mine:
                apply(kept, e)
            pending = [e for e in pending if e not in mine]
        else:
            apply(names, entry)
            pending.append(entry)
    for entry in pending[: rng.randrange(len(pending) + 1)]:  # a journal keeps the order of names
        apply(kept, entry)
    after.mkdir()
    for name, inode in sorted(kept.items(), key=lambda item: item[0]):
        path = after / Path(name).relative_to(cache) if Path(name).is_relative_to(cache) else None
        above = [str(p) for p in Path(name).parents if p.is_relative_to(cache)]
        if path is None or any(folder not in kept for folder in above):
            continue  # a folder above it did not reach the disk under this name
        if inode is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        sure, data = durable.get(inode, 0), content[inode]
        tail = bytearray(data[sure : rng.randint(sure, len(data))])
        if tail and rng.random() < 0.5:  # the size came to the disk, some of the bytes did not
            tail[: rng.randint(0, len(tail))] = bytes(rng.randint(0, len(tail)))
        path.write_bytes(data[:sure] + bytes(tail))


def test_a_full_disk_at_any_size_keeps_what_was_committed(tmp_path: Path, quick: None) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    store = open_store(tmp_path / "whole")
    extract(store, KEYS[:32])
    whole = shard_files(tmp_path / "whole")[0].stat().st_size
    refused = 0
    for limit in [*range(0, whole, 331), whole - 1, whole]:
        cache = tmp_path / str(limit)
        with open_store(cache) as store:
            store.append(KEYS[:32], ROWS[:32])
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                with contextlib.suppress(StoreError):
                    store.append(KEYS[32:64], ROWS[32:64])
                    assert limit == whole
                    refused -= 1
                refused += 1
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert leftovers(cache) == []
            expect_rows(cache, 32)
        expect_rows(cache, 64)  # leaving the store, with room again, commits what was refused
        fresh = tmp_path / f"{limit}-fresh"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with contextlib.suppress(StoreError):
                open_store(fresh).append(KEYS[:32], ROWS[:32])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        finish(fresh, 96)
    assert refused > 30


def test_a_process_that_meets_a_full_disk_ends_in_peace(tmp_path: Path) -> None:
    def work() -> None:
        with contextlib.suppress(StoreError), open_store(tmp_path) as store:
            store.append(KEYS[:32], ROWS[:32])
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
            store.append(KEYS[32:64], ROWS[32:64])
        assert len(store) == 32

    assert wait(fork(work)) == 0
    assert len(expect_rows(tmp_path, 32)) == 32


@pytest.mark.parametrize("count", [2, 4])
def test_several_writers_at_once_end_with_the_same_rows(tmp_path: Path, quick: None, count: int) -> None:
    rng = np.random.default_rng(count)
    for attempt in range(4):
        cache = tmp_path / str(attempt)
        orders = [rng.permutation(len(KEYS)) for _ in range(count)]
        start = time.time() + 0.05

        def work(order: np.ndarray, cache: Path = cache, start: float = start) -> None:
            time.sleep(max(0.0, start - time.time()))
            store = (open_store, open_light)[int(order[0] % 2)](cache)
            extract(store, KEYS[order])
            assert store.contains(KEYS).all() and (isinstance(store, LightStore) or right(store, KEYS[:, 0] >= 0))

        codes = [wait(child) for child in [fork(lambda order=order: work(order)) for order in orders]]
        assert codes == [0] * count
        store = expect_rows(cache, len(KEYS))
        assert store.notes == [] and leftovers(cache) == [] and len(store) == len(KEYS)
        assert caching.compact(cache, NAME).rows_after == len(KEYS)
        finish(cache)


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_an_entry_that_another_process_removes_during_a_run_is_said_and_what_was_buffered_is_kept(
    tmp_path: Path, at: int
) -> None:
    appended, removed = [0], []

    def remove_once() -> None:
        appended[0] += 16
        if appended[0] == 16 * at:
            removed.extend(FeatureStore(tmp_path, SPEC).keys()[:, 0].tolist())
            assert wait(fork(lambda: caching.remove(tmp_path, NAME) and None)) == 0

    with pytest.raises(StoreError, match=r"it was removed meanwhile; run the same command again"):
        extract(open_store(tmp_path), KEYS[:96], done=remove_once)
    committed, taken_in = 32 * (at // 2), min(16 * (at + 1), 96) if at % 2 else min(16 * (at + 2), 96)
    assert len(removed) == committed  # two batches a shard
    store = FeatureStore(tmp_path, SPEC)
    assert store.contains(KEYS[:96]).nonzero()[0].tolist() == list(range(committed, taken_in))
    assert right(store, store.contains(KEYS))
    finish(tmp_path, 96)
    assert leftovers(tmp_path) == []


def test_a_process_that_removes_the_entry_again_and_again_leaves_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()

    def remove() -> None:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            with contextlib.suppress(StoreError):
                caching.remove(tmp_path, NAME)

    child, seen = fork(remove), set()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            extract(open_store(tmp_path), KEYS[:96])
            FeatureStore(tmp_path, SPEC).read(KEYS[:96])
        except StoreError as error:
            seen.add(
                next(
                    (end for end in ("removed meanwhile", "extract them first", "faster") if end in str(error)),
                    str(error),
                )
            )
    assert wait(child) == 0
    assert "removed meanwhile" in seen and seen <= {"removed meanwhile", "extract them first", "faster"}
    finish(tmp_path, 96)


def test_of_two_engines_at_once_one_is_recorded_and_the_other_told(tmp_path: Path) -> None:
    for attempt in range(10):
        cache, start = tmp_path / str(attempt), time.time() + 0.02

        def work(engine: str, cache: Path = cache, start: float = start) -> None:
            try:  # told on opening, where the other was early, or at the first append
                store = FeatureStore(cache, SPEC, engine=engine)
                time.sleep(max(0.0, start - time.time()))
                with store:
                    store.append(KEYS[:32], ROWS[:32])
            except StoreError as error:
                os._exit(7 if f"not {engine!r}" in str(error) else 1)

        codes = [wait(child) for child in [fork(lambda name=name: work(name)) for name in ("one", "two")]]
        assert sorted(codes) == [0, 7]
        store = expect_rows(cache, 32)
        assert store.engine == ("one", "two")[codes.index(0)] and store.notes == [] and not leftovers(cache)


def test_compacting_while_others_write_and_read_loses_nothing(tmp_path: Path, quick: None) -> None:
    def write(half: int) -> None:
        extract((open_store, open_light)[half](tmp_path), KEYS[half::2])

    def compact() -> None:
        for _ in range(8):
            with contextlib.suppress(StoreError):  # nothing there yet
                caching.compact(tmp_path, NAME)

    children = [fork(lambda: write(0)), fork(lambda: write(1)), fork(compact), fork(compact)]
    seen = 0
    while seen < len(KEYS):
        store = FeatureStore(tmp_path, SPEC)
        there = store.contains(KEYS)
        assert there.sum() >= seen
        seen = int(there.sum())
        assert right(store, there)
    assert [wait(child) for child in children] == [0] * 4
    assert expect_rows(tmp_path, len(KEYS)).notes == []


def test_killed_compacts_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(open_store(tmp_path / "cache"), KEYS[:96])
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        caching.compact(shutil.copytree(tmp_path / "cache", tmp_path / "whole"), NAME)
    assert disk.calls > 15
    for at in range(disk.calls):
        cache = shutil.copytree(tmp_path / "cache", tmp_path / str(at))
        with monkeypatch.context() as patch:
            Disk(patch, at)
            with contextlib.suppress(Crash):
                caching.compact(cache, NAME)
        expect_rows(cache, 96)
        assert caching.compact(cache, NAME).rows_after == 96 == len(FeatureStore(cache, SPEC).stored())


def test_leftovers_of_dead_writers_are_swept_and_those_of_live_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(open_store(tmp_path), KEYS[:32])
    folder = tmp_path / "features" / NAME
    names: dict[str, bool] = {}

    def leave(name: str, swept: bool, age: float = 0.0) -> None:
        names[name] = swept
        (folder / name).write_bytes(b"half a shard")
        os.utime(folder / name, (time.time() - age,) * 2)

    mine = files.aside_name().split("~")
    leave(files.aside_name(), False, age=10 * 86400)
    dead = fork(lambda: (tmp_path / "name").write_text(files.aside_name()) and None)
    wait(dead)
    leave((tmp_path / "name").read_text(), True)
    leave("~".join([*mine[:3], "1", "ab.tmp"]), True)  # our number, another start: the number was used again
    leave("~".join([mine[0], "elsewhere-12345678", *mine[2:]]), False)
    leave("~".join([mine[0], "elsewhere-12345678", mine[2], mine[3], "old.tmp"]), True, age=2 * 86400)
    leave("notes.tmp", False, age=9 * 86400)
    extract(open_store(tmp_path), KEYS[32:64])
    assert {name: not (folder / name).exists() for name in names} == names
    assert len(names) == 6


@pytest.mark.soak
def test_soak(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """For `FEATX_SOAK_SECONDS` (600): writers killed at random, compacts, full disks, flipped bytes."""
    if "soak" not in request.config.option.markexpr:
        pytest.skip("long; run by `make soak`")
    seed = int(os.environ.get("FEATX_SOAK_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}")
    rng = random.Random(seed)
    until = time.time() + float(os.environ.get("FEATX_SOAK_SECONDS", "600"))
    rounds = kills = flips = 0
    cache = tmp_path / "cache"
    while time.time() < until:
        rounds += 1

        def write(order: list[int], limit: int) -> None:
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with contextlib.suppress(StoreError):
                extract(open_store(cache, shard_bytes=rng.choice([1, 3, 10]) * SHARD), KEYS[order])

        def compact() -> None:
            with contextlib.suppress(StoreError):
                caching.compact(cache, NAME)

        children = []
        for _ in range(rng.randint(1, 4)):
            order = rng.sample(range(len(KEYS)), len(KEYS))
            limit = rng.choice([0, 0, 0, rng.randint(1, 3 * SHARD)])
            children.append(fork(lambda order=order, limit=limit: write(order, limit)))
        children += [fork(compact)] if rng.random() < 0.3 else []
        time.sleep(rng.uniform(0, 0.3))
        for child in children:
            if rng.random() < 0.7:
                os.kill(child, signal.SIGKILL)
                kills += 1
        assert {wait(child) for child in children} <= {0, -signal.SIGKILL}
        store = FeatureStore(cache, SPEC)
        there = store.contains(KEYS)
        assert store.notes == []
        assert right(store, there)
        listed = shard_files(cache)
        if listed and rng.random() < 0.3:
            broken = rng.choice(listed)
            with broken.open("r+b") as file:
                file.seek(rng.randrange(broken.stat().st_size))
                byte = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte[0] ^ 1 << rng.randrange(8)]))
            flips += 1
            store = FeatureStore(cache, SPEC)
            assert len(store.notes) == 1 and broken.name in store.notes[0]
            left = store.contains(KEYS)
            assert right(store, left)
        if there.all() or rng.random() < 0.1:
            finish(cache)
            shutil.rmtree(cache)
    print(f"{rounds} rounds, {kills} kills, {flips} flipped bits")
    assert rounds
