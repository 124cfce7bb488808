"""An extraction in a process of its own that stops after some batches, for tests that interrupt it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

# a program that was started in the background ignores Ctrl-C, and so would its children
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import COLOURS, ColourEngine
from featx.extraction.pipeline import sync

class Stopping(ColourEngine):
    left = int(sys.argv[1])
    def __call__(self, images):
        self.left -= 1
        print("batch", flush=True)
        if not self.left:
            time.sleep(3600)
        return super().__call__(images)

data, cache, engine = Path({data!r}), Path({cache!r}), Stopping()
{call}
"""


def program(data: Path, cache: Path, call: str = "sync(data, COLOURS, engine=engine, cache=cache)") -> str:
    """Python that extracts `data` by a backbone without torch and waits, once it was given as many batches as its
    argument says; `call` is how."""
    return PROGRAM.format(tests=str(Path(__file__).parent), data=str(data), cache=str(cache), call=call)


def interrupt(code: str, batches: int) -> None:
    """Run it, send Ctrl-C in the last of so many batches, and test that it ends as an interrupted program does."""
    command = [sys.executable, "-c", code, str(batches)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(batches):
        assert process.stdout.readline() == "batch\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130) and "KeyboardInterrupt" in errors
