"""Every example of docs/data.md: its files are made, its Python is run, its output compared."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

DOC = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_every_example_of_the_data_page_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = failures = 0
    report: list[str] = []
    blocks = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.M | re.S)
    for language, name, body in blocks:
        if language == "text":
            for line in body.split():
                Path(line).parent.mkdir(parents=True, exist_ok=True)
                Path(line).write_bytes(b"listing reads no image")
        elif language in ("csv", "jsonl"):
            Path(name).write_text(body, encoding="utf-8")
        else:
            assert language == "pycon"
            test = doctest.DocTestParser().get_doctest(body, names, "docs/data.md", None, None)
            runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
            result = runner.run(test, out=report.append, clear_globs=False)
            names = test.globs
            examples += result.attempted
            failures += result.failed
    assert not failures, "".join(report)
    assert examples >= 12
