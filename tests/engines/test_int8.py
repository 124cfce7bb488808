"""int8: a calibration is made once, named by its bytes, kept, and never replaced by another one silently."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import COLOURS, ColourEngine, write_images
from int8_runs import calibrate, engine_of
from onnx import TensorProto, helper, numpy_helper
from sklearn.base import clone

import featx
from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.cache.store import FeatureStore
from featx.cli import cli
from featx.devices import arithmetic
from featx.engines import int8
from featx.engines.onnx import backbone_onnx, session
from featx.engines.opening import choose_engine, open_engine
from featx.errors import ExportError, FeatxError, HeadError, StoreError
from featx.estimators import ImageFeatures
from featx.extraction.calibrating import examples
from featx.extraction.pipeline import sync
from featx.features import FeatureSpec, content_key
from featx.finetuning.recipes import FinetuneConfig
from featx.options import Options
from featx.pixels.preprocess import Preprocess
from featx.records import read_record
from featx.runs import open_run
from featx.sources.source import Source

NORMED = BackboneRequest("small:backbone_normed", weights="random")
needs_none = pytest.mark.skipif("int8" in arithmetic(), reason="this processor multiplies int8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a calibration on 24 images, which lie beside it."""
    root = tmp_path_factory.mktemp("int8")
    calibrate(write_images(root / "data", per_class=12), NORMED, root / "cache")
    return root / "cache"


@pytest.fixture
def own(cache: Path, tmp_path: Path) -> Path:
    """A cache with the exported backbone alone, to be changed."""
    return shutil.copytree(cache, tmp_path / "cache", ignore=shutil.ignore_patterns("calibrations"))


@pytest.fixture
def digest(cache: Path) -> str:
    found = int8.find(cache, resolve(NORMED, cache), "auto")
    assert found
    return found


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def test_the_artefact_is_named_by_its_bytes_and_its_record_says_what_it_was_made_of(cache: Path, digest: str) -> None:
    path = int8.calibrated(cache, digest)
    record, sealed = read_record(path.with_suffix(".json"))
    files = sorted((cache.parent / "data").glob("*/*.png"))
    keys = sorted(content_key(file.read_bytes()).hex() for file in files)
    assert sealed and record["sha256"] == path.stem == digest
    assert set(record["images"]) < set(keys) and 0 < record["distance"] < 0.2
    trained = [key for key in keys if int(key[:16], 16) / 2**64 >= 0.2]  # the split that featx makes by itself
    assert record["images"] == trained

    model = onnx.load(path)
    onnx.checker.check_model(model)
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8]
    assert max(np.abs(w.astype(int)).max() for w in weights if w.size > 1) <= 64  # 7 bits
    scales = [t for t in model.graph.initializer if t.name.endswith("_scale") and numpy_helper.to_array(t).ndim]
    assert scales  # per channel
    assert str(cache) not in path.read_bytes().decode("latin-1")


def test_rows_do_not_depend_on_the_batch_or_on_the_threads(cache: Path, digest: str) -> None:
    images = pixels(13)
    first = engine_of(cache, digest, threads=1, batch_size=1)
    rows = np.concatenate([first(images[i : i + 1]) for i in range(13)])
    for threads, batch in ((1, 13), (2, 5), (3, 32)):
        engine = engine_of(cache, digest, threads, batch)
        np.testing.assert_array_equal(
            np.concatenate([engine(images[i : i + batch]) for i in range(0, 13, batch)]), rows
        )


def test_the_same_images_give_the_same_bytes(cache: Path, own: Path, digest: str) -> None:
    """So two processes that make one at once, or one again after a kill, end with one artefact."""
    assert calibrate(cache.parent / "data", NORMED, own) == digest
    (own / "calibrations" / f"{digest}.json").unlink()  # killed before it was written
    assert int8.find(own, resolve(NORMED, cache), "auto") is None
    assert calibrate(cache.parent / "data", NORMED, own) == digest


