"""What the tests of the cache share: an engine that needs no torch, shards to break, processes to kill."""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featx.cache import shards, writing
from featx.cache.shards import Form
from featx.cache.store import FeatureStore
from featx.cache.writing import Writer
from featx.features import FeatureSpec
from featx.files import stat_row

SPEC = FeatureSpec("torchvision/resnet18", "ab" * 32)
NAME = SPEC.folder_name


def table(count: int, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random keys and rows."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    return keys, rng.standard_normal((count, width)).astype(np.float32)


def tiny_engine(keys: np.ndarray, width: int = 64) -> np.ndarray:
    """`float32 [B, width]`, a function of each key alone, as a backbone's features are."""
    seeds = np.ascontiguousarray(keys[:, :4]).view("<u4").astype(np.float64)
    return np.sin(seeds + np.arange(width)).astype(np.float32)


def extract(store: Writer, keys: np.ndarray, batch: int = 16, done: Callable[[], None] | None = None) -> int:
    """The main path in small: compute what is missing, say after each commit how far it is."""
    todo = keys[~store.contains(keys)]
    computed = 0
    with store:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            store.append(part, tiny_engine(part))
            computed += len(part)
            if done:
                done()
    return computed


def fill(cache: Path, keys: np.ndarray, rows: np.ndarray, batch: int = 32, **settings: Any) -> FeatureStore:
    """A store with these rows committed."""
    store = FeatureStore(cache, SPEC, engine="tiny", **settings)
    with store:
        for start in range(0, len(keys), batch):
            store.append(keys[start : start + batch], rows[start : start + batch])
    return store


def many_shards(
    cache: Path, count: int, each: int, width: int = 2, *, answer: bool = True, spec: FeatureSpec = SPEC
) -> tuple[np.ndarray, np.ndarray]:
    """Lay out shards of so many rows in a moment, as if all were verified: copies of one file with other keys and rows.

    Returns the keys and rows of all, in their order: each key has the shard's number in its last bytes, each row in
    its last column; answer: False for neither. The digests are wrong, as nobody reads them.
    """
    form = Form(spec, "tiny", (width,))
    folder = cache / "features" / spec.folder_name
    shards.create(folder, form)
    keys, rows = table(each, width)
    first = writing.write(folder, form, keys, [rows])
    data = bytearray((folder / first.name).read_bytes())
    (folder / first.name).unlink()
    in_keys = np.frombuffer(data, np.uint8, keys.size, first.keys_at).reshape(keys.shape)
    in_rows = np.frombuffer(data, "<f4", rows.size, first.rows_at).reshape(rows.shape)
    words, verified = in_keys.view("<u8"), {}
    salt = np.random.default_rng(1).integers(0, 2**63, (count, 3), np.uint64)
    for number in range(count):
        words[:, :3] = keys.view("<u8")[:, :3] ^ salt[number]
        words[:, 3], in_rows[:, -1] = number, number
        name = f"{number:016x}-{number:064x}.h5"
        (folder / name).write_bytes(data)
        verified[name] = replace(first, name=name, stat=stat_row(os.stat(folder / name)))
    shards.write_verified(folder, verified)

    if not answer:
        return keys[:0], rows[:0]
    of, every, values = (
        np.arange(count * each) // each,
        np.tile(keys, (count, 1)).view("<u8"),
        np.tile(rows, (count, 1)),
    )
    every[:, :3] ^= salt[of]
    every[:, 3], values[:, -1] = of, of
    return every.view(np.uint8), values


def shard_files(cache: Path, name: str = NAME) -> list[Path]:
    """The shards of the entry, in the order of their commits."""
    folder = cache / "features" / name
    return [folder / shard for shard in shards.list_shards(folder)] if folder.is_dir() else []


def leftovers(cache: Path) -> list[str]:
    """What unfinished writers left aside anywhere in the cache."""
    return [path.name for path in cache.rglob(".~*")]


def flip(path: Path, at: int) -> None:
    """Change one bit of one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child process, which exits with 0 if it returns and with 1 if it raises; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    gc.freeze()  # garbage of other tests may be an onnxruntime session, which waits for threads that are not here
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def make_read_only(monkeypatch: pytest.MonkeyPatch, number: int = errno.EROFS) -> None:
    """Every call that writes fails with this error: root may write to any folder, so take the calls away."""
    opening = os.open

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    def read(path: Any, flags: int, *more: Any, **options: Any) -> int:
        return refuse() if flags & (os.O_WRONLY | os.O_RDWR) else opening(path, flags, *more, **options)  # type: ignore

    monkeypatch.setattr(os, "open", read)
    for name in ("mkdir", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
