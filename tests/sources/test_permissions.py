"""Files and folders that this user may not read, tried for real: as another user where root runs the tests."""

from __future__ import annotations

import encodings.utf_8_sig  # noqa: F401  before rights are dropped: Python may lie where nobody else reads
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from featx.errors import ImageError, SourceError
from featx.sources.opening import open_source


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Two classes of one image each, seen by a process with no more rights than any user has."""
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "1.jpg").write_bytes(b"image")
    (tmp_path / "root" / "list.csv").write_text("path,label\ncat/1.jpg,cat\n")
    (tmp_path / "root").chmod(0o777)
    closed: list[tuple[Path, int]] = []
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents):  # pytest's own temporary folders are root's alone
            mode = folder.stat().st_mode & 0o7777
            if mode & 0o011 != 0o011:
                closed.append((folder, mode))
                folder.chmod(mode | 0o011)
        for path in (tmp_path / "root").rglob("*"):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    yield tmp_path / "root"
    os.seteuid(os.getuid())
    for folder, mode in closed:
        folder.chmod(mode)
    for path in (tmp_path / "root").iterdir():
        path.chmod(0o755)


def test_an_image_without_permission_is_one_named_image_error(root: Path) -> None:
    (root / "cat" / "1.jpg").chmod(0)
    source = open_source(root)
    assert source.ids == ["cat/1.jpg", "dog/1.jpg"]
    with pytest.raises(ImageError, match=r"^the file may not be read by this user; try `chmod \+r`"):
        source.read(0)
    assert source.read(1) == b"image"


def test_a_class_folder_that_cannot_be_listed_is_an_error_that_names_it(root: Path) -> None:
    (root / "dog").chmod(0)
    with pytest.raises(SourceError, match=r"root/dog cannot be listed \(Permission denied\); make it readable"):
        open_source(root)


def test_a_class_folder_whose_files_cannot_be_looked_at_gives_image_errors(root: Path) -> None:
    (root / "dog").chmod(0o444)  # names, but nothing about them
    source = open_source(root)
    assert source.stats is not None and source.stats[:, 0].tolist() == [5, -1]
    with pytest.raises(ImageError, match=r"^the file may not be read"):
        source.read(1)


def test_a_link_into_a_closed_folder_is_skipped_by_name(root: Path) -> None:
    (root / "cat" / "2.jpg").symlink_to("../dog/1.jpg")
    (root / "dog").chmod(0)
    (root / "list.csv").write_text("path,label\ncat/1.jpg,cat\ncat/2.jpg,dog\n")
    source = open_source(root / "list.csv")
    assert source.notes == ["1 of 2 files are not there and will be skipped: cat/2.jpg (row 3)"]
    with pytest.raises(ImageError, match=r"^the file may not be read"):
        source.read(1)
    (root / "dog").chmod(0o755)
    (root / ".closed").mkdir(0)
    (root / "cat" / "3.jpg").symlink_to("../.closed/1.jpg")
    assert open_source(root).ids == ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg", "dog/1.jpg"]


def test_a_manifest_or_folder_without_permission_is_an_error_that_says_so(root: Path) -> None:
    (root / "list.csv").chmod(0)
    with pytest.raises(SourceError, match=r"list\.csv cannot be read \(Permission denied\)"):
        open_source(root / "list.csv")
    (root / "dog").chmod(0)
    with pytest.raises(SourceError, match=r"deeper cannot be opened \(Permission denied\)"):
        open_source(root / "dog" / "deeper")
