"""Fine-tuning in processes of its own: killed without warning, and several that work as one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sharing import environment
from test_finetuning import Bench

HERE = Path(__file__).parent
ALONE = environment(OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Bench(tmp_path_factory.mktemp("processes"))
    made.extraction("plain"), made.extraction("dropping")
    yield made
    torch.set_num_threads(threads)


def command(bench: Bench, folder: Path, name: str, settings: dict[str, Any]) -> list[str]:
    return [str(HERE / "finetune_script.py"), str(bench.root), str(folder), name, json.dumps(settings)]


def test_sigkill_then_the_same_command_ends_with_the_same_bits(bench: Bench) -> None:
    settings = {"epochs": 8, "select": "val", "lr": 0.01}
    folder = bench.folder()
    run = [sys.executable, *command(bench, folder, "dropping", settings)]
    first = subprocess.Popen([*run, "4"], env=ALONE, stderr=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 4:
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert len(metrics.read_text().splitlines()) == 4 and not (folder / "model.safetensors").exists()
    subprocess.run(run, env=ALONE, check=True, stderr=subprocess.DEVNULL)
    _, whole = bench.tune("dropping", **settings)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ours, theirs = ([json.loads(line) for line in (f / "metrics.jsonl").open()] for f in (whole, folder))
    assert [row["held_loss"] for row in ours] == [row["held_loss"] for row in theirs] and len(ours) == 9


def test_two_processes_equal_one_with_the_same_global_batch(bench: Bench) -> None:
    settings = {"epochs": 3, "batch_size": 8, "accumulate": 2, "class_weight": "balanced"}
    tuned, alone = bench.tune("plain", **settings)
    folder = bench.folder()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, *command(bench, folder, "plain", settings)], env=ALONE, check=True)
    ours, theirs = load_file(alone / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs) and len(ours) == 12
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    for row, expected in zip(rows, tuned.history["epochs"], strict=True):
        for key in ("loss", "accuracy", "held_loss", "held_accuracy"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-4)
