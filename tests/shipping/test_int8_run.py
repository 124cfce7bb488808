"""A run on int8 features: its file has the backbone that computed them, and answers as they do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from int8_runs import calibrate, engine_of
from photo_run import photo_run as some_photographs
from sharing import made_once

import featx
from featx.cli import cli
from featx.engines import int8
from featx.errors import ExportError, ParityError, RunError
from featx.measuring.curve import learning_curve
from featx.reporting.report import write_report
from featx.runs import open_run, write_config
from featx.shipping import graph
from featx.shipping.exporting import check, export
from featx.shipping.gate import gate_images
from featx.shipping.inspection import inspect
from featx.shipping.int8 import verify
from featx.shipping.reduction import export_reduced


@pytest.fixture(scope="module")
def made(photos: Path, squeezenet_weights: Path) -> Path:
    """A folder with `photos/`, `cache/` and `int8/`, a run of SqueezeNet on 40 photographs, measured on 60."""
    base = some_photographs(photos, squeezenet_weights)

    def make(root: Path) -> None:
        for name in ("photos", "cache"):
            shutil.copytree(base / name, root / name)
        request = featx.BackboneRequest("squeezenet1_1", str(squeezenet_weights))
        digest = calibrate(root / "photos", request, root / "cache", most=8)
        engine = engine_of(root / "cache", digest)
        where = {"cache": root / "cache", "output": root / "int8"}
        run = featx.fit(root / "photos", request, precision="int8", engine=engine, **where)
        featx.export(run)

    return made_once("int8-run", make)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "int8", tmp_path / "run")


def test_heads_on_int8_features_lose_nothing_that_can_be_measured(made: Path) -> None:
    """Of 60 photographs at most two more are wrong than in fp32, and the log-loss stays inside fp32's interval."""
    opened = open_run(made / "int8")
    fp32 = featx.extract(made / "photos", opened.request, cache=made / "cache")
    known = featx.fitting.fit_features(fp32).to_dict()
    assert abs(round(60 * (known["accuracy"] - opened.report["accuracy"]))) <= 2
    interval = known["intervals"]["log_loss"]
    assert interval["low"] < opened.report["log_loss"] < interval["high"]
    cost = opened.report["int8"]
    assert cost["passed"] and cost["images"] == 40
    assert cost["differences"]["log_loss"]["low"] < 0 < cost["differences"]["log_loss"]["high"]


def test_the_file_has_the_calibrations_backbone_and_answers_as_the_cached_rows(made: Path, run: Path) -> None:
    opened, record = open_run(run), json.loads((run / "parity.json").read_text())
    described = inspect(run / "model.onnx")
    assert described.featx["precision"] == "int8"
    own = onnx.load(int8.calibrated(made / "cache", opened.config.spec.calibration))
    weights = {t.name: t.raw_data for t in own.graph.initializer}
    shipped = {t.name.removeprefix("backbone/"): t.raw_data for t in onnx.load(run / "model.onnx").graph.initializer}
    assert len(weights) > 100 and weights.items() <= shipped.items()
    assert record["parts"] == graph.part_digests(onnx.load(run / "model.onnx").graph)

    assert record["method"] == "cached" and record["equal_labels"] >= 58
    assert record["checks"]["mean probabilities"]["value"] < 0.01
    files = sorted((made / "photos" / "val").glob("*/*.jpg"))
    answers = [p.label for p in featx.predict(run / "model.onnx", files)]
    right = np.mean([label == file.parent.name for label, file in zip(answers, files, strict=True)])
    assert right == pytest.approx(record["accuracy"])
    assert check(run / "model.onnx", run).passed
    card = (run / "README.md").read_text()
    assert "as the int8 features that the head was fitted on for" in card and "torch model" not in card


def test_a_file_that_answers_otherwise_than_the_cached_rows_is_refused(made: Path, run: Path) -> None:
    """As if another engine had computed the rows: they are turned by the order of the features."""
    opened = open_run(run)
    images = gate_images(opened, 20, "val")
    shifted = replace(images, cached=images.cached[:, ::-1].copy())
    model = graph.build(
        graph.load(int8.calibrated(made / "cache", opened.config.spec.calibration)),
        opened.head,
        images.spec.preprocess,
        input="tensor",
    )
    found = verify(opened, model, shifted)
    assert {"labels", "mean probabilities"} & {each.name for each in found.missed} and len(found.differing) > 2
    assert verify(opened, model, images).equal_labels == 20  # from the same pixels
    with pytest.raises(
        ParityError, match=r"mean probabilities.*Nothing was written\. --input tensor leaves the resize"
    ):
        export(opened, output=run / "other.onnx", images=20, tolerance=1e-9)
    assert not (run / "other.onnx").exists()


def test_an_int8_run_has_no_file_in_another_precision_and_no_torch_classifier(run: Path) -> None:
    for precision in ("fp32", "fp16"):
        done = CliRunner().invoke(cli, ["export", str(run), "--precision", precision])
        assert done.exit_code == 1 and "its head knows no others: its file is int8" in done.output
    with pytest.raises(ExportError, match="its file is int8, and `featx export` without --precision writes it"):
        export_reduced(run, "int8")
    with pytest.raises(RunError, match="int8 features, which torch does not compute; use `featx export`"):
        featx.load(run)


def test_commands_reuse_the_runs_own_calibration_and_say_if_it_is_gone(made: Path, run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    assert featx.evaluate(run, made / "photos", split="val").accuracy == opened.report["accuracy"]
    assert [point.images for point in learning_curve(run, sizes=[20, 40], repeats=1).points] == [20, 40]
    page = write_report(run).read_text()
    assert "int8 against fp32 on 40 training images" in page and "run by onnxruntime" in page

    cache = shutil.copytree(made / "cache", tmp_path / "cache")
    write_config(run, replace(opened.config, cache=str(cache)))
    for file in (cache / "calibrations").glob("*"):
        file.unlink()
    done = CliRunner().invoke(cli, ["export", str(run)])
    assert done.exit_code == 1
    assert f"calibrations/{opened.config.spec.calibration}.onnx is missing; bring the same file" in done.output
