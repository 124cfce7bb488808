"""One fine-tuning as a process of its own, to be killed or launched twice: FOLDER RUN NAME SETTINGS [EPOCH].

With EPOCH it waits to be killed once it has trained that epoch, before it saves it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from test_finetuning import Bench

from featx.finetuning.checkpoints import Checkpoints, Progress
from featx.finetuning.training import Setup


class Waiting(Checkpoints):
    last = int(sys.argv[5]) if len(sys.argv) > 5 else -1

    def save(self, network: Any, optimizer: Any, progress: Progress, *, best: bool = False) -> None:
        if progress.epoch == self.last:
            time.sleep(3600)
        super().save(network, optimizer, progress, best=best)


def wait(setup: Setup) -> None:
    setup.checkpoints = Waiting(setup.checkpoints.folder, setup.checkpoints.configuration)


if __name__ == "__main__":
    root, folder, name, settings, *epoch = sys.argv[1:]
    torch.set_num_threads(1)
    Bench(Path(root)).tune(name, Path(folder), wait if epoch else None, **json.loads(settings))
