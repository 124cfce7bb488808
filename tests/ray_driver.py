"""A driver for tests of clusters: extracts a folder of small images by a backbone without torch, which any process can
open, and prints the report. Arguments: folder, cache, address, and how each image is read.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import COLOURS, ColourEngine

from featx.extraction.job import prepare
from featx.extraction.pipeline import run
from featx.options import complete
from featx.sources.folder import open_folder
from featx.sources.source import Source


@dataclass(frozen=True, eq=False)
class Odd(Source):
    """Images whose reading takes time, is logged in a file, or ends the process."""

    log: Path = Path()
    seconds: float = 0.0
    killer: str = ""

    def read(self, i: int) -> bytes:
        if self.killer and self.ids[i] == self.killer:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        with open(self.log, "a") as log:
            log.write(f"{self.ids[i]}\n")
        return super().read(i)


def main(folder: str, cache: str, address: str, log: str, seconds: str, killer: str = "") -> None:
    listed = open_folder(folder)
    source = Odd(**(vars(listed) | {"log": Path(log), "seconds": float(seconds), "killer": killer}))
    job = prepare(source, COLOURS, complete({"cache": cache}), ColourEngine())
    extraction = run(job, ColourEngine(), "ray", address or None, chunk_bytes=8 * job.row_bytes)
    print(json.dumps(extraction.report.to_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
