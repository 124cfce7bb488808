"""What the digest of an exported file costs: opening 100 MB with featx, and with onnxruntime alone.

    python benchmarks/opening.py [--megabytes 100] [--rounds 5]

The file is one matrix of random numbers behind featx's own preprocessing and head. Both take turns; each figure is the
best of the rounds, from the disk's cache. Peak memory (Linux) is what opening adds in a process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from featx.features import FeatureSpec
from featx.head import Head
from featx.pixels.preprocess import Preprocess
from featx.seals import SEAL, is_sealed, seal
from featx.shipping import graph
from featx.shipping.deployed import FORMAT, Model

CROP = 32
PEAK = """
import onnxruntime, featx.shipping.deployed

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

before = peak()
{}
print(peak() - before)
"""


def backbone(megabytes: float) -> ModelProto:
    """`images` -> `features`: one product with a matrix of this size."""
    pixels = 3 * CROP * CROP
    width = int(megabytes * 1e6 / 4 / pixels)
    arrays: dict[str, np.ndarray] = {
        "shape": np.array([0, pixels], np.int64),
        "mix": np.random.default_rng(0).normal(size=(pixels, width)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], ["rows"]),
        helper.make_node("MatMul", ["rows", "mix"], ["features"]),
    ]
    body = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, CROP, CROP])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=10)


def write(path: Path, megabytes: float) -> None:
    source, preprocess = backbone(megabytes), Preprocess(resize=36, crop=CROP)
    width = source.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    head = Head(np.ones((2, width), np.float32), np.zeros(2, np.float32), ("a", "b"))
    model = graph.build(source, head, preprocess)
    spec = FeatureSpec("custom/one", "00" * 32, preprocess=preprocess)
    values: dict[str, Any] = {"input": "pixels", "class_names": ["a", "b"], "activation": "softmax", "threshold": None}
    values |= {"preprocess": preprocess.to_dict(), "spec_digest": spec.digest, **SEAL}
    helper.set_model_props(model, {k: json.dumps(v) for k, v in values.items()} | {"featx_format": FORMAT})
    path.write_bytes(seal(model.SerializeToString()))


def peak(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", PEAK.format(code)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write(path, asked.megabytes)
        opening: dict[str, Callable[[], object]] = {
            "onnxruntime alone, by path": lambda: onnxruntime.InferenceSession(str(path)),
            "featx.Model": lambda: Model(path),
            "its digest alone": lambda: is_sealed(path.read_bytes()),
        }
        seconds = dict.fromkeys(opening, float("inf"))
        for _ in range(asked.rounds):
            for name, work in opening.items():
                begin = time.perf_counter()
                work()
                seconds[name] = min(seconds[name], time.perf_counter() - begin)

        alone = seconds["onnxruntime alone, by path"]
        for name, found in seconds.items():
            print(f"{name:<28} {found * 1000:7.1f} ms  {found / alone:5.2f} times onnxruntime alone")
        print(f"peak memory, onnxruntime alone {peak(f'onnxruntime.InferenceSession({str(path)!r})'):.0f} MiB")
        print(f"peak memory, featx.Model       {peak(f'featx.shipping.deployed.Model({str(path)!r})'):.0f} MiB")


if __name__ == "__main__":
    main()
