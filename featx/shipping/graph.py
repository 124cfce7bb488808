"""The ONNX graph of an exported file: preprocessing, backbone and head, put together without torch.

Every name in the graph says which part it belongs to: `preprocess/`, `backbone/` or `head/`. Parts meet
at two values, `backbone/images` (`uint8 [N, 3, crop, crop]`) and `backbone/features` (`float32 [N, D]`),
so a part can be hashed, compared and exchanged by itself.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from featx.engines.wire import require_whole, scan
from featx.errors import ExportError
from featx.files import MOST_NETWORK_BYTES, read_plain
from featx.head import Head
from featx.options import Input
from featx.pixels.preprocess import MAX_ASPECT, Preprocess

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto

OPSET = 18
"""The oldest operator set with an antialiased Resize, and so the one that most runtimes have."""
INPUTS = get_args(Input)
OUTPUTS = ("probabilities", "logits", "features", "accepted")
PARTS = ("preprocess", "backbone", "head")
GUARD = f"preprocess/refuse_empty_or_beyond_1_to_{MAX_ASPECT}"
"""The node whose name a runtime reports for an image that the graph will not resize."""
PIXELS, FEATURES_VALUE = "backbone/images", "backbone/features"
"""Where the parts meet."""
INNER = ["probabilities", "logits", FEATURES_VALUE]
"""The outputs of `opened_up`."""
_IR_VERSION = 10  # what onnxruntime 1.18 and later read


class Part:
    """A part of a graph that is being built: nodes and constants under one prefix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(values, f"{self.name}/{name}"))
        return f"{self.name}/{name}"

    def integers(self, name: str, values: list[int]) -> str:
        return self.constant(name, np.array(values, np.int64))

    def node(self, operator: str, inputs: list[str], name: str, *, output: str | None = None, **attributes: Any) -> str:
        """Add one node; its output has the node's name, or `output`."""
        from onnx import helper

        full = f"{self.name}/{name}"
        self.nodes.append(helper.make_node(operator, inputs, [output or full], name=full, **attributes))
        return output or full


def build(
    backbone: ModelProto | None,
    head: Head,
    preprocess: Preprocess,
    *,
    input: Input = "pixels",
    outputs: tuple[str, ...] | None = None,
) -> ModelProto:
    """The whole ONNX model, without its metadata.

    backbone: `images` uint8 `[N, 3, crop, crop]` -> `features` float32 `[N, D]`; None for
    `input="features"`, the head alone. input: `pixels` (`uint8 [N, H, W, 3]` RGB of any size), `tensor`
    (`uint8 [N, 3, crop, crop]`) or `features` (`float32 [N, D]`). outputs: some of `OUTPUTS`, which are given in
    that order; by default all that are possible. Raises `ExportError` for an impossible combination.
    """
    from onnx import TensorProto, helper

    outputs = _chosen(head, input, outputs)
    if input == "features":
        entry = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", head.weight.shape[1]])
        return _model("featx_head", entry, [_head_part(head, outputs, "features")], head, outputs, {"": OPSET})

    assert backbone is not None
    body, opsets = _backbone_part(backbone)
    crop = preprocess.crop
    if input == "pixels":
        shape: list[str | int] = ["N", "H", "W", 3]
        front = pixels_part(preprocess)
    else:
        shape = ["N", 3, crop, crop]
        front = Part("preprocess")
        front.node("Identity", ["images"], "none", output=PIXELS)
    entry = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
    return _model("featx", entry, [front, body, _head_part(head, outputs, FEATURES_VALUE)], head, outputs, opsets)


def resizes(model: ModelProto) -> bool:
    """Whether a file takes images of any size and resizes them itself."""
    return any(node.name == GUARD for node in model.graph.node)