def test_a_data_set_that_grows_keeps_its_calibration_until_a_new_one_is_asked_for(own: Path, tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data", per_class=9), own
    later = [data / name / f"{i:03d}.png" for name in ("cold", "warm") for i in (6, 7, 8)]
    for file in later:
        file.rename(tmp_path / f"{file.parent.name}{file.name}")
    first = calibrate(data, NORMED, cache)
    given = Options(cache=cache, precision="int8", weights="random")
    small = featx.extract(data, NORMED, engine=engine_of(cache, first), **given)
    for file in later:
        (tmp_path / f"{file.parent.name}{file.name}").rename(file)
    grown = featx.extract(data, NORMED, engine=engine_of(cache, first), **given)
    assert grown.spec == small.spec and (grown.spec.calibration, grown.spec.engine) == (first, "onnxruntime")
    assert grown.report and (grown.report.cached, grown.report.extracted) == (12, 6)

    other = featx.extract(data, NORMED, engine=ColourlessEngine(), calibration="new", **given).spec
    assert other.calibration != first and other.digest != small.spec.digest
    assert int8.find(cache, resolve(NORMED, cache), "auto") == other.calibration  # the newest
    again = featx.extract(data, NORMED, calibration=first[:8], **given)  # needs no engine: all rows are there
    assert again.spec == small.spec and again.report and again.report.cached == 18


class ColourlessEngine(ColourEngine):
    """Rows that say nothing of an image, from the engine that would have computed others."""

    name = "onnxruntime"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([np.random.default_rng(list(each.tobytes()[:9])).random(8, np.float32) for each in images])


def test_a_missing_or_damaged_calibration_is_named_and_never_replaced(cache: Path, digest: str, tmp_path: Path) -> None:
    info, own = resolve(NORMED, cache), tmp_path / "calibrations"
    with pytest.raises(StoreError, match=f"no calibration '0123456789'.*there are {digest[:12]}.*--calibration new"):
        int8.find(cache, info, "0123456789")
    with pytest.raises(StoreError, match="is missing; bring the same file from another cache"):
        int8.calibrated(tmp_path, digest)
    own.mkdir()
    data = (cache / "calibrations" / f"{digest}.onnx").read_bytes()
    (own / f"{digest}.onnx").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match="is damaged; bring the same file"):
        open_engine(NORMED, info, cache=tmp_path, precision="int8", calibration=digest, engine="onnxruntime")
    (own / f"{digest}.json").write_text("{}")
    with pytest.raises(StoreError, match=r"\.json is damaged; choose a calibration.*there are none"):
        int8.find(tmp_path, info, "auto")
    assert int8.find(tmp_path, info, digest) == digest  # as a run asks, which knows that it is its own
    for file in own.iterdir():
        file.unlink()
    os.rmdir(own)
    own.write_text("a file where the folder would be")
    with pytest.raises(StoreError, match="the calibration cannot be written to"):
        calibrate(cache.parent / "data", NORMED, tmp_path)


def test_a_damaged_record_that_may_be_the_newests_is_named_and_hinders_no_other(cache: Path, tmp_path: Path) -> None:
    own, info = shutil.copytree(cache, tmp_path / "cache"), resolve(NORMED, cache)
    digest = int8.find(own, info, "auto")
    (own / "calibrations" / f"{'0' * 64}.json").write_text("no record")
    with pytest.raises(StoreError, match=rf"0000\.json is damaged; .*there are {str(digest)[:12]}"):
        int8.find(own, info, "auto")
    assert int8.find(own, info, str(digest)[:8]) == int8.find(own, info, str(digest)) == digest


def test_data_sets_that_begin_at_once_have_one_calibration(own: Path, digest: str, cache: Path) -> None:
    """The second finds, once it has made its own, that another was kept meanwhile."""
    info, images = resolve(NORMED, own), {f"{i:064x}": image for i, image in enumerate(pixels(4))}
    backbone = backbone_onnx(NORMED, info, own)
    first = int8.calibrate(own, info, backbone, images, "auto")
    assert int8.calibrate(own, info, backbone, {"1": pixels(9)[8]}, "auto") == first
    assert int8.calibrate(own, info, backbone, {"1": pixels(9)[8]}, "new") != first


