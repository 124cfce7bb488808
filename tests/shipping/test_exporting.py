"""Export behind its gate: the file compared with torch on the run's images, damage found, heads swapped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from conftest import write_images
from networks import THIRTEEN, calibrated
from onnx import numpy_helper
from onnx_files import write_sealed
from PIL import Image
from sharing import session_cache

import featx
from featx.cli import cli
from featx.errors import ExportError, ParityError
from featx.head import Head
from featx.records import read_record, write_record
from featx.runs import open_run
from featx.shipping import graph, parity
from featx.shipping.deployed import Model
from featx.shipping.exporting import check, export
from featx.shipping.gate import gate_images
from featx.shipping.inspection import inspect
from featx.shipping.prediction import predict
from featx.shipping.reduction import export_reduced


@pytest.fixture(scope="session")
def record(photo_run: Path) -> dict[str, Any]:
    """What `parity.json` says of the exported run."""
    values: dict[str, Any] = json.loads((photo_run / "parity.json").read_text())
    return values


@pytest.fixture
def run(photo_run: Path, tmp_path: Path) -> Path:
    """A copy of the exported run, to spoil."""
    return shutil.copytree(photo_run, tmp_path / "run")


def test_all_153_validation_photographs_get_the_torch_classifiers_labels(
    photo_run: Path, record: dict[str, Any], photos: Path
) -> None:
    assert record["method"] == "file"
    assert record["images"] == record["equal_labels"] == 153
    assert record["ties"] == record["differing"] == []
    classifier = featx.load(photo_run)
    files = sorted((photos / "val").glob("*/*.jpg"))
    assert len(files) == 153
    logits = classifier(np.stack([classifier.preprocess(file.read_bytes()) for file in files]))
    predicted = list(predict(photo_run / "model.onnx", files))
    assert [p.label for p in predicted] == [classifier.class_names[i] for i in logits.argmax(axis=1)]
    right = np.mean([p.label == file.parent.name for p, file in zip(predicted, files, strict=True)])
    report = json.loads((photo_run / "report.json").read_text())
    assert right == record["accuracy"] == record["torch_accuracy"] == report["accuracy"]


def test_differences_are_within_the_limits_that_were_set(record: dict[str, Any]) -> None:
    limits = {
        "labels": 0,
        "pixels": 2,
        "features": 3e-2,
        "probabilities": 5e-2,
        "same-pixel features": 1e-5,
        "same-pixel probabilities": 1e-5,
        "cached features": 2e-3,
        "reported accuracy": 0,
    }
    checks = dict(record["checks"])
    loss = checks.pop("reported log-loss")
    assert loss["value"] <= 1e-6 < loss["limit"] < 1e-3
    logits = checks.pop("same-feature logits")
    assert logits["value"] <= logits["limit"] < 1e-4
    assert {name: check["limit"] for name, check in checks.items()} == limits
    assert all(check["value"] <= check["limit"] for check in checks.values())
    assert checks["probabilities"]["value"] > checks["same-pixel probabilities"]["value"] > 0


def test_what_was_compared_is_in_parity_json_and_in_the_file(photo_run: Path, record: dict[str, Any]) -> None:
    described = inspect(photo_run / "model.onnx")
    assert record["passed"] is True and record["split"] == "val"
    assert described.sha256 == record["sha256"]
    assert described.bytes == record["bytes"] == (photo_run / "model.onnx").stat().st_size
    ours = described.featx
    assert ours["class_names"] == ["ants", "bees"]
    assert ours["parity"]["equal_labels"] == 153
    assert ours["parity"]["probabilities"] == record["checks"]["probabilities"]["value"]
    assert ours["metrics"]["accuracy"] == record["accuracy"] and ours["metrics"]["count"] == 153
    config = json.loads((photo_run / "config.json").read_text())
    assert ours["data_digest"] == config["data_digest"]
    assert ours["weights_digest"] == config["backbone"]["weights_digest"]
    assert ours["preprocess"]["resize"] == 256
    assert "256 pixels" in ours["contract"] and "224 x 224" in ours["contract"]
    assert set(described.intact.values()) == {True}
    assert described.inputs == {"images": {"dtype": "uint8", "shape": ["N", "H", "W", 3]}}
    assert described.outputs["probabilities"] == {"dtype": "float32", "shape": ["N", 2]}
    assert described.opsets == {"ai.onnx": 18}


def test_the_file_names_no_place_on_this_machine(photo_run: Path, photos: Path) -> None:
    data = (photo_run / "model.onnx").read_bytes()
    for path in (photo_run.parent, photos, Path(featx.__file__).parent, Path(sys.prefix), Path.home()):
        assert os.fsencode(path) not in data
    assert b"stack_trace" not in data and b"ants" in data


def test_the_same_run_exports_the_same_bytes(run: Path, tmp_path: Path) -> None:
    assert export(run, output=tmp_path / "again.onnx").method == "head"
    assert (tmp_path / "again.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    assert json.loads((tmp_path / "again.parity.json").read_text())["method"] == "head"


def test_another_head_is_swapped_in_without_torch_and_without_a_forward_pass(run: Path) -> None:
    head, _ = Head.from_bytes((run / "head.safetensors").read_bytes())
    new = Head(head.weight, head.bias + 1e-6, head.class_names)
    (run / "head.safetensors").write_bytes(new.to_bytes())
    report, _ = read_record(run / "report.json")
    write_record(run / "report.json", {name: value for name, value in report.items() if name != "files"})
    before = graph.part_digests(onnx.load(run / "model.onnx").graph)
    code = f"""
