"""Rewrite an exported backbone's 3x3 convolutions to Winograd's F(4x4, 3x3): 4 times fewer products."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, shape_inference

# Rewriting pays for neighbouring convolutions with at least this many channels in and out: a single one loses by the
# change of layout about what it gains, as in ResNet-50. Both found on one machine (docs/benchmarks/winograd.md).
MIN_CHANNELS = 128
# Up to this many tiles per image, onnxruntime multiplies faster by 36 packed matrices than by one stack of them.
FEW_TILES = 16
# With fewer tiles, one image's matrix has a row or two, which another kernel multiplies, with other last bits.
MIN_TILES = 4
# Where polynomials are evaluated, beside infinity. The usual 0, 1, -1, 2, -2 give about twice the error (tested).
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)


def transforms(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T `[6, 6]`, G `[6, 3]` and A^T `[4, 6]`: four outputs of a filter g with three taps over six inputs d are
    A^T [(G g) * (B^T d)], with six products instead of twelve.

    Winograd's minimal filtering for networks: Lavin and Gray, arXiv:1509.09308. Its construction by Toom and
    Cook, and the choice of points: Barabasz and others, arXiv:1803.10986.
    """
    others = [[q for q in points if q != p] for p in points]
    inputs = [[*np.poly(rest)[::-1], 0] for rest in others]
    weights = [np.power(p, range(3)) / np.prod(p - np.array(rest)) for p, rest in zip(points, others, strict=True)]
    outputs = [np.power(p, range(4)) for p in points]
    return (
        np.array([*inputs, np.poly(points)[::-1]]),
        np.array([*weights, [0, 0, 1]]),
        np.array([*outputs, [0, 0, 0, 1]]).T,
    )


_BT, _G, _AT = transforms(POINTS)
# In two dimensions, their Kronecker products act on a tile's 36 inputs, 9 weights and 36 products at once.
INPUT, FILTER = np.kron(_BT, _BT), np.kron(_G, _G)
# With a row of zeros: every tensor in tiles carries the zeros outside of the image along.
OUTPUT = np.concatenate([np.kron(_AT, _AT), np.zeros((1, 36))])
# What is added to the products to add 1 to all 16 outputs: the weights that interpolate at 1.
_ONE = np.concatenate([[0], np.linalg.solve(_AT[:, 1:5], np.ones(4)), [0]])
CONSTANT = np.kron(_ONE, _ONE)


def rewritten(model: Any, max_bytes: int) -> Any | None:
    """The same network (`onnx.ModelProto`) with fewer multiplications; None where that gains nothing, or where
    the file would be larger than `max_bytes`, since a filter of 9 weights becomes 36.

    Its rows differ from the model's in their last bits (by 5e-7 to 1.3e-6 of their largest entry in four
    networks, docs/benchmarks/winograd.md), and do not depend on the batch.
    """
    rewriter = _Rewriter(model)
    size = sum(4 * math.prod(tensor.dims) for tensor in model.graph.initializer)
    size += sum(4 * (36 - 9) * c * k for c, k in rewriter.chosen.values())
    return rewriter.run() if rewriter.chosen and size < max_bytes else None


