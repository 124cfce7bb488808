"""A slow extraction in a process of its own, for tests that interrupt it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from conftest import ColourEngine
from featx import decoder, extraction
from featx.backbones import BackboneInfo
from featx.preprocess import Preprocess

class Slow(ColourEngine):
    def __call__(self, images):
        print("batch", flush=True)
        time.sleep(0.2)
        return super().__call__(images)

extraction.resolve = lambda request, cache: BackboneInfo("custom/tiny", "00" * 32, "features",
    request.override(Preprocess(resize=36, crop=32)), (48,), None, False, 0, "colours")
extraction.open_engine = lambda *a, **k: Slow()
{setup}
extraction.extract({data!r}, "tiny", cache={cache!r}, **{options!r})
"""


def program(data: Path, cache: Path, setup: str = "", **options: Any) -> str:
    """Python that extracts `data` by a backbone without torch, 0.2 s a batch; `setup` goes before."""
    return PROGRAM.format(
        tests=str(Path(__file__).parent), data=str(data), cache=str(cache), setup=setup, options=options
    )


def interrupt(code: str, batches: int) -> None:
    """Run it, send Ctrl-C after so many batches, and hold it to ending as an interrupted program does."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for _ in range(batches):
        assert process.stdout.readline() == "batch\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 130) and "KeyboardInterrupt" in errors
