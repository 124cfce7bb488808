"""`Findings`: the images of a data set that an extraction found odd, one by one; its report names the first of them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import FeatxError
from featx.features import short_keys
from featx.files import make_folder, open_plain, write_chunks
from featx.sources.columns import Names
from featx.sources.source import Source
from featx.text import encodable, printable

FIRST = b'{"what": "'  # what a file of findings begins with
LINES = 1 << 12  # that are text at a time


@dataclass(frozen=True, eq=False)
class Findings:
    """Skipped images, ignored files, copies, and copies with several labels. Iterating gives a dict for each."""

    source: Source
    errors: dict[int, str]
    """Why each image without features has none, by its number."""
    copies: np.ndarray
    """`int64 [M]`: the images with the same bytes as another one, a group after the other, each in ascending order."""
    begins: np.ndarray
    """`int64 [G + 1]`: where each group begins in `copies`, and their number."""
    conflicts: np.ndarray
    """`int64`: the groups whose images have several labels."""

    @classmethod
    def of(cls, source: Source, numbers: np.ndarray, keys: np.ndarray, errors: dict[int, str]) -> Findings:
        """numbers: `int64 [N]`, the images that have features; keys: `uint8 [N, 32]`, theirs."""
        short = short_keys(keys)
        order = np.argsort(short, kind="stable")
        same, again = short[order][1:] == short[order][:-1], np.zeros(len(order), bool)
        again[1:] = same
        again[:-1] |= same
        maybe = np.sort(order[again])

        whole = np.ascontiguousarray(keys[maybe]).view("V32").ravel()  # equal first bytes: compare whole keys
        _, first, inverse, counts = np.unique(whole, return_index=True, return_inverse=True, return_counts=True)
        several = np.flatnonzero(counts[inverse] > 1)
        several = several[np.argsort(first[inverse[several]], kind="stable")]
        begins = np.append(np.flatnonzero(np.diff(first[inverse[several]], prepend=-1)), len(several))
        copies = numbers[maybe[several]]

        conflicts = begins[:0]
        if source.labels is not None and len(copies):
            labels = Names.of(source.labels).codes[copies]
            least, most = (extreme.reduceat(labels, begins[:-1]) for extreme in (np.minimum, np.maximum))
            conflicts = np.flatnonzero(least != most)
        return cls(source, errors, copies, begins, conflicts)

    def group(self, number: int) -> np.ndarray:
        """The images of one group, `int64`."""
        return self.copies[self.begins[number] : self.begins[number + 1]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        ids, labels = self.source.ids, self.source.labels or ()
        for i, reason in self.errors.items():
            yield {"what": "skipped", "id": ids[i], "reason": reason}
        for name in self.source.ignored:
            yield {"what": "ignored", "file": name}
        for number in range(len(self.begins) - 1):
            first, *others = self.group(number).tolist()
            for i in others:
                yield {"what": "duplicate", "id": ids[i], "of": ids[first]}
        for number in self.conflicts.tolist():
            first, *_ = same = self.group(number).tolist()
            for i in same:
                yield {"what": "conflict", "id": ids[i], "label": labels[i], "of": ids[first]}

    def write(self, path: str | Path) -> Path:
        """Write them as JSON lines, and return the path. Raises `FeatxError`, as `check_findings`."""
        path = check_findings(path)
        lines = (encodable(json.dumps(found, ensure_ascii=False)) + "\n" for found in self)
        chunks = iter(lambda: "".join(islice(lines, LINES)).encode(), b"")
        try:
            make_folder(path.parent)
            return write_chunks(path.parent, chunks, lambda: path.name)
        except OSError as error:
            raise FeatxError(f"{printable(str(path))} cannot be written ({error.strerror or error})") from error


def check_findings(path: str | Path) -> Path:
    """The path, where findings may be written: nothing is there, or older findings.

    Raises `FeatxError`, before any extraction, for any other file.
    """
    path, known = Path(path), not os.path.lexists(path)
    with contextlib.suppress(OSError), open_plain(path, follow=False) as file:
        known = file.read(len(FIRST)) in (FIRST, b"")
    if not known:
        raise FeatxError(f"{printable(str(path))} holds no findings of featx, so it stays; give another file")
    return path