class _Rewriter:
    """Walks the graph once. A tensor in tiles is `float32 [17, B*T*C]`, with T tiles of 4x4 per image.

    Its first 16 slabs are the positions in a tile, line by line, each `[B, T, C]`; the last is zeros, which
    padding reads. Adding and rectifying leave the zeros as they are, so that tensors stay in tiles from one
    convolution to the next.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:  # exporters share equal constants this way
            if node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        inferred = _inferred(model.graph, model.opset_import)
        batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        self.shapes: dict[str, list[int]] = {}
        """C, H and W of the tensors that hold as many images as the network is given."""
        for value in [*inferred.value_info, *inferred.input, *inferred.output]:
            dims = value.type.tensor_type.shape.dim
            if len(dims) == 4 and batch and dims[0].dim_param == batch and all(d.dim_value for d in dims[1:]):
                self.shapes[value.name] = [d.dim_value for d in dims[1:]]
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.readers.update(output.name for output in model.graph.output)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.names = itertools.count(1)
        self.made: dict[Any, str] = {}
        """Names of what is made only once: constants, indices, tensors in another layout."""
        self.waiting: dict[str, Any] = {}
        """Convolutions that are made when they are read, so that an addition can be made with them."""
        self.tiles: dict[str, str] = {}
        """Tensors that exist in tiles only, and the names of what holds them."""
        self.chosen = self._choose()

    def run(self) -> Any:
        graph = self.model.graph
        for node in graph.node:
            name = node.output[0]
            if name in self.chosen:
                self.waiting[name] = node
            elif node.op_type == "Relu" and self._tiled(node.input[0]):
                self.tiles[name] = self._op("Relu", self._in_tiles(node.input[0]))
            elif node.op_type == "Add" and any(map(self._tiled, node.input)) and self._alike(node):
                self.tiles[name] = self._sum(*node.input)
            else:
                for read in node.input:
                    self._out_of_tiles(read)
                self.nodes.append(node)
        for output in graph.output:
            self._out_of_tiles(output.name)

        read, nodes = {output.name for output in graph.output}, []
        for node in reversed(self.nodes):  # nodes that only the old convolutions read are dropped
            if read.intersection(node.output):
                read.update(node.input)
                nodes.append(node)
        light = helper.make_graph(nodes[::-1], graph.name, graph.input, graph.output)
        made = helper.make_model(light, opset_imports=self.model.opset_import)
        made.ir_version = self.model.ir_version
        kept = (tensor for tensor in [*graph.initializer, *self.initializers] if tensor.name in read)
        made.graph.initializer.extend(kept)  # the weights last: each of these makers copies its parts
        return made

    def _choose(self) -> dict[str, tuple[int, int]]:
        """The convolutions that pay, by their outputs' names: their channels out and in."""
        attributes = (a for node in self.model.graph.node for a in node.attribute)
        if self.model.functions or any(a.type in (a.GRAPH, a.GRAPHS) for a in attributes):
            return {}  # what a branch reads is not among its node's inputs

        origins: dict[str, set[str]] = {}
        """For tensors that could stay in tiles: the convolutions that they come from."""
        linked: set[str] = set()
        channels = {}
        for node in self.model.graph.node:
            name = node.output[0]
            come = set().union(*(origins.get(read, ()) for read in node.input))
            if self._possible(node):
                channels[name] = tuple(self.constants[node.input[1]].dims[:2])
                linked |= come | {name} if come else set()
                origins[name] = {name}
            elif come and (node.op_type == "Relu" or (node.op_type == "Add" and self._alike(node))):
                origins[name] = come
        return {name: channels[name] for name in linked}

    def _possible(self, node: Any) -> bool:
        """Whether this is a convolution that can be rewritten, with enough channels."""
        if node.op_type != "Conv" or any(name not in self.constants for name in node.input[1:]):
            return False
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "kernel_shape"}
        plain = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": b"NOTSET"}
        shape, weight = self.shapes.get(node.input[0], []), self.constants[node.input[1]]
        return (
            plain | given == plain | {"pads": [1, 1, 1, 1]}
            and list(weight.dims[2:]) == [3, 3]
            and min(weight.dims[:2]) >= MIN_CHANNELS
            and weight.data_type == TensorProto.FLOAT
            and node.output[0] in self.shapes
            and len(shape) == 3
            and _tiles(shape[1]) * _tiles(shape[2]) >= MIN_TILES
        )

    def _alike(self, node: Any) -> bool:
        one, other = (self.shapes.get(name) for name in node.input)
        return one is not None and one == other

    def _tiled(self, name: str) -> bool:
        return name in self.tiles or name in self.waiting

    def _sum(self, one: str, other: str) -> str:
        """The sum of two tensors, in tiles; fused into a convolution that nothing else reads."""
        for name, added in ((one, other), (other, one)):
            if name in self.waiting and self.readers[name] == 1 and name != added:
                return self._convolved(self.waiting.pop(name), self._in_tiles(added))
        return self._op("Add", self._in_tiles(one), self._in_tiles(other))

    def _convolved(self, node: Any, *added: str) -> str:
        """A convolution in tiles, plus `added`, a tensor in tiles."""
        weight = numpy_helper.to_array(self.constants[node.input[1]])  # [K, C, 3, 3]
        bias = numpy_helper.to_array(self.constants[node.input[2]]) if len(node.input) > 2 else None
        k, c = weight.shape[:2]
        taps = weight.transpose(2, 3, 1, 0).reshape(9, c * k).astype(np.float64)
        filters = (FILTER @ taps).astype(np.float32).reshape(36, c, k)
        inputs = self._op("Reshape", self._values(node.input[0], self._grid(node.input[0], 6, -1)), self._ints(36, -1))
        spread = self._op("MatMul", self._constant(INPUT.astype(np.float32)), inputs)  # [36, B*T*C]

        height, width = self.shapes[node.input[0]][1:]
        few = _tiles(height) * _tiles(width) <= FEW_TILES
        if few:
            parts = [self._new("part") for _ in range(36)]
            rows = self._op("Reshape", spread, self._ints(-1, c))
            self.nodes.append(helper.make_node("Split", [rows], parts, axis=0, num_outputs=36))
            for i, part in enumerate(parts):
                factors = [part, self._weights(filters[i])]
                if bias is not None and CONSTANT[i]:
                    factors.append(self._weights((CONSTANT[i] * bias).astype(np.float32)))
                parts[i] = self._op("Gemm" if len(factors) == 3 else "MatMul", *factors)
            products = self._op("Concat", *parts, axis=0)
        else:
            rows = self._op("Reshape", spread, self._ints(36, -1, c))
            products = self._op("MatMul", rows, self._weights(filters))
        products = self._op("Reshape", products, self._ints(36, -1))  # [36, B*T*K]

        # onnxruntime fuses Gemm with what is added and with a Relu that follows
        done = self._op("Gemm", self._constant(OUTPUT.astype(np.float32)), products, *added)
        if bias is None or few:
            return done
        within = np.zeros((17, 1, k), np.float32)
        within[:16, 0] = bias  # not in the zeros
        done = self._op("Add", self._op("Reshape", done, self._ints(17, -1, k)), self._constant(within))
        return self._op("Reshape", done, self._ints(17, -1))

    def _in_tiles(self, name: str) -> str:
        if name in self.waiting:
            self.tiles[name] = self._convolved(self.waiting.pop(name))
        if name in self.tiles:
            return self.tiles[name]
        if ("tiles", name) not in self.made:
            outside = ((0, 0), (0, 1), (0, 0))
            inputs = self._values(name, np.pad(self._grid(name, 4, 0), outside, constant_values=-1))
            self.made["tiles", name] = self._op("Reshape", inputs, self._ints(17, -1))
        return self.made["tiles", name]

    def _out_of_tiles(self, name: str) -> None:
        """Make a tensor under its own name, `[B, C, H, W]`, for nodes that do not read tiles."""
        if not self._tiled(name) or ("out", name) in self.made:
            return
        c, height, width = self.shapes[name]
        values = self._values(name, np.indices((height, width)).reshape(2, 1, -1))
        values = self._op("Reshape", values, self._ints(-1, height * width, c))
        # three axes: onnxruntime would move a transposition of four into what follows, and a mean over the axes
        # of [B, H, W, C] changes its last bits with B
        first = self._op("Transpose", values, perm=[0, 2, 1])
        self.nodes.append(helper.make_node("Reshape", [first, self._ints(-1, c, height, width)], [name]))
        self.made["out", name] = name

    def _values(self, name: str, places: np.ndarray) -> str:
        """`[P*B*T, C]`: a tensor's values at places (y and x, `int [2, P, T]`) of all images, zero outside of them."""
        c, height, width = self.shapes[name]
        y, x = places
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        if self._tiled(name):
            table = self._op("Reshape", self._in_tiles(name), self._ints(-1, c))
            slab = np.where(inside, y % 4 * 4 + x % 4, 16)
            tile = np.where(inside, y // 4 * _tiles(width) + x // 4, 0)
            numbers = self._numbers(slab, _tiles(height) * _tiles(width), np.ones_like(slab), tile)
        else:
            table = self._pixels(name)
            pixel = np.where(inside, 1 + y * width + x, 0)
            numbers = self._numbers(np.zeros_like(pixel), height * width, inside.astype(np.int64), pixel)
        return self._op("Gather", table, numbers, axis=0)

    def _pixels(self, name: str) -> str:
        """`[B, C, H, W]` as `[1 + B*H*W, C]`, the first of zeros."""
        if ("pixels", name) not in self.made:
            last = self._op("Transpose", name, perm=[0, 2, 3, 1])
            pixels = self._op("Reshape", last, self._ints(-1, self.shapes[name][0]))
            self.made["pixels", name] = self._op("Pad", pixels, self._ints(1, 0, 0, 0))
        return self.made["pixels", name]

    def _numbers(self, slab: np.ndarray, size: int, moves: np.ndarray, start: np.ndarray) -> str:
        """`int32 [P*B*T]`: slab * B * size + moves * b * size + start, for image b of the batch's B."""
        key = ("numbers", size, slab.shape, slab.tobytes(), moves.tobytes(), start.tobytes())
        if key not in self.made:
            count, images = self._batch
            offset, stride = (self._op("Mul", a, self._ints(size)) for a in (images, count))
            terms = (self._constant(a[:, None, :].astype(np.int64)) for a in (slab, moves, start))
            far, near, first = self._op("Mul", next(terms), stride), self._op("Mul", next(terms), offset), next(terms)
            total = self._op("Reshape", self._op("Add", self._op("Add", far, near), first), self._ints(-1))
            self.made[key] = self._op("Cast", total, to=TensorProto.INT32)
        return self.made[key]

    @functools.cached_property
    def _batch(self) -> tuple[str, str]:
        """The batch's size B, `int64 [1]`, and its images' numbers, `int64 [1, B, 1]`."""
        size = self._op("Shape", self.model.graph.input[0].name, start=0, end=1)
        zero, one = (self._constant(np.array(i, np.int64)) for i in (0, 1))
        numbers = self._op("Range", zero, self._op("Squeeze", size), one)
        return size, self._op("Reshape", numbers, self._ints(1, -1, 1))

    def _grid(self, name: str, side: int, start: int) -> np.ndarray:
        """Places (y and x, `int [2, side*side, T]`) in every tile of a tensor, from `start` before its corner on."""
        corners = 4 * np.indices([_tiles(size) for size in self.shapes[name][1:]]).reshape(2, 1, -1)
        return corners + np.indices((side, side)).reshape(2, -1, 1) + start

    def _op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = self._new(kind.lower())
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def _new(self, kind: str) -> str:
        return f"winograd_{kind}_{next(self.names)}"

    def _ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _constant(self, values: np.ndarray) -> str:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self.made:
            self.made[key] = self._weights(values)
        return self.made[key]

    def _weights(self, values: np.ndarray) -> str:
        name = self._new("constant")
        self.initializers.append(numpy_helper.from_array(values, name))
        return name


def _inferred(graph: Any, opsets: Any) -> Any:
    """The graph with its tensors' shapes. Large weights are left out but for their shapes, so that none is copied."""
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > 1 << 10]
    small = [tensor for tensor in graph.initializer if math.prod(tensor.dims) <= 1 << 10]
    given = [helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in large]
    light = helper.make_graph(graph.node, graph.name, [*graph.input, *given], graph.output, small)
    return shape_inference.infer_shapes(helper.make_model(light, opset_imports=opsets)).graph


def _tiles(size: int) -> int:
    """How many tiles of 4 cover this many pixels."""
    return -(-size // 4)
