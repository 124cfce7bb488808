"""Looks through an ONNX file's bytes before any runtime does: its metadata, and what featx would never have exported.

It reads the protobuf fields that matter and skips the weights. So `predict` needs no onnx package, and a stranger's
file is refused before something in it runs. Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from featx.errors import ExportError

FORMAT_KEY = "featx_format"
"""The name of an exported file's metadata that other ONNX files lack."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# A file of 1,000 layers has some 100,000; a crafted one could have as many as bytes, at a microsecond or more each.
MOST_FIELDS = 1_000_000
Value = int | memoryview
INSIDE = {
    "model": {7: "graph", 14: "metadata", 20: "training", 25: "functions"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "operator", 5: "attribute"},
    "attribute": {5: "tensor", 6: "subgraph", 10: "tensor", 11: "subgraph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external", 14: "location"},
}
"""What is looked at in a message of each kind, by the number of its field; the kinds named here are entered."""


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
            kind, number = tag & 7, 0
            if kind in (VARINT, BYTES):
                number, at = _varint(data, at)
            size = {VARINT: 0, BYTES: number, FIXED64: 8, FIXED32: 4}.get(kind)
            if size is None or at + size > len(data):
                raise ValueError("it is not an ONNX file, or cut short")
            yield tag >> 3, number if kind == VARINT else data[at : at + size]
            at += size

    def walk(self, kind: str, data: memoryview) -> Iterator[tuple[str, Value]]:
        """What `INSIDE` names in a message of this kind, in the order of the file, each before what is in it."""
        for number, value in self.fields(data):
            if name := INSIDE[kind].get(number):
                yield name, value
                if name in INSIDE and isinstance(value, memoryview):
                    yield from self.walk(name, value)

    def pair(self, entry: memoryview) -> tuple[str, str]:
        """A key and its value, each a text."""
        texts = {number: _text(value) for number, value in self.fields(entry) if not isinstance(value, int)}
        return texts.get(1, ""), texts.get(2, "")


def scan(data: bytes) -> Contents:
    """Look through a model. Raises `ValueError` for what is not an ONNX file."""
    found, reader, graphs, operator = Contents(), Reader(), 0, "?"
    for name, value in reader.walk("model", memoryview(data)):
        if name == "location" and value:  # of the data: elsewhere; runtimes differ in whether they follow it
            found.side_files.append("?")
        elif isinstance(value, int):  # not what the field should hold
            continue
        elif name == "graph":
            graphs += 1
        elif name == "metadata":
            found.metadata.update([reader.pair(value)])
        elif name == "node":
            operator = "?"
        elif name == "operator":
            operator = _text(value)
        elif name in ("training", "functions", "subgraph"):
            found.programs.append(operator if name == "subgraph" else name)
        elif name == "external" and (pair := reader.pair(value))[0] == "location":
            found.side_files.append(pair[1])
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


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("it is not an ONNX file, or cut short")
