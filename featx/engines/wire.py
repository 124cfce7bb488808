"""Looks through an ONNX file's bytes before any runtime does: its metadata, and what featx would never have exported.

It reads the protobuf fields that matter and skips the weights. So `predict` needs no onnx package, and a stranger's
file is refused before something in it runs. Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from featx.errors import ExportError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# A file of 1,000 layers has some 100,000; a crafted one could have as many as bytes, at a microsecond or more each.
MOST_FIELDS = 1_000_000
Value = int | memoryview


@dataclass(frozen=True)
class Contents:
    """What an ONNX file holds, as far as `scan` reads it."""

    metadata: dict[str, str] = field(default_factory=dict)
    side_files: list[str] = field(default_factory=list)
    """Files that its weights lie in: a crafted file could name any file of this machine."""
    programs: list[str] = field(default_factory=list)
    """Operators with graphs of their own, such as Loop, which may never end, and functions."""


class Reader:
    """Protobuf fields of a message and of those in it, with a limit on their number."""

    def __init__(self) -> None:
        self.left = MOST_FIELDS

    def fields(self, data: memoryview) -> Iterator[tuple[int, Value]]:
        """Number and value of each field. Raises `ValueError`."""
        at = 0
        while at < len(data):
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"it has more than {MOST_FIELDS:,} fields")
            tag, at = _varint(data, at)
            if tag >> 32:  # other readers drop the bits above, and would find a field here that this one does not
                raise ValueError("it is not an ONNX file")
            kind = tag & 7
            if kind == VARINT:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            size = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
            if kind == BYTES:
                size, at = _varint(data, at)
            elif not size:
                raise ValueError("it is not an ONNX file")
            if at + size > len(data):
                raise ValueError("it is not an ONNX file, or cut short")
            yield tag >> 3, data[at : at + size]
            at += size

    def messages(self, data: memoryview, *numbers: int) -> Iterator[memoryview]:
        """The messages in fields of these numbers."""
        for number, value in self.fields(data):
            if number in numbers:
                if isinstance(value, int):
                    raise ValueError("it is not an ONNX file")
                yield value


def scan(data: bytes) -> Contents:
    """Look through a model. Raises `ValueError` for what is not an ONNX file."""
    found, reader, graphs = Contents(), Reader(), 0
    for number, value in reader.fields(memoryview(data)):
        if isinstance(value, int):
            continue
        if number == 7:
            graphs += 1
            _scan_graph(reader, value, found)
        elif number == 14:
            found.metadata.update([_pair(reader, value)])
        elif number in (20, 25):
            found.programs.append("training" if number == 20 else "functions")
    if not graphs:
        raise ValueError("it is not an ONNX file, or holds no graph")
    return found


def require_whole(found: Contents, path: Path) -> None:
    """Raise `ExportError` for a file that needs others, or that holds programs of its own."""
    if found.side_files:
        raise ExportError(
            f"{path} keeps weights in other files ({', '.join(sorted(set(found.side_files))[:3])}); "
            "featx reads and writes one file, since such a file could name any file of this machine"
        )
    if found.programs:
        raise ExportError(
            f"{path} holds {', '.join(sorted(set(found.programs))[:3])}, graphs of its own that may never end; featx "
            "neither exports nor runs them"
        )


def _scan_graph(reader: Reader, graph: memoryview, found: Contents) -> None:
    for number, value in reader.fields(graph):
        if isinstance(value, int):
            continue
        if number == 1:
            _scan_node(reader, value, found)
        elif number == 5:
            _scan_tensor(reader, value, found)
        elif number == 15:  # sparse: its values and indices
            for tensor in reader.messages(value, 1, 2):
                _scan_tensor(reader, tensor, found)


def _scan_node(reader: Reader, node: memoryview, found: Contents) -> None:
    operator = "?"
    for number, value in reader.fields(node):
        if isinstance(value, int):
            continue
        if number == 4:
            operator = _text(value)
        elif number == 5:
            for name, part in reader.fields(value):
                if isinstance(part, int):
                    continue
                if name in (6, 11):
                    found.programs.append(operator)
                elif name in (5, 10):
                    _scan_tensor(reader, part, found)
                elif name in (22, 23):
                    for tensor in reader.messages(part, 1, 2):
                        _scan_tensor(reader, tensor, found)


def _scan_tensor(reader: Reader, tensor: memoryview, found: Contents) -> None:
    """external_data is field 13, data_location field 14; runtimes differ in which of them they follow."""
    for number, value in reader.fields(tensor):
        if number == 14 and value:
            found.side_files.append("?")
        elif number == 13 and not isinstance(value, int):
            name, text = _pair(reader, value)
            if name == "location":
                found.side_files.append(text)


def _pair(reader: Reader, entry: memoryview) -> tuple[str, str]:
    """A key and its value, each a text."""
    texts = {number: _text(value) for number, value in reader.fields(entry) if not isinstance(value, int)}
    return texts.get(1, ""), texts.get(2, "")


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is not an ONNX file, or cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("it is not an ONNX file")