def pixels_part(preprocess: Preprocess) -> Part:
    """`images` uint8 `[N, H, W, 3]` -> `backbone/images` uint8 `[N, 3, crop, crop]`.

    The arithmetic of `Preprocess`: in mode `center` the short side becomes `resize`, the long one
    `resize * long // short` (integers, as `int(resize * long / short)` rounds), antialiased without weights outside the
    image, and the crop's offset is rounded half to even. Pixels are within 2 levels of Pillow's, mostly within 1. An
    image with a zero side or an aspect ratio beyond 1:64 would need gigabytes: node `GUARD` then fails, by an index out
    of bounds, before anything is resized.
    """
    part = Part("preprocess")
    one = part.integers("one", [1])
    size = part.node("Shape", ["images"], "size", start=1, end=3)  # H, W
    short = part.node("ReduceMin", [size], "short", keepdims=1)
    long = part.node("ReduceMax", [size], "long", keepdims=1)
    most = part.node("Mul", [short, part.integers("aspect", [MAX_ASPECT])], "longest_allowed")
    beyond = part.node("Greater", [part.node("Max", [long, one], "long_or_one"), most], "is_beyond")
    index = part.node("Cast", [beyond], "index", to=7)
    guard = part.node("Gather", [part.integers("zero", [0]), index], GUARD.removeprefix("preprocess/"))
    # dividing by zero ends the process in some runtimes before the guard is looked at
    divisor = part.node("Add", [part.node("Max", [short, one], "short_or_one"), guard], "divisor")
    resize = part.integers("resize", [preprocess.resize])
    if preprocess.crop_mode == "squash":
        resized = part.node("Add", [part.node("Concat", [resize, resize], "square", axis=0), guard], "resized_size")
    elif preprocess.crop_mode == "border":  # in double precision, as `Preprocess.resized` computes it
        most = part.node("Add", [part.node("Max", [long, one], "longest"), guard], "longest_checked")
        double = [part.node("Cast", [v], f"double_{i}", to=11) for i, v in enumerate((size, most, resize))]
        ratio = part.node("Div", double[1:], "ratio")
        rounded = part.node("Round", [part.node("Div", [double[0], ratio], "resized_double")], "resized_rounded")
        resized = part.node("Max", [part.node("Cast", [rounded], "resized_whole", to=7), one], "resized_size")
    else:
        scaled = part.node("Mul", [size, resize], "scaled")
        resized = part.node("Div", [scaled, divisor], "resized_size")
    batch = part.node("Shape", ["images"], "batch", start=0, end=1)
    # sizes of all four axes: onnxruntime's optimizer breaks a Resize with `axes` when it moves a Transpose
    sizes = part.node("Concat", [batch, resized, part.integers("channels", [3])], "sizes", axis=0)
    linear: dict[str, Any] = {"mode": "linear"}
    attributes = linear if preprocess.interpolation == "bilinear" else {"mode": "cubic", "cubic_coeff_a": -0.5}
    # channels last: measured 1.2 ms for a 500 x 375 photograph, 1.6 ms channels first
    attributes |= {"antialias": 1, "exclude_outside": 1, "coordinate_transformation_mode": "half_pixel"}
    whole = part.node("Resize", ["images", "", "", sizes], "resized", **attributes)
    crop = part.integers("crop", [preprocess.crop, preprocess.crop])
    spare = part.node("Cast", [part.node("Sub", [resized, crop], "spare")], "spare_float", to=1)
    half = part.node("Mul", [spare, part.constant("half", np.array(0.5, np.float32))], "half_spare")
    start = part.node("Cast", [part.node("Round", [half], "offset_float")], "offset", to=7)
    if preprocess.pads:
        cut = _padded(part, whole, start, resized, crop, preprocess.fill)
    else:
        end = part.node("Add", [start, crop], "offset_end")
        cut = part.node("Slice", [whole, start, end, part.integers("axes", [1, 2])], "cropped")
    turned = part.node("Transpose", [cut], "channels_first", perm=[0, 3, 1, 2])
    # says the shape that is known here, for the runtimes that plan by it
    shape = part.integers("shape", [0, 3, preprocess.crop, preprocess.crop])
    part.node("Reshape", [turned, shape], "pixels", output=PIXELS)
    return part


