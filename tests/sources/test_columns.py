"""Columns of texts: they behave as the lists they are made of, and take a few bytes a text."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from featx.errors import SourceError
from featx.sources.columns import AT_ONCE, Column, Names, Texts
from featx.sources.source import Source

ODD = ["cat/1.jpg", "", "zoë/ü.jpg", "caf\udce9.jpg", "two\nlines.jpg", "cat/1.jpg", "\U0001f41d"]
LISTS = {
    "none": [],
    "one": ["a"],
    "one empty": [""],
    "odd": ODD,
    "with zeros": ["a\0b", "c", "\0", ""],
    "many": [f"{i % 7}/{i}" for i in range(2 * AT_ONCE + 3)],
}


@pytest.mark.parametrize("kind", [Texts, Names])
@pytest.mark.parametrize("texts", LISTS.values(), ids=LISTS)
def test_a_column_is_the_list_it_was_made_of(kind: type[Texts | Names], texts: list[str]) -> None:
    column = kind.of(texts)
    assert len(column) == len(texts) and list(column) == texts
    assert column == texts and texts == column and column == tuple(texts) and column == kind.of(list(texts))
    assert Texts.of(texts) == Names.of(texts)
    assert column != [*texts, "more"] and column != [*texts[:-1], "other"] and column != "text"
    assert [column[i] for i in range(-len(texts), len(texts))] == texts + texts
    for part in (slice(1, 3), slice(None, -1), slice(None, None, -2), slice(5, 2)):
        assert isinstance(column[part], kind) and column[part] == texts[part]
    assert all(text in column for text in texts[:3]) and "absent" not in column
    again = pickle.loads(pickle.dumps(column))
    assert type(again) is kind and again == texts
    assert kind.of(column) is column
    for outside in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            column[outside]


@pytest.mark.parametrize("kind", [Texts, Names])
@pytest.mark.parametrize("numbers", [[], [3], [2, 3, 4], [6, 0, 0, -1, 3], [-7, -6]], ids=str)
def test_taking_from_a_column_gives_a_column(kind: type[Texts | Names], numbers: list[int]) -> None:
    taken = kind.of(ODD).take(np.array(numbers, np.int64))
    assert isinstance(taken, kind) and taken == [ODD[i] for i in numbers]
    assert list(taken.take(np.arange(len(numbers))[::-1])) == [ODD[i] for i in reversed(numbers)]
    with pytest.raises(IndexError):
        kind.of(ODD).take(np.array([7]))


def test_a_column_is_shown_as_a_list_up_to_its_tenth_text() -> None:
    assert repr(Texts.of(ODD)) == repr(ODD) and repr(Names.of([])) == "[]"
    assert repr(Texts.of("abcdefghijklmno")) == f"{list('abcdefghij')} and 5 more"


def test_columns_take_a_few_bytes_a_text_also_when_they_travel() -> None:
    texts = [f"class-{i % 1000:04d}/image-{i:07d}.jpg" for i in range(100_000)]
    ids, labels = Texts.of(texts), Names.of([text[:10] for text in texts])
    assert len(ids.data) + ids.begins.nbytes <= sum(map(len, texts)) + 5 * len(texts) + 4
    assert labels.codes.nbytes == 4 * len(texts) and len(labels.names) == 1000
    assert len(pickle.dumps(ids)) < len(ids.data) + ids.begins.nbytes + 1000
    assert len(pickle.dumps(ids.take(np.arange(50_000, 50_100)))) < 5000  # a part takes nothing else along


def test_packed_texts_are_found_where_a_block_ends() -> None:
    texts = ["x" * (1 << 16), "y", "", "z" * (1 << 17)]  # bytes are looked through 65,536 at a time
    column = Texts.packed("\0".join(texts).encode(), 4)
    assert column == texts and column.begins.dtype == np.uint32


def test_only_texts_are_names() -> None:
    with pytest.raises(SourceError, match=r"names are texts; .*expected str instance, PosixPath found"):
        Source("", Path(), ["a.jpg", Path("b.jpg")])  # type: ignore[list-item]


def test_a_source_packs_what_it_is_given_and_stays_packed() -> None:
    source = Source(
        "", Path(), ("b", "a", "c"), ["x", "y", ""], ["train", "", "val"], np.arange(12).reshape(3, 4), ["t.txt"],
        starts=np.array([0, 2]),
    )  # fmt: skip
    assert (source.ids, source.labels, source.splits) == (["b", "a", "c"], ["x", "y", ""], ["train", "", "val"])
    taken = source.take(np.array([2, 0]))
    for each in (source, taken, pickle.loads(pickle.dumps(taken))):
        assert isinstance(each.ids, Texts) and isinstance(each.labels, Names) and isinstance(each.splits, Names)
        assert isinstance(each.ignored, Column) and each.ignored == ["t.txt"]
    assert (taken.ids, taken.labels, taken.splits) == (["c", "b"], ["", "x"], ["val", "train"])
    assert taken.stats is not None and taken.stats[:, 0].tolist() == [8, 0]
    assert taken.starts is None and source.starts is not None
    bare = Source("", Path(), ["a", "b"]).take(np.array([1]))
    assert (bare.ids, bare.labels, bare.splits, bare.stats) == (["b"], None, None, None)


def test_a_digest_says_whether_two_listings_are_the_same() -> None:
    ids = ["a", "b", "zoë"]
    begins = np.array([0, 2, 4, 9], "<u4").tobytes()
    expected = hashlib.sha256(begins + "a\0b\0zoë".encode()).hexdigest()
    assert Source("", Path(), ids).digest == Source("else", Path("x"), Names.of(ids), ["x"] * 3).digest == expected
    others = [["b", "a", "zoë"], ids[:2], [*ids, ""], ["a\0b", "zoë"], ["a", "b\0zoë"], []]
    assert len({Source("", Path(), each).digest for each in [ids, *others]}) == 7
