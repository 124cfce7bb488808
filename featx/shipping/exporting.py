"""Owns `export`: a run's backbone and head become one ONNX file, which is put in place only if it passes the gate."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx import __version__
from featx.devices import memory_for_features
from featx.engines.onnx import backbone_onnx
from featx.errors import ExportError, ParityError
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.features import FeatureSpec, short_keys
from featx.files import write_atomic
from featx.head import Head
from featx.runs import Run, open_run
from featx.shipping import card, graph, parity
from featx.shipping.deployed import FORMAT, open_session, parse_metadata
from featx.shipping.parity import Images, Parity, Rows
from featx.sources.source import Source

if TYPE_CHECKING:
    from onnx import ModelProto

DEFAULT = {"pixels": "model.onnx", "tensor": "model-tensor.onnx", "features": "head.onnx"}
"""The file's name in the run's folder, by what it takes."""
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "log_loss", "mean_average_precision")


def export(
    run: str | Path | Run,
    *,
    output: str | Path | None = None,
    input: str = "pixels",
    outputs: tuple[str, ...] | None = None,
    images: int = parity.IMAGES,
    split: str = "val",
    data: str | Path | Source | None = None,
    tolerance: float = parity.PROBABILITIES,
    factory: str | None = None,
) -> Parity:
    """Write a run as one ONNX file, after holding it to the torch classifier on the run's own images.

    output: the file, by default `model.onnx` in the run's folder (`model-tensor.onnx`, `head.onnx`); what
    the gate found lies beside it as `parity.json` (`<name>.parity.json`). input: `pixels` (`uint8 [N, H, W,
    3]` of any size), `tensor` (`uint8 [N, 3, crop, crop]`) or `features` (the head alone). outputs: of
    probabilities, logits, features and, where the head has a threshold, accepted; by default all.
    images: how many the gate looks at, at most, of `split` (`val`, `test` or `train`), those with the
    smallest content hashes. data: labelled images in place of the run's own, such as where these moved to.
    tolerance: on probabilities through the file's resize, in [0, 1]; above 0.03 on features too.
    factory: as for `featx.load`.

    Where the data are not what the run was fitted on, images, labels and splits, the file is held to torch on
    them all the same; an accuracy is stated if the head has learned from none of these images.
    While this backbone is the one that was verified on these images, only the head is run, without torch.
    Raises `ParityError` where the file misses a limit; what lay at `output` before is then untouched. Anything
    there but a file that featx exported is an `ExportError`.
    """
    opened = open_run(run, factory)
    outputs = outputs or default_outputs(opened.head, input)
    path = free_path(Path(output) if output else opened.path / DEFAULT.get(input, "model.onnx"))
    model = _built(opened, input, outputs)
    parts = graph.part_digests(model.graph)
    chosen = gate_images(opened, images, split, data)
    found, rows = _measure(opened, model, parts, chosen, list(opened.head.class_names), tolerance, trust=True)
    if not found.passed:
        raise ParityError(
            f"the file does not answer as the classifier does, on {found.images} images: "
            f"{found.failures()}. {_named(found)}Nothing was written. {_advice(found)}"
        )
    if rows is not None and found.method == "file":
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next export a full gate
            parity.save_rows(parity.verified_path(_cache(opened), chosen, parts), chosen, rows)
    short = {name: getattr(found, name) for name in ("images", "accuracy", "torch_accuracy", "equal_labels")}
    known = {"split": chosen.split}
    short |= known | {check.name.replace(" ", "_"): check.value for check in found.checks[1:]}
    put(model, path, metadata(opened, input, outputs, parts, short), found.to_dict() | known)
    if path == opened.path / DEFAULT["pixels"]:
        card.write(opened)
    return found


def check(
    model: str | Path,
    run: str | Path | Run,
    *,
    images: int = parity.IMAGES,
    split: str = "val",
    factory: str | None = None,
) -> Parity:
    """Hold a file that lies somewhere to a run: is it, whole and unchanged, what was exported?

    Its classes, its preprocessing, and every node and weight of its parts are compared with the run's
    record, then every image goes through it and through torch. Raises `ParityError` that names what
    differs, and `ExportError` for a file that featx did not export. factory: as for `featx.load`.
    """
    path, opened = Path(model), open_run(run, factory)
    proto = graph.load(path)
    described = parse_metadata({p.key: p.value for p in proto.metadata_props}, path)
    if described.get("precision", "fp32") != "fp32":
        raise ExportError(f"{path} is {described['precision']}: it was held to fp32 when it was made, not to torch")
    parts = graph.part_digests(proto.graph)
    spec = opened.config.spec
    wrong = []
    if described["class_names"] != list(opened.head.class_names):
        wrong.append("its classes, or their order, are not the run's")
    if described["preprocess"] != json.loads(json.dumps(spec.preprocess.to_dict())):
        wrong.append("its preprocessing is not the run's")
    if described["spec_digest"] != spec.digest:
        wrong.append("its backbone is not the run's")
    expected = graph.part_digests(_built(opened, described["input"], tuple(described["outputs"])).graph)
    for name in (*graph.PARTS, "other"):
        if parts[name] != expected[name]:
            wrong.append(f"its {name} part has other nodes or weights than the run gives")
    if wrong:
        raise ParityError(f"{path}: {'; '.join(wrong)}; export it again")
    chosen = gate_images(opened, images, split, None)
    found, _ = _measure(opened, proto, parts, chosen, described["class_names"], parity.PROBABILITIES, trust=False)
    if not found.passed:
        raise ParityError(f"{path} does not answer as the run's classifier does: {found.failures()}. {_named(found)}")
    return found


def default_outputs(head: Head, input: str) -> tuple[str, ...]:
    """All that a head can give: `accepted` needs a threshold, and a head alone has no features to give."""
    names = [name for name in graph.OUTPUTS if name != "accepted" or head.threshold is not None]
    return tuple(name for name in names if name != "features" or input != "features")


def free_path(path: Path) -> Path:
    """The path, if a file may be written there, with its record beside it: in no one's place but featx's own."""
    for file, ours, what in ((path, _is_export, "an export"), (_beside(path), _is_record, "the record of one")):
        if os.path.exists(file) and not (file.is_file() and ours(file)):
            raise ExportError(
                f"{file} exists and is not {what} by featx, so it is not replaced; "
                "give another --output, or move it away"
            )
    return path


def _is_export(path: Path) -> bool:
    try:
        return any(entry.key == "featx_format" for entry in graph.load(path, external=True).metadata_props)
    except ExportError:
        return False


def _is_record(path: Path) -> bool:
    try:
        return {"passed", "file", "sha256"} <= set(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return False


def _beside(path: Path) -> Path:
    return path.with_name("parity.json" if path.name == "model.onnx" else f"{path.stem}.parity.json")


def put(model: ModelProto, path: Path, entries: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the file and its `parity.json`, each whole or not at all."""
    from onnx import helper

    helper.set_model_props(
        model, {name: json.dumps(value) for name, value in entries.items()} | {"featx_format": FORMAT}
    )
    data = model.SerializeToString(deterministic=True)
    record = found | {"file": path.name, "bytes": len(data), "parts": entries["parts"], "versions": entries["versions"]}
    try:
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(lambda: hashlib.sha256(data).hexdigest())
            write_atomic(path, data)
        record["sha256"] = digest.result()
        write_atomic(_beside(path), json.dumps(record, indent=2).encode() + b"\n")
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror or error}); what lay there is untouched"
        ) from error


