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
