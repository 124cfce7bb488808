"""Describes an ONNX file without running it, whether featx wrote it or not."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx.engines.wire import FORMAT_KEY
from featx.errors import ExportError
from featx.files import MOST_NETWORK_BYTES, read_plain
from featx.options import home
from featx.seals import SEAL, is_sealed
from featx.shipping.deployed import parse_metadata
from featx.shipping.graph import PARTS, parse, part_digests
from featx.text import printable

if TYPE_CHECKING:
    from onnx import ValueInfoProto


@dataclass(frozen=True)
class Inspection:
    """What an ONNX file is, whether featx wrote it or not."""

    file: str
    bytes: int
    sha256: str
    featx: dict[str, Any] | None
    """The metadata of a file that featx exported (classes, preprocessing, contract, metrics, ...); None for others."""
    inputs: dict[str, dict[str, Any]]
    """Name -> `dtype` and `shape`, in which a symbol or None stands for any size."""
    outputs: dict[str, dict[str, Any]]
    opsets: dict[str, int]
    ir_version: int
    producer: str
    nodes: int
    operators: dict[str, int]
    """How many nodes there are of each, the most frequent first."""
    parameters: int
    external_data: list[str]
    """Other files that hold weights."""
    metadata: dict[str, str]
    """The metadata of a file that featx did not export."""
    intact: dict[str, bool] | None
    """Has each part, and the `file` as a whole, still the digest that was recorded at export? None where featx did not
    export the file."""

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return values if self.intact is not None else {name: values[name] for name in values if name != "intact"}

    def text(self, most: int = 10) -> str:
        """For people, with up to `most` classes and operators."""
        lines = [f"{printable(self.file)}  {self.bytes:,} bytes, {self.parameters:,} parameters"]

        def add(name: str, value: object) -> None:  # a line's end in a stranger's file would forge the next line
            lines.append(f"  {printable(name):<14}{printable(str(value))}")

        if self.featx is None:
            add("exported by", f"{self.producer or 'an unknown program'}, not featx")
        else:
            ours, names = self.featx, self.featx["class_names"]
            more = f" and {len(names) - most} more" if len(names) > most else ""
            add("exported by", f"featx {ours.get('versions', {}).get('featx', '')}")
            add("takes", ours.get("contract", ours["input"]))
            add("classes", f"{len(names)}: {', '.join(names[:most])}{more}")
            add("answer", f"{ours['activation']}, threshold {ours['threshold']}")
            for name in ("backbone", "weights", "license", "head"):
                if name in ours:
                    add(name, ours[name])
            for name in ("metrics", "parity"):
                add(name, ", ".join(f"{k} {_short(v)}" for k, v in ours.get(name, {}).items()))
            changed = [name for name, same in (self.intact or {}).items() if not same]
            add("parts", f"CHANGED since export: {', '.join(changed)}" if changed else "as exported")
        for way, values in (("input", self.inputs), ("output", self.outputs)):
            for name, value in values.items():
                add(way, f"{name}  {value['dtype']} {value['shape']}")
        add("opset", ", ".join(f"{name} {version}" for name, version in self.opsets.items()))
        add("operators", ", ".join(f"{name} {count}" for name, count in list(self.operators.items())[:most]))
        if self.external_data:
            add("weights in", ", ".join(self.external_data))
        for name, text in self.metadata.items():
            add(name, text[:200])
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """Describe an ONNX file; nothing in it is run, and no other file is opened.

    Raises `ExportError` for anything but an ONNX file.
    """
    path = Path(home(path))
    try:
        data = read_plain(path, MOST_NETWORK_BYTES)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror or error})") from error
    model = parse(data, path)
    raw = {entry.key: entry.value for entry in model.metadata_props}
    initializers = model.graph.initializer
    given = {t.name for t in initializers}  # old files list their weights among the inputs, too
    operators = sorted(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph.node)
    ours, intact = None, None
    if FORMAT_KEY in raw:
        ours, found = parse_metadata(raw, path), part_digests(model.graph)
        recorded = ours.get("parts", {})
        intact = {name: found[name] == recorded.get(name) for name in (*PARTS, "other")}
        if raw.keys() & SEAL.keys():  # older files have neither
            intact["file"] = False
            with contextlib.suppress(ValueError):
                intact["file"] = is_sealed(data)

    return Inspection(
        file=path.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        featx=ours,
        inputs={v.name: _type(v) for v in model.graph.input if v.name not in given},
        outputs={v.name: _type(v) for v in model.graph.output},
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        nodes=len(model.graph.node),
        operators=dict(Counter(operators).most_common()),
        parameters=sum(math.prod(t.dims) for t in initializers),
        external_data=sorted({e.value for t in initializers for e in t.external_data if e.key == "location"}),
        metadata={} if ours is not None else raw,
        intact=intact,
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _type(value: ValueInfoProto) -> dict[str, Any]:
    from onnx import helper

    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return {"dtype": None, "shape": None}
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    try:
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError as error:
        raise ExportError(f"{value.name} has an unknown element type {tensor.elem_type}") from error
    return {"dtype": dtype, "shape": dims if tensor.HasField("shape") else None}
