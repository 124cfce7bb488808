"""Columns of texts at a few bytes each: a list of a million names takes 57 MB beside the names themselves."""

from __future__ import annotations

import hashlib
import operator
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np

from featx.errors import SourceError

AT_ONCE = 1 << 12  # texts that are Python objects at a time
SHOWN = 10  # texts in a `repr`


class Column(Sequence[str]):
    """An immutable sequence of texts, equal to any sequence of the same texts; a slice is a column, too."""

    __slots__ = ()

    @abstractmethod
    def take(self, numbers: np.ndarray) -> Self:
        """The texts with these numbers, `int [M]`, negative ones counted from the end. Raises `IndexError`."""

    @abstractmethod
    def _text(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Self: ...
    def __getitem__(self, i: int | slice) -> str | Self:
        if isinstance(i, slice):
            return self.take(np.arange(*i.indices(len(self))))
        return self._text(range(len(self))[i])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        more = f" and {len(self) - SHOWN:,} more" if len(self) > SHOWN else ""
        return f"{list(self[:SHOWN])}{more}"


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Texts(Column):
    """Many different texts: one `bytes` object, and where each of them begins in it."""

    data: bytes
    """All texts in UTF-8 (lone surrogates pass), with a NUL between each two."""
    begins: np.ndarray
    """`uint32 | int64 [N + 1]`, ascending: text i is `data[begins[i] : begins[i + 1] - 1]`."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Pack texts. Raises `SourceError` for anything that is not a text."""
        if isinstance(texts, Texts):
            return texts
        texts = texts if isinstance(texts, list | tuple) else list(texts)
        try:
            data = _encoded("\0".join(texts))
        except TypeError as error:
            raise SourceError(f"names are texts; {error}") from None
        if data.count(b"\0") == len(texts) - 1:
            return cls.packed(data, len(texts))
        ends = np.cumsum([0, *(len(_encoded(text)) + 1 for text in texts)])  # none, or a text that holds a NUL itself
        return cls(data, ends.astype(_offsets(data)))

    @classmethod
    def packed(cls, data: bytes, count: int) -> Texts:
        """So many texts, none of which holds a NUL, encoded and joined by NUL."""
        begins, at, step = np.zeros(count + 1, _offsets(data)), 1, 1 << 16
        for start in range(0, len(data), step):
            zeros = np.flatnonzero(np.frombuffer(data, np.uint8, min(step, len(data) - start), start) == 0)
            begins[at : at + len(zeros)] = zeros + (start + 1)
            at += len(zeros)
        if count:
            begins[-1] = len(data) + 1
        return cls(data, begins)

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            stop = min(start + AT_ONCE, len(self))
            texts = _decoded(self.data[self.begins[start] : self.begins[stop] - 1]).split("\0")
            yield from texts if len(texts) == stop - start else map(self._text, range(start, stop))

    def take(self, numbers: np.ndarray) -> Texts:
        numbers = np.asarray(numbers, np.int64)
        first = self.begins[:-1][numbers]
        after = self.begins[1:][numbers]
        lengths = (after - first).astype(np.int64)
        if len(numbers) and (first[1:] == after[:-1]).all():  # neighbours
            data = self.data[first[0] : after[-1] - 1]
        else:
            blocks = (slice(i, i + AT_ONCE) for i in range(0, len(numbers), AT_ONCE))
            places = (map(slice, first[block].tolist(), (after[block] - 1).tolist()) for block in blocks)
            data = b"\0".join(b"\0".join(map(self.data.__getitem__, each)) for each in places)
        return Texts(data, np.concatenate([[0], np.cumsum(lengths)]).astype(_offsets(data)))

    def digest(self) -> str:
        """SHA-256, in hex, of the texts in their order."""
        digest = hashlib.sha256(self.begins.data)
        digest.update(self.data)
        return digest.hexdigest()

    def _text(self, i: int) -> str:
        return _decoded(self.data[self.begins[i] : self.begins[i + 1] - 1])


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Names(Column):
    """Few different texts, such as labels: each of them once, and a number for every place."""

    names: tuple[str, ...]
    codes: np.ndarray
    """`int32 [N]`, numbers in `names`."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        """Pack texts."""
        if isinstance(texts, Names):
            return texts
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int32)
        return cls(tuple(numbers), codes)

    @classmethod
    def repeated(cls, texts: Sequence[str], counts: Sequence[int]) -> Names:
        """Each text so many times."""
        each = cls.of(texts)
        return cls(each.names, np.repeat(each.codes, counts))

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from map(self.names.__getitem__, self.codes[start : start + AT_ONCE].tolist())

    def take(self, numbers: np.ndarray) -> Names:
        return Names(self.names, self.codes[np.asarray(numbers, np.int64)])

    def _text(self, i: int) -> str:
        return self.names[int(self.codes[i])]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _offsets(data: bytes) -> type[np.uint32] | type[np.int64]:
    return np.uint32 if len(data) < 2**32 - 1 else np.int64
