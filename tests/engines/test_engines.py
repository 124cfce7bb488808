"""Every engine gives the rows that eager torch gives, whatever else is in the batch."""

from __future__ import annotations

import copy
import ctypes
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import calibrated, resnet18_rewritten
from sharing import session_cache

from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.engines.onnx import OnnxEngine, _lasting, backbone_onnx, reason, to_onnx
from featx.engines.opening import open_engine
from featx.engines.torch import CudaEngine, prepared
from featx.errors import ExportError, FeatxError, StoreError, WeightsError
from featx.features import TOLERANCE, difference
from featx.records import read_record, write_record

REQUEST = calibrated("resnet18")
BF16, FP16 = 3e-2, 5e-3
"""The largest `difference` of this network's rows from fp32's."""


@pytest.fixture(scope="module")
def info() -> BackboneInfo:
    return resolve(REQUEST, session_cache())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return noise(9, 224)


@pytest.fixture(scope="module")
def eager(images: np.ndarray) -> np.ndarray:
    """What torch gives by itself, one batch, fp32."""
    with torch.inference_mode():
        return load_backbone(REQUEST).module(torch.from_numpy(images)).numpy()


def noise(count: int, crop: int) -> np.ndarray:
    """Images of many brightnesses and grains, `uint8 [count, 3, crop, crop]`."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (count, 3, crop // 16 + 1, crop // 16 + 1))
    fine = rng.integers(-20, 21, (count, 3, crop, crop))
    smooth = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :crop, :crop]
    return np.clip(smooth + fine, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("engine", "precision"), [("onnxruntime", "fp32"), ("torch-cpu", "fp32"), ("torch-cpu", "bf16")]
)
def test_every_engine_agrees_with_eager_torch_for_any_batch(
    engine: str, precision: str, info: BackboneInfo, images: np.ndarray, eager: np.ndarray
) -> None:
    opened = open_engine(
        REQUEST, info, cache=session_cache(), device="cpu", precision=precision, batch_size=4, engine=engine, threads=2
    )
    assert opened.name == engine
    assert opened.batch_size == 4
    if precision == "bf16":  # half a second an image where the processor has no bf16
        images, eager = images[:5], eager[:5]
    # the last batch is 1 image
    whole = np.concatenate([opened(images[start : start + 4]) for start in range(0, len(images), 4)])
    assert whole.dtype == np.float32
    assert whole.shape == (len(images), 512)
    assert difference(whole, eager) <= (TOLERANCE if precision == "fp32" else BF16)
    if precision != "fp32":
        assert difference(whole, eager) > TOLERANCE  # else it would be fp32 under another name
    # alone, in another place of the batch and beside other images: the same row, bit for bit
    alone = np.concatenate([opened(image[None]) for image in images])
    assert np.array_equal(alone, whole)
    assert np.array_equal(opened(images[[-1, 0, 3]]), whole[[-1, 0, 3]])
    first, second = opened.submit(images[:4]), opened.submit(images[4:8])
    assert np.array_equal(second(), whole[4:8])
    assert np.array_equal(first(), whole[:4])
    opened.close()


def test_rows_depend_on_the_image(eager: np.ndarray) -> None:
    """The tolerances mean something only where images differ by much more."""
    apart = [difference(eager[i : i + 1], eager[j : j + 1]) for i in range(9) for j in range(i)]
    assert min(apart) > BF16
    assert np.abs(eager).max() > 1


def test_thread_count_does_not_change_onnxruntime_rows(info: BackboneInfo, images: np.ndarray) -> None:
    rows = [
        open_engine(REQUEST, info, cache=session_cache(), device="cpu", batch_size=9, threads=n)(images)
        for n in (1, 2, 3)
    ]
    assert difference(rows[1], rows[0]) <= TOLERANCE
    assert difference(rows[2], rows[0]) <= TOLERANCE


@pytest.mark.parametrize(("threads", "size", "sizes"), [(2, 32, [8, 8, 8, 8]), (1, 10, [5, 5]), (4, 9, [3, 3, 3])])
def test_a_batch_is_cut_into_pieces_of_one_size(threads: int, size: int, sizes: list[int]) -> None:
    taken: list[int] = []

    class Counting(OnnxEngine):
        def _run(self, images: np.ndarray) -> np.ndarray:
            taken.append(len(images))
            return images

    path = resnet18_rewritten()[1]
    assert path.stat().st_size // (16 << 20) == 9  # more images than that share its weights in no piece
    engine = Counting(path, size, threads)
    assert engine(np.zeros((size, 1), np.uint8)).shape == (size, 1)
    assert taken == sizes
    engine.close()


def test_difference_is_the_worst_rows_share_of_its_largest_entry() -> None:
    reference = np.array([[1.0, -4.0], [100.0, 0.0]], np.float32)
    assert difference(np.array([[1.0, -3.6], [100.1, 0.0]]), reference) == pytest.approx(0.1)
    assert difference(reference, reference) == 0
    assert np.isnan(difference(np.full((2, 2), np.nan), reference))
    with pytest.raises(FeatxError, match="cannot be compared"):
        difference(reference[:1], reference)
    with pytest.raises(FeatxError, match="cannot be compared"):
        difference(reference[:0], reference[:0])


def test_folding_batch_norm_leaves_no_batch_norm_and_the_same_rows(images: np.ndarray, eager: np.ndarray) -> None:
    backbone = load_backbone(REQUEST)
    module = prepared(backbone.module, torch.float32, torch.device("cpu"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.module.modules()) == 20
    with torch.inference_mode():
        assert difference(module(torch.from_numpy(images)).numpy(), eager) <= TOLERANCE


def test_the_exported_backbone_is_plain_and_says_nothing_of_its_maker(info: BackboneInfo) -> None:
    path = backbone_onnx(REQUEST, info, session_cache())
    assert path.parent == session_cache() / "engines"
    model = onnx.load(path)
    onnx.checker.check_model(model)
    (images,), (features,) = model.graph.input, model.graph.output
    assert (images.name, features.name) == ("images", "features")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [d.dim_value for d in images.type.tensor_type.shape.dim] == [0, 3, 224, 224]
    assert images.type.tensor_type.shape.dim[0].dim_param == "N"
    assert [d.dim_value for d in features.type.tensor_type.shape.dim][1:] == [512]
    assert [o.version for o in model.opset_import if o.domain == ""] == [18]
    assert not any(t.external_data for t in model.graph.initializer)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    text = path.read_bytes()
    for word in (b"site-packages", b"torchvision", str(Path.cwd()).encode(), str(Path.home()).encode() + b"/"):
        assert word not in text


def test_a_warm_engine_needs_no_torch(info: BackboneInfo) -> None:
    backbone_onnx(REQUEST, info, session_cache())
    script = f"""
