"""`export`: a run's backbone and head become one ONNX file, which is put in place only if it passes the gate."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from featx import __version__
from featx.engines.int8 import calibrated
from featx.engines.onnx import backbone_onnx
from featx.engines.wire import FORMAT_KEY, require_whole, scan
from featx.errors import ExportError, ParityError
from featx.files import write_atomic
from featx.options import Clustered, Input, Split, home
from featx.pixels.preprocess import Preprocess
from featx.records import write_record
from featx.runs import Run, is_export, is_record, open_run, record_of
from featx.seals import SEAL, escape, seal
from featx.shipping import card, graph, int8, parity
from featx.shipping.deployed import FORMAT, read_model
from featx.shipping.gate import IMAGES, gate_images
from featx.shipping.parity import Parity
from featx.sources.source import Source
from featx.state import ordinary

if TYPE_CHECKING:
    from onnx import ModelProto

DEFAULT = {"pixels": "model.onnx", "tensor": "model-tensor.onnx", "features": "head.onnx"}
"""The file's name in the run's folder, by what it takes."""
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "log_loss", "mean_average_precision")


@ordinary()
def export(
    run: str | Path | Run,
    *,
    output: str | Path | None = None,
    input: Input = "pixels",
    outputs: tuple[str, ...] | None = None,
    images: int = IMAGES,
    split: Split = "val",
    data: str | Path | Source | None = None,
    tolerance: float | None = None,
    factory: str | None = None,
    weights: str | Path | None = None,
    **cluster: Unpack[Clustered],
) -> Parity:
    """Write a run as one ONNX file, after comparing it with the torch classifier on the run's own images.

    An int8 run's file has the backbone that computed its features, byte for byte, and is compared with their answers.

    output: the file, by default `model.onnx` in the run's folder (`model-tensor.onnx`, `head.onnx`); what
    was compared is written beside it as `parity.json` (`<name>.parity.json`). input: `pixels` (`uint8 [N, H, W,
    3]` of any size), `tensor` (`uint8 [N, 3, crop, crop]`) or `features` (the head alone). outputs: some
    of probabilities, logits, features and, where the head has a threshold, accepted; by default all.
    images: how many are compared, at most, of `split` (`val`, `test` or `train`), those with the
    smallest content hashes. data: labelled images in place of the run's own, such as where these moved to.
    tolerance: on probabilities through the file's resize, in [0, 1], instead of 0.05; above 0.03 on features too.
    factory, weights: as for `featx.load`. cluster: `on` and `address` of `featx.extract`, for images without a row.

    Where images, labels or splits have changed since the fit, the file is compared all the same, and an accuracy
    is stated only if the head has learned from none of these images. Where this backbone was verified on these
    images before, only the head is run, without torch. Raises `ParityError` where the file exceeds a limit, and
    `ExportError` where something that featx did not export is at `output`; both leave it untouched.
    """
    opened = open_run(run, factory, weights)
    path = free_path(opened, output, DEFAULT.get(input, "model.onnx"))
    model = build(opened, input, outputs)
    parts = graph.part_digests(model.graph)

    chosen = gate_images(opened, images, split, data, **cluster)
    if own := precision(opened, input) == "int8":
        found = int8.verify(opened, model, chosen, tolerance=tolerance)
    else:
        found = parity.verify(opened, model, chosen, tolerance=tolerance, parts=parts)
    if not found.passed:
        advice = _advice_int8(opened) if own else _advice(found)
        raise ParityError(
            f"the file does not answer as the classifier does, on {found.images} images: "
            f"{found.failures()} Nothing was written. {advice}"
        )

    known = {"split": chosen.split}
    short = {name: getattr(found, name) for name in ("images", "accuracy", "torch_accuracy", "equal_labels")} | known
    short |= {check.name.replace(" ", "_"): check.value for check in found.checks[1:]}
    put(model, path, metadata(opened, model, input, parts, short, precision(opened, input)), found.to_dict() | known)
    if path == opened.path / DEFAULT["pixels"]:
        card.write(opened)
    return found


@ordinary()
def check(
    model: str | Path,
    run: str | Path | Run,
    *,
    images: int = IMAGES,
    split: Split = "val",
    factory: str | None = None,
    weights: str | Path | None = None,
) -> Parity:
    """Check that a file is an unmodified export of a run, and still gives the same answers.

    Its classes, its preprocessing, and every node and weight of its parts are compared with the run's
    record, then every image goes through it and through torch. Raises `ParityError` that names what
    differs, and `ExportError` for a file that featx did not export. factory, weights: as for `featx.load`.
    """
    path, opened = Path(home(model)), open_run(run, factory, weights)
    data, described = read_model(path)
    proto = graph.parse(data, path)
    if (own := described.get("precision", "fp32")) != precision(opened, described["input"]):
        raise ExportError(f"{path} is {own}: it was compared with fp32 when it was made, not torch")

    parts, spec = graph.part_digests(proto.graph), opened.config.spec
    outputs = tuple(value.name for value in proto.graph.output)
    expected = graph.part_digests(build(opened, described["input"], outputs).graph)
    differs = {
        "its classes, or their order, are not the run's": described["class_names"] != list(opened.head.class_names),
        "its preprocessing is not the run's": Preprocess.from_dict(described["preprocess"]) != spec.preprocess,
        "its backbone is not the run's": described["spec_digest"] != spec.digest,
    }
    differs |= {
        f"its {name} part has other nodes or weights than the run gives": parts[name] != expected[name]
        for name in parts
    }
    if wrong := [what for what, found in differs.items() if found]:
        raise ParityError(f"{path}: {'; '.join(wrong)}; export it again")

    chosen = gate_images(opened, images, split)
    found = int8.verify(opened, proto, chosen) if own == "int8" else parity.verify(opened, proto, chosen)
    if not found.passed:
        raise ParityError(f"{path} does not answer as the run's classifier does: {found.failures()}")
    return found


def build(run: Run, input: Input, outputs: tuple[str, ...] | None) -> ModelProto:
    """The ONNX model of a run, without its metadata; arguments as for `export`."""
    backbone = None if input == "features" else graph.load(backbone_path(run))
    return graph.build(backbone, run.head, run.config.spec.preprocess, input=input, outputs=outputs)


def precision(run: Run, input: str) -> str:
    """The arithmetic of a run's file: an int8 run's is int8, as its features are; all others are float32."""
    return "int8" if run.config.spec.precision == "int8" and input != "features" else "fp32"


def require_float(run: Run) -> None:
    """Raise `ExportError` for an int8 run, where a file in another precision is asked for."""
    if run.config.spec.precision == "int8":
        raise ExportError(
            f"{run.path} was fitted on int8 features, and its head knows no others: its file is int8, and `featx "
            "export` without --precision writes it. For a file in another precision, fit without --precision int8"
        )


def backbone_path(run: Run) -> Path:
    """The run's backbone as an ONNX file, exported where it is missing; an int8 run's is its calibration."""
    if calibration := run.config.spec.calibration:
        return calibrated(Path(run.config.cache), calibration)
    return backbone_onnx(run.request, run.config.backbone, Path(run.config.cache))


def free_path(run: Run, output: str | Path | None, name: str) -> Path:
    """`output`, or `name` in the run's folder. Raises `ExportError` if it or its record would replace others' files."""
    path = Path(home(output)) if output else run.path / name
    for file, ours, what in ((path, is_export, "an export"), (record_of(path), is_record, "the record of one")):
        if os.path.lexists(file) and not (file.is_file() and ours(file)):
            raise ExportError(
                f"{file} exists and is not {what} by featx, so it is not replaced; "
                "give another --output, or move it away"
            )
    return path


def put(model: ModelProto, path: Path, entries: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the file with its metadata, and its `parity.json`, each whole or not at all."""
    from onnx import helper

    values = {name: escape(json.dumps(value)) for name, value in entries.items()}
    values |= {name: json.dumps(value) for name, value in SEAL.items()}
    helper.set_model_props(model, values | {FORMAT_KEY: FORMAT})
    data = seal(model.SerializeToString(deterministic=True))
    require_whole(scan(data), path)
    record = found | {"file": path.name, "bytes": len(data), "parts": entries["parts"], "versions": entries["versions"]}

    try:
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(lambda: hashlib.sha256(data).hexdigest())
            write_atomic(path, data)
        write_record(record_of(path), record | {"sha256": digest.result()})
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}); what was there is untouched"
        ) from error


