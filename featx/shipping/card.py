"""Owns the model card, a run folder's `README.md`, with which the folder can be uploaded to a model hub as it is."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from featx.errors import ExportError
from featx.files import write_atomic
from featx.metrics import SCORES
from featx.runs import CARD, CARD_MARK, Run, RunConfig, open_run
from featx.text import printable, templates

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


def card(run: str | Path | Run) -> str:
    """The model card of a finished run: YAML for a hub, then Markdown for people. It names no place on this machine."""
    import yaml
    from markupsafe import Markup

    opened = open_run(run)
    config, report, head = opened.config, opened.report, opened.head
    count = report.get("count")
    measured = {name: float(report[name]) for name in SCORES if count and report.get(name) is not None}
    front = _front_matter(opened, measured)
    template = templates("featx.shipping", _escaped, html=False).get_template("card.md")
    return template.render(
        front=Markup(yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=math.inf)),
        mark=Markup(CARD_MARK),
        most=CLASSES,
        name=_run_name(opened),
        data=_data_name(config),
        config=config,
        report=report,
        head=head,
        backbone=config.backbone,
        preprocess=config.spec.preprocess,
        measured=[(SCORES[n], value, report.get("intervals", {}).get(n)) for n, value in measured.items()],
        classes=sorted(report.get("per_class", []), key=lambda row: -row["support"]),
        parity=_parity(opened),
        files={file: what for file, what in FILES.items() if (opened.path / file).exists()},
    )


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


def _front_matter(run: Run, measured: dict[str, float]) -> dict[str, Any]:
    """What a hub reads, as plain values."""
    config, backbone = run.config, run.config.backbone
    license = backbone.license.lower()
    front: dict[str, Any] = {"library_name": "featx", "pipeline_tag": "image-classification"}
    if license in LICENSES or not license:
        front["license"] = license or "unknown"
    else:
        front |= {"license": "other", "license_name": printable(backbone.license)}
    front["tags"] = ["featx", "onnx", "image-classification", printable(backbone.name.rpartition("/")[2])]
    if backbone.name.startswith("timm/") and backbone.weights_note.startswith("pretrained"):
        front["base_model"] = printable(backbone.name)
    if measured:
        front["metrics"] = list(measured)
        data = {"type": "imagefolder", "name": printable(_data_name(config)), "split": run.report["split"]}
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": data,
            "metrics": [{"type": n, "name": SCORES[n], "value": round(v, 6)} for n, v in measured.items()],
        }
        front["model-index"] = [{"name": printable(_run_name(run)), "results": [result]}]
    return front


def _parity(run: Run) -> dict[str, Any] | None:
    """What was compared to verify the exported file; None where it is not exported yet, or only its head."""
    try:
        found = json.loads((run.path / "parity.json").read_bytes())
        apart = max(check["value"] for name, check in found["checks"].items() if name.endswith("probabilities"))
        return {"equal_labels": found["equal_labels"], "images": found["images"], "apart": apart}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _data_name(config: RunConfig) -> str:
    """The data's own name, without where it lies."""
    return re.split(r"[/\\]", config.data.rstrip("/\\"))[-1] or "images"


def _run_name(run: Run) -> str:
    return run.path.resolve().name or "featx run"


def _escaped(text: str) -> str:
    """Any text as Markdown that shows it: class names may hold `|`, `<b>` or a line's end."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", printable(text))
