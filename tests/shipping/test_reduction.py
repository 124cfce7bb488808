"""int8 and fp16 files: what they cost and gain is measured, and what does not pay is not written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import write_images
from onnx import numpy_helper
from onnx_files import SMALL, average_backbone, some_head

from featx.errors import ExportError
from featx.features import FeatureSpec, content_key
from featx.head import Head
from featx.shipping import graph, reduction
from featx.shipping.deployed import open_session
from featx.shipping.exporting import check
from featx.shipping.gate import Images, allowed_images
from featx.shipping.inspection import inspect
from featx.shipping.prediction import predict
from featx.shipping.reduction import Reduction, export_reduced
from featx.sources.source import Source


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
    assert found.changed <= 1 and 0 < found.max_probability_difference < 0.15
    assert 0.03 < found.feature_distance < 0.1 and found.max_feature_distance < 0.3
    file = run / "model-int8.onnx"
    assert file.stat().st_size < (run / "model.onnx").stat().st_size / 3
    onnx.checker.check_model(str(file), full_check=True)
    described = inspect(file)
    assert described.featx["precision"] == "int8" and described.featx["parity"]["speedup"] == found.speedup
    assert described.operators["QuantizeLinear"] > 25
    digests = [graph.part_digests(onnx.load(run / name).graph) for name in ("model.onnx", "model-int8.onnx")]
    assert {part for part in digests[0] if digests[0][part] != digests[1][part]} == {"backbone"}  # the head is float
    record = json.loads((run / "model-int8.parity.json").read_text())
    assert (
        record["passed"]
        and record["lost"] == found.lost
        and record["changed"] == found.changed
        and record["sha256"] == described.sha256
    )
    files = sorted((photos / "val" / "bees").glob("*.jpg"))[:12]
    labels = [[p.label for p in predict(run / name, files)] for name in ("model.onnx", "model-int8.onnx")]
    assert labels[0] == labels[1]
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
    message = r"fp16 is not faster here: fp16 runs 80\.0 images/s, fp32 100\.0 \(0\.80 times\).*Nothing was written"
    with pytest.raises(ExportError, match=message):
        export_reduced(run, "fp16", images=4, clock=clock(80, 100))
    assert sorted(os.listdir(run)) == before


def reduced(**changed: Any) -> Reduction:
    found = Reduction(
        precision="int8",
        images=100,
        accuracy=0.9,
        fp32_accuracy=0.9,
        lost=0,
        allowed=2,
        equal_labels=97,
        allowed_changes=5,
        max_probability_difference=0.1,
        feature_distance=0.05,
        max_feature_distance=0.2,
        images_per_second=100.0,
        fp32_images_per_second=50.0,
        batch=32,
        cores=2,
    )
    return replace(found, **changed)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"lost": 2}, None),
        ({"lost": -1, "equal_labels": 95, "images_per_second": 55.0}, None),
        ({"lost": 3}, r"int8 loses too many answers \(--max-loss allows more\): .* \(3 right answers lost, 2 allowed;"),
        (
            {"equal_labels": 94},
            r"int8 changes too many answers \(--max-changed allows more\): .* 6 answers changed, 5 all",
        ),
        ({"images_per_second": 50.0}, "int8 is not faster here: "),
    ],
)
def test_the_gate_wants_speed_and_answers(changed: dict[str, Any], why: str | None) -> None:
    found = reduced(**changed)
    assert found.passed is found.to_dict()["passed"] is (why is None)
    if why is None:
        reduction.require(found)
    else:
        with pytest.raises(ExportError, match=why):
            reduction.require(found)


def turned(backbone: onnx.ModelProto, angle: float) -> onnx.ModelProto:
    """Its first two features turned by an angle."""
    mix = next(t for t in backbone.graph.initializer if t.name == "mix")
    array = numpy_helper.to_array(mix).copy()
    cos, sin = np.cos(angle), np.sin(angle)
    array[:, :2] = array[:, :2] @ np.float32([[cos, sin], [-sin, cos]])
    mix.CopyFrom(numpy_helper.from_array(array, "mix"))
    return backbone


def test_answers_that_change_count_though_no_right_one_is_lost(tmp_path: Path) -> None:
    """Nothing can be lost where all answers are wrong, as the labels are other ones."""
    folder = write_images(tmp_path, per_class=20)
    files = sorted(folder.glob("*/*.png"))
    source = Source("", folder, [path.relative_to(folder).as_posix() for path in files], ["other"] * 40)
    keys = np.stack([np.frombuffer(content_key(path.read_bytes()), np.uint8) for path in files])
    head = Head(np.eye(2, 12, dtype=np.float32), np.zeros(2, np.float32), ("a", "b"))
    images = Images(source, keys, np.zeros((40, 12), np.float32), FeatureSpec("b", "00", preprocess=SMALL), split="val")

    pixels = np.stack([SMALL(path.read_bytes()) for path in files])
    cells = pixels.reshape(40, 3, 4, 8, 4, 8).mean(axis=(3, 5)) / 255
    mean, std = (np.reshape(values, (3, 1, 1)) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    mix = numpy_helper.to_array(next(t for t in average_backbone(32).graph.initializer if t.name == "mix"))
    features = ((cells - mean) / std).reshape(40, -1) @ mix
    x, y = features[:, 0], features[:, 1]
    angle = float(np.pi / 4 - np.quantile(np.arctan2(y, x), 0.25))  # at which the classes part in their midst
    a, b = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    changed = int(((a > b) != (x > y)).sum())
    assert 4 < changed < 36

    small, fp32 = (graph.build(turned(average_backbone(32), by), head, SMALL) for by in (angle, 0.0))
    found = reduction.measure(small, fp32, images, head, precision="int8", clock=clock(250, 100))
    assert (found.changed, found.lost, found.allowed_changes) == (changed, 0, 2)
    lengths = np.linalg.norm(features, axis=1)
    off = np.hypot(a - x, b - y) / np.maximum(lengths, np.median(lengths))
    assert found.feature_distance == pytest.approx(np.median(off), rel=0.02)
    assert found.max_feature_distance == pytest.approx(off.max(), rel=0.02)
    with pytest.raises(ExportError, match=rf"changes too many answers .*; {changed} answers changed, 2 allowed"):
        reduction.require(found)
    enough = reduction.measure(
        small, fp32, images, head, precision="int8", max_changed=100 * changed / 40, clock=clock(250, 100)
    )
    assert enough.passed


def test_a_tenth_of_a_point_of_ten_thousand_is_ten_images() -> None:
    for count, points, allowed in ((10_000, 0.1, 10), (10_000, 0.0, 2), (153, 0.5, 2), (1000, 0.5, 5)):
        assert allowed_images(count, points) == allowed


def test_both_files_are_timed_on_the_same_batch() -> None:
    models = [graph.opened_up(graph.build(average_backbone(32), some_head(), SMALL), pixels=True) for _ in range(2)]
    speeds = reduction.measure_speeds([open_session(model) for model in models], 32)
    assert len(speeds) == 2 and min(speeds) > 100


def test_choices_that_cannot_be_are_refused(run: Path) -> None:
    with pytest.raises(ExportError, match="int8 or fp16, not 'int4'"):
        export_reduced(run, "int4")
    with pytest.raises(ExportError, match="a head alone stays in float"):
        export_reduced(run, "int8", input="features")