def metadata(
    run: Run, model: ModelProto, input: str, parts: dict[str, str], found: dict[str, Any], precision: str = "fp32"
) -> dict[str, Any]:
    """What the file says about itself; each value is written as JSON, and none names a place on this machine."""
    from importlib.metadata import version

    config, report, head = run.config, run.report, run.head
    info, spec = config.backbone, config.spec
    metrics = {name: report[name] for name in METRICS if report.get(name) is not None}
    identity = spec.to_dict()
    return {
        "contract": contract(run, input),
        "input": input,
        "outputs": [value.name for value in model.graph.output],
        "precision": precision,
        "class_names": list(head.class_names),
        "activation": head.activation,
        "threshold": head.threshold,
        "preprocess": identity["preprocess"],
        "spec": identity,
        "spec_digest": spec.digest,
        "backbone": info.name,
        "weights": info.weights_note,
        "weights_digest": info.weights_digest,
        "license": info.license or "not stated with the weights; ask their publisher",
        "head": config.head,
        "data_digest": config.data_digest,
        "metrics": metrics | {"split": report.get("split"), "count": report.get("count")},
        "parity": found,
        "parts": parts,
        "versions": {"featx": __version__}
        | {name: version(name) for name in ("onnx", "onnxruntime", "numpy", "pillow")},
    }