def metadata(
    run: Run,
    input: str,
    outputs: tuple[str, ...],
    parts: dict[str, str],
    found: dict[str, Any],
    precision: str = "fp32",
) -> dict[str, Any]:
    """What the file says about itself; each value is written as JSON, and none names a place on this machine."""
    from importlib.metadata import version

    config, report, head = run.config, run.report, run.head
    info, spec = config.backbone, config.spec
    metrics = {name: report[name] for name in METRICS if report.get(name) is not None}
    return {
        "contract": contract(spec, input, head),
        "input": input,
        "outputs": list(outputs),
        "precision": precision,
        "class_names": list(head.class_names),
        "activation": head.activation,
        "threshold": head.threshold,
        "preprocess": spec.preprocess.to_dict(),
        "spec": spec.to_dict(),
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
        "versions": {
            "featx": __version__,
            **{name: version(name) for name in ("onnx", "onnxruntime", "numpy", "pillow")},
        },
    }


def contract(spec: FeatureSpec, input: str, head: Head) -> str:
    """What a caller must give, in one sentence or two."""
    p = spec.preprocess
    if input == "features":
        return (
            f"features: float32 [N, {head.weight.shape[1]}], as a file with input pixels or tensor and "
            f"spec_digest {spec.digest} gives them."
        )
    done = "scales and normalises them itself: give whole numbers from 0 to 255"
    if input == "tensor":
        return (
            f"images: uint8 [N, 3, {p.crop}, {p.crop}], RGB, the short side resized to {p.resize} pixels "
            f"({p.interpolation}, antialiased) and the centre cropped. The file {done}."
        )
    return (
        f"images: uint8 [N, H, W, 3], RGB, upright, of any size up to an aspect ratio of 1:64. The file resizes "
        f"the short side to {p.resize} pixels ({p.interpolation}, antialiased), crops the centre to "
        f"{p.crop} x {p.crop}, and {done}."
    )


