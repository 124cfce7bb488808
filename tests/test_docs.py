"""The examples of the documentation, run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import Ran, run_page, working_folder

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture
def work(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    photos: Path,
    squeezenet_weights: Path,
) -> Path:
    return working_folder(tmp_path_factory, monkeypatch, photos, squeezenet_weights, tmp_path)


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
