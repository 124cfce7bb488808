"""int8 features: what ways of quantising cost in features and in answers, under onnxruntime and OpenVINO.

    python benchmarks/int8.py PHOTOS --networks squeezenet1_1=W.pth timm/tf_efficientnet_lite0=W.pth [--page PAGE]

PHOTOS as for featx.fit. Heads are refitted on each way's features. No processor with int8 arithmetic is needed, since
onnxruntime can be told to calculate as one that has it.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from extraction import machine, say
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.engines.int8 import arithmetic_of_sizes
from featx.engines.onnx import backbone_onnx
from featx.engines.openvino import OpenVinoEngine, installed
from featx.extraction.calibrating import examples
from featx.extraction.pipeline import sync
from featx.features import Features, distances, groups
from featx.fitting import fit_features
from featx.measuring.views import held_out, paired, scores
from featx.solvers.training import folds
from featx.sources.opening import open_source

BATCH = 32
WAYS: dict[str, dict[str, Any]] = {
    "7 bits, as featx does": {},
    "8 bits": {"reduce_range": False},
    "7 bits, sizes of paddings too": {"sizes": True},
    "7 bits, percentile 99.99": {"calibrate_method": CalibrationMethod.Percentile},
    "7 bits, entropy": {"calibrate_method": CalibrationMethod.Entropy},
    "7 bits, first convolution in float": {"float": "first"},
    "7 bits, depthwise convolutions in float": {"float": "depthwise"},
}
HISTOGRAM_IMAGES = 64  # percentile and entropy keep every activation in memory
TEXT = """\
# int8 features

Written by `python benchmarks/int8.py`, on {images} photographs. *off*: the distance of an image's features from fp32's,
relative to their length, median and worst. *right* of the validation photographs, and their log-loss, by logistic
regression refitted on the features; *cross-validated*: log-loss on held-out training photographs in the same folds,
and how much more it is than fp32's, with the 95 % interval. onnxruntime calculates as a processor with VNNI does
(*here*: as this one does).

{told}

| network | quantised | off | off, here | OpenVINO from onnxruntime, here | right | log-loss | cross-validated |
|---|---|---|---|---|---|---|---|
{rows}
"""


def quantise(prepared: Path, result: Path, crops: np.ndarray, way: dict[str, Any]) -> Path:
    """Write a backbone quantised in one of `WAYS`."""
    changed, model = dict(way), onnx.load(prepared)
    excluded = [] if changed.pop("sizes", False) else arithmetic_of_sizes(model)
    kept, convolutions = changed.pop("float", ""), [node for node in model.graph.node if node.op_type == "Conv"]
    if kept == "first":
        excluded += [convolutions[0].name]
    if kept == "depthwise":
        excluded += [n.name for n in convolutions if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    crops = crops[:HISTOGRAM_IMAGES] if "calibrate_method" in way else crops
    batches = iter([{"images": crops[i : i + BATCH]} for i in range(0, len(crops), BATCH)])
    form = {"quant_format": QuantFormat.QDQ, "per_channel": True, "reduce_range": True, "nodes_to_exclude": excluded}
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    options = {"extra_options": {"CalibPercentile": 99.99}} if "calibrate_method" in way else {}
    reader = SimpleNamespace(get_next=lambda: next(batches, None))
    quantize_static(str(prepared), str(result), reader, **form | types | options | changed)
    return result


def run(model: Path, crops: np.ndarray, *, as_vnni: bool) -> np.ndarray:
    """The features by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", str(int(as_vnni)))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": crops[i : i + BATCH]})[0] for i in range(0, len(crops), BATCH)])


def spread(rows: np.ndarray, reference: np.ndarray) -> str:
    apart = distances(rows, reference)
    return f"{np.median(apart):.3f}, {apart.max():.3f}"


def losses(features: Features, X: np.ndarray) -> np.ndarray:
    """Log-loss of each held-out training image."""
    train = features.splits == "train"
    y, group = features.y[train], groups(features.keys[train])
    fold, _ = folds(y, 5, groups=group)
    logits, _ = held_out("logreg", [X[train]], y, features.class_names, fold, groups=group)
    return scores(logits, y)[1]


def rows_of(photos: Path, name: str, weights: str, folder: Path) -> Iterator[str]:
    """Rows of the table, fp32 first."""
    request, cache = BackboneRequest(name, weights), folder / "cache"
    info = resolve(request, cache)
    features = sync(photos, request, cache=cache).features()
    source = open_source(photos)
    number = {id: i for i, id in enumerate(source.ids)}
    crops = np.stack([info.preprocess(source.read(number[id])) for id in features.ids])
    calibration = np.stack(list(examples(source, info.preprocess, cache).values()))
    prepared = folder / "prepared.onnx"
    quant_pre_process(str(backbone_onnx(request, info, cache)), str(prepared), skip_symbolic_shape=True)

    nodes, base = onnx.load(prepared), losses(features, features.X)
    depthwise = any(a.name == "group" and a.i > 1 for node in nodes.graph.node for a in node.attribute)
    there = {"sizes": arithmetic_of_sizes(nodes), "depthwise": depthwise}
    for way, changed in {"fp32": None, **WAYS}.items():
        if changed and not all(there.get(part, True) for part in (*changed, changed.get("float", ""))):
            continue  # the network has nothing of the kind
        if changed is None:
            X, shown = features.X, ["", "", ""]
        else:
            say(f"{name}: {way}")
            model = quantise(prepared, folder / "int8.onnx", calibration, changed)
            X, here = run(model, crops, as_vnni=True), run(model, crops, as_vnni=False)
            other = OpenVinoEngine(model, "int8", BATCH) if installed() else None
            apart = ""
            if other:
                apart = spread(np.concatenate([other(crops[i : i + BATCH]) for i in range(0, len(crops), BATCH)]), here)
                other.close()
            shown = [spread(X, features.X), spread(here, features.X), apart]
        fields: dict[str, Any] = {name: getattr(features, name) for name in features.__dataclass_fields__}
        report = fit_features(Features(**fields | {"rows": X})).val
        assert report is not None
        loss = losses(features, X)
        more = paired("log_loss", loss, base)
        cells = [
            name,
            way,
            *shown,
            f"{report.accuracy * report.count:.0f} of {report.count}",
            f"{report.scores['log_loss'].value:.4f}",
        ]
        interval = "" if changed is None else f" ({more.value:+.4f}, {more.low:+.4f} to {more.high:+.4f})"
        yield f"| {' | '.join(cells)} | {loss.mean():.4f}{interval} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="+", required=True, metavar="NAME=WEIGHTS")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines: list[str] = []
    for each in options.networks:
        name, _, weights = each.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            lines += rows_of(options.photos, name, weights or "random", Path(folder))
    told = "\n".join(f"- {key}: {value}" for key, value in machine().items())
    images = sum(1 for path in options.photos.rglob("*.jpg"))
    text = TEXT.format(images=images, told=told, rows="\n".join(lines))
    print(text)
    if options.page:
        options.page.write_text(text)


if __name__ == "__main__":
    main()