def _measure(
    run: Run,
    model: ModelProto,
    parts: dict[str, str],
    images: Images,
    class_names: list[str],
    tolerance: float,
    *,
    trust: bool,
) -> tuple[Parity, Rows | None]:
    """Run the gate: the head alone where its backbone is verified (and `trust`), else everything."""
    if model.graph.input[0].name == "features":
        rows: Rows | None = Rows(None, images.cached, images.cached)
    else:
        rows = parity.load_rows(parity.verified_path(_cache(run), images, parts), images) if trust else None
    if rows is None:
        return _measure_all(run, model, images, class_names, tolerance)

    alone = _built(run, "features", ("probabilities", "logits"))
    file, same = parity.run_head(rows, open_session(alone.SerializeToString(), threads=1))
    found = parity.compare(
        images, run.head, rows, file, same, class_names=class_names, method="head", tolerance=tolerance
    )
    return found, rows


def _measure_all(
    run: Run, model: ModelProto, images: Images, class_names: list[str], tolerance: float
) -> tuple[Parity, Rows]:
    from featx.classifier import load as load_classifier

    classifier = load_classifier(run)
    same = open_session(graph.opened_up(model, pixels=True))
    resizes = any(node.op_type == "Resize" and node.name.startswith("preprocess/") for node in model.graph.node)
    file = open_session(graph.opened_up(model)) if resizes else None
    rows, outputs, same_outputs = parity.run_file(images, classifier.preprocess, file, same, classifier.features)
    found = parity.compare(
        images, run.head, rows, outputs, same_outputs, class_names=class_names, method="file", tolerance=tolerance
    )
    return found, rows


def _built(run: Run, input: str, outputs: tuple[str, ...]) -> ModelProto:
    backbone = None if input == "features" else graph.load(backbone_path(run))
    return graph.build(backbone, run.head, run.config.spec.preprocess, input=input, outputs=outputs)


def gate_images(run: Run, limit: int, split: str, data: str | Path | Source | None) -> Images:
    """Up to `limit` images to hold a file to; of data that are not what the run was fitted on, they are no split of it.

    Without its validation images, for one, a folder's training images are split anew.
    """
    if limit < 1:
        raise ExportError(f"the gate needs at least one image, not {limit}")
    config = run.config
    extraction: Extraction = sync(
        data or config.data, run.request, cache=config.cache, precision=config.spec.precision, dtype=config.spec.dtype
    )
    features = extraction.features(memory=memory_for_features())
    if features.spec.digest != config.spec.digest:
        raise ExportError(
            f"{config.backbone.name} gives other features now than when {run.path} was fitted "
            "(its weights or preprocessing changed); fit again"
        )
    chosen = parity.choose(extraction, features, split, limit)
    if features.digest == config.data_digest:
        return chosen
    seen = run.trained_on
    unseen = seen is not None and not np.isin(short_keys(chosen.keys), seen).any()
    return replace(chosen, split=None, unseen=unseen)


def backbone_path(run: Run) -> Path:
    return backbone_onnx(run.request, run.config.backbone, _cache(run))


def _cache(run: Run) -> Path:
    return Path(run.config.cache)


def _advice(found: Parity) -> str:
    missed = {check.name for check in found.checks if not check.passed}
    if missed <= {"probabilities", "features"}:
        return (
            "Only the pixels of the file's own resize, 1 level from Pillow's, make the difference: "
            "--input tensor leaves the resize to Pillow, a larger --tolerance accepts it"
        )
    if missed == {"cached features"}:
        return "The cache holds features of other pixels or another network: remove its folder and fit again"
    if missed == {"cached features, 1 - cosine"}:
        return "They were computed from images decoded on the GPU, too far from Pillow's: fit again with --decode exact"
    return "Please report this with the names and versions of the backbone, torch and onnxruntime"


def _named(found: Parity) -> str:
    if not found.differing:
        return ""
    some = ", ".join(found.differing[:3])
    return f"Answers differ for {len(found.differing)}: {some}{' ...' if len(found.differing) > 3 else ''}. "
