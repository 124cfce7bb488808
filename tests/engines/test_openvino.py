"""OpenVINO as an engine: which precision it computes, equal rows for any batch, threads, forks; and no telemetry."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_in_a_fork
from networks import calibrated
from sharing import session_cache

from featx.backbones.loading import load_backbone, resolve
from featx.devices import arithmetic
from featx.engines.onnx import backbone_onnx
from featx.engines.opening import choose_engine, open_engine
from featx.engines.openvino import OpenVinoEngine
from featx.errors import FeatxError
from featx.features import TOLERANCE, difference

REQUEST = calibrated("squeezenet1_1")
BOTH = frozenset({"bf16", "int8"})


@pytest.fixture(scope="module")
def model() -> Path:
    return backbone_onnx(REQUEST, resolve(REQUEST, session_cache()), session_cache())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (19, 3, 224, 224), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole(model: Path, images: np.ndarray) -> np.ndarray:
    return OpenVinoEngine(model, "fp32", threads=2)(images)


def test_its_rows_in_fp32_are_torchs(images: np.ndarray, whole: np.ndarray) -> None:
    with torch.inference_mode():
        eager = load_backbone(REQUEST).module(torch.from_numpy(images)).numpy()
    assert whole.dtype == np.float32 and whole.shape == eager.shape
    assert 0 < difference(whole, eager) <= TOLERANCE


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_rows_do_not_depend_on_the_batch_nor_on_threads(precision: str, model: Path, images: np.ndarray) -> None:
    if precision == "bf16" and precision not in arithmetic():
        pytest.skip("this processor has no bf16 arithmetic: OpenVINO's rows in bf16 are untested here")
    rows = [OpenVinoEngine(model, precision, threads=n)(images) for n in (1, 2, 3)]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])
    engine = OpenVinoEngine(model, precision, batch_size=5, threads=2)
    waiting = [engine.submit(images[i : i + 5]) for i in range(0, 19, 5)]
    assert np.array_equal(np.concatenate([each() for each in waiting]), rows[0])
    assert np.array_equal(np.concatenate([engine(image[None]) for image in images[:3]]), rows[0][:3])


def test_bf16_is_refused_where_openvino_would_compute_fp32_without_a_word(model: Path) -> None:
    if "bf16" in arithmetic():
        pytest.skip("this processor has bf16 arithmetic")
    with pytest.raises(FeatxError, match="no bf16 arithmetic on this processor; use --precision fp32"):
        OpenVinoEngine(model, "bf16")


def test_a_forked_child_computes_the_same_rows(model: Path, images: np.ndarray, whole: np.ndarray) -> None:
    engine = OpenVinoEngine(model, "fp32", threads=2)
    assert np.array_equal(engine(images), whole)

    def child() -> None:
        assert np.array_equal(engine(images), whole)

    run_in_a_fork(child)


def test_threads_that_open_it_first_at_the_same_time_do_not_wait_for_each_other_for_ever(model: Path) -> None:
    """Its module's first call sets it up, holding one lock while it waits for the interpreter's."""
    code = f"""
import threading
from pathlib import Path
import numpy as np
from featx.engines.openvino import OpenVinoEngine
pixels = np.zeros((8, 3, 224, 224), np.uint8)
def work():
    assert OpenVinoEngine(Path({str(model)!r}), "fp32", threads=2)(pixels).shape == (8, 512)
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_its_telemetry_is_not_imported_and_nothing_is_sent_or_written_at_home(model: Path, tmp_path: Path) -> None:
    code = f"""
import sys
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event.startswith("socket.") else None)
from pathlib import Path
import numpy as np
from featx.engines.openvino import OpenVinoEngine
OpenVinoEngine(Path({str(model)!r}), "fp32")(np.zeros((1, 3, 224, 224), np.uint8))
found = [name for name in sys.modules if name.split(".")[0] == "openvino_telemetry"]
print("asked for sockets:", len(asked), "modules:", len(found))
import openvino_telemetry  # other code of the process finds it as before
"""
    home = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=home, capture_output=True, text=True)
    assert done.stdout.split() == ["asked", "for", "sockets:", "0", "modules:", "0"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "precision", "recorded", "has_openvino", "name"),
    [
        ("cpu", "fp32", None, True, "onnxruntime"),
        ("cpu", "fp32", "torch-cpu", True, "torch-cpu"),
        ("cpu", "bf16", None, True, "openvino"),
        ("cpu", "bf16", None, False, "torch-cpu"),
        ("cpu", "bf16", "torch-cpu", True, "torch-cpu"),  # a store is continued by what began it
        ("cpu", "bf16", "openvino", True, "openvino"),
        ("cpu", "int8", "onnxruntime", True, "onnxruntime"),
        ("cpu", "int8", None, False, "onnxruntime"),
        ("cuda:0", "bf16", None, True, "torch-cuda"),
    ],
)
def test_a_rule_chooses_the_engine(
    place: str, precision: str, recorded: str | None, has_openvino: bool, name: str
) -> None:
    assert choose_engine(place, precision, recorded, BOTH, has_openvino) == name


@pytest.mark.parametrize(
    ("precision", "recorded", "native", "message"),
    [
        ("bf16", None, frozenset({"int8"}), "no bf16 arithmetic .*use --precision fp32"),
        ("bf16", "openvino", BOTH, r'come from OpenVINO, which is not installed; pip install "featx\[openvino\]"'),
        ("fp32", "openvino", BOTH, r"engine openvino, and here onnxruntime would run"),
        ("fp16", None, BOTH, "fp16 is for GPUs"),
    ],
)
def test_what_no_engine_can_compute_here_is_refused(
    precision: str, recorded: str | None, native: frozenset[str], message: str
) -> None:
    with pytest.raises(FeatxError, match=message):
        choose_engine("cpu", precision, recorded, native, False)


def test_a_bf16_store_that_torch_began_goes_on_where_the_processor_has_no_bf16() -> None:
    assert choose_engine("cpu", "bf16", "torch-cpu", frozenset(), True) == "torch-cpu"


def test_new_bf16_features_are_refused_on_this_processor_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(FeatxError, match="use --precision fp32, or a machine that has it"):
        open_engine(REQUEST, resolve(REQUEST, session_cache()), cache=tmp_path, precision="bf16", native=frozenset())
    assert not list(tmp_path.iterdir())


def test_the_processors_arithmetic_is_read_from_what_linux_says(tmp_path: Path) -> None:
    said = tmp_path / "cpuinfo"
    for flags, found in (
        ("flags : fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8", BOTH),
        ("flags : fpu avx2 avx_vnni", {"int8"}),
        ("Features : fp asimd asimddp bf16", BOTH),
        ("flags : fpu avx avx2 fma", frozenset()),
    ):
        said.write_text(f"processor : 0\n{flags}\n")
        assert arithmetic(said) == found
    assert arithmetic(tmp_path / "absent") == BOTH
