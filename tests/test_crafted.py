"""Files that somebody crafted, with a right digest: each parser reads them or refuses them in one line.

`make soak` tries far more of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import COLOURS, ColourEngine, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import average_backbone, exported_file, write_sealed
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from featx.backbones.weights import read_state
from featx.cache.memo import KeyMemo
from featx.cache.shards import read_form
from featx.cli import cli
from featx.engines.onnx import session
from featx.engines.wire import scan
from featx.errors import DamageError, ExportError, FeatxError, HeadError, NewerError, RunError, WeightsError
from featx.features import FeatureSpec
from featx.finetuning.checkpoints import Checkpoints
from featx.fitting import fit
from featx.head import Head
from featx.measuring.curve import Curve
from featx.records import TENSOR_SEAL, array_bytes, array_of, opened, read_record, warn_older, write_record
from featx.records import write_sealed as seal_json
from featx.reporting.report import write_report
from featx.runs import Run, open_run
from featx.seals import BLANK, MARK, SEAL, is_sealed, seal
from featx.shipping import card
from featx.shipping.deployed import Model, open_session, parse_metadata
from featx.shipping.inspection import inspect
from featx.sources.opening import open_source
from featx.text import from_json, to_json

ODD: list[Any] = [None, True, -1, 2**62, 1e300, "", "x" * 300, "a\nb", [], {}, [[]], {"a": {}}, "\udcff"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a curve, a record of its export and a cache."""
    root = tmp_path_factory.mktemp("crafted")
    data = write_images(root / "data", per_class=20)
    run = fit(data, COLOURS, engine=ColourEngine(), cache=root / "cache", output=root / "run")
    rows = [{"images": n, "accuracy": 0.9, "low": 0.8, "high": 1.0, "subsets": 2, "spread": 0.1} for n in (8, 16)]
    curve = {"rows": rows, "forecast": None, "verdict": "No forecast.", "seed": 0, "repeats": 2, "measured_on": 8}
    write_record(run.path / "curve.json", curve)
    record = {"passed": True, "file": "model.onnx", "sha256": "", "equal_labels": 8, "images": 8}
    checks = {"probabilities": {"value": 1e-3, "limit": 5e-3}}
    write_record(run.path / "parity.json", record | {"checks": checks})
    return run


