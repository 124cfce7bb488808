"""Inspection of ONNX files, ours and others', whole and damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import WIDTH, average_backbone, exported_file, some_head

from featx.errors import ExportError
from featx.shipping.graph import part_digests
from featx.shipping.inspection import inspect


def test_our_file_says_what_it_is(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "model é.onnx", some_head(classes=12), outputs=("probabilities", "logits"))
    parts = part_digests(onnx.load(path).graph)
    exported_file(path, some_head(classes=12), outputs=("probabilities", "logits"), parts=parts)
    values = inspect(path)
    described = values.to_dict()
    assert json.loads(json.dumps(described)) == described and described["intact"] == values.intact
    assert (values.featx or {})["class_names"] == [f"class {i}" for i in range(12)]
    assert values.bytes == path.stat().st_size and values.metadata == {}
    assert values.inputs == {"images": {"dtype": "uint8", "shape": ["N", "H", "W", 3]}}
    assert values.outputs["logits"] == {"dtype": "float32", "shape": ["N", 12]}
    assert values.parameters >= 48 * WIDTH + 12 * WIDTH + 12
    assert values.operators["Resize"] == 1 and set((values.intact or {}).values()) == {True}
    shown = values.text()
    assert "12: class 0, class 1" in shown and "and 2 more" in shown and "as exported" in shown


def test_a_part_that_changed_since_is_named(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "m.onnx")
    exported_file(path, parts=part_digests(onnx.load(path).graph))
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "head/bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    path.write_bytes(model.SerializeToString())
    values = inspect(path)
    assert values.intact == {"preprocess": True, "backbone": True, "head": False, "other": True, "file": False}
    assert "CHANGED since export: head" in values.text()


def test_anothers_file_is_described_too(tmp_path: Path) -> None:
    model = average_backbone(32)
    model.producer_name = "another"
    helper.set_model_props(model, {"author": "someone"})
    model.graph.input.append(helper.make_tensor_value_info("mix", TensorProto.FLOAT, [48, WIDTH]))  # as old files do
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    values = inspect(tmp_path / "other.onnx")
    assert values.featx is None and "intact" not in values.to_dict()
    assert list(values.inputs) == ["images"] and values.metadata == {"author": "someone"}
    assert "another, not featx" in values.text() and "someone" in values.text()


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x07" * 40])
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"m\.onnx is not an ONNX file"):
        inspect(tmp_path / "m.onnx")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "folder"), (tmp_path / "absent.onnx", "No such file")):
        with pytest.raises(ExportError, match=reason):
            inspect(path)


def test_inspecting_a_file_loads_nothing_that_computes_features(tmp_path: Path) -> None:
    exported_file(tmp_path / "model.onnx", parts={})
    code = "import sys\nfrom featx.shipping.inspection import inspect\ninspect(sys.argv[1])\nprint(*sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "model.onnx")]
    loaded = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "featx.shipping.graph" in loaded
    assert not loaded & {"tqdm", "torch", "onnxruntime", "featx.extraction", "featx.runs", "featx.backbones"}
