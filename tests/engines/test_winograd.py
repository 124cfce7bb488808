"""A network rewritten with fewer multiplications gives the same rows, for any batch."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import resnet18_rewritten
from storekit import make_read_only
from torch import nn

from featx.devices import processor
from featx.engines.onnx import accelerated, export, session
from featx.engines.winograd import CONSTANT, OUTPUT, POINTS, rewritten, transforms
from featx.features import difference
from featx.records import read_record, write_record

NO_LIMIT = 1 << 40
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Two(nn.Module):
    """Two convolutions side by side, and whatever else a test puts around them."""

    def __init__(self, channels: int = 128, middle: int = 128, bias: bool = True, **first: Any) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, middle, 3, padding=1, bias=bias, **first)
        self.two = nn.Conv2d(middle, channels, 3, padding=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


class Block(Two):
    """As ResNet's first block of a stage: what is added is computed after what it is added to, and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(128, 128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.two(self.one(x).relu())
        y = (y + self.side(x)).relu()
        z = self.two(self.one(y).relu())
        return torch.cat([(z + y).relu(), y, z + z], 1)


class Halves(Two):
    """Twice as many images inside as outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, bottom = x[:, :, :8], x[:, :, 8:]
        return super().forward(torch.cat([top, bottom], 0))


class Offset(Two):
    """Adds what is the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 128, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) + self.offset.exp()).relu()


class Kept(Two):
    """What is added in tiles is read by others as well, the network's input among it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (super().forward(x) + x).relu()
        pooled = nn.functional.max_pool2d(x, 3, 1, 1)
        z = (super().forward(pooled) + pooled).relu()
        return torch.cat([y, x, x.relu(), z, pooled], 1)


class Within(nn.Module):
    """The convolutions between layers that know nothing of tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.two = nn.Conv2d(3, 128, 3, stride=2, padding=1), Two()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.max_pool2d(self.two(self.stem(x)), 2)
        return self.two(y).mean((2, 3))


def exported(module: nn.Module, *shape: int) -> Any:
    torch.manual_seed(0)
    for parameter in module.parameters():  # biases that matter
        parameter.data = torch.randn_like(parameter) * (0.04 if parameter.ndim > 1 else 0.3)
    return export(module.eval(), torch.randn(2, *shape))


def convolutions(model: Any) -> int:
    return sum(node.op_type == "Conv" for node in model.graph.node)


@pytest.mark.parametrize(
    ("module", "shape", "left"),
    [
        (Two(), (128, 12, 12), 0),
        (Two(bias=False), (128, 12, 12), 0),
        (Two(middle=160), (128, 5, 8), 0),  # no whole number of tiles, and no square
        (Two(), (128, 7, 7), 0),
        (Two(), (128, 29, 18), 0),  # more tiles than are multiplied one by one
        (Two(bias=False), (128, 29, 18), 0),
        (Block(), (128, 14, 14), 1),
        (Block(), (128, 21, 21), 1),
        (Within(), (3, 32, 40), 1),
        (Offset(), (128, 12, 12), 0),
        (Kept(), (128, 12, 12), 0),
    ],
)
def test_rewritten_networks_agree_with_torch_in_double_precision(
    module: nn.Module, shape: tuple[int, ...], left: int
) -> None:
    model = exported(module, *shape)
    new = rewritten(model, NO_LIMIT)
    assert new is not None
    onnx.checker.check_model(new, full_check=True)
    assert convolutions(new) == left
    images = torch.randn(5, *shape)
    with torch.inference_mode():
        reference = module.double()(images.double()).numpy()
        module.float()
    run = session(new.SerializeToString(), 2).run
    rows = run(None, {"images": images.numpy()})[0]
    assert rows.shape == reference.shape
    assert difference(rows, reference) < 3e-6
    parts = [run(None, {"images": part.numpy()})[0] for part in images.split(1)]
    assert np.array_equal(np.concatenate(parts), rows)  # whatever else is in the batch


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Two(channels=64, middle=64), (64, 16, 16)),  # the change of layout costs more than it saves
        (Two(stride=2), (128, 16, 16)),  # one by itself
        (Two(dilation=2), (128, 16, 16)),
        (Two(groups=2), (128, 16, 16)),
        (Two(), (128, 4, 4)),  # a matrix of one row
        (Halves(), (128, 16, 8)),  # the number of images is not the one given
        (nn.Sequential(nn.Conv2d(128, 128, 5, padding=2), nn.Conv2d(128, 128, 5, padding=2)), (128, 16, 16)),
        (nn.Sequential(nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 3)), (128, 16, 16)),  # not padded
    ],
)
def test_what_would_not_pay_or_cannot_be_rewritten_is_left_alone(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert rewritten(exported(module, *shape), NO_LIMIT) is None


def test_a_constant_can_be_added_to_the_products() -> None:
    """The bias goes into the products of few tiles, whose sums then hold it exactly once."""
    assert OUTPUT[:16] @ CONSTANT == pytest.approx(np.ones(16), abs=1e-12)
    assert not OUTPUT[16].any()


def clock(plain: float = 2.0, fast: float = 1.0) -> Callable[[], float]:
    """For one measurement: so many seconds for the graph as it was exported, and for the rewritten one."""
    moments = iter([0, 0, plain, plain + fast, 1000])
    return lambda: next(moments)


def unused() -> float:
    raise AssertionError("measured again")


def gains(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.with_suffix(".json").read_text())["gains"]
    return found


def test_the_engine_runs_a_file_that_is_made_once_and_never_shipped() -> None:
    plain, fast = resnet18_rewritten()
    assert fast != plain
    assert (convolutions(onnx.load(plain)), convolutions(onnx.load(fast))) == (20, 11)
    assert list(gains(fast).values()) == [2.0]
    before = fast.stat().st_mtime_ns
    program = "import sys; from pathlib import Path; from featx.engines.onnx import accelerated;"
    program += f"print(accelerated(Path({str(plain)!r})).name, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [fast.name, "False"]
    assert fast.stat().st_mtime_ns == before


def test_a_file_that_would_be_too_large_is_not_made() -> None:
    model = exported(Two(), 128, 12, 12)
    size = 2 * 4 * (36 * 128 * 128 + 128)  # each filter of 9 weights becomes one of 36
    assert rewritten(model, size) is None
    new = rewritten(model, size + 1)
    assert new is not None and abs(new.ByteSize() - size) < 200_000


def test_the_points_give_half_the_error_of_the_usual_ones() -> None:
    rng = np.random.default_rng(0)
    inputs, filters = np.maximum(rng.standard_normal((6, 6, 128, 256)), 0), rng.standard_normal((3, 3, 128, 32))
    windows = [[inputs[y + i, x + j] for y in range(4) for x in range(4)] for i in range(3) for j in range(3)]
    exact = np.einsum("tocn,tck->okn", np.array(windows), filters.reshape(9, 128, 32), optimize=True)
    error = {}
    for points in (POINTS, (0.0, 1.0, -1.0, 2.0, -2.0)):
        bt, g, at = (np.kron(m, m) for m in transforms(points))
        spread = (bt.astype(np.float32) @ inputs.reshape(36, -1).astype(np.float32)).reshape(36, 128, 256)
        weights = (g @ filters.reshape(9, -1)).reshape(36, 128, 32).astype(np.float32)
        products = np.einsum("pck,pcn->pkn", weights, spread, optimize=True).reshape(36, -1)
        made = (at.astype(np.float32) @ products).reshape(exact.shape)
        error[points] = np.linalg.norm(made - exact) / np.linalg.norm(exact)
    assert error[POINTS] < 2e-6
    assert error[POINTS] < 0.6 * error[0.0, 1.0, -1.0, 2.0, -2.0]


def test_the_export_runs_where_another_file_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _two(tmp_path)
    with monkeypatch.context() as patch:
        make_read_only(patch, errno.ENOSPC)
        assert accelerated(plain) == plain
    assert [p.name for p in tmp_path.iterdir()] == [plain.name]
    assert accelerated(plain, clock=clock()) != plain


def test_a_cache_that_can_only_be_read_serves_the_file_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _two(tmp_path)
    fast = accelerated(plain, clock=clock())
    record = dict(read_record(fast.with_suffix(".json"))[0])
    write_record(fast.with_suffix(".json"), record | {"gains": {"another processor": 1.5}})
    with monkeypatch.context() as patch:
        make_read_only(patch, errno.EROFS)
        assert accelerated(plain, clock=clock()) == fast
        assert accelerated(plain, clock=clock(1, 2)) == plain
    assert gains(fast) == {"another processor": 1.5}


def test_what_a_killed_run_left_beside_it_goes(tmp_path: Path) -> None:
    program = "from featx.files import aside_name; print(aside_name())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    left = tmp_path / done.stdout.strip()
    left.write_bytes(b"half a graph")
    accelerated(_two(tmp_path), clock=clock())
    assert not left.exists()


def test_files_of_another_revision_go(tmp_path: Path) -> None:
    plain = _two(tmp_path)
    others = {"other.winograd0.onnx", f"{plain.stem}.winograd-notes.txt", f"{plain.stem}.winograd0.old.onnx"}
    for name in (f"{plain.stem}.winograd0.onnx", f"{plain.stem}.winograd0.json", *others):
        (tmp_path / name).write_bytes(b"made by another featx")
    fast = accelerated(plain, clock=clock())
    kept = {plain.name, fast.name, fast.with_suffix(".json").name, *others}
    assert {p.name for p in tmp_path.iterdir()} == kept


def test_a_file_made_of_another_export_is_not_taken(tmp_path: Path) -> None:
    plain = _two(tmp_path)
    first = accelerated(plain, clock=clock()).read_bytes()
    torch.manual_seed(1)
    _two(tmp_path)
    assert accelerated(plain, clock=clock()).read_bytes() != first


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    plain = _two(tmp_path)
    fast = accelerated(plain, clock=clock())
    whole = fast.read_bytes()
    fast.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert accelerated(plain, clock=clock()) == fast
    assert fast.read_bytes() == whole


def test_a_network_that_gains_nothing_runs_as_it_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _two(tmp_path, channels=64, middle=64)
    assert accelerated(plain) == plain
    monkeypatch.setattr(onnx, "load", None)  # the answer is remembered
    assert accelerated(plain) == plain
    (record,) = (json.loads(p.read_text()) for p in tmp_path.glob("*.json"))
    assert record["plain"] is True


def test_rows_too_far_from_the_export_are_not_taken(tmp_path: Path) -> None:
    plain = _two(tmp_path)
    assert accelerated(plain, tolerance=1e-9, clock=clock()) == plain
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".onnx"]
    assert accelerated(plain, clock=unused) == plain