def places(values: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside JSON values."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [here] * bool(here) + [way for name, value in inside for way in places(value, (*here, name))]


def changed(values: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at this place."""
    copy: Any = json.loads(json.dumps(values))
    holder = copy
    for name in way[:-1]:
        holder = holder[name]
    holder[way[-1]] = value
    return copy


def read_everything(run: Path) -> None:
    """What commands read from a run, but for drawing."""
    opened_run = open_run(run)
    card.card(opened_run)
    Curve.from_dict(read_record(run / "curve.json")[0])
    assert opened_run.request.name


def survives(read: Callable[[], Any], what: Any, refusal: type[ValueError] = FeatxError) -> bool:
    """Whether something is read; False where it is refused with a text. Any other error is a traceback for a user."""
    try:
        read()
        return True
    except refusal as error:
        assert str(error), what
        return False


@pytest.mark.parametrize("name", ["config.json", "report.json", "curve.json", "parity.json"])
def test_a_wrong_value_anywhere_in_a_runs_json_is_read_or_refused(made: Run, name: str, tmp_path: Path) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    values, _ = opened((run / name).read_bytes())
    refused = 0
    for number, way in enumerate(places(values)):
        for value in (ODD[number % len(ODD)], ODD[(number * 5 + 3) % len(ODD)]):
            write_record(run / name, changed(values, way, value))
            # a curve's reader is not a user's: the report page names the file in its error
            refusal = ValueError if name == "curve.json" else FeatxError
            refused += not survives(lambda: read_everything(run), (way, value), refusal)
    assert refused > len(places(values)) / 4


# Parsers whose callers name the file: they refuse by any `ValueError`, all others by a `FeatxError`.
INNER = ("JSON", "head.safetensors", "npy", "ONNX from nothing")


def hammer(examples: int, name: str, strategy: st.SearchStrategy[Any], read: Callable[[Any], Any]) -> None:
    """Give a parser `examples` inputs: each is read, or refused with a text."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def is_read_or_refused(value: Any) -> None:
        survives(lambda: read(value), value, ValueError if name in INNER else FeatxError)

    is_read_or_refused()


def spliced(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with a piece of it replaced by other bytes."""
    at = st.integers(0, len(data))
    return st.builds(lambda a, n, new: data[:a] + new + data[a + n :], at, st.integers(0, 40), st.binary(max_size=40))


def resealed(data: bytes) -> bytes:
    """The bytes with the digest that they should have, where the place for it is still there."""
    at = data.rfind(MARK)
    blank = data[:at] + BLANK.encode() + data[at + len(BLANK) :]
    return seal(blank) if at >= 0 and len(blank) == len(data) else data


def parsers(made: Run, folder: Path) -> dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], Any]]]:
    """Every parser of a file, with what it is given."""
    folder.mkdir(exist_ok=True)
    report, _ = opened((made.path / "report.json").read_bytes())
    config, _ = opened((made.path / "config.json").read_bytes())
    head, array = made.head.to_bytes(), array_bytes(np.arange(9, dtype=np.uint64))
    model = exported_file(folder / "m.onnx").read_bytes()
    raw = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props if entry.key != "seal"}
    spec = made.config.spec
    form = {"kind": "featx features 1", "spec": spec.to_dict(), "engine": "colour", "row_shape": [48]}
    written = KeyMemo(folder, folder)
    written.record(["a"], np.ones((1, 4), np.int64), np.ones((1, 32), np.uint8), np.ones(1, bool))
    (memo,) = written.folder.iterdir()

    def run_with(name: str, values: dict[str, Any]) -> Callable[[tuple[tuple[Any, ...], Any]], Any]:
        def read(change: tuple[tuple[Any, ...], Any]) -> None:
            run = folder / f"run-{name}"
            if not run.exists():
                shutil.copytree(made.path, run)
            (run / name).write_bytes(seal(json.dumps(changed(values, *change) | SEAL).encode()))
            read_everything(run)

        return read

    def parse_model(data: bytes) -> None:
        path = folder / "crafted.onnx"
        path.write_bytes(resealed(data))
        inspect(path)
        Model(path)(np.zeros((1, 40, 40, 3), np.uint8))

    def parse_form(change: tuple[tuple[Any, ...], Any]) -> None:
        seal_json(folder / "spec.json", changed(form, *change))
        read_form(folder / "spec.json")

    def parse_memo(data: bytes) -> None:
        memo.write_bytes(data)
        KeyMemo(folder, folder).lookup(["a"], np.zeros((1, 4), np.int64))

    def parse_manifest(lines: list[str]) -> None:
        (folder / "list.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        open_source(folder / "list.jsonl")

    changes = {
        name: st.tuples(st.sampled_from(places(values)), VALUES)
        for name, values in {"config.json": config, "report.json": report, "spec.json": form}.items()
    }
    texts = st.text(max_size=60) | st.sampled_from(["Infinity", "NaN", "1e999", "[" * 5000, "9" * 5000, '{"a":' * 900])
    return {
        "JSON": (texts | VALUES.map(lambda value: json.dumps(value)), from_json),
        "config.json": (changes["config.json"], run_with("config.json", config)),
        "report.json": (changes["report.json"], run_with("report.json", report)),
        "spec.json": (changes["spec.json"], parse_form),
        "head.safetensors": (spliced(head).map(resealed), Head.from_bytes),
        "npy": (spliced(array).map(resealed), lambda data: array_of(data, "<u8", 1)),
        "ONNX": (spliced(model), parse_model),
        "ONNX from nothing": (st.binary(max_size=200), scan),
        "metadata": (
            st.tuples(st.sampled_from(sorted(raw)), texts | VALUES.map(json.dumps)),
            lambda change: parse_metadata(raw | dict([change]), Path("m.onnx")),
        ),
        "memo": (spliced(memo.read_bytes()), parse_memo),
        "manifest": (st.lists(texts | VALUES.map(json.dumps), max_size=3), parse_manifest),
    }


PARSERS = [
    "JSON",
    "config.json",
    "report.json",
    "spec.json",
    "head.safetensors",
    "npy",
    "ONNX",
    "ONNX from nothing",
    "metadata",
    "memo",
    "manifest",
]


@pytest.mark.parametrize("name", PARSERS)
def test_crafted_bytes_are_read_or_refused(made: Run, name: str, tmp_path: Path) -> None:
    found = parsers(made, tmp_path / "crafted")
    assert list(found) == PARSERS
    hammer(60, name, *found[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", PARSERS)
def test_soak_of_crafted_bytes(made: Run, name: str, tmp_path: Path) -> None:
    hammer(20_000, name, *parsers(made, tmp_path / "crafted")[name])


@pytest.mark.soak
def test_soak_of_pages_of_crafted_reports(made: Run, tmp_path: Path) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    values, _ = opened((run / "report.json").read_bytes())
    for way in places(values):
        for value in ODD:
            write_record(run / "report.json", changed(values, way, value))
            survives(lambda: write_report(run, layout="pca"), (way, value))


@pytest.mark.parametrize("text", ["Infinity", "[NaN]", "-Infinity", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 900])
def test_json_holds_finite_numbers_and_is_not_deep(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|64 bits|nested"):
        from_json(text)
    assert from_json('{"a": [1, 2.5, "[[["], "b": "\\udcff"}') == {"a": [1, 2.5, "[[["], "b": "\udcff"}
    assert from_json(to_json({"n": 2**63 - 1, "x": 1e-300})) == {"n": 2**63 - 1, "x": 1e-300}


@pytest.mark.parametrize("tail", ['\\"' * 500_000, '"' + '\\"' * 500_000 + "\\"])
def test_a_text_without_an_end_is_read_once_not_once_for_each_of_its_quotes(tail: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"nested|delimiter|Expecting|Unterminated"):
        from_json("[" * 60 + "],[" * 20 + tail)
    assert time.process_time() - started < 2


def test_a_flipped_bit_anywhere_breaks_a_seal_wherever_it_is() -> None:
    for data in (b"{" + BLANK.encode() + b"}", BLANK.encode() + b" behind", b"before " + BLANK.encode()):
        whole, at_mark = seal(data), data.index(MARK)
        assert is_sealed(whole) and len(whole) == len(data)
        for at in {*range(len(whole))} - {*range(at_mark, at_mark + len(MARK))}:
            with pytest.raises(ValueError, match="SHA-256"):
                is_sealed(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="SHA-256"):
            is_sealed(whole + MARK)
    assert not is_sealed(b"nothing of the kind")


def test_classes_may_be_called_like_the_mark(tmp_path: Path) -> None:
    names = (BLANK, "featx-sha256:", *(f"featx-sha256:{i}" for i in range(20)))
    head = Head(np.ones((22, 12), np.float32), np.zeros(22, np.float32), names)
    for _ in range(20):  # safetensors writes metadata in any order
        read, sealed = Head.from_bytes(head.to_bytes())
        assert read.class_names == names and sealed
    write_record(tmp_path / "a.json", {"labels": list(names), BLANK: 1})
    assert read_record(tmp_path / "a.json") == ({"labels": list(names), BLANK: 1}, True)


def test_a_file_of_todays_format_without_its_digest_is_damaged_and_an_older_one_is_read_with_one_note(
    made: Run, tmp_path: Path
) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    for name in ("config.json", "report.json"):
        values = json.loads((run / name).read_bytes())
        del values["seal"]
        whole = (run / name).read_bytes()
        (run / name).write_text(json.dumps(values))
        with pytest.raises(FeatxError, match=rf"{name} is damaged \(it has lost the SHA-256"):
            open_run(run)
        (run / name).write_bytes(whole)

    for name in ("config.json", "report.json"):  # as before there were digests
        values = json.loads((run / name).read_bytes())
        (run / name).write_text(json.dumps({k: v for k, v in values.items() if k not in ("seal", "format", "files")}))
    with pytest.raises(FeatxError, match=r"head.safetensors is damaged \(it has lost"):
        open_run(run)
    head = (run / "head.safetensors").read_bytes()
    length = struct.unpack("<Q", head[:8])[0]
    header = json.loads(head[8 : 8 + length])
    for name in TENSOR_SEAL:
        del header["__metadata__"][name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (run / "head.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + head[8 + length :])
    np.save(run / "trained-on.npy", made.trained_on)
    with pytest.warns(UserWarning, match="written by an older featx, without a digest") as noted:
        older = open_run(run)
    assert len(noted) == 1
    assert np.array_equal(older.head.weight, made.head.weight) and older.report == made.report


def test_files_of_a_newer_format_are_not_called_damaged(made: Run, tmp_path: Path) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    for name in ("report.json", "config.json"):
        values = json.loads((run / name).read_bytes()) | {"format": 3, "seal": BLANK}
        (run / name).write_bytes(seal(json.dumps(values).encode()))
        with pytest.raises(FeatxError, match=rf"{name} cannot be read: it is of format 3, .* reads 2; update featx"):
            open_run(run)
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    for entry in proto.metadata_props:
        entry.value = {"format": "3", "seal": json.dumps(BLANK)}.get(entry.key, entry.value)
    (tmp_path / "m.onnx").write_bytes(seal(proto.SerializeToString()))
    with pytest.raises(ExportError, match=r"m\.onnx cannot be read: it is of format 3, .* reads 2; update featx"):
        Model(tmp_path / "m.onnx")


def test_an_older_run_that_is_read_twice_is_noted_once(made: Run) -> None:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("default")
        for _ in range(2):
            warn_older(made.path)
        exec("warn_older(path)", {"warn_older": warn_older, "path": made.path})  # from elsewhere
        warn_older(made.path / "model.onnx")
    assert len(noted) == 2


def test_a_checkpoint_whose_metadata_are_no_objects_is_refused(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    checkpoints = Checkpoints(tmp_path, {"lr": 0.1})
    for metadata in ({"configuration": "[1]", "progress": "{}"}, {"configuration": '{"lr": 0.1}', "progress": "7"}):
        data = save_torch(network.state_dict(), metadata | TENSOR_SEAL)
        (tmp_path / "last.safetensors").write_bytes(seal(data))
        with pytest.raises(FeatxError, match=r"last\.safetensors cannot be read \(Expected `object`"):
            checkpoints.load(network, optimizer)


def test_a_head_of_another_run_is_not_this_runs(made: Run, tmp_path: Path) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    other = Head(made.head.weight * 2, made.head.bias, made.head.class_names)
    (run / "head.safetensors").write_bytes(other.to_bytes())
    with pytest.raises(FeatxError, match=r"head.safetensors is damaged \(it is not the file that report.json"):
        open_run(run)


# --- pipes and devices


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_at_once_or_passed_over(tiny: Path, tmp_path: Path, kind: str) -> None:
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")

    cache = tmp_path / "cache"
    run = fit(tiny, COLOURS, engine=ColourEngine(), cache=cache, output=tmp_path / "run")
    segment = KeyMemo(cache, tiny).folder / "-".join(["0" * 16] * 2)
    segment.parent.mkdir(parents=True, exist_ok=True)
    for path in [segment, *(cache / "features").rglob("*.json")]:
        put(path)
    engine = ColourEngine()
    again = fit(tiny, COLOURS, engine=engine, cache=cache, output=tmp_path / "again")
    assert np.array_equal(again.head.weight, run.head.weight) and engine.images == 0

    for name in ("head.safetensors", "trained-on.npy", "report.json", "config.json"):
        copy = shutil.copytree(again.path, tmp_path / f"run-{name}")
        put(copy / name)
        with pytest.raises(FeatxError, match="not a file"):
            open_run(copy)
    for name in ("weights.pth", "weights.safetensors"):
        put(tmp_path / name)
        with pytest.raises(WeightsError, match="it is a pipe, socket or device, not a file"):
            read_state(tmp_path / name)
    put(tmp_path / "m.onnx")
    for read in (Model, inspect):
        with pytest.raises(ExportError, match="not a file"):
            read(tmp_path / "m.onnx")


# --- the cache's own records


def test_an_infinite_row_shape_is_damage(tmp_path: Path) -> None:
    form = {"kind": "featx features 1", "spec": FeatureSpec("custom/x", "00" * 32).to_dict(), "engine": "colour"}
    path = tmp_path / "spec.json"
    for shape in (float("inf"), [float("inf")], ["a"], [1.5], None, [10**30]):
        seal_json(path, {**form, "row_shape": shape})
        with pytest.raises(DamageError, match=r"spec\.json.*(Infinity|expected|Expected|64 bits)"):
            read_form(path)
    newer = {**form, "spec": {**form["spec"], "tomorrow": 1}, "row_shape": [4]}  # type: ignore[dict-item]
    seal_json(path, newer)
    with pytest.raises(NewerError, match="tomorrow"):
        read_form(path)


# --- exported files


def endless() -> onnx.GraphProto:
    true = helper.make_node("Constant", [], ["go"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    inputs = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("c", 9))]
    return helper.make_graph([true], "body", inputs, [helper.make_tensor_value_info("go", TensorProto.BOOL, [])])


def test_a_loop_that_never_ends_is_refused_before_it_runs(tmp_path: Path) -> None:
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    proto.graph.node.append(helper.make_node("Loop", ["", ""], [], body=endless()))
    with pytest.raises(ExportError, match="holds Loop, graphs of its own that may never end"):
        Model(write_sealed(tmp_path / "m.onnx", proto))
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    proto.functions.append(onnx.FunctionProto(name="f", domain="d"))
    with pytest.raises(ExportError, match="functions"):
        Model(write_sealed(tmp_path / "m.onnx", proto))


@pytest.mark.parametrize("bit", [32, 33, 34])
def test_no_graph_hides_behind_a_tag_whose_upper_bits_onnxruntime_drops(tmp_path: Path, bit: int) -> None:
    graph = onnx.GraphProto(node=[helper.make_node("Loop", ["", ""], [], body=endless())]).SerializeToString()
    size = bytes([len(graph) & 127 | 128, len(graph) >> 7])
    data = exported_file(tmp_path / "m.onnx").read_bytes()
    assert scan(data + b"\x3a" + size + graph).programs == ["Loop"]
    tag = 0x3A | 1 << bit
    hidden = bytes([*(tag >> shift & 127 | 128 for shift in (0, 7, 14, 21)), tag >> 28])
    with pytest.raises(ValueError, match="not an ONNX file"):
        scan(data + hidden + size + graph)


def test_a_model_in_onnxruntimes_own_format_which_nothing_looks_through_is_refused(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "m.ort")
    onnxruntime.InferenceSession(exported_file(tmp_path / "m.onnx").read_bytes(), options)
    data = (tmp_path / "m.ort").read_bytes()
    assert data[4:8] == b"ORTM" and onnxruntime.InferenceSession(data)
    with pytest.raises(ExportError, match="onnxruntime does not take the file"):
        open_session(data)
    with pytest.raises(Exception, match="parsing failed"):
        session(data)


@pytest.mark.parametrize("where", ["initializer", "constant", "sparse", "located"])
def test_weights_in_other_files_are_refused_wherever_they_are_named(tmp_path: Path, where: str) -> None:
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    tensor = onnx.TensorProto(name="backbone/secret", data_type=1, dims=[1])
    if where != "located":
        tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    if where == "constant":
        proto.graph.node.append(helper.make_node("Constant", [], ["s"], value=tensor))
    elif where == "sparse":
        proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[1]))
    else:
        proto.graph.initializer.append(tensor)
    path = write_sealed(tmp_path / "m.onnx", proto)
    with pytest.raises(ExportError, match="keeps weights in other files"):
        Model(path)
    inspect(path)


def test_what_the_file_gives_fits_what_it_says(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "m.onnx", class_names=["one", "two"])
    with pytest.raises(ExportError, match="names 2 classes and gives probabilities"):
        Model(path)(np.zeros((1, 40, 40, 3), np.uint8))
    for crop, resize in ((10**9, 10**9), (0, 36), (64, 36)):
        preprocess = {"resize": resize, "crop": crop, "interpolation": "bilinear", "mean": [0] * 3, "std": [1] * 3}
        proto = onnx.load(exported_file(path))
        entry = next(e for e in proto.metadata_props if e.key == "preprocess")
        entry.value = json.dumps(preprocess | {"pixels": "pillow/1"})
        with pytest.raises(ExportError, match=r"metadata of .* is damaged"):
            Model(write_sealed(path, proto))


@pytest.mark.parametrize("output", ["probabilities", "features"])
@pytest.mark.parametrize("operator", ["SequenceConstruct", "Unsqueeze", "Flat", "Log"])
def test_answers_of_another_kind_or_shape_are_refused(tmp_path: Path, output: str, operator: str) -> None:
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    for node in proto.graph.node:
        node.output[:] = [f"{name}-inner" if name == output else name for name in node.output]
        node.input[:] = [f"{name}-inner" if name == output else name for name in node.input]
    inner, axis = f"{output}-inner", numpy_helper.from_array(np.array([1]), "axis")
    proto.graph.initializer.append(axis)
    if operator == "Log":
        proto.graph.node.append(helper.make_node("Sub", [inner, inner], ["nought"]))
        proto.graph.node.append(helper.make_node("Log", ["nought"], [output]))
    elif operator == "SequenceConstruct":
        proto.graph.node.append(helper.make_node(operator, [inner], [output]))
    elif operator == "Unsqueeze":
        proto.graph.node.append(helper.make_node(operator, [inner, "axis"], [output]))
    else:
        proto.graph.node.append(helper.make_node("ReduceMax", [inner, "axis"], [output], keepdims=0))
    tensor = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    sequence = helper.make_tensor_sequence_value_info(output, TensorProto.FLOAT, None)
    left = [value for value in proto.graph.output if value.name != output]
    del proto.graph.output[:]
    proto.graph.output.extend([*left, sequence if operator == "SequenceConstruct" else tensor])
    model = Model(write_sealed(tmp_path / "m.onnx", proto))
    with pytest.raises(ExportError, match=f"gives {output} that are not 1 rows of finite numbers"):
        model(np.zeros((1, 40, 40, 3), np.uint8), features=True)


def test_a_model_without_a_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"damaged \(it names no class\)"):
        Model(exported_file(tmp_path / "m.onnx", class_names=[]))


def test_an_error_is_one_line_whatever_the_file_makes_onnxruntime_say(tmp_path: Path) -> None:
    proto = onnx.load(exported_file(tmp_path / "m.onnx"))
    proto.graph.node[0].op_type = "Cast\nError: all is well"
    path = write_sealed(tmp_path / "m.onnx", proto)
    result = CliRunner().invoke(cli, ["predict", str(path), str(tmp_path)])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "\\x0aError: all is well" in result.stderr


@pytest.mark.parametrize("change", ["no class", "twice", "narrow", "several"])
def test_a_head_that_fits_neither_its_run_nor_its_data_is_refused(made: Run, tmp_path: Path, change: str) -> None:
    run = shutil.copytree(made.path, tmp_path / "run")
    head = made.head
    weight, bias, names = {
        "no class": (head.weight[:0], head.bias[:0], []),
        "twice": (head.weight, head.bias, ["cold", "cold"]),
        "narrow": (head.weight[:, :9], head.bias, ["cold", "warm"]),
        "several": (head.weight, head.bias, ["cold", "warm"]),
    }[change]
    metadata = {"class_names": json.dumps(names), "threshold": "null"}
    metadata |= TENSOR_SEAL | {"activation": "sigmoid" if change == "several" else "softmax"}
    data = seal(save({"weight": np.ascontiguousarray(weight), "bias": bias}, metadata))
    (run / "head.safetensors").write_bytes(data)
    report, _ = opened((run / "report.json").read_bytes())
    report["files"]["head.safetensors"] = hashlib.sha256(data).hexdigest()
    write_record(run / "report.json", report)
    if change == "several":
        with pytest.raises(HeadError, match=r"fitted on several labels for an image, and .* one label"):
            open_run(run).require_alike(False, "photos")
    else:
        with pytest.raises(RunError, match=r"head.safetensors is damaged \((a head has one class|it takes 9 features)"):
            open_run(run)


def test_a_line_end_in_a_file_forges_no_line_of_inspect(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "m.onnx", class_names=["ant\n  parts         as exported", "b", "c"])
    text = CliRunner().invoke(cli, ["inspect", str(path)]).output
    assert sum(line.startswith("  parts ") for line in text.splitlines()) == 1
    assert "ant\\x0a  parts" in text
    foreign = average_backbone(32)
    helper.set_model_props(foreign, {"note\n  exported by   featx": "x\n  license       mit"})
    (tmp_path / "foreign.onnx").write_bytes(foreign.SerializeToString())
    text = CliRunner().invoke(cli, ["inspect", str(tmp_path / "foreign.onnx")]).output
    assert not [line for line in text.splitlines() if line.startswith(("  exported by   featx", "  license"))]
