"""One fine-tuning as a process of its own, to be killed or launched twice: FOLDER RUN NAME SETTINGS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_finetuning import Bench

if __name__ == "__main__":
    root, folder, name, settings = sys.argv[1:]
    torch.set_num_threads(1)
    bench = Bench(Path(root))
    bench.tune(name, Path(folder), **json.loads(settings))
