"""Work ahead of its reader: the order of results, the bound on how far ahead, errors, and an early end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest

from featx.threads import ahead

SECONDS = 20  # a wait that long means that the test has failed
NAME = "featx-test-ahead"


def running() -> list[str]:
    """The threads of `ahead` that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def numbers(count: int, read: list[int]) -> Iterator[int]:
    """0, 1, ...; notes in `read` what was asked for."""
    for number in range(count):
        read.append(number)
        yield number


def waits(event: threading.Event) -> None:
    assert event.wait(SECONDS)


def test_results_keep_the_order_of_their_items() -> None:
    done = [threading.Event() for _ in range(4)]

    def work(number: int) -> int:
        if number % 2 == 0:  # the first of each pair ends after the second
            waits(done[number + 1])
        done[number].set()
        return 10 * number

    assert list(ahead(work, range(4), threads=2, window=2, name=NAME)) == [0, 10, 20, 30]
    assert list(ahead(work, [], threads=2, window=2, name=NAME)) == []


def test_fewer_items_than_the_window_are_all_given() -> None:
    assert list(ahead(str, range(3), threads=2, window=10, name=NAME)) == ["0", "1", "2"]


@pytest.mark.parametrize("window", [1, 3])
def test_no_more_items_than_the_window_are_in_flight(window: int) -> None:
    lock, begun, full = threading.Lock(), [0], threading.Event()
    seen: list[int] = []

    def work(number: int) -> int:
        with lock:
            begun[0] += 1
            if begun[0] >= window:
                full.set()
        waits(full)  # so that the first result comes only once the window is full
        return number

    for given in ahead(work, range(12), threads=8, window=window, name=NAME):
        with lock:
            seen.append(begun[0] - given)  # begun and not given yet, this one included

    assert seen[0] == window and max(seen) <= window


def test_inputs_are_read_no_further_than_the_window() -> None:
    read: list[int] = []
    results = ahead(abs, numbers(100, read), threads=2, window=3, name=NAME)
    assert read == []

    for given in range(5):
        assert next(results) == given
        assert read == list(range(given + 3))
    results.close()
    assert read == list(range(7))


def test_an_error_is_raised_where_its_result_would_be_given() -> None:
    failed = threading.Event()

    def work(number: int) -> int:
        if number == 2:
            failed.set()
            raise ValueError("item 2")
        return number

    results = ahead(work, range(6), threads=3, window=4, name=NAME)
    first = next(results)
    waits(failed)
    assert [first, next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert list(results) == [] and running() == []


def test_an_error_of_the_inputs_ends_the_threads() -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise OSError("no more inputs")

    with pytest.raises(OSError, match="no more inputs"):
        list(ahead(abs, broken(), threads=2, window=4, name=NAME))
    assert running() == []


class Item:
    def __init__(self, number: int) -> None:
        self.number = number


def test_closing_drops_what_waits_and_joins_the_threads() -> None:
    started, dropped, worked = threading.Event(), threading.Event(), list[int]()

    def items() -> Iterator[Item]:
        for number in range(50):
            item = Item(number)
            if number == 8:  # of 0 to 9, the last but one in the window: the last is then out of the queue, too
                weakref.finalize(item, dropped.set)
            yield item
            del item

    def work(item: Item) -> int:
        if item.number == 1:
            started.set()
            waits(dropped)
        worked.append(item.number)
        return item.number

    results = ahead(work, items(), threads=1, window=10, name=NAME)
    assert next(results) == 0
    waits(started)
    results.close()
    assert worked == [0, 1] and running() == []


def test_nothing_starts_before_the_first_result_is_asked_for() -> None:
    worked: list[int] = []
    ahead(worked.append, range(3), threads=1, window=2, name=NAME).close()
    assert worked == [] and running() == []
