"""What an extraction found odd: a report of bounded size, and all of it in a file on request."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ColourEngine

from featx.errors import FeatxError
from featx.extraction.findings import Findings
from featx.extraction.pipeline import sync
from featx.features import content_key
from featx.reporting.report import _extraction_notes
from featx.sources.source import Source


def test_copies_are_grouped_as_a_dictionary_of_their_bytes_groups_them() -> None:
    rng = np.random.default_rng(0)
    contents, labels = rng.integers(0, 300, 500), rng.choice(["a", "b", ""], 500)
    numbers = np.sort(rng.choice(700, 500, replace=False))
    ids = [f"{i}.jpg" for i in range(700)]
    label_of = dict(zip(numbers.tolist(), labels.tolist(), strict=True))
    source = Source("", Path(), ids, [label_of.get(i, "c") for i in range(700)])
    keys = np.frombuffer(b"".join(content_key(b"%d" % each) for each in contents), np.uint8).reshape(-1, 32).copy()
    keys[contents % 10 == 0, :8] = 7  # the same first bytes, which are not the same key

    by_content: dict[int, list[int]] = {}
    for number, content in zip(numbers.tolist(), contents.tolist(), strict=True):
        by_content.setdefault(content, []).append(number)
    groups = [same for same in by_content.values() if len(same) > 1]

    found = Findings.of(source, numbers, keys, {})
    assert [found.group(i).tolist() for i in range(len(found.begins) - 1)] == groups
    conflicting = [i for i, same in enumerate(groups) if len({label_of[number] for number in same}) > 1]
    assert found.conflicts.tolist() == conflicting and 0 < len(conflicting) < len(groups)
    rows = list(found)
    assert [(row["id"], row["of"]) for row in rows if row["what"] == "duplicate"] == [
        (ids[number], ids[first]) for first, *others in groups for number in others
    ]
    assert [(row["id"], row["label"], row["of"]) for row in rows if row["what"] == "conflict"] == [
        (ids[number], label_of[number], ids[groups[i][0]]) for i in conflicting for number in groups[i]
    ]
    assert not list(Findings.of(source, numbers[:0], keys[:0], {}))


@pytest.fixture
def odd(tiny: Path) -> Path:
    """120 images that cannot be read, 130 other files, 150 copies of an image, of which the last has another label."""
    for i in range(120):
        (tiny / "cold" / f"bad-{i:03d}.png").write_bytes(b"%d" % (i // 2))
    for i in range(130):
        (tiny / "cold" / os.fsdecode(b"n\xef-%03d.txt" % i)).touch()
    for i in range(149):
        shutil.copy(tiny / "cold" / "000.png", tiny / "cold" / f"copy-{i:03d}.png")
    shutil.copy(tiny / "cold" / "000.png", tiny / "warm" / "copy.png")
    return tiny


def test_a_report_counts_all_and_names_the_first_hundred(odd: Path, tmp_path: Path, engine: ColourEngine) -> None:
    extraction = sync(odd, COLOURS, engine=engine, cache=tmp_path / "cache")
    report = extraction.report
    assert (report.found, report.extracted) == (282, 12)
    assert (report.skipped, report.ignored, report.duplicate) == (120, 130, 150)
    assert (report.duplicate_groups, report.conflict_groups) == (1, 1)
    assert [len(each) for each in (report.skipped_images, report.ignored_files)] == [100, 100]
    copies = ["cold/000.png", *(f"cold/copy-{i:03d}.png" for i in range(149))]
    assert report.duplicates == [copies[:100]]
    assert report.conflicts == [dict.fromkeys(copies[:99], "cold") | {"warm/copy.png": "warm"}]
    assert "1 images appear with the same bytes under several labels" in report.notes
    for line in ("skipped: 110 more", "ignored: 120 more"):
        assert f"{line}, all of them with `featx extract DATA --findings FILE`" in report.text()
    notes = _extraction_notes(report.to_dict())
    assert len(notes) == 30 + 1 + len(report.notes)
    assert notes[30] == "222 more, all of them with `featx extract DATA --findings FILE`"

    expected = [f"cold/bad-{i:03d}.png" for i in range(120)]
    for where in (extraction, sync(odd, COLOURS, engine=engine, cache=tmp_path / "cache")):
        path = where.findings.write(tmp_path / "found" / "odd.jsonl")  # the second time in place of the first
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert [row["id"] for row in rows if row["what"] == "skipped"] == expected
        assert all(row["reason"] for row in rows if row["what"] == "skipped")
        assert [row["file"] for row in rows if row["what"] == "ignored"] == list(extraction.source.ignored)
        assert {(row["id"], row["of"]) for row in rows if row["what"] == "duplicate"} == {
            (name, copies[0]) for name in (*copies[1:], "warm/copy.png")
        }
        assert len(rows) == 120 + 130 + 150 + 151


def test_nothing_odd_is_an_empty_file(tiny: Path, tmp_path: Path, engine: ColourEngine) -> None:
    extraction = sync(tiny, COLOURS, engine=engine, cache=tmp_path / "cache")
    for _ in range(2):
        assert extraction.findings.write(tmp_path / "odd.jsonl").read_bytes() == b""


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_findings_never_replace_anything_else(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "odd.jsonl", tmp_path / "other.jsonl"
    if kind == "file":
        path.write_text('{"path": "a.jpg"}\n')
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        other.write_text('{"what": "skipped"}\n')
        path.symlink_to(other)
    else:
        os.mkfifo(path)
    before, names = path.lstat(), sorted(tmp_path.iterdir())
    with pytest.raises(FeatxError, match=r"odd\.jsonl holds no findings of featx, so it stays; give another file"):
        Findings.of(Source("", Path(), []), np.zeros(0, np.int64), np.zeros((0, 32), np.uint8), {}).write(path)
    after = path.lstat()
    assert (after.st_mode, after.st_ino, after.st_mtime_ns) == (before.st_mode, before.st_ino, before.st_mtime_ns)
    assert sorted(tmp_path.iterdir()) == names
    assert kind != "link" or other.read_text() == '{"what": "skipped"}\n'
