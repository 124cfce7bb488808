"""JSON files: sealed ones are read only as they were written."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path

import pytest

from featx.files import read_plain, write_atomic
from featx.records import unsealed, write_record, write_sealed

GOLDEN = Path(__file__).parent / "cache" / "golden" / "cache" / "features"


def test_sealed_values_come_back(tmp_path: Path) -> None:
    values = {"shape": [1, 2], "name": "caf\udce9 née", "nested": {"b": None, "a": 0.1}}
    write_sealed(tmp_path / "new" / "values.json", values)
    assert unsealed((tmp_path / "new" / "values.json").read_bytes()) == values


def test_any_flipped_byte_breaks_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_sealed(path, {"rows": 12, "name": "a"})
    data = path.read_bytes()
    for at in range(len(data)):
        if chr(data[at]).isspace() or chr(data[at] ^ 1).isspace():
            continue  # between the values
        with pytest.raises(ValueError):
            unsealed(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"sha256": 1}', b"[" * 100_000])
def test_what_was_never_sealed_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        unsealed(data)


def test_what_an_older_featx_sealed_is_read_and_written_the_same(tmp_path: Path) -> None:
    (golden,) = GOLDEN.glob("*/spec.json")
    values = unsealed(golden.read_bytes())
    write_sealed(tmp_path / "spec.json", values)
    assert json.loads((tmp_path / "spec.json").read_bytes()) == json.loads(golden.read_bytes())


def test_json_for_people_keeps_letters_and_escapes_bytes(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", {"name": "née caf\udce9"})
    assert (tmp_path / "a.json").read_bytes().startswith(b'{\n  "name": "n\xc3\xa9e caf\\udce9",\n  "format": 2,\n')


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    write_atomic(path, b"old")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_atomic(path, bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(OSError, match="it has 21,474,836,480 bytes, and at most 268,435,456 are read"):
        read_plain(path)


def test_a_write_that_fails_names_its_folder(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_atomic(tmp_path / "new" / "values.bin", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())