def _padded(part: Part, whole: str, start: str, resized: str, crop: str, fill: tuple[int, ...]) -> str:
    """The crop of an image that may be smaller; what lies beyond it has the colour `fill`."""
    taken = part.node("Min", [resized, crop], "taken")
    first = part.node("Max", [start, part.integers("edge", [0])], "first")
    end = part.node("Add", [first, taken], "end")
    cut = part.node("Slice", [whole, first, end, part.integers("axes", [1, 2])], "cropped")
    lacking = part.node("Sub", [crop, taken], "lacking")
    before = part.node("Div", [lacking, part.integers("two", [2])], "before")
    none = part.integers("none", [0])
    pads = [none, before, none, none, part.node("Sub", [lacking, before], "after"), none]
    widths = part.node("Concat", pads, "pad_widths", axis=0)
    padded = part.node("Pad", [cut, widths], "padded")
    if not any(fill):
        return padded
    single = part.integers("single", [1])
    shape = part.node("Concat", [single, taken, single], "inside_shape", axis=0)
    inside = part.node("Expand", [part.constant("yes", np.ones(1, np.uint8)), shape], "inside")
    mask = part.node("Cast", [part.node("Pad", [inside, widths], "inside_padded")], "is_inside", to=9)
    return part.node("Where", [mask, padded, part.constant("fill", np.array(fill, np.uint8))], "filled")


def _head_part(head: Head, outputs: tuple[str, ...], features: str) -> Part:
    part = Part("head")
    weight = part.constant("weight", np.ascontiguousarray(head.weight, np.float32))
    bias = part.constant("bias", np.ascontiguousarray(head.bias, np.float32))
    logits = part.node("Gemm", [features, weight, bias], "gemm", output="logits", transB=1)
    operator, attributes = ("Softmax", {"axis": 1}) if head.activation == "softmax" else ("Sigmoid", {})
    part.node(operator, [logits], "activation", output="probabilities", **attributes)
    if "features" in outputs:
        part.node("Identity", [features], "features", output="features")
    if "accepted" in outputs:
        best = part.node("ReduceMax", ["probabilities", part.integers("axis", [1])], "best", keepdims=0)
        threshold = part.constant("threshold", np.array(head.threshold, np.float32))
        part.node("GreaterOrEqual", [best, threshold], "accept", output="accepted")
    return part


def _chosen(head: Head, input: str, outputs: tuple[str, ...] | None) -> tuple[str, ...]:
    """The outputs in the graph's order, checked."""
    if input not in INPUTS:
        raise ExportError(f"input {input!r} is not one of {', '.join(INPUTS)}")
    missing = {"accepted"} if head.threshold is None else set()
    missing |= {"features"} if input == "features" else set()
    if outputs is None:
        return tuple(name for name in OUTPUTS if name not in missing)
    if not outputs or not set(outputs) <= set(OUTPUTS) or len(set(outputs)) < len(outputs):
        raise ExportError(f"outputs are one or more of {', '.join(OUTPUTS)}, each once; got {list(outputs)}")
    if "accepted" in missing.intersection(outputs):
        raise ExportError("the head has no rejection threshold, so it cannot give `accepted`")
    if missing.intersection(outputs):
        raise ExportError("a head alone takes features in; choose its outputs from the others")
    return tuple(name for name in OUTPUTS if name in outputs)


def _backbone_part(model: ModelProto) -> tuple[Part, dict[str, int]]:
    """A backbone's file as a part, with its operator sets; changes `model` in place (it may be large)."""
    from onnx import compose

    from featx.engines.onnx import strip

    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("", 0) < OPSET:
        raise ExportError(f"the backbone is in operator set {opsets.get('')}; {OPSET} or later is needed")
    if model.functions:
        raise ExportError("the backbone's file has functions of its own; export it with them inlined")
    names = [v.name for v in model.graph.input], [v.name for v in model.graph.output]
    if names != (["images"], ["features"]):
        raise ExportError(f"the backbone takes and gives {names}; expected images -> features")

    strip(model)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or str(number)
    compose.add_prefix_graph(model.graph, "backbone/", inplace=True)
    part = Part("backbone")
    part.nodes, part.initializers = list(model.graph.node), list(model.graph.initializer)
    return part, opsets


