"""What is costly and the same for many tests is made once for all test processes of a session."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import featx


def environment(**more: str) -> dict[str, str]:
    """For a process that a test starts: it imports this featx, and the tests' modules."""
    path = os.pathsep.join([str(Path(featx.__file__).parents[1]), str(Path(__file__).parent)])
    return os.environ | {"PYTHONPATH": path} | more


def session_folder() -> Path:
    """The folder that all tests of one run share, in whatever process they are; conftest.py makes and removes it."""
    return Path(os.environ["FEATX_TEST_SESSION"])


def session_cache() -> Path:
    """A `cache` that tests share, so that a backbone is exported once in a session."""
    return session_folder() / "cache"


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The shared folder `name`, filled by `make(folder)` in the process that asks first, while others wait.

    Copy what is in it to change it.
    """
    folder = session_folder() / name
    with open(session_folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an error left
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder
