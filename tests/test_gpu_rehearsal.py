"""`make gpu` without a GPU: the real script end to end, with small sizes, and what it makes of its figures."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpegs import encoded, photo
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from featx.devices import has_cuda

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from gpu import NAMES, NEEDED, main, missing, ran  # noqa: E402
from gpu_page import ALONE, BY_GPU, CPU_DECODES, EXACT, GPU_DECODES, LOADER, page, verdicts  # noqa: E402

# What featx and its tests use elsewhere, and the parts do without.
ABSENT = ["click", "hypothesis", "jinja2", "matplotlib", "openvino", "pandas", "timm", "yaml"]


def test_what_was_measured_is_kept_where_a_part_hits_its_time_limit(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "hymenoptera_data" / "val" / "ants"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(encoded(photo(280, 250, seed=i)))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--data", str(tmp_path)]
    command += ["--output", str(tmp_path / "out"), "--images", "4"]
    command += ["--parts", "solver", "extraction", "--limits", "solver=0.2", "extraction=300"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    given = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 0, done.stdout + done.stderr

    results = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {name: part["end"] for name, part in results["parts"].items()} == {
        "solver": "time limit",
        "extraction": "done",
    }, done.stdout
    extraction = results["parts"]["extraction"]
    assert extraction["absent"] == {}
    assert list(extraction["times"]) == [EXACT, LOADER, CPU_DECODES, ALONE]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in extraction["times"].values())
    assert extraction["images"] == dict.fromkeys(extraction["times"], 4)
    exact, loader = (np.median(extraction["times"][label]) for label in (EXACT, LOADER))
    found = results["verdicts"]["exact decoding against DataLoader + AMP + compile"]
    assert found["found"] == pytest.approx(loader / exact, abs=1e-3)
    assert results["verdicts"]["--decode gpu against exact decoding"]["verdict"] == "unmeasured"
    assert (tmp_path / "out" / "gpu.md").read_text() == page(results)
    assert "| solver | time limit | 0." in page(results) and "A rehearsal on a CPU" in page(results)


def results(**parts: Any) -> dict[str, Any]:
    return {"device": "cuda:0", "parts": {name: {"end": "done", "took": 1.0, **part} for name, part in parts.items()}}


def test_verdicts_compare_medians_with_what_was_asked() -> None:
    times = {
        EXACT: [1.0, 2.0, 3.0],  # 500 images/s
        LOADER: [2.5],  # 400
        BY_GPU: [1.6],  # 625
        CPU_DECODES: [1.8],
        GPU_DECODES: [1.0],
        ALONE: [1.25],
    }
    extraction = {"times": times, "images": dict.fromkeys(times, 1000)}
    row = {"difference": 2e-5, "tolerance": 1e-5, "cosine": 1.0, "alone is equal": False, "batch": 256}
    found = verdicts(
        results(
            extraction=extraction,
            precision={"distances": {"resnet50, fp32": row}},
            solver={"fits": {"big": {"cpu": 3.0, "gpu": 1.0}, "half": {"cpu": 3.0}}},
            tests={"passed": 10, "failed": 1, "failures": ["test_x"]},
        )
    )
    assert {what: (row["found"], row["verdict"]) for what, row in found.items()} == {
        "exact decoding against DataLoader + AMP + compile": (1.25, "met"),
        "--decode gpu against exact decoding": (1.25, "missed"),
        "--decode exact against its slowest stage": (0.9, "met"),
        "--decode gpu against its slowest stage": (0.781, "missed"),
        "logreg on the GPU, big": (3.0, "met"),
        "logreg on the GPU, half": (None, "unmeasured"),
        "distance, resnet50, fp32: times below its tolerance": (0.5, "missed"),
        "distance, resnet50, fp32: rows alone": ("differ", "missed"),
        "pytest -m gpu": ("10 of 11", "missed"),
    }
    assert found["--decode exact against its slowest stage"]["note"] == CPU_DECODES
    assert found["--decode gpu against its slowest stage"]["note"] == ALONE
    assert {row["verdict"] for row in verdicts(results()).values()} == {"unmeasured"}


def test_children_of_a_part_end_with_it_at_its_limit(tmp_path: Path) -> None:
    command = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"]
    end, seconds = ran(command, 0.5, dict(os.environ), tmp_path / "log")
    assert end == "time limit" and seconds < 30
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "status")
    for _ in range(100):  # whoever adopted it takes note of its end
        if not status.exists() or "zombie" in status.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child still runs")


def test_a_package_that_the_machine_lacks_is_named_with_how_to_bring_it() -> None:
    assert missing(["numpy", "PIL"]) == ""
    said = missing(["numpy", "no_such_package", "sklearn"])
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert said.startswith("missing: no_such_package; where there is a package index: pip install ")
    assert said.endswith(f"--python-version {version} --target .gpu/packages no_such_package")


def test_the_tests_for_a_gpu_import_only_what_the_script_asks_for() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    files = [path for path in files if path != Path(__file__)] + [ROOT / "tests" / "conftest.py"]
    assert len(files) > 4
    known = {*NEEDED, *sys.stdlib_module_names, "featx", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {str(name).partition(".")[0] for name in names} <= known, path
    assert NAMES.keys() <= set(NEEDED)


def test_what_a_carried_package_needs_is_carried_with_it() -> None:
    def closure(names: set[str]) -> set[str]:
        """Distributions, with all that they require."""
        found: set[str] = set()
        while todo := names - found:
            found |= todo
            asked = [Requirement(line) for name in todo for line in metadata.requires(name) or []]
            wanted = [each.name for each in asked if not each.marker or each.marker.evaluate({"extra": ""})]
            names = names | {canonicalize_name(name) for name in wanted}
        return found

    there = {"torch", "torchvision", "onnxruntime", "scikit-learn"}  # with all of theirs
    needed = {canonicalize_name(NAMES.get(name, name)) for name in NEEDED}
    assert closure(needed - closure(there)) - closure(there) <= needed


def test_results_that_a_time_limit_cut_off_are_drawn_and_equal_rows_meet_their_tolerance() -> None:
    row = {"difference": 0.0, "tolerance": 1e-5, "cosine": 1.0, "alone is equal": True, "batch": 256}
    nan = {**row, "difference": math.nan, "tolerance": None}
    cut = results(
        solver={"fits": {"big": {"gpu": 1.25}, "small": {"gpu": 1.0, "cpu": 2.0}}},
        precision={"distances": {"equal": row, "nan": nan, "nan, fp32": {**nan, "tolerance": 1e-5}}},
        tests={"passed": 10, "failed": 0, "skipped": 2, "failures": []},
    )
    found = {what: row["verdict"] for what, row in verdicts(cut).items()}
    assert found["distance, equal: times below its tolerance"] == found["pytest -m gpu"] == "met"
    assert found["distance, nan, fp32: times below its tolerance"] == found["distance, nan"] == "missed"
    assert "| big | not measured | 1.25 |  |  |" in page(cut) and "10 of 10, 2 skipped" in page(cut)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--output", "{file}/out"], "the results cannot be written to {file}/out"),
        (["--parts", "decoding"], "missing: photographs, {tmp}/data/hymenoptera_data/*/*/*.jpg"),
        (["--device", "cuda:0"], "missing: a GPU that NVIDIA's driver sees"),
    ],
)
def test_what_keeps_the_parts_from_being_measured_is_said_before_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], said: str
) -> None:
    if "cuda:0" in given and has_cuda():
        pytest.skip("a GPU is here")
    (tmp_path / "file").write_bytes(b"")
    names = {"tmp": tmp_path, "file": tmp_path / "file"}
    common = [
        "gpu.py",
        "--device",
        "cpu",
        "--data",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
        "--parts",
        "tests",
    ]
    monkeypatch.setattr(sys, "argv", [*common, *(each.format(**names) for each in given)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert str(ended.value).startswith(said.format(**names))