def test_a_full_folder_for_temporary_files_is_named(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, room = resolve(NORMED, own), tmp_path / "room"
    room.mkdir()
    backbone = backbone_onnx(NORMED, info, own)
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    room.rmdir()
    with pytest.raises(StoreError, match=f"int8 needs some room in {room} .*set TMPDIR"):
        int8.calibrate(own, info, backbone, {"1": pixels(1)[0]})


@pytest.mark.parametrize("option", ["calibration", "runtime"])
def test_what_is_for_int8_alone_is_refused_elsewhere(tiny: Path, tmp_path: Path, option: str) -> None:
    value = {"calibration": "0123456789", "runtime": "openvino"}[option]
    with pytest.raises(FeatxError, match=f"--{option} {value} is for --precision int8, not fp32; leave it out"):
        sync(tiny, COLOURS, engine=ColourEngine(), cache=tmp_path, **Options(**{option: value}))  # type: ignore[typeddict-item]


def test_a_fitted_transformer_keeps_its_calibration(cache: Path, own: Path, digest: str, tmp_path: Path) -> None:
    """Else rows to be predicted would have another calibration than those that the head has learned from."""
    data = write_images(tmp_path / "data", per_class=4)
    files = [str(file) for file in sorted(data.glob("*/*.png"))]
    shutil.copytree(cache / "calibrations", own / "calibrations")
    given: dict[str, Any] = {"weights": "random", "cache": own, "precision": "int8", "runtime": "onnxruntime"}
    featx.extract(data, NORMED, engine=engine_of(own, digest), **given)
    fitted = ImageFeatures(NORMED.name, **given).fit(files)
    rows = fitted.transform(files)
    assert calibrate(write_images(tmp_path / "other", per_class=2), NORMED, own) != digest  # a newer one
    assert fitted.calibration_ == digest and clone(fitted).calibration == "auto"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(files), rows)
    assert fitted.get_feature_names_out()[-1] == "imagefeatures7"


def test_rows_of_an_engine_that_is_not_installed_name_the_other_ones_option() -> None:
    with pytest.raises(
        FeatxError, match=r'pip install "featx\[openvino\]", or --runtime onnxruntime for features of their own'
    ):
        choose_engine("cpu", "int8", "openvino", frozenset({"int8"}), has_openvino=False)


def test_the_cache_commands_keep_calibrations_and_say_whose_rows_are_whose(cache: Path, own: Path) -> None:
    shutil.copytree(cache / "calibrations", own / "calibrations")
    spec = resolve(NORMED, own).spec(precision="int8", calibration="ab" * 32, engine="onnxruntime")
    with FeatureStore(own, spec) as store:
        store.computed_by("onnxruntime")
        store.append(np.zeros((1, 32), np.uint8), np.zeros((1, 8), np.float32))
    listed = CliRunner().invoke(cli, ["cache", "list", "--cache", str(own)]).output
    assert "calibration abababab by onnxruntime" in listed
    again, needed = (line for line in listed.splitlines() if line.startswith("beside the features"))
    assert "engines" in again and "calibrations" not in again and "needed by those in int8" in needed
    removed = CliRunner().invoke(cli, ["cache", "remove", "calibrations", "--yes", "--cache", str(own)])
    assert removed.exit_code == 1 and "is kept: int8 features and runs need the very files" in removed.output


def test_a_sweep_states_the_size_of_the_int8_backbone(cache: Path, own: Path, digest: str, tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", per_class=6)
    shutil.copytree(cache / "calibrations", own / "calibrations")
    given: dict[str, Any] = {"weights": "random", "cache": own, "precision": "int8"}
    engine = engine_of(own, digest)
    swept = featx.sweep(data, [NORMED], ["ncm"], engine=engine, output=tmp_path / "sweep", **given)
    (point,) = swept.points
    head = (swept.path / point.run / "head.safetensors").stat().st_size
    assert point.megabytes == round((int8.calibrated(own, digest).stat().st_size + head) / 1e6, 3)


def test_a_calibration_is_for_one_backbone_and_one_preprocessing(cache: Path) -> None:
    other = BackboneRequest("small:backbone_normed", weights="random", preprocess=(("mean", (0.5, 0.5, 0.5)),))
    assert int8.find(cache, resolve(other, cache), "auto") is None
    assert int8.find(cache, resolve(BackboneRequest("small:backbone_plain", weights="random"), cache), "auto") is None


@needs_none
def test_int8_is_refused_before_any_image_is_read_where_the_processor_has_no_use_for_it(tmp_path: Path) -> None:
    class Unread(Source):
        def read(self, i: int) -> bytes:
            raise AssertionError("an image was read")

    source = Unread("", tmp_path, ["a.png"], ["a"])
    with pytest.raises(FeatxError, match=r"no integer dot product \(AMX, .*use --precision fp32"):
        sync(source, NORMED, cache=tmp_path / "cache", precision="int8")


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"decode": "gpu"}])
def test_int8_is_for_cpus(tiny: Path, tmp_path: Path, options: Options) -> None:
    where = Options(cache=tmp_path, precision="int8", **options)
    (tmp_path / "features").mkdir()  # a filled cache: no GPU is asked for
    with pytest.raises(FeatxError, match="int8 is for CPUs"):
        sync(tiny, COLOURS, engine=ColourEngine(), **where)