import json, sys
from featx.shipping.exporting import export
found = export({str(run)!r})
print(json.dumps([found.to_dict(), sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, loaded = json.loads(out.stdout)
    assert found["passed"] and found["method"] == "head" and found["images"] == 153
    assert not set(loaded) & {"torch", "torchvision", "sklearn", "timm"}
    after = graph.part_digests(onnx.load(run / "model.onnx").graph)
    assert {name for name in after if after[name] != before[name]} == {"head"}
    np.testing.assert_array_equal(numpy_helper.to_array(head_weight(run / "model.onnx")), new.weight)


def head_weight(path: Path) -> onnx.TensorProto:
    return next(t for t in onnx.load(path).graph.initializer if t.name == "head/weight")


def changed_weight(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.startswith("backbone/") and np.prod(t.dims) > 1000)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[7] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def changed_head(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "head/bias")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.1), tensor.name))


def permuted_names(model: onnx.ModelProto) -> None:
    entry = next(e for e in model.metadata_props if e.key == "class_names")
    entry.value = json.dumps(json.loads(entry.value)[::-1])


def dropped_mean_and_std(model: onnx.ModelProto) -> None:
    """Cast to float goes straight into the first convolution, as where someone normalises outside."""
    nodes = list(model.graph.node)
    cast = next(n for n in nodes if n.name.startswith("backbone/") and n.op_type == "Cast")
    conv = next(n for n in nodes if n.name.startswith("backbone/") and n.op_type == "Conv")
    conv.input[0] = cast.output[0]


def nearest_resize(model: onnx.ModelProto) -> None:
    resize = next(n for n in model.graph.node if n.op_type == "Resize")
    for attribute in list(resize.attribute):
        if attribute.name in ("antialias", "exclude_outside"):
            resize.attribute.remove(attribute)


DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "one weight changed": (changed_weight, "backbone part"),
    "head changed": (changed_head, "head part"),
    "class names permuted": (permuted_names, "classes, or their order"),
    "mean and std dropped": (dropped_mean_and_std, "backbone part"),
    "resize without antialiasing": (nearest_resize, "preprocess part"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_caught_and_what_is_damaged_is_named(run: Path, damage: str) -> None:
    spoil, named = DAMAGE[damage]
    model = onnx.load(run / "model.onnx")
    spoil(model)
    (run / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="does not have the SHA-256"):
        check(run / "model.onnx", run)
    write_sealed(run / "model.onnx", model)  # by somebody who means it
    with pytest.raises(ParityError, match=named):
        check(run / "model.onnx", run)


def test_an_undamaged_file_passes_the_check(run: Path) -> None:
    found = check(run / "model.onnx", run, images=16)
    assert found.passed and found.method == "file" and found.images == 16


def test_a_miss_leaves_the_former_file_and_writes_none_where_there_was_none(run: Path, tmp_path: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("model.onnx", "parity.json")}
    for output in (None, tmp_path / "new" / "model.onnx"):
        with pytest.raises(ParityError, match=r"probabilities .*Nothing was written.*--input tensor"):
            export(run, output=output, tolerance=1e-6)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not (tmp_path / "new").exists()
    assert not [name for name in os.listdir(run) if "tmp" in name]


def test_a_full_disk_leaves_the_former_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "model.onnx").read_bytes()

    def full(handle: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ExportError, match=r"model.onnx cannot be written \(No space left on device\)"):
        export(run)
    monkeypatch.undo()
    assert (run / "model.onnx").read_bytes() == before
    assert not [name for name in os.listdir(run) if "tmp" in name]


def test_choices_of_input_and_outputs(run: Path, photos: Path) -> None:
    files = sorted((photos / "val" / "ants").glob("*.jpg"))[:8]
    whole = [p.probabilities for p in predict(run / "model.onnx", files)]
    found = export(run, input="tensor", outputs=("probabilities",), images=24)
    assert "probabilities" not in {check.name for check in found.checks}  # there is no resize in the file
    described = inspect(run / "model-tensor.onnx")
    assert described.inputs == {"images": {"dtype": "uint8", "shape": ["N", 3, 224, 224]}}
    assert list(described.outputs) == ["probabilities"]
    np.testing.assert_allclose([p.probabilities for p in predict(run / "model-tensor.onnx", files)], whole, atol=5e-3)

    alone = export(run, input="features")
    assert alone.method == "head" and alone.images == 153 and (run / "head.onnx").stat().st_size < 30_000
    export(run, outputs=("features",), output=run / "features model é.onnx", images=24)
    swapped = predict(Model(run / "features model é.onnx", head=run / "head.onnx"), files)
    np.testing.assert_allclose([p.probabilities for p in swapped], whole, atol=1e-6)
    with pytest.raises(ExportError, match="no rejection threshold"):
        export(run, outputs=("accepted",))


def test_a_damaged_record_of_a_verified_backbone_is_not_trusted(run: Path, tmp_path: Path) -> None:
    opened, parts = open_run(run), graph.part_digests(onnx.load(run / "model.onnx").graph)
    everything, fewer = (gate_images(opened, count, "val") for count in (153, 152))
    path = parity.rows_path(opened, everything, parts)
    rows = parity.load_rows(path)
    assert rows is not None and rows.levels is not None and rows.levels[:-1].max() == 1
    np.testing.assert_allclose(rows.torch, everything.cached, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rows.exported, rows.same, rtol=1e-3, atol=1e-4)
    assert parity.distances(rows.same, rows.torch).max() > 1e-3  # one level in a thousand pixels is seen
    assert parity.rows_path(opened, fewer, parts) != path
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:200] + bytes(100) + data[300:]):
        (tmp_path / "record.npz").write_bytes(damaged)
        assert parity.load_rows(tmp_path / "record.npz") is None


def test_the_images_are_those_with_the_smallest_hashes(run: Path) -> None:
    everything, few = (gate_images(open_run(run), count, "val") for count in (2000, 10))
    assert (len(everything.source), len(few.source)) == (153, 10)
    hashes = [bytes(key) for key in everything.keys]
    assert hashes == sorted(hashes) and [bytes(key) for key in few.keys] == hashes[:10]
    assert set(everything.source.labels or []) == {"ants", "bees"}


def test_a_split_without_images_says_what_to_do(run: Path) -> None:
    message = r"no test images.*244 train, 153 val, 0 test.*--split train, or --data"
    with pytest.raises(ExportError, match=message):
        export(run, split="test")
    assert export(run, split="train", images=8, output=run / "other.onnx").images == 8


