"""How rows are read out of listed shards: memory-mapped where they are one run in one file, else copied by threads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from featx.cache.index import KeyIndex
from featx.cache.shards import Form, Shard
from featx.devices import available_threads
from featx.threads import ahead

# Large reads and hashes are shared out to a few threads, in pieces of this many bytes of rows.
PIECE_BYTES, READERS = 8 << 20, min(4, available_threads())
# Rows that lie no further apart than this are read in one go, with those between them.
NEAR_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The rows of some shards as one table: those of one listing, whatever is listed meanwhile.

    A row's place counts through all shards.
    """

    folder: Path
    form: Form | None
    """None where there are no shards yet."""
    shards: list[Shard]
    index: KeyIndex
    """The keys of all rows, in the same order."""

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each shard's rows start, and the number of all rows: `int64 [S + 1]`."""
        return np.cumsum([0, *(shard.count for shard in self.shards)], dtype=np.int64)

    def plus(self, shards: list[Shard], keys: np.ndarray) -> ShardTable:
        """A table with more shards, behind the others; this one stays as it is."""
        return replace(self, shards=[*self.shards, *shards], index=self.index.plus(keys))

    def read(self, at: np.ndarray, *, mapped: bool = True) -> np.ndarray:
        """The rows at these places, `int64 [M]`: a memory map where they are one run in one file, else a copy.

        Raises `StaleError` where a shard is not the one that was listed.
        """
        if mapped and len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
            number = int(np.searchsorted(self.starts, at[0], "right")) - 1
            if at[-1] < self.starts[number + 1]:
                first = int(at[0] - self.starts[number])
                assert self.form is not None
                return self.shards[number].map(self.folder, self.form)[first : first + len(at)]
        return self._gather(at)

    def _gather(self, at: np.ndarray) -> np.ndarray:
        """A copy of the rows."""
        assert self.form is not None
        out = np.empty((len(at), *self.form.row_shape), self.form.dtype)
        of = np.searchsorted(self.starts, at, "right") - 1
        order = np.argsort(of, kind="stable")  # shard by shard
        edges = np.flatnonzero(np.diff(of[order], prepend=-1, append=len(self.shards)))
        step = max(1, PIECE_BYTES // self.form.row_bytes)
        pieces: list[tuple[Shard, np.ndarray, np.ndarray]] = []
        for a, b in pairwise(edges.tolist()):
            number = int(of[order[a]])
            for start in range(a, b, step):
                to = order[start : min(start + step, b)]
                pieces.append((self.shards[number], at[to] - self.starts[number], to))

        if out.nbytes <= PIECE_BYTES:
            for piece in pieces:
                self._copy(*piece, out)
        else:
            copies = ahead(
                lambda p: self._copy(*p, out), pieces, threads=READERS, window=2 * READERS, name="featx-read"
            )
            for _ in copies:
                pass
        return out

    def _copy(self, shard: Shard, source: np.ndarray, to: np.ndarray, out: np.ndarray) -> None:
        """Put the rows `source` of a shard into the rows `to` of `out`. Files are read, not mapped: a map's pages count
        as memory in use."""
        breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(to) != 1)) + 1
        scattered = len(breaks) > len(source) // 64
        if scattered:
            order = np.argsort(source, kind="stable")
            source, to = source[order], to[order]
            far = np.diff(source) * out[:1].nbytes > NEAR_BYTES
            part = (source - source[0]) * out[:1].nbytes // PIECE_BYTES
            breaks = np.flatnonzero(far | (np.diff(part) != 0)) + 1

        with shard.open(self.folder) as file:
            for a, b in pairwise([0, *breaks.tolist(), len(source)]):
                first, end = int(source[a]), int(source[b - 1]) + 1
                if not scattered:
                    shard.fill(out[int(to[a]) : int(to[a]) + b - a], file, first)
                    continue
                near = np.empty((end - first, *out.shape[1:]), out.dtype)  # with the rows between those asked for
                shard.fill(near, file, first)
                out[to[a:b]] = near[source[a:b] - first]