def test_a_network_that_cannot_be_exported_has_no_int8(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise torch.onnx.errors.UnsupportedOperatorError("aten::no such operator", 18, None)

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ExportError, match="int8 needs the exported backbone: use --precision fp32 or bf16"):
        sync(tiny, NORMED, weights="random", engine=ColourlessEngine(), cache=tmp_path, precision="int8")


def test_images_without_labels_calibrate_too_and_unreadable_ones_do_not(tiny: Path, tmp_path: Path) -> None:
    (tiny / "cold" / "000.png").write_bytes(b"not an image")
    files = sorted(tiny.glob("*/*.png"))
    source = Source("", tiny, [file.relative_to(tiny).as_posix() for file in files])
    found = examples(source, Preprocess(resize=36, crop=32), tmp_path)
    assert list(found) == sorted(content_key(file.read_bytes()).hex() for file in files[1:])
    assert list(examples(source, Preprocess(resize=36, crop=32), tmp_path, most=4)) == list(found)[:4]


def test_arithmetic_of_sizes_stays_as_it_is(tmp_path: Path) -> None:
    """Padding worked out from an image's size, as TensorFlow's convolutions do: 58 in 8 bits was 57.97, and so 57."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], "x", to=TensorProto.FLOAT),
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "two"], ["side"], "side"),
        helper.make_node("Cast", ["side"], ["size"], "size", to=TensorProto.FLOAT),
        helper.make_node("Add", ["size", "half"], ["wanted"], "wanted"),
        helper.make_node("Mul", ["x", "half"], ["features"], "features"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [numpy_helper.from_array(np.int64(2), "two"), numpy_helper.from_array(np.float32(0.5), "half")],
    )
    assert int8.arithmetic_of_sizes(helper.make_model(graph)) == ["shape", "side", "size", "wanted"]


def test_a_fit_whose_int8_features_cost_log_loss_is_refused_with_both_figures(own: Path, tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data", per_class=20), own
    calibrate(data, NORMED, cache)
    given = Options(cache=cache, precision="int8", weights="random")
    message = r"int8 against fp32 on \d\d training images, 5 folds: log-loss 0\.\d+ against 0\.\d+ \(\+.*fp32"
    with pytest.raises(HeadError, match=message):
        featx.fit(data, NORMED, engine=ColourlessEngine(), output=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_fit_keeps_what_int8_costs_and_its_run_keeps_the_calibration(own: Path, tmp_path: Path) -> None:
    data, cache = write_images(tmp_path / "data", per_class=20), own
    digest = calibrate(data, NORMED, cache)
    given = Options(cache=cache, precision="int8", weights="random")
    run = featx.fit(data, NORMED, engine=engine_of(cache, digest), output=tmp_path / "run", **given)
    cost = run.report["int8"]
    assert cost["passed"] and cost["folds"] == 5 and 20 < cost["images"] <= 40
    fp32 = featx.extract(data, NORMED, cache=cache, weights="random")  # was computed for the comparison
    assert fp32.report and fp32.report.cached == cost["images"]

    calibrate(write_images(data, per_class=30), NORMED, cache)  # another, newer one, for `auto`
    assert open_run(run.path).config.spec.calibration == digest
    spec = run.config.spec
    assert FeatureSpec.from_dict(spec.to_dict()) == spec
    assert (
        featx.extract(data, NORMED, cache=cache, weights="random", **spec.asked, engine=engine_of(cache, digest)).spec
        == spec
    )
    with pytest.raises(HeadError, match="fine-tuning does not begin in int8"):
        featx.fit(data, NORMED, finetune=FinetuneConfig(mode="full"), **given)


def test_the_graph_takes_any_number_of_images(cache: Path, digest: str) -> None:
    assert session(int8.calibrated(cache, digest)).run(None, {"images": pixels(3)})[0].shape == (3, 8)
