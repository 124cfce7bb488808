"""Small exported files made by hand, without torch: a backbone of averages, a head, and the whole file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from featx.features import FeatureSpec
from featx.head import Head
from featx.pixels.preprocess import Preprocess
from featx.records import TENSOR_SEAL
from featx.seals import seal
from featx.shipping import graph

WIDTH = 12
SMALL = Preprocess(resize=36, crop=32)


def average_backbone(crop: int, seed: int = 0) -> ModelProto:
    """Cells of 8 x 8 pixels are averaged, scaled as ImageNet's mean and std say, and mixed to `WIDTH` features."""
    rng = np.random.default_rng(seed)
    cells = (crop // 8) ** 2 * 3
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    arrays = {
        "mean": 255 * mean.reshape(1, 3, 1, 1),
        "std": 255 * std.reshape(1, 3, 1, 1),
        "shape": np.array([0, cells], np.int64),
        "mix": rng.normal(size=(cells, WIDTH)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("AveragePool", ["normal"], ["cells"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["cells", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "mix"], ["features"]),
    ]
    body = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, crop, crop])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=10)


def some_head(classes: int = 3, width: int = WIDTH, **values: Any) -> Head:
    rng = np.random.default_rng(1)
    return Head(
        rng.normal(size=(classes, width)).astype(np.float32),
        rng.normal(size=classes).astype(np.float32),
        tuple(f"class {i}" for i in range(classes)),
        **values,
    )


def exported_file(
    path: Path,
    head: Head | None = None,
    preprocess: Preprocess = SMALL,
    input: str = "pixels",
    outputs: tuple[str, ...] | None = None,
    **metadata: Any,
) -> Path:
    """A file such as `featx export` writes, but for the gate."""
    head = head or some_head()
    if outputs is None:
        outputs = ("probabilities", "logits") if input == "features" else ("probabilities", "logits", "features")
    backbone = None if input == "features" else average_backbone(preprocess.crop)
    model = graph.build(backbone, head, preprocess, input=input, outputs=outputs)
    spec = FeatureSpec("custom/averages", "00" * 32, preprocess=preprocess)
    values = {
        "input": input,
        "outputs": list(outputs),
        "class_names": list(head.class_names),
        "activation": head.activation,
        "threshold": head.threshold,
        "preprocess": preprocess.to_dict(),
        "spec_digest": spec.digest,
        "backbone": spec.backbone,
        **metadata,
    }
    helper.set_model_props(model, {k: json.dumps(v) for k, v in values.items()} | {"featx_format": "1"})
    return write_sealed(path, model)


def write_sealed(path: Path, model: ModelProto) -> Path:
    """A file with the digest of what it holds now, as somebody writes one who means it."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    helper.set_model_props(model, kept | TENSOR_SEAL)
    path.write_bytes(seal(model.SerializeToString()))
    return path
