"""Owns how rows are read out of listed shards: mapped where they lie in one run, else copied by a few threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from featx.cache import shards
from featx.cache.shards import Form, Shard
from featx.devices import available_threads

# Large reads and hashes are shared out to a few threads, in pieces of this many bytes of rows.
PIECE_BYTES, READERS = 8 << 20, min(4, available_threads())


@contextlib.contextmanager
def readers() -> Iterator[ThreadPoolExecutor]:
    """A few threads; on an error or Ctrl-C what they have not begun is dropped."""
    pool = ThreadPoolExecutor(READERS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Reader:
    """The rows of some shards as one table, in the order listed: of one listing, whatever is listed meanwhile.

    A row's place counts through all shards. maps: what is mapped already, by shard name.
    Raises `StaleError` where a shard is not the one that was listed.
    """

    def __init__(self, folder: Path, form: Form, listed: Iterable[Shard], maps: dict[str, np.ndarray]) -> None:
        self.folder, self.form, self.shards, self.maps = folder, form, list(listed), maps
        counts = [shard.count for shard in self.shards]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def mapped(self, at: np.ndarray) -> np.ndarray:
        """The rows at these places, `int64 [M]`, M > 0: a memory map where they are one run in one file."""
        shard = int(np.searchsorted(self.starts, at[0], "right")) - 1
        one_run = at[-1] < self.starts[shard + 1] and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all()
        if not one_run:
            return self.gather(at)
        first = int(at[0] - self.starts[shard])
        return self._map(self.shards[shard])[first : first + len(at)]

    def gather(self, at: np.ndarray) -> np.ndarray:
        """A copy of the rows at these places: whole runs straight from the file, scattered rows from its map."""
        out = np.empty((len(at), *self.form.row_shape), self.form.dtype)
        of = np.searchsorted(self.starts, at, "right") - 1
        order = None if (of[1:] >= of[:-1]).all() else np.argsort(of, kind="stable")
        ordered = of if order is None else of[order]
        edges = np.flatnonzero(np.diff(ordered, prepend=-1, append=len(self.shards)))
        step = max(1, PIECE_BYTES // self.form.row_bytes)
        pieces: list[tuple[Shard, np.ndarray, np.ndarray]] = []
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            number = int(ordered[a])
            for start in range(a, b, step):
                to = np.arange(start, min(start + step, b)) if order is None else order[start : min(start + step, b)]
                pieces.append((self.shards[number], at[to] - self.starts[number], to))
        if out.nbytes <= PIECE_BYTES:
            for shard, source, to in pieces:
                self._copy(shard, source, to, out)
        else:
            with readers() as pool:
                for done in [pool.submit(self._copy, *piece, out) for piece in pieces]:
                    done.result()
        return out

    def _copy(self, shard: Shard, source: np.ndarray, to: np.ndarray, out: np.ndarray) -> None:
        breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(to) != 1)) + 1
        if len(breaks) > len(source) // 64:
            if to[-1] - to[0] == len(to) - 1:  # ascending, so one run: no second copy
                np.take(self._map(shard), source, axis=0, out=out[to[0] : to[-1] + 1], mode="clip")
            else:
                out[to] = self._map(shard)[source]
            return
        with shard.open(self.folder) as file:
            for a, b in zip([0, *breaks.tolist()], [*breaks.tolist(), len(source)], strict=True):
                target = out[int(to[a]) : int(to[a]) + b - a]
                if target.nbytes:
                    offset = shard.rows_at + int(source[a]) * self.form.row_bytes
                    shards.read_into(file, offset, target.data.cast("B"))

    def _map(self, shard: Shard) -> np.ndarray:
        found = self.maps.get(shard.name)
        if found is None:
            shape = (shard.count, *self.form.row_shape)
            with shard.open(self.folder) as file:
                found = self.maps[shard.name] = np.memmap(file, self.form.dtype, "r", shard.rows_at, shape)
        return found
