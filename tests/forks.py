"""Work in the child of a fork, where threads and locks of the parent are gone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable


def run_in_a_fork(child: Callable[[], None]) -> None:
    """Run `child` in a forked process, and test that it ends within a minute and raises nothing."""
    forked = multiprocessing.get_context("fork").Process(target=child)
    forked.start()
    forked.join(60)
    alive = forked.is_alive()
    forked.kill()
    assert not alive and forked.exitcode == 0
