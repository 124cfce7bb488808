"""What must come out on real photographs with real weights: ants and bees, SqueezeNet 1.1.

The 153 validation photographs are for measuring. Nothing here or in featx was chosen on them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import featx
from featx.records import read_record, write_record
from featx.runs import Run, open_run


@pytest.fixture(scope="module")
def fitted(photos: Path, squeezenet_weights: Path, photo_run: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """One run for each head, on one cache."""
    root = tmp_path_factory.mktemp("photographs")
    options = {"weights": str(squeezenet_weights), "cache": photo_run.parent / "cache"}
    runs = {"logreg": open_run(photo_run)}
    for head in ("linear", "pretrained"):
        runs[head] = featx.fit(photos, "squeezenet1_1", head, output=root / head, **options)
    restricted = {"settings": {"restrict": True}, "output": root / "restricted"}
    runs["restricted"] = featx.fit(photos, "squeezenet1_1", "pretrained", **options, **restricted)
    return runs


def test_logistic_regression_is_right_on_at_least_138_of_153(fitted: dict[str, Run]) -> None:
    report = fitted["logreg"].report
    assert report["count"] == 153
    assert report["accuracy"] >= 138 / 153
    low, high = report["intervals"]["accuracy"]["low"], report["intervals"]["accuracy"]["high"]
    assert low < report["accuracy"] < high


def test_the_linear_head_is_within_two_points_of_it(fitted: dict[str, Run]) -> None:
    assert abs(fitted["linear"].report["accuracy"] - fitted["logreg"].report["accuracy"]) <= 0.02


def test_the_pretrained_classifier_free_to_answer_anything_is_right_on_588_of_1000(fitted: dict[str, Run]) -> None:
    report = fitted["pretrained"].report
    assert report["accuracy"] == pytest.approx(0.588, abs=0.007)
    assert report["confusion_columns"] == ["ants", "bees", "other"]
    others = sum(row[2] for row in report["confusion"])
    assert others > 0 and sum(map(sum, report["confusion"])) == 153
    assert report["fit"]["classes"] == {"ants": "ant", "bees": "bee"}
    assert len(fitted["pretrained"].head.class_names) == 1000
    trained_on = [fitted[name].trained_on for name in ("pretrained", "logreg")]
    assert [None if keys is None else len(keys) for keys in trained_on] == [0, 244]


def test_restricted_to_the_two_classes_it_is_far_better(fitted: dict[str, Run]) -> None:
    report = fitted["restricted"].report
    assert report["confusion_columns"] == ["ants", "bees"]
    assert report["accuracy"] > fitted["pretrained"].report["accuracy"] + 0.2


def test_four_hundred_photographs_are_extracted_once_and_the_gif_is_ignored(fitted: dict[str, Run]) -> None:
    first, second = fitted["logreg"].report["extract"], fitted["linear"].report["extract"]
    assert (first["found"], first["extracted"], first["cached"], first["skipped"]) == (397, 397, 0, 0)
    assert (second["found"], second["extracted"], second["cached"], second["skipped"]) == (397, 0, 397, 0)
    assert first["ignored_files"] == ["train/ants/imageNotFound.gif"]


def test_a_warm_extract_from_the_command_line_imports_no_torch_and_ends_with_0(
    fitted: dict[str, Run], photos: Path, squeezenet_weights: Path
) -> None:
    words = ["extract", str(photos), "-b", "squeezenet1_1", "--weights", str(squeezenet_weights), "--json"]
    words += ["--cache", fitted["logreg"].config.cache]
    code = f"""
import sys
from featx.cli import cli
try:
    cli({words!r})
except SystemExit as done:
    assert done.code == 0, done.code
assert "numpy" in sys.modules
assert not {{"torch", "torchvision", "sklearn", "onnxruntime", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["cached"] == 397 and report["ignored"] == 1
    assert "imageNotFound.gif" in report["ignored_files"][0]


def test_a_run_loads_as_a_torch_classifier_with_the_measured_accuracy(fitted: dict[str, Run], photos: Path) -> None:
    import numpy as np

    classifier = featx.load(fitted["logreg"].path)
    paths = sorted((photos / "val").glob("*/*.jpg"))[::10]
    images = np.stack([classifier.preprocess(path.read_bytes()) for path in paths])
    answers = [classifier.class_names[i] for i in classifier(images).argmax(axis=1)]
    wrong = {mistake["id"] for mistake in fitted["logreg"].report["mistakes"]}
    for path, answer in zip(paths, answers, strict=True):
        right = answer == path.parent.name
        assert right == (f"val/{path.parent.name}/{path.name}" not in wrong)
    assert len(paths) == 16


def test_changed_weights_are_noticed_when_a_run_is_loaded(
    fitted: dict[str, Run], squeezenet_weights: Path, tmp_path: Path
) -> None:
    import shutil

    import torch

    state = torch.load(squeezenet_weights, weights_only=True)
    state["features.0.bias"] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    shutil.copytree(fitted["logreg"].path, tmp_path / "run")
    config, _ = read_record(tmp_path / "run" / "config.json")
    config["request"]["weights"] = str(tmp_path / "other.pth")
    write_record(tmp_path / "run" / "config.json", config)
    with pytest.raises(featx.FeatxError, match="was fitted on weights"):
        featx.load(tmp_path / "run")