import sys, json, pathlib, numpy
from featx.backbones.request import BackboneRequest
from featx.backbones.loading import resolve
from featx.engines.opening import open_engine
request = BackboneRequest({REQUEST.name!r}, weights={REQUEST.weights!r})
cache = pathlib.Path({str(session_cache())!r})
info = resolve(request, cache)
engine = open_engine(request, info, cache=cache, device="cpu")
rows = engine(numpy.zeros((1, 3, 224, 224), numpy.uint8))
heavy = [m for m in ("torch", "torchvision", "onnx", "sklearn", "h5py") if m in sys.modules]
print(json.dumps([engine.name, list(rows.shape), heavy]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["onnxruntime", [1, 512], []]
    assert done.stderr == ""


def test_exporting_is_silent_and_a_damaged_export_is_made_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small = resolve(request, tmp_path)
    path = backbone_onnx(request, small, tmp_path)
    data = path.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 4
    path.write_bytes(changed)
    assert backbone_onnx(request, small, tmp_path) == path
    assert path.read_bytes() == data
    path.with_suffix(".json").write_text("{")
    assert backbone_onnx(request, small, tmp_path).read_bytes() == data
    assert capfd.readouterr() == ("", "")


def test_where_export_fails_torch_runs_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small = resolve(request, tmp_path)
    calls = []

    def fails(*args: object, **kwargs: object) -> None:
        calls.append(1)
        raise torch.onnx.errors.UnsupportedOperatorError("aten::no such operator", 18, None)

    monkeypatch.setattr(torch.onnx, "export", fails)
    for _ in range(2):  # the second time it is known, and not tried again
        with pytest.warns(RuntimeWarning, match=r"cannot be exported .*no such operator.*torch runs it"):
            engine = open_engine(request, small, cache=tmp_path, device="cpu")
        assert engine.name == "torch-cpu"
    assert calls == [1, 1]  # one exporter, then the other
    with pytest.raises(FeatxError, match=r"cannot be exported .*come from the engine onnxruntime"):
        open_engine(request, small, cache=tmp_path, device="cpu", engine="onnxruntime")
    pixels = noise(3, small.preprocess.crop)
    with torch.inference_mode():
        reference = load_backbone(request).module(torch.from_numpy(pixels)).numpy()
    assert difference(engine(pixels), reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (torch.onnx.errors.UnsupportedOperatorError("aten::x", 18, None), True),
        (torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode(None), True),  # type: ignore[arg-type]
        (NotImplementedError("aten::x"), True),
        (MemoryError(), False),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (torch.OutOfMemoryError(), False),
    ],
)
def test_only_an_error_that_will_come_again_lasts(error: Exception, lasts: bool) -> None:
    assert _lasting(error) == lasts
    wrapped = torch.onnx.OnnxExporterError("This is step 1/3")
    wrapped.__cause__ = error
    assert _lasting(wrapped) == lasts


def test_what_went_wrong_once_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small, real = resolve(request, tmp_path), torch.onnx.export

    def fails(*args: object, dynamo: bool, **kwargs: object) -> None:
        if dynamo:  # one of the two ways can never work, the other may
            raise torch.onnx.errors.SymbolicValueError("no way", None)  # type: ignore[arg-type]
        raise MemoryError

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.warns(RuntimeWarning, match="torch runs it instead"):
        assert open_engine(request, small, cache=tmp_path, device="cpu").name == "torch-cpu"
    monkeypatch.setattr(torch.onnx, "export", real)
    assert open_engine(request, small, cache=tmp_path, device="cpu").name == "onnxruntime"


def test_a_record_of_an_older_version_that_nothing_works_heals(tmp_path: Path) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small = resolve(request, tmp_path)
    path = backbone_onnx(request, small, tmp_path)
    record = read_record(path.with_suffix(".json"))[0]
    path.unlink()
    known = {name: record[name] for name in ("graph", "libraries")}
    write_record(path.with_suffix(".json"), known | {"error": "cannot be exported (KeyError: 'a')"})
    assert backbone_onnx(request, small, tmp_path).read_bytes()


def test_where_tracing_fails_the_program_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small, real = resolve(request, tmp_path), torch.onnx.export

    def fails(*args: Any, dynamo: bool, **options: Any) -> Any:
        if not dynamo:
            raise RuntimeError("not in this torch")
        return real(*args, dynamo=True, **options)

    monkeypatch.setattr(torch.onnx, "export", fails)
    engine = open_engine(request, small, cache=tmp_path, device="cpu")
    assert engine.name == "onnxruntime"
    pixels = noise(3, small.preprocess.crop)
    with torch.inference_mode():
        reference = load_backbone(request).module(torch.from_numpy(pixels)).numpy()
    assert difference(engine(pixels), reference) <= TOLERANCE


def test_a_graph_that_tracing_fixed_to_its_batch_is_not_taken(tmp_path: Path) -> None:
    """The captured program has the number of images as a symbol, and is taken instead."""
    request = BackboneRequest("small:backbone_fixed", weights="random")
    small = resolve(request, tmp_path)
    engine = open_engine(request, small, cache=tmp_path, device="cpu")
    assert engine.name == "onnxruntime"
    pixels = noise(5, small.preprocess.crop)
    with torch.inference_mode():
        reference = load_backbone(request).module(torch.from_numpy(pixels)).numpy()
    assert difference(engine(pixels), reference) <= TOLERANCE


def test_what_went_wrong_first_is_said_in_one_line() -> None:
    try:
        try:
            raise NotImplementedError("aten::strange has no ONNX\nand a trace")
        except NotImplementedError as cause:
            raise RuntimeError("\x1b[96mFailed to export\x1b[0m\nThis is step 1/3") from cause
    except RuntimeError as error:
        assert reason(error) == "NotImplementedError: aten::strange has no ONNX"
    assert reason(RuntimeError("\n\x1b[96mcoloured\x1b[0m\nmore")) == "RuntimeError: coloured"


def test_an_export_that_differs_from_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small, real = resolve(request, tmp_path), torch.onnx.export

    def wrong(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        changed = copy.deepcopy(module)
        with torch.no_grad():
            next(changed.parameters()).add_(0.1)
        return real(changed, *args, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.warns(RuntimeWarning, match=r"its rows differ from torch's by \d.*, more than 1e-05"):
        engine = open_engine(request, small, cache=tmp_path, device="cpu")
    assert engine.name == "torch-cpu"


def test_a_network_too_large_for_one_file_is_not_exported(info: BackboneInfo) -> None:
    large = torch.nn.Linear(50_000, 10_001, bias=False, device="meta")  # 2.0002 GB, of which none is allocated
    with pytest.raises(ExportError, match="larger than the 2 GB"):
        to_onnx(large, info)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    (tmp_path / "engines").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"engines.*--cache"):
        backbone_onnx(request, resolve(request, tmp_path), tmp_path)


def test_weights_that_changed_since_they_were_resolved_are_an_error(tmp_path: Path) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    stale = replace(resolve(request, tmp_path), weights_digest="00" * 32)
    with pytest.raises(WeightsError, match="start again"):
        open_engine(request, stale, cache=tmp_path, device="cpu")
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device is auto, cpu"),
        ({"precision": "int4"}, "precision is one of"),
        ({"precision": "fp16", "device": "cpu"}, "use bf16"),
        ({"engine": "tensorrt"}, "come from the engine tensorrt, and here .* would run"),
    ],
)
def test_what_an_engine_cannot_be_is_refused(options: dict[str, object], message: str, info: BackboneInfo) -> None:
    with pytest.raises(FeatxError, match=message):
        open_engine(REQUEST, info, cache=session_cache(), **options)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu_in_silence(
    info: BackboneInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FeatxError, match="no CUDA GPU"):
        open_engine(REQUEST, info, cache=session_cache(), device="cuda")
    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(FeatxError, match=r"engine torch-cuda, and here onnxruntime would run.*use a GPU"):
        open_engine(REQUEST, info, cache=session_cache(), engine="torch-cuda")
    with pytest.raises(FeatxError, match=r"engine onnxruntime, and here (openvino|torch-cpu) would run.*--device cpu"):
        open_engine(REQUEST, info, cache=session_cache(), engine="onnxruntime", precision="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_engine(REQUEST, info, cache=session_cache()).name == "onnxruntime"


def test_a_torch_batch_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    request = BackboneRequest("small:backbone_normed", weights="random")
    small = resolve(request, tmp_path)
    engine = open_engine(request, small, cache=tmp_path, device="cpu", engine="torch-cpu", batch_size=2)
    good = noise(2, small.preprocess.crop)
    assert len(engine(good)) == 2
    for bad in (good[:0], noise(3, small.preprocess.crop), good[:, :, 1:], good.astype(np.float32)):
        with pytest.raises(FeatxError, match=r"expected uint8 \[B, 3"):
            engine(bad)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gpu_agrees_with_the_cpu(precision: str, images: np.ndarray, eager: np.ndarray) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: the CUDA engine is untested on this machine")
    engine = CudaEngine(load_backbone(REQUEST), "cuda:0", precision, 4)
    calls = [engine.submit(images[start : start + 4]) for start in range(0, 9, 4)]
    rows = np.concatenate([call() for call in calls])
    assert difference(rows, eager) <= {"fp32": TOLERANCE, "bf16": BF16, "fp16": FP16}[precision]
    assert np.array_equal(np.concatenate([engine(image[None]) for image in images]), rows)
    there = torch.from_numpy(images).to("cuda:0")  # as a decoder on the GPU leaves them
    calls = [engine.submit(there[start : start + 4].clone()) for start in range(0, 9, 4)]
    assert np.array_equal(np.concatenate([call() for call in calls]), rows)


@pytest.mark.gpu
def test_a_network_with_a_branch_on_its_values_runs_on_the_gpu_without_a_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: networks without a CUDA graph are untested on this machine")
    backbone = load_backbone(BackboneRequest("small:backbone_branching", weights="random"))
    engine = CudaEngine(backbone, "cuda:0", "fp32", 4)
    assert engine.graph is None
    pixels = noise(9, backbone.info.preprocess.crop)
    with torch.inference_mode():
        reference = backbone.module(torch.from_numpy(pixels)).numpy()
    calls = [engine.submit(pixels[start : start + 4]) for start in range(0, 9, 4)]
    assert difference(np.concatenate([call() for call in calls]), reference) <= TOLERANCE