def _model(
    name: str, entry: ValueInfoProto, parts: list[Part], head: Head, outputs: tuple[str, ...], opsets: dict[str, int]
) -> ModelProto:
    from onnx import TensorProto, helper

    classes, width = head.weight.shape
    shapes = {
        "probabilities": (TensorProto.FLOAT, ["N", classes]),
        "logits": (TensorProto.FLOAT, ["N", classes]),
        "features": (TensorProto.FLOAT, ["N", width]),
        "accepted": (TensorProto.BOOL, ["N"]),
    }
    model = helper.make_model(
        helper.make_graph([], name, [entry], [helper.make_tensor_value_info(out, *shapes[out]) for out in outputs]),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        producer_name="featx",
        ir_version=_IR_VERSION,
    )
    for part in parts:  # only now: a model copies its graph, which may be large
        model.graph.node.extend(part.nodes)
        model.graph.initializer.extend(part.initializers)
    return model


def opened_up(model: ModelProto, *, pixels: bool = False) -> bytes:
    """The same graph with its inner values as outputs: probabilities, logits and `FEATURES_VALUE`.

    pixels: leave the preprocessing out; the graph's input is then `PIXELS`. What is computed stays the
    same, so that a file can be measured at every joint. Raises `ExportError` where it lacks these values.
    """
    from onnx import ModelProto, TensorProto, helper

    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    there = {name for node in graph.node for name in node.output}
    if missing := [name for name in [PIXELS, *INNER] if name not in there]:
        raise ExportError(f"the graph has no {', '.join(missing)}; featx did not write it")

    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in INNER)
    if pixels:
        nodes = [node for node in graph.node if not node.name.startswith("preprocess/")]
        tensors = [tensor for tensor in graph.initializer if not tensor.name.startswith("preprocess/")]
        del graph.node[:], graph.initializer[:], graph.input[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensors)
        graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, ["N", 3, "H", "W"]))
    data: bytes = copy.SerializeToString()
    return data


def resize_alone(model: ModelProto) -> bytes:
    """The preprocessing of a file by itself: its input, and `PIXELS` as the only output."""
    from onnx import TensorProto, helper

    nodes, tensors = (
        [entry for entry in entries if entry.name.startswith("preprocess/")]
        for entries in (model.graph.node, model.graph.initializer)
    )
    pixels = helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, None)
    graph = helper.make_graph(nodes, "preprocess", list(model.graph.input), [pixels], tensors)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    data: bytes = alone.SerializeToString()
    return data


def load(path: Path) -> ModelProto:
    """Read an ONNX file that holds its own weights. Raises `ExportError` for anything else."""
    try:
        data = read_plain(path, MOST_NETWORK_BYTES)
        found = scan(data)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ExportError(f"{path} cannot be read: {error}; give a whole ONNX file") from error
    require_whole(found, path)
    return parse(data, path)


def parse(data: bytes, path: Path) -> ModelProto:
    """An ONNX file's bytes as a model; weights in other files are left out. path: for the message of `ExportError`."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: ModelProto = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ExportError(f"{path} is not an ONNX file ({error})") from error
    if not model.graph.node and not model.graph.initializer:
        raise ExportError(f"{path} is not an ONNX file, or holds no graph")
    return model


def part_digests(graph: GraphProto) -> dict[str, str]:
    """SHA-256, in hex, of the SHA-256s of each part's nodes and weights, in the graph's order, by part name.

    A part that is not there has the digest of nothing. Names that belong to no part count as `other`.
    """
    hashes = {name: hashlib.sha256() for name in (*PARTS, "other")}
    weights = [*graph.initializer, *graph.sparse_initializer]
    with ThreadPoolExecutor(2) as pool:
        digests = [*map(_digest, graph.node), *pool.map(_digest, weights)]
    for entry, digest in zip([*graph.node, *weights], digests, strict=True):
        prefix = getattr(entry, "name", "").partition("/")[0]
        hashes[prefix if prefix in PARTS else "other"].update(digest)
    return {name: hash.hexdigest() for name, hash in hashes.items()}


def _digest(entry: NodeProto | TensorProto | SparseTensorProto) -> bytes:
    return hashlib.sha256(entry.SerializeToString(deterministic=True)).digest()