def test_data_that_moved_is_found_again(run: Path, photos: Path, tmp_path: Path) -> None:
    config, _ = read_record(run / "config.json")
    config["data"] = str(tmp_path / "gone")
    config.pop("from_here", None)
    write_record(run / "config.json", config)
    with pytest.raises(featx.FeatxError, match="gone"):
        export(run)
    assert export(run, data=photos).method == "head"


SMALL = "small:backbone_normed"  # code that is not featx's, and so must be named again


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A run on `data/train` and `data/val` that is fast to export in full."""
    for split, seed in (("train", 0), ("val", 1)):
        write_images(tmp_path / "data" / split, per_class=12, seed=seed)
    options = {"weights": "random", "cache": tmp_path / "cache", "output": tmp_path / "run"}
    return featx.fit(tmp_path / "data", SMALL, **options).path


def test_after_the_data_have_changed_the_file_is_compared_and_no_accuracy_is_claimed(
    small_run: Path, tmp_path: Path
) -> None:
    found = export(small_run, factory=SMALL)
    assert (found.images, found.accuracy) == (24, json.loads((small_run / "report.json").read_text())["accuracy"])
    assert json.loads((small_run / "parity.json").read_text())["split"] == "val"

    (tmp_path / "data" / "val").rename(tmp_path / "val")  # validation images are now taken out of the training images
    found = export(small_run, factory=SMALL)
    assert found.passed and 0 < found.images < 24
    assert (found.accuracy, found.torch_accuracy) == (None, None)
    assert check(small_run / "model.onnx", small_run, factory=SMALL).accuracy is None
    for record in (json.loads((small_run / "parity.json").read_text()), inspected(small_run)["parity"]):
        assert [record[name] for name in ("split", "accuracy", "torch_accuracy")] == [None] * 3
        assert record["images"] == record["equal_labels"] == found.images
    shown = CliRunner().invoke(cli, ["export", str(small_run), "--factory", SMALL])
    assert shown.exit_code == 0
    assert (
        "no accuracy: the data have changed since the fit, and the head may have learned from these images"
        in shown.stderr
    )
    refused = r"it may have learned from these: the images or labels of .*data are not those that .*run was fitted on"
    with pytest.raises(ExportError, match=refused):
        export_reduced(small_run, "int8", factory=SMALL)
    with pytest.raises(ExportError, match=refused):  # its training images, by another name
        export_reduced(small_run, "int8", split="train", data=tmp_path / "data", factory=SMALL)

    (tmp_path / "val").rename(tmp_path / "data" / "val")
    assert export(small_run, factory=SMALL).accuracy is not None


def test_images_that_are_new_to_the_head_have_an_accuracy_but_are_not_called_a_split(
    small_run: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "more", per_class=14, seed=2)
    shutil.copy(tmp_path / "more" / "warm" / "013.png", tmp_path / "data" / "train" / "warm")
    found = export(small_run, factory=SMALL)
    assert (found.images, found.accuracy) == (24, json.loads((small_run / "report.json").read_text())["accuracy"])
    assert json.loads((small_run / "parity.json").read_text())["split"] is None
    assert export(small_run, data=tmp_path / "more", factory=SMALL).accuracy is not None
    assert export(small_run, split="train", factory=SMALL).accuracy is None
    (small_run / "trained-on.npy").unlink()  # as a run of an older featx
    assert export(small_run, factory=SMALL).accuracy is None


def inspected(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = inspect(run / "model.onnx").featx
    return values


@pytest.mark.parametrize("existing", ["photo.jpg", "model.onnx", "parity.json", "folder.onnx", "link.onnx"])
def test_a_file_that_featx_did_not_export_is_never_replaced(
    run: Path, tmp_path: Path, photos: Path, existing: str
) -> None:
    theirs = tmp_path / existing
    if existing == "folder.onnx":
        theirs.mkdir()
    elif existing == "link.onnx":
        theirs.symlink_to(tmp_path / "a-disk-that-is-not-mounted" / "model.onnx")
    else:
        theirs.write_bytes(next(photos.glob("val/ants/*.jpg")).read_bytes() if existing == "photo.jpg" else b"{}")
    output = tmp_path / "model.onnx" if existing == "parity.json" else theirs
    before = sorted(os.listdir(tmp_path)), not theirs.is_file() or theirs.read_bytes()
    options = {"output": output, "data": tmp_path / "nowhere"}  # which is not looked for: nothing is done for nothing
    for make in (
        lambda: export(run, **options),
        lambda: export(run, input="features", **options),
        lambda: export_reduced(run, "int8", **options),
    ):
        with pytest.raises(ExportError, match=f"{existing} exists and is not .* by featx.*give another --output"):
            make()
    assert (sorted(os.listdir(tmp_path)), not theirs.is_file() or theirs.read_bytes()) == before


def test_files_that_are_not_ours_or_not_whole_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name, message in (
        ("text.onnx", "not an ONNX file"),
        ("empty.onnx", "not an ONNX file"),
        ("absent.onnx", "there is no file"),
    ):
        with pytest.raises(ExportError, match=message):
            check(tmp_path / name, run)
    model = onnx.load(run / "model.onnx")
    del model.metadata_props[:]
    (tmp_path / "foreign.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="not exported by featx"):
        check(tmp_path / "foreign.onnx", run)
    onnx.save_model(model, tmp_path / "parts.onnx", save_as_external_data=True, location="weights.bin")
    with pytest.raises(ExportError, match=r"weights in other files"):
        check(tmp_path / "parts.onnx", run)
    assert inspect(tmp_path / "parts.onnx").external_data == ["weights.bin"]


# Half a minute each, of moving weights; of their kinds, AlexNet and ResNeXt are exported in any case. Their graphs are
# compared with torch in tests/backbones/test_thirteen.py in any case, too.
LARGE = ("vgg16", "wide_resnet50_2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak if n in LARGE else ()) for n in THIRTEEN])
def test_every_network_exports_a_clean_file_that_answers_as_torch_does(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=5)
    run = featx.fit(data, calibrated(name), cache=session_cache(), output=tmp_path / "run")
    found = export(run.path, images=3)
    assert found.passed and found.method == "file"
    assert max(check.value for check in found.checks[1:]) > 0
    file = run.path / "model.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    capfd.readouterr()
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": np.full((2, 50, 60, 3), 128, np.uint8)})
    assert capfd.readouterr().err == ""
    assert outputs[0].shape == (2, 2) and outputs[2].shape == (2, run.head.weight.shape[1])
    shutil.rmtree(run.path)  # up to half a gigabyte


@pytest.fixture
def large_jpegs(tmp_path: Path) -> Path:
    """Large enough for the small backbone's `--decode fast` to decode them at another scale."""
    rng = np.random.default_rng(3)
    for number, name in enumerate(("cold", "warm")):
        (tmp_path / "jpegs" / name).mkdir(parents=True)
        for i in range(10):
            coarse = rng.integers(100 * number, 100 * number + 150, (40, 40, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((320, 320), Image.Resampling.BICUBIC)
            image.save(tmp_path / "jpegs" / name / f"{i}.jpg", quality=90)
    return tmp_path / "jpegs"


def test_runs_of_both_decoders_on_one_cache_are_compared_on_their_own_pixels(large_jpegs: Path, tmp_path: Path) -> None:
    features = {}
    for decode in ("exact", "fast", "exact"):
        run = featx.fit(
            large_jpegs,
            SMALL,
            weights="random",
            decode=decode,
            cache=tmp_path / "cache",
            output=tmp_path / f"run-{decode}",
            overwrite=True,
        )
        assert export(run, images=4).passed
        options = {"weights": "random", "decode": decode, "cache": tmp_path / "cache"}
        features[decode] = featx.extract(large_jpegs, SMALL, **options).X
    assert np.abs(features["exact"] - features["fast"]).max() > 0


def test_a_cache_that_cannot_be_written_does_not_stop_an_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: str, path: Path) -> None:
        if path.name.endswith(".verified.safetensors"):
            raise PermissionError(13, "Permission denied")
        real(source, path)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        found = export(run, images=7, output=tmp_path / "model.onnx")
        assert found.passed and found.method == "file"  # nothing was kept of the first one
    assert (tmp_path / "model.onnx").exists()
