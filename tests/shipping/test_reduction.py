"""int8 and fp16 files: what they cost and gain is measured, and what does not pay is not written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_files import SMALL, average_backbone, some_head

from featx.errors import ExportError
from featx.shipping import graph, reduction
from featx.shipping.deployed import open_session
from featx.shipping.exporting import check
from featx.shipping.inspection import inspect
from featx.shipping.prediction import predict
from featx.shipping.reduction import Reduction, export_reduced


@pytest.fixture
def run(photo_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photo_run, tmp_path / "run")


def clock(images_per_second: float, fp32: float) -> Callable[[], float]:
    """A clock by which batches of 32 take as long as these speeds say: what is tested does not depend on the load."""
    durations = itertools.cycle([0.0, 32 / images_per_second, 0.0, 32 / fp32])
    return itertools.accumulate(durations).__next__


def test_int8_keeps_the_answers_in_a_third_of_the_size(run: Path, photos: Path) -> None:
    found = export_reduced(run, "int8", images=40, clock=clock(250, 100))
    assert found.images == 40 and found.lost <= found.allowed == 2
    assert found.speedup == pytest.approx(2.5)
    assert found.equal_labels >= 38 and 0 < found.max_probability_difference < 0.5
    file = run / "model-int8.onnx"
    assert file.stat().st_size < (run / "model.onnx").stat().st_size / 3
    onnx.checker.check_model(str(file), full_check=True)
    described = inspect(file)
    assert described.featx["precision"] == "int8" and described.featx["parity"]["speedup"] == found.speedup
    assert described.operators["QuantizeLinear"] > 25
    digests = [graph.part_digests(onnx.load(run / name).graph) for name in ("model.onnx", "model-int8.onnx")]
    assert {part for part in digests[0] if digests[0][part] != digests[1][part]} == {"backbone"}  # the head is float
    record = json.loads((run / "model-int8.parity.json").read_text())
    assert record["passed"] and record["lost"] == found.lost and record["sha256"] == described.sha256
    files = sorted((photos / "val" / "bees").glob("*.jpg"))[:12]
    labels = [[p.label for p in predict(run / name, files)] for name in ("model.onnx", "model-int8.onnx")]
    assert np.mean([a == b for a, b in zip(*labels, strict=True)]) >= 10 / 12  # 10 on a CPU without VNNI
    with pytest.raises(ExportError, match="is int8"):
        check(file, run)


def test_fp16_keeps_float_at_both_ends(run: Path) -> None:
    found = export_reduced(run, "fp16", images=12, outputs=("probabilities", "features"), clock=clock(250, 100))
    described = inspect(run / "model-fp16.onnx")
    assert {value["dtype"] for value in described.outputs.values()} == {"float32"}
    assert described.bytes < (run / "model.onnx").stat().st_size * 0.55
    assert found.equal_labels == 12 and found.max_probability_difference < 1e-2


def test_a_slower_file_is_refused_with_the_figures_and_not_written(run: Path) -> None:
    before = sorted(os.listdir(run))
    message = r"fp16 is no faster here: fp16 runs 80\.0 images/s, fp32 100\.0 \(0\.80 times\).*Nothing was written"
    with pytest.raises(ExportError, match=message):
        export_reduced(run, "fp16", images=4, clock=clock(80, 100))
    assert sorted(os.listdir(run)) == before


@pytest.mark.parametrize(
    ("lost", "allowed", "speed", "passed"),
    [(2, 2, 2.0, True), (3, 2, 2.0, False), (0, 2, 1.0, False), (-1, 2, 1.1, True)],
)
def test_the_gate_wants_speed_and_answers(lost: int, allowed: int, speed: float, passed: bool) -> None:
    found = Reduction("int8", 100, 0.9, 0.9, lost, allowed, 97, 0.1, speed * 50, 50.0, 32, 2)
    assert found.passed is passed
    if not passed:
        with pytest.raises(ExportError, match=f"{lost} right answers lost, {allowed} allowed"):
            reduction.require(found)


def test_a_tenth_of_a_point_of_ten_thousand_is_ten_images() -> None:
    for count, points, allowed in ((10_000, 0.1, 10), (10_000, 0.0, 2), (153, 0.5, 2), (1000, 0.5, 5)):
        assert reduction.allowed_loss(count, points) == allowed


def test_both_files_are_timed_on_the_same_batch() -> None:
    models = [graph.opened_up(graph.build(average_backbone(32), some_head(), SMALL), pixels=True) for _ in range(2)]
    speeds = reduction.measure_speeds([open_session(model) for model in models], 32)
    assert len(speeds) == 2 and min(speeds) > 100


def test_choices_that_cannot_be_are_refused(run: Path) -> None:
    with pytest.raises(ExportError, match="int8 or fp16, not 'int4'"):
        export_reduced(run, "int4")
    with pytest.raises(ExportError, match="a head alone stays in float"):
        export_reduced(run, "int8", input="features")
