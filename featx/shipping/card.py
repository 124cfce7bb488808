"""The model card, a run folder's `README.md`, with which the folder can be uploaded to a model hub as it is."""

from __future__ import annotations

import math
import os
import re
from importlib import resources
from typing import Any

from featx.errors import ExportError
from featx.files import write_atomic
from featx.metrics import SCORES
from featx.records import read_record
from featx.runs import CARD, CARD_MARK, Run, is_card
from featx.stored import Compared
from featx.text import printable

CLASSES = 30
"""The most classes that a card lists; report.json has all."""
# Identifiers that the Hugging Face Hub takes as a license; anything else is called `other` there.
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0",
    "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip
FILES = {
    "model.onnx": "the classifier, for onnxruntime: pixels in, probabilities out, verified before it was written",
    "model-tensor.onnx": "the same for images that are resized and cropped already",
    "head.onnx": "the head alone, for the features of an exported model",
    "parity.json": "what was compared to verify model.onnx, and its SHA-256",
    "head.safetensors": "the head: weight `[C, D]`, bias `[C]`, class names",
    "model.safetensors": "the fine-tuned network",
    "config.json": "the settings of the run; it names folders of the computer that the run was made on",
    "trained-on.npy": "which images it has learned from: 8 bytes of each one's SHA-256",
    "report.json": "the evaluation in full",
    "report.html": "the same as a page; it shows some of the photographs",
    "plots": "its figures, photographs among them",
}


def card(run: Run) -> str:
    """The model card of a run: YAML for a hub, then Markdown for people. It contains no path of this machine."""
    import yaml
    from jinja2 import Environment, StrictUndefined

    config, report, head = run.config, run.report, run.head
    names = {
        "name": run.path.resolve().name or "featx run",
        "data": re.split(r"[/\\]", config.data.rstrip("/\\"))[-1] or "images",
        "backbone": config.backbone.name,
        "weights": config.backbone.weights_note,
        "license": config.backbone.license,
    }
    names = {name: printable(text) for name, text in names.items()}
    measured = {name: float(report[name]) for name in SCORES if report.get("count") and report.get(name) is not None}
    front = _front_matter(names, report["split"], measured)

    intervals = {n: f"{i['low']:.4f} to {i['high']:.4f}" for n, i in report.get("intervals", {}).items()}
    shown = names | {
        "config": {"head": config.head, "featx": config.featx},
        "report": {name: report[name] for name in ("count", "split")},
        "head": {"activation": head.activation, "threshold": head.threshold, "class_names": head.class_names},
        "classes": [
            [row[name] for name in ("label", "precision", "recall", "f1", "support")]
            for row in sorted(report.get("per_class", []), key=lambda row: -row["support"])
        ],
        "preprocess": config.spec.preprocess,
    }
    text = resources.files(__package__).joinpath("templates/card.md").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(
        _escaped(shown),
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf),
        mark=CARD_MARK,
        most=CLASSES,
        measured=[(SCORES[n], value, intervals.get(n, "")) for n, value in measured.items()],
        parity=_parity(run),
        exported=(run.path / "model.onnx").exists(),
        files=[(f"`{file}`", what) for file, what in FILES.items() if (run.path / file).exists()],
    )


def write(run: Run) -> None:
    """Put the card into the run's folder; a README.md that featx did not write stays.

    Raises `ExportError` where the folder cannot be written.
    """
    path = run.path / CARD
    try:
        if not os.path.lexists(path) or is_card(path):
            write_atomic(path, card(run).encode())
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror or error})") from error


def _front_matter(names: dict[str, str], split: str, measured: dict[str, float]) -> dict[str, Any]:
    """What a hub reads, as plain values."""
    backbone, license = names["backbone"], names["license"].lower()
    front: dict[str, Any] = {"library_name": "featx", "pipeline_tag": "image-classification"}
    if license in LICENSES or not license:
        front["license"] = license or "unknown"
    else:
        front |= {"license": "other", "license_name": names["license"]}
    front["tags"] = ["featx", "onnx", "image-classification", backbone.rpartition("/")[2]]
    if backbone.startswith("timm/") and names["weights"].startswith("pretrained"):
        front["base_model"] = backbone
    if measured:
        front["metrics"] = list(measured)
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": "imagefolder", "name": names["data"], "split": split},
            "metrics": [{"type": n, "name": SCORES[n], "value": round(v, 6)} for n, v in measured.items()],
        }
        front["model-index"] = [{"name": names["name"], "results": [result]}]
    return front


def _parity(run: Run) -> dict[str, Any] | None:
    """What was compared to verify the exported file; None where it is not exported yet, or only its head."""
    path = run.path / "parity.json"
    try:
        found, _ = read_record(path, Compared)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is damaged ({error}); export again") from error
    apart = [check["value"] for name, check in found.get("checks", {}).items() if name.endswith("probabilities")]
    other, how = "the torch model", "at most"
    if found.get("method") == "cached":
        other, how = "the int8 features that the head was fitted on", "on average"
    counts = {name: found[name] for name in ("equal_labels", "images")}
    return counts | {"apart": max(apart, default=0.0), "other": other, "how": how}


def _escaped(value: Any) -> Any:
    """JSON values with their texts escaped as Markdown: class names may hold `|`, `<b>` or a line's end."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    shown = value if value.isprintable() else printable(value)
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", shown)
