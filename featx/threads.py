"""Work done ahead of its reader on threads, in order, with a bound on how far ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, window: int, name: str
) -> Generator[Result]:
    """Yield `function(item)` for every item, in order, at most `window` items ahead of the reader.

    Threads, not processes: Pillow and hashlib release the interpreter's lock where the time goes. Closing the
    generator ends the threads; what `function` raises is raised where its result would be yielded.
    """
    waiting: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()

        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
