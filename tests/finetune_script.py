"""One fine-tuning as a process of its own, to be killed or launched twice: FOLDER RUN NAME SETTINGS [EPOCH].

With EPOCH it waits to be killed when it has trained that epoch and not kept it yet.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from test_finetuning import Bench

from featx.finetuning import training


def wait_at(last: int) -> None:
    keep = training.keep

    def kept(setup: Any, progress: Any, epoch: int) -> None:
        if epoch == last:
            time.sleep(3600)
        keep(setup, progress, epoch)

    training.keep = kept


if __name__ == "__main__":
    root, folder, name, settings, *epoch = sys.argv[1:]
    if epoch:
        wait_at(int(epoch[0]))
    torch.set_num_threads(1)
    bench = Bench(Path(root))
    bench.tune(name, Path(folder), **json.loads(settings))
