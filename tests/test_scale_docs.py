"""The scripts of docs/scale.md as they stand, on a few photographs: each way ends with a plain extraction's rows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pages import run_page, working_folder
from photo_run import photo_run
from sharing import made_once

import featx
from featx.extraction.chunks import prepare_chunks

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
CHUNKS = 4


def block(language: str, words: str) -> str:
    """The page's only block in this language with these words."""
    (found,) = [body for kind, body in BLOCKS if kind == language and words in body]
    return found


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path, squeezenet_weights: Path) -> Path:
    """A working folder, and `featx` on the path as this test's own interpreter runs it."""
    folder = working_folder(monkeypatch, photos, squeezenet_weights, tmp_path / "work")
    shutil.copytree(photo_run(photos, squeezenet_weights) / "cache" / "resolved", folder / "cache" / "resolved")
    command = tmp_path / "bin" / "featx"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m featx "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PAGE.parent.parent), os.environ.get("PYTHONPATH", "")]))
    return folder


@pytest.fixture
def prepared(work: Path) -> Path:
    """The working folder with 20 photographs and one broken file, after `--prepare`."""
    for place in sorted((work / "photos").glob("*/*/")):
        for path in sorted(place.iterdir())[5:]:
            path.unlink()
    (work / "photos" / "val" / "bees" / "zzz.jpg").write_bytes(b"broken")
    assert prepare_chunks("photos", "squeezenet1_1").images == 21
    return work


def run(*command: str, code: int = 0, **variables: str) -> str:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr


def assert_complete(folder: Path) -> None:
    """All is cached, and the rows are those of one plain extraction, byte for byte."""
    plain = made_once("plain-rows", lambda base: plain_rows(folder, base))
    found = featx.extract("photos", "squeezenet1_1")
    assert (found.report.cached, found.report.extracted, found.report.skipped) == (20, 0, 1)
    assert found.X.tobytes() == (plain / "rows").read_bytes()
    assert len([path for path in (folder / "cache" / "engines").glob("*.onnx") if "winograd" not in path.name]) == 1


def plain_rows(folder: Path, base: Path) -> None:
    for name in ("engines", "resolved"):
        shutil.copytree(folder / "cache" / name, base / "cache" / name)
    (base / "rows").write_bytes(featx.extract("photos", "squeezenet1_1", cache=base / "cache").X.tobytes())


def test_the_slurm_script_computes_every_chunk_of_its_array(prepared: Path) -> None:
    (prepared / "job.sh").write_text(script := block("bash", "#SBATCH"))
    first, last = re.search(r"--array=(\d+)-(\d+)", script).groups()  # type: ignore[union-attr]
    assert (int(first), int(last)) == (0, CHUNKS - 1)
    said = [run("bash", "job.sh", SLURM_ARRAY_TASK_ID=str(task)) for task in range(CHUNKS)]
    assert ["skipped: val/bees/zzz.jpg" in text for text in said] == [False, False, False, True]
    assert_complete(prepared)


def test_one_line_computes_all_chunks_of_a_machine(prepared: Path) -> None:
    said = run("sh", "-c", block("sh", "parallel --jobs 2" if shutil.which("parallel") else "xargs"))
    assert sorted(re.findall(r"chunk (\d)/4: ", said)) == ["0", "1", "2", "3"]
    assert_complete(prepared)


def test_the_kubernetes_job_computes_a_chunk_for_each_of_its_indexes(prepared: Path) -> None:
    spec = yaml.safe_load(block("yaml", "kind: Job"))["spec"]
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", CHUNKS)
    (container,) = spec["template"]["spec"]["containers"]
    for index in range(CHUNKS):
        said = run(*container["command"], JOB_COMPLETION_INDEX=str(index))
        assert said.startswith(f"chunk {index}/{CHUNKS}: ")
    assert_complete(prepared)


def test_ray_on_this_machine_computes_all(prepared: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install featx[ray]")
    said = run("sh", "-c", block("sh", "--on ray\n"), code=3, HOME=str(prepared))  # where Ray leaves its token
    assert "note: computed on a Ray cluster" in said
    assert_complete(prepared)


def test_the_other_commands_of_the_page_say_what_it_shows(work: Path) -> None:
    assert run_page(PAGE).commands == 3
