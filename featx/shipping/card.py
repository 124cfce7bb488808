"""Owns the model card, a run folder's `README.md`, with which the folder can be uploaded to a model hub as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featx.errors import ExportError
from featx.files import write_atomic
from featx.runs import CARD, CARD_MARK, Run, RunConfig, open_run
from featx.text import printable

CLASSES = 30
"""Named one by one, at most; report.json has all."""
# Identifiers that the Hugging Face Hub takes as a license; anything else is called `other` there.
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0",
    "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip
FILES = {
    "model.onnx": "the classifier, for onnxruntime: pixels in, probabilities out, verified against the torch model",
    "model-tensor.onnx": "the same for images that are resized and cropped already",
    "head.onnx": "the head alone, for the features of an exported model",
    "parity.json": "what was compared to verify model.onnx, and its SHA-256",
    "head.safetensors": "the head: weight `[C, D]`, bias `[C]`, class names",
    "model.safetensors": "the fine-tuned network",
    "config.json": "what was asked for; it names folders of the computer that the run was made on",
    "trained-on.npy": "which images it has learned from: 8 bytes of each one's SHA-256",
    "report.json": "the evaluation in full",
    "report.html": "the same as a page; it shows some of the photographs",
    "plots": "its figures, photographs among them",
}
METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "top5_accuracy": "Top-5 accuracy",
    "mean_average_precision": "Mean average precision",
    "log_loss": "Log-loss",
}
USAGE = """```python
import json, numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
image = ImageOps.exif_transpose(Image.open("photo.jpg"))
image = image.convert("RGB")  # would clip 16-bit grey: scale such an image to 8 bits first
(probabilities,) = session.run(["probabilities"], {"images": np.asarray(image)[None]})
print(class_names[probabilities[0].argmax()], probabilities[0].max())
```"""


def card(run: str | Path | Run) -> str:
    """The model card of a finished run: YAML for a hub, then Markdown for people. It names no place on this machine."""
    opened = open_run(run)
    return f"---\n{_yaml(_front_matter(opened))}---\n\n{CARD_MARK}\n\n{_body(opened)}"


def write(run: str | Path | Run) -> bool:
    """Put the card into the run's folder; a README.md of somebody's own stays, and False says so.

    Raises `ExportError` where the folder cannot be written.
    """
    opened = open_run(run)
    path = opened.path / CARD
    try:
        if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return False
        write_atomic(path, card(opened).encode())
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror or error})") from error
    return True


def _front_matter(run: Run) -> dict[str, Any]:
    config, report = run.config, run.report
    info = config.backbone
    license = info.license.lower()
    front: dict[str, Any] = {"library_name": "featx", "pipeline_tag": "image-classification"}
    if license in LICENSES or not license:
        front["license"] = license or "unknown"
    else:
        front |= {"license": "other", "license_name": info.license}
    front["tags"] = ["featx", "onnx", "image-classification", info.name.rpartition("/")[2]]
    if info.name.startswith("timm/") and info.weights_note.startswith("pretrained"):
        front["base_model"] = info.name
    measured = _measured(report)
    if measured:
        front["metrics"] = list(measured)
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": "imagefolder", "name": _data_name(config), "split": report["split"]},
            "metrics": [{"type": name, "name": METRICS[name], "value": value} for name, value in measured.items()],
        }
        front["model-index"] = [{"name": _run_name(run), "results": [result]}]
    return front


def _body(run: Run) -> str:
    config, report, head = run.config, run.report, run.head
    info, preprocess = config.backbone, config.spec.preprocess
    kind = "any number of classes" if head.activation == "sigmoid" else "one class"
    parts = [
        f"# {_text(_run_name(run))}",
        f"An image classifier: {kind} of {len(head.class_names)} for each image. "
        f"The backbone is {_text(info.name)} ({_text(info.weights_note)}); the head is {_text(config.head)}, "
        f"fitted by featx {_text(config.featx)} on {_text(_data_name(config))}.",
        "## Classes\n\n" + _names(head.class_names),
    ]
    if head.threshold is not None:
        parts.append(f"An answer whose probability is below {head.threshold:.4g} is to be rejected.")
    measured = _measured(report)
    if measured:
        parts += [f"## Measured on {report['count']} images of the {report['split']} split", _metrics(report, measured)]
        parts += _per_class(report)
    else:
        parts.append("## Measured\n\nNothing: there were no validation images.")
    parts += _parity(run)
    if (run.path / "model.onnx").is_file():
        parts += [
            "## Use",
            f"`model.onnx` takes `images`, `uint8 [N, H, W, 3]`: RGB, upright, of any size up to an aspect ratio of "
            f"1:64. It resizes the short side to {preprocess.resize} pixels ({preprocess.interpolation}, "
            f"antialiased), crops the centre to {preprocess.crop} x {preprocess.crop}, scales and normalises.",
            USAGE,
        ]
    license = _text(info.license) if info.license else "not stated with them; ask their publisher"
    parts.append(f"## License\n\nOf the backbone's weights: {license}. Of the photographs: not known to featx.")
    files = {name: what for name, what in FILES.items() if (run.path / name).exists()}
    parts.append("## Files\n\n" + _table(["file", "what it is"], ([f"`{n}`", w] for n, w in files.items())))
    return "\n\n".join(parts) + "\n"


def _measured(report: dict[str, Any]) -> dict[str, float]:
    if not report.get("count"):
        return {}
    return {name: float(report[name]) for name in METRICS if report.get(name) is not None}


def _metrics(report: dict[str, Any], measured: dict[str, float]) -> str:
    rows = []
    for name, value in measured.items():
        interval = report.get("intervals", {}).get(name)
        text = f"{interval['low']:.4f} to {interval['high']:.4f}" if interval else ""
        rows.append([METRICS[name], f"{value:.4f}", text])
    return _table(["", "value", "95 % interval"], rows)


def _per_class(report: dict[str, Any]) -> list[str]:
    rows = sorted(report.get("per_class", []), key=lambda row: -row["support"])
    shown = [
        [_text(row["label"]), *(f"{row[name]:.4f}" for name in ("precision", "recall", "f1")), str(row["support"])]
        for row in rows[:CLASSES]
    ]
    if not shown:
        return []
    more = f"\n\nThe other {len(rows) - CLASSES} classes are in report.json." if len(rows) > CLASSES else ""
    return [_table(["class", "precision", "recall", "F1", "images"], shown) + more]


def _parity(run: Run) -> list[str]:
    try:
        parity = json.loads((run.path / "parity.json").read_bytes())
        checks = parity["checks"]
        known = f"{parity['equal_labels']} of {parity['images']}"
        apart = max(check["value"] for name, check in checks.items() if name.endswith("probabilities"))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not exported yet, or only its head
    return [
        f"`model.onnx` gave the same answer as the torch model for {known} images, with probabilities at most "
        f"{apart:.1e} apart (parity.json)."
    ]


def _names(names: tuple[str, ...]) -> str:
    text = ", ".join(_text(name) for name in names[:CLASSES])
    return f"{text} and {len(names) - CLASSES} more." if len(names) > CLASSES else f"{text}."


def _data_name(config: RunConfig) -> str:
    """The data's own name, without where it lies."""
    return re.split(r"[/\\]", config.data.rstrip("/\\"))[-1] or "images"


def _run_name(run: Run) -> str:
    return run.path.resolve().name or "featx run"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Any text as Markdown that shows it: class names may hold `|`, `<b>` or a line's end."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", printable(text))


def _yaml(values: Any, indent: str = "") -> str:
    """Dicts, lists, text and numbers as YAML. Text is quoted as JSON quotes it, which YAML reads likewise."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:\n{_yaml(value, indent + '  ')}")
        elif isinstance(value, list):
            lines.append(f"{indent}{name}:\n")
            for item in value:
                text = _yaml(item, indent + "  ")[len(indent) + 2 :] if isinstance(item, dict) else f"{_scalar(item)}\n"
                lines.append(f"{indent}- {text}")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: str | float) -> str:
    if not isinstance(value, str):
        return f"{value:.6f}"  # not repr: YAML 1.1 reads 1e-06 as text
    text = printable(value)
    if re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", text) and text not in YAML_WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}
"""Words that YAML takes for something else than text."""