@pytest.mark.parametrize(("seconds", "gain", "runs"), [((1.06, 1), 1.06, True), ((1.04, 1), 1.04, False)])
def test_the_rewritten_graph_runs_only_where_it_was_measured_to_be_faster(
    tmp_path: Path, seconds: tuple[float, float], gain: float, runs: bool
) -> None:
    plain = _two(tmp_path)
    chosen = accelerated(plain, clock=clock(*seconds))
    assert (chosen != plain) == runs
    (record,) = tmp_path.glob("*.json")
    assert gains(record) == {f"{processor()}, onnxruntime {metadata.version('onnxruntime')}": gain}
    assert record.with_suffix(".onnx").exists() == runs  # large, and of no use
    assert accelerated(plain, clock=unused) == chosen


def test_another_processor_decides_for_itself_and_an_older_record_is_completed_once(tmp_path: Path) -> None:
    plain = _two(tmp_path)
    fast = accelerated(plain, clock=clock())
    record = dict(read_record(fast.with_suffix(".json"))[0])
    before = fast.stat().st_mtime_ns
    write_record(fast.with_suffix(".json"), record | {"gains": {"another processor": 1.5}})
    assert accelerated(plain, clock=clock(1, 2)) == plain
    assert sorted(gains(fast).values()) == [0.5, 1.5]
    assert accelerated(plain, clock=unused) == plain

    write_record(fast.with_suffix(".json"), {name: record[name] for name in ("of", "libraries", "sha256")})
    assert accelerated(plain, clock=clock()) == fast
    assert list(gains(fast).values()) == [2.0]
    assert accelerated(plain, clock=unused) == fast
    assert fast.stat().st_mtime_ns == before  # the file served all of them


@pytest.mark.parametrize(("theirs", "ours"), [(0.9, 2.0), (2.0, 0.5)])
def test_two_processes_that_measure_at_once_keep_one_answer_and_the_file_that_it_needs(
    tmp_path: Path, theirs: float, ours: float
) -> None:
    plain, here = _two(tmp_path), f"{processor()}, onnxruntime {metadata.version('onnxruntime')}"
    fast = accelerated(plain, clock=clock())
    record = dict(read_record(fast.with_suffix(".json"))[0])
    write_record(fast.with_suffix(".json"), record | {"gains": {}})
    moments = clock(ours, 1)

    def decided_meanwhile() -> float:
        write_record(fast.with_suffix(".json"), record | {"gains": {here: theirs}})
        if theirs < 1:
            fast.unlink(missing_ok=True)
        return moments()

    assert accelerated(plain, clock=decided_meanwhile) == (fast if theirs > 1 else plain)
    assert gains(fast) == {here: theirs} and fast.exists() == (theirs > 1)


def _two(folder: Path, **options: Any) -> Path:
    class Bytes(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float() / 255)

    module = Bytes(**options)
    path = folder / "two.onnx"
    images = torch.zeros((2, module.one.in_channels, 12, 12), dtype=torch.uint8)
    onnx.save(export(module.eval(), images), path)
    return path
