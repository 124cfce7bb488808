"""Describes an ONNX file without running it, whether featx wrote it or not."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx.errors import ExportError
from featx.shipping.deployed import parse_metadata
from featx.shipping.graph import PARTS, load, part_digests

if TYPE_CHECKING:
    from onnx import ValueInfoProto


def inspect(path: str | Path) -> dict[str, Any]:
    """JSON values that describe an ONNX file; nothing in it is run, and no other file is opened.

    `featx` has the metadata of a file that featx exported (classes, preprocessing, contract, metrics,
    ...), None for any other, whose own metadata is under `metadata`. `intact` says whether each part still has the
    digest that was recorded at export. `inputs` and `outputs` map names to dtype and shape, where a
    symbol or None stands for any size. Raises `ExportError` for anything but an ONNX file.
    """
    path = Path(path)
    model = load(path, external=True)
    raw = {entry.key: entry.value for entry in model.metadata_props}
    initializers = model.graph.initializer
    given = {t.name for t in initializers}  # old files list their weights among the inputs, too
    operators = sorted(f"{node.domain}.{node.op_type}".removeprefix(".") for node in model.graph.node)
    ours = parse_metadata(raw, path) if "featx_format" in raw else None
    data = path.read_bytes()

    values: dict[str, Any] = {
        "file": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "featx": ours,
        "inputs": {v.name: _type(v) for v in model.graph.input if v.name not in given},
        "outputs": {v.name: _type(v) for v in model.graph.output},
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "nodes": len(model.graph.node),
        "operators": dict(Counter(operators).most_common()),
        "parameters": sum(math.prod(t.dims) for t in initializers),
        "external_data": sorted({e.value for t in initializers for e in t.external_data if e.key == "location"}),
        "metadata": {} if ours is not None else raw,
    }
    if ours is not None:
        found, recorded = part_digests(model.graph), ours.get("parts", {})
        values["intact"] = {name: found[name] == recorded.get(name) for name in (*PARTS, "other")}
    return values


def text(values: dict[str, Any], most: int = 10) -> str:
    """What `inspect` found, for people."""
    ours = values["featx"]
    lines = [f"{values['file']}  {values['bytes']:,} bytes, {values['parameters']:,} parameters"]

    def add(name: str, value: object) -> None:
        lines.append(f"  {name:<14}{value}")

    if ours is None:
        add("exported by", f"{values['producer'] or 'an unknown program'}, not featx")
    else:
        names = ours["class_names"]
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
        changed = [name for name, same in values["intact"].items() if not same]
        add("parts", f"CHANGED since export: {', '.join(changed)}" if changed else "as exported")
    for way in ("inputs", "outputs"):
        for name, value in values[way].items():
            add(way.removesuffix("s"), f"{name}  {value['dtype']} {value['shape']}")
    add("opset", ", ".join(f"{name} {version}" for name, version in values["opsets"].items()))
    add("operators", ", ".join(f"{name} {count}" for name, count in list(values["operators"].items())[:most]))
    if values["external_data"]:
        add("weights in", ", ".join(values["external_data"]))
    lines += [f"  {name:<14}{value[:200]}" for name, value in values["metadata"].items()]
    return "\n".join(lines)


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