def contract(run: Run, input: str) -> str:
    """What a caller must give, in one sentence or two."""
    p = run.config.spec.preprocess
    if input == "features":
        return (
            f"features: float32 [N, {run.head.weight.shape[1]}], as a file with input pixels or tensor and "
            f"spec_digest {run.config.spec.digest} gives them."
        )
    done = "scales and normalises them itself: give whole numbers from 0 to 255."
    if input == "tensor":
        return (
            f"images: uint8 [N, 3, {p.crop}, {p.crop}], RGB, {p.target} resized to {p.resize} pixels "
            f"({p.interpolation}, antialiased) and the centre cropped{p.beyond}. The file {done}"
        )
    return (
        "images: uint8 [N, H, W, 3], RGB, upright, of any size up to an aspect ratio of 1:64. The file resizes "
        f"{p.target} to {p.resize} pixels ({p.interpolation}, antialiased), crops the centre to {p.crop} x {p.crop}"
        f"{p.beyond}, and {done}"
    )


def _advice_int8(run: Run) -> str:
    if (engine := run.config.spec.engine) != "onnxruntime":
        return (
            f"The features were computed by {engine}, and onnxruntime rounds otherwise: fit with --runtime onnxruntime"
        )
    return "--input tensor leaves the resize to Pillow; else fit with --precision fp32, or another --calibration"


def _advice(found: Parity) -> str:
    missed = {check.name for check in found.missed}
    if missed <= {"probabilities", "features"}:
        return (
            "Only the pixels of the file's own resize, a level or two from Pillow's, make the difference: "
            "--input tensor leaves the resize to Pillow, a larger --tolerance accepts it"
        )
    if "pixels" in missed and missed <= {"pixels", "probabilities", "features"}:
        return "The file resizes otherwise than Pillow does: --input tensor leaves the resize to Pillow"
    if missed <= {"reported accuracy", "reported log-loss"}:
        return "head.safetensors and report.json are not of one fit: one is another run's, or was changed. Fit again"
    if missed == {"answers from cached features"}:
        return "The head was fitted on features in less than fp32, and answers otherwise in fp32: fit in fp32"
    if missed & {"cached features", "cached features, median"}:
        return "The cache holds features of other pixels or another network: remove its folder and fit again"
    if missed == {"cached features, 1 - cosine"}:
        return "They were computed from images decoded on the GPU, too far from Pillow's: fit again with --decode exact"
    return "Please report this with the names and versions of the backbone, torch and onnxruntime"
