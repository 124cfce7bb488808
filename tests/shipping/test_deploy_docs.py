"""The examples of docs/deploy.md, and the limits it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import run_page, working_folder

from featx.shipping import graph, parity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"


def test_the_page_works_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path, squeezenet_weights: Path
) -> None:
    work = working_folder(monkeypatch, photos, squeezenet_weights, tmp_path)
    ran = run_page(PAGE)
    assert (ran.commands, ran.python) == (7, 1) and ran.doctests >= 6
    assert (work / "answers.csv").read_text().count("\n") == 101
    assert (work / "answers.jsonl").read_text().count("probability") > 50
    assert run_page(PAGE.with_name("trust.md")).doctests >= 5


def test_the_page_names_the_limits_and_the_node_as_they_are() -> None:
    text = PAGE.read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.count("|") == 3
    }
    limits = [float(value.split()[0].rstrip(",")) for value in rows.values() if value[0].isdigit()]
    assert graph.GUARD in text
    for limit in (
        parity.LEVELS,
        parity.FEATURES,
        parity.PROBABILITIES,
        parity.SAME_FEATURES,
        parity.SAME_SUM,
        parity.CACHED,
        parity.CACHED_MEDIAN,
    ):
        assert limit in limits
    assert f"{parity.ROUNDING:.0e} at most".replace("e-03", "e-3") in rows["`same-pixel probabilities`"]
    assert f"{2 * parity.ROUNDING / parity.SAME_SUM:.0e}".replace("e+04", "e4") in text
