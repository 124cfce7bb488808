"""The examples of the documentation, run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from pages import Ran, run_page, working_folder

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path, squeezenet_weights: Path) -> Path:
    return working_folder(monkeypatch, photos, squeezenet_weights, tmp_path)


def test_the_quick_start_of_the_readme_runs_as_it_stands(work: Path) -> None:
    (work / "photos" / "train" / "ants" / "imageNotFound.gif").write_bytes(b"GIF89a")
    for verified in (work / "cache" / "engines").glob("*.verified.safetensors"):
        verified.unlink()  # a reader has none: the whole file goes through the gate
    ran = run_page(ROOT / "README.md")
    assert (ran.commands, ran.python) == (4, 1)
    assert (work / "export" / "insects" / "model.onnx").exists()


def test_the_command_line_page_is_what_the_commands_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page.count("\n## ") > 15
    assert page == generate.render(), "`make docs` writes it again"


def test_every_page_that_the_readme_names_is_there() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_python_page_prints_what_it_says(work: Path) -> None:
    ran = run_page(DOCS / "python.md")
    assert ran.doctests >= 40


def test_every_example_of_the_extending_page_works_as_it_stands(work: Path) -> None:
    ran = run_page(DOCS / "extending.md")
    assert (ran.files, ran.commands) == (4, 6)
    assert ran.python >= 2 and ran.doctests >= 1
    assert (work / "answers.csv").read_text().startswith("image,label,probability")


def test_the_runner_notices_what_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def page(text: str) -> Ran:
        (tmp_path / "page.md").write_text(text)
        return run_page(tmp_path / "page.md")

    assert page("```pycon\n>>> 1 + 1\n2\n```\n```python\nassert True\n```\n") == Ran(python=1, doctests=1)
    assert page("```console\n$ featx backbones alexnet\nalexnet 9 1.0 M 9 IMAGENET1K_V1\n$ rm x\n```\n").commands == 1
    assert page("```console\n$ featx nothing  # exit 2\n```\n").commands == 1
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        page("\n```pycon\n>>> 1 + 1\n3\n```\n")
    with pytest.raises(AssertionError, match="does not say: vgg"):
        page("```console\n$ featx backbones alexnet\nvgg16\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: featx extract nothing"):
        page("```console\n$ featx extract nothing\n```\n")
