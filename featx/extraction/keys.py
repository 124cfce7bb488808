"""The content keys of a source's images: what the memo knows, what reading finds, which images are copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featx.cache.index import KEY_BYTES, distinct
from featx.cache.memo import KeyMemo
from featx.cache.writing import Writer
from featx.devices import available_threads
from featx.errors import ImageError, SourceError, StoreError
from featx.extraction.findings import Findings
from featx.features import content_key
from featx.sources.opening import open_source
from featx.sources.source import Source
from featx.threads import ahead


class KeyTable:
    """One content key for each image of a source, as far as it is known. Opening it reads no image."""

    def __init__(self, source: Source, cache: Path, *, recall: bool = True) -> None:
        """recall: look the keys up in the memo; False where it is known to lack them."""
        self.source = source
        self.keys = np.zeros((len(source.ids), KEY_BYTES), np.uint8)
        """`uint8 [N, 32]`; zeros where unknown."""
        self.known = np.zeros(len(source.ids), bool)
        """`bool [N]`."""
        self.errors: dict[int, str] = {}
        """Why an image cannot be used, by its number."""
        self._memo = None
        if source.stats is not None:
            self._memo = KeyMemo(cache, source.root)
            if recall:
                self.keys, self.known = self._memo.lookup(source.ids, source.stats)
            else:
                self._memo.expect_none(source.ids, source.stats)

    def note(self, number: int, key: bytes, error: str = "") -> None:
        """Record what reading an image gave: its key (empty if it could not be read), and why it cannot be used."""
        if key:
            self.keys[number] = np.frombuffer(key, np.uint8)
        self.known[number] = bool(key)
        if error:
            self.errors[number] = error

    def read_missing(self, most_bytes: float = float("inf")) -> None:
        """Read the images whose keys are unknown, in order, until more than `most_bytes` were read."""

        def read(number: int) -> tuple[int, int, bytes, str]:
            try:
                data = self.source.read(number)
            except ImageError as error:
                return number, 0, b"", str(error)
            return number, len(data), content_key(data), ""

        unknown, threads = np.flatnonzero(~self.known).tolist(), available_threads()
        for number, size, key, error in ahead(read, unknown, threads=threads, window=2 * threads, name="featx-keys"):
            self.note(number, key, error)
            most_bytes -= size
            if most_bytes < 0:
                break

    def record(self) -> None:
        """Remember the keys, so that an unchanged file is not read again."""
        if self._memo is not None:
            assert self.source.stats is not None
            self._memo.record(self.source.ids, self.source.stats, self.keys, self.known)

    def stored(self, stores: Sequence[Writer]) -> np.ndarray:
        """`bool [N]`: which images are known to have a row in every store."""
        stored = self.known.copy()
        for store in stores:
            stored &= store.confirm(self.keys)
        return stored

    def first(self) -> np.ndarray:
        """`bool [N]`: the first image of each known key."""
        first = np.zeros(len(self.known), bool)
        first[np.flatnonzero(self.known)[distinct(self.keys[self.known])]] = True
        return first

    def reasons(self, stored: np.ndarray) -> dict[int, str]:
        """Why each image has no features, by its number, in order. stored: `bool [N]`, those that have.

        Raises `StoreError` where rows were stored and have gone.
        """
        by_key = {self.keys[i].tobytes(): why for i, why in self.errors.items()}
        found = {i: self.errors.get(i) or by_key.get(self.keys[i].tobytes()) for i in np.flatnonzero(~stored).tolist()}
        reasons = {i: why for i, why in found.items() if why}
        if gone := len(found) - len(reasons):
            raise StoreError(f"{gone} rows were stored, and are gone or damaged by now; run the same command again")
        return reasons

    def findings(self, stored: np.ndarray) -> Findings:
        """What was found odd. stored, and what is raised: as for `reasons`."""
        numbers = np.flatnonzero(stored)
        return Findings.of(self.source, numbers, self.keys[numbers], self.reasons(stored))


def content_keys(data: str | Path | Source, cache: str | Path, *, whole: bool = False) -> np.ndarray:
    """`uint8 [N, 32]`: the keys of a data set's readable files; only those that changed are read.

    whole: raise `SourceError` where one cannot be read now, rather than leave it out.
    """
    source = open_source(data)
    table = KeyTable(source, Path(cache))
    table.read_missing()
    for number, error in table.errors.items() if whole else ():
        raise SourceError(f"{source.ids[number]} cannot be read now ({error}), so its row would be lost")

    table.record()
    return table.keys[table.known]
