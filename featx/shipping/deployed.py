"""An exported file, opened: what it takes and gives, and what its metadata says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from featx.errors import ExportError
from featx.pixels.preprocess import Preprocess
from featx.text import near

FORMAT = "1"
"""The version of the metadata; raised when a reader of an older version would misread a file."""


class Model:
    """An exported file, opened: what it takes, what it gives, and the classes it knows."""

    def __init__(
        self,
        path: str | Path,
        *,
        providers: list[str] | None = None,
        threads: int | None = None,
        head: str | Path | None = None,
    ) -> None:
        """Open `path`. Raises `ExportError` for anything that featx did not export.

        providers: onnxruntime's execution providers, best first, by their names or short ones (`cuda`,
        `coreml`, `openvino`, `cpu`); by default the CPU. threads: for the model, by default
        one per core. head: a head exported alone, to apply to the features of `path`.
        """
        self.path = Path(path)
        self._session = open_session(self.path, providers=providers, threads=threads)
        self._head = None if head is None else open_session(Path(head), providers=providers, threads=1)
        self.metadata = described = parse_metadata(self._session.get_modelmeta().custom_metadata_map, self.path)
        self.input: str = described["input"]
        self.outputs = [output.name for output in self._session.get_outputs()]
        if self.input == "features":
            raise ExportError(f"{self.path} is a head alone; give the features model, and this file as its head")
        if head is not None:
            described = self._head_metadata(self._head, Path(head))
        elif "probabilities" not in self.outputs:
            raise ExportError(
                f"{self.path} gives {', '.join(self.outputs)}; to predict, export with "
                "probabilities among the outputs, or give a head for its features"
            )
        self.class_names: tuple[str, ...] = tuple(described["class_names"])
        self.activation: str = described["activation"]
        self.threshold: float | None = described["threshold"]
        self.preprocess = Preprocess.from_dict(self.metadata["preprocess"])

    def _head_metadata(self, session: Any, path: Path) -> dict[str, Any]:
        metadata = parse_metadata(session.get_modelmeta().custom_metadata_map, path)
        if metadata["input"] != "features":
            raise ExportError(f"{path} takes {metadata['input']}; a head takes features (--input features)")
        self.require_features()
        if metadata["spec_digest"] != self.metadata["spec_digest"]:
            raise ExportError(
                f"{path} was fitted on other features than {self.path} gives "
                f"({metadata['backbone']} and {self.metadata['backbone']}); export both from one run"
            )
        return metadata

    def require_features(self) -> None:
        """Raise `ExportError` where the file does not give features."""
        if "features" not in self.outputs:
            raise ExportError(f"{self.path} gives {', '.join(self.outputs)}, not features")

    def __call__(self, images: np.ndarray, *, features: bool = False) -> dict[str, np.ndarray]:
        """`uint8 [N, H, W, 3]` (or `[N, 3, crop, crop]`) -> `probabilities` `float32 [N, C]`, `features`.

        features: give `float32 [N, D]` as well. Raises `ExportError` where the file cannot be run on these images.
        """
        names = ["probabilities"] if self._head is None else []
        if features or self._head is not None:
            self.require_features()
            names.append("features")
        try:
            outputs = dict(zip(names, self._session.run(names, {"images": images}), strict=True))
            if self._head is not None:
                (outputs["probabilities"],) = self._head.run(["probabilities"], {"features": outputs["features"]})
        except Exception as error:  # onnxruntime's own classes, which share no base
            raise ExportError(f"onnxruntime cannot run {self.path}: {error}") from error
        return outputs


def open_session(model: Path | bytes, *, providers: list[str] | None = None, threads: int | None = None) -> Any:
    """An onnxruntime session on a file, or on a file's bytes.

    Raises `ExportError` for what onnxruntime does not take, and for an unknown provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.intra_op_num_threads = threads or 0
    # waiting threads that spin would take the cores from those that decode
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isinstance(model, Path) and not model.is_file():
        inside = model / "model.onnx"
        if inside.is_file():
            raise ExportError(f"{model} is a folder; its model is {inside}")
        raise ExportError(f"there is no file {model}; `featx export RUN` writes one")

    chosen = _providers(onnxruntime.get_available_providers(), providers or ["cpu"])
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else os.fspath(model), options, providers=chosen
        )
    except Exception as error:  # as above
        what = "the file" if isinstance(model, bytes) else model
        raise ExportError(f"onnxruntime does not take {what}: {error}") from error


def _providers(available: list[str], asked: list[str]) -> list[str]:
    known = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    chosen = [name if name in available else known.get(name.lower(), "") for name in asked]
    if "" in chosen:
        name = asked[chosen.index("")]
        raise ExportError(
            f"no execution provider {name!r} is installed; there are {', '.join(known)}."
            f"{near(name.lower(), known)} Others come with builds such as onnxruntime-gpu"
        )
    return chosen


def parse_metadata(raw: dict[str, str], path: Path) -> dict[str, Any]:
    """The metadata of a file that featx exported, its values parsed. Raises `ExportError` for any other file."""
    version = raw.get("featx_format")
    if version is None:
        raise ExportError(f"{path} was not exported by featx; `featx inspect {path}` shows what it is")
    if version != FORMAT:
        raise ExportError(f"{path} is of format {version}, this featx reads {FORMAT}; install the featx that wrote it")
    try:
        values = {name: json.loads(text) for name, text in raw.items() if name != "featx_format"}
    except ValueError as error:
        raise ExportError(f"the metadata of {path} is damaged ({error}); export it again") from error
    if missing := {"input", "class_names", "activation", "threshold", "preprocess", "spec_digest"} - set(values):
        raise ExportError(f"the metadata of {path} lacks {', '.join(sorted(missing))}; export it again")
    return values
