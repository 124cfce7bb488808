"""An exported file, opened: what it takes and gives, and what its metadata says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from featx.devices import available_threads
from featx.engines.wire import FORMAT_KEY, require_whole, scan
from featx.errors import ExportError, NewerError
from featx.files import MOST_NETWORK_BYTES, read_plain
from featx.head import Activation
from featx.options import Input, count, home, listed
from featx.pixels.preprocess import Preprocess
from featx.records import convert, warn_older
from featx.seals import SEAL, is_current, is_sealed
from featx.state import HAVE_THREADS
from featx.text import from_json, near

FORMAT = "1"
"""The version of the metadata; raised when a reader of an older version would misread a file."""


class Metadata(TypedDict):
    """What an exported file says about itself; each value is JSON."""

    input: Input
    outputs: NotRequired[list[str]]
    class_names: list[str]
    activation: Activation
    threshold: float | None
    preprocess: dict[str, Any]
    spec_digest: str
    backbone: NotRequired[str]
    precision: NotRequired[str]
    contract: NotRequired[str]
    weights: NotRequired[str]
    license: NotRequired[str]
    head: NotRequired[str]
    parts: NotRequired[dict[str, str]]
    metrics: NotRequired[dict[str, Any]]
    parity: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, str]]


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
        self.path, head = Path(home(path)), None if head is None else Path(home(head))
        whole = self.path.absolute(), head and head.absolute()
        self._again = {"path": whole[0], "providers": providers, "threads": threads, "head": whole[1]}
        self._process = os.getpid()
        data, self.metadata = read_model(self.path)
        self.input: str = self.metadata["input"]
        if self.input == "features":
            raise ExportError(f"{self.path} is a head alone; give the features model, and this file as its head")
        self._session = open_session(data, providers=providers, threads=threads)
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._head, described = None, self.metadata
        if head is not None:
            data, described = read_model(head)
            self._require_fitting(described, head)
            self._head = open_session(data, providers=providers, threads=1)
        elif "probabilities" not in self.outputs:
            raise ExportError(
                f"{self.path} gives {', '.join(self.outputs)}; to predict, export with "
                "probabilities among the outputs, or give a head for its features"
            )
        self.class_names: tuple[str, ...] = tuple(described["class_names"])
        self.activation: str = described["activation"]
        self.threshold: float | None = described["threshold"]
        self.preprocess = Preprocess.from_dict(self.metadata["preprocess"])

    def __getstate__(self) -> dict[str, Any]:
        return self._again | {"metadata": self.metadata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the file where it lies. Raises `ExportError` where another one lies there by now."""
        metadata = state.pop("metadata")
        self.__init__(**state)  # type: ignore[misc]
        if self.metadata != metadata:
            raise ExportError(f"{self.path} is another export than the one this Model was made of; open it by its path")

    def _require_fitting(self, metadata: dict[str, Any], path: Path) -> None:
        """Raise `ExportError` unless a head exported alone takes the features of this file."""
        if metadata["input"] != "features":
            raise ExportError(f"{path} takes {metadata['input']}; a head takes features (--input features)")
        self.require_features()
        if metadata["spec_digest"] != self.metadata["spec_digest"]:
            raise ExportError(
                f"{path} was fitted on other features than {self.path} gives "
                f"({metadata.get('backbone')} and {self.metadata.get('backbone')}); export both from one run"
            )

    def require_features(self) -> None:
        """Raise `ExportError` where the file does not give features."""
        if "features" not in self.outputs:
            raise ExportError(f"{self.path} gives {', '.join(self.outputs)}, not features")

    def __call__(self, images: np.ndarray, *, features: bool = False) -> dict[str, np.ndarray]:
        """`uint8 [N, H, W, 3]` (or `[N, 3, crop, crop]`) -> `probabilities` `float32 [N, C]`, `features`.

        features: give `float32 [N, D]` as well. Raises `ExportError` where the file cannot be run on these images.
        """
        images = np.asarray(images)
        if images.ndim != 4:
            raise ExportError(
                f"expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}; "
                "featx.predict(model, images) takes images of any kind"
            )
        if self._process != os.getpid():  # a fork has left the session's threads behind, which it would wait for
            self.__setstate__(self.__getstate__())
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
        expected = len(images), len(self.class_names)
        for name, rows in outputs.items():
            fits = isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.ndim == 2
            if not fits or len(rows) != len(images) or not np.isfinite(rows).all():
                raise ExportError(f"{self.path} gives {name} that are not {len(images)} rows of finite numbers")
        if outputs["probabilities"].shape != expected:
            raise ExportError(
                f"{self.path} names {expected[1]} classes and gives probabilities "
                f"{list(outputs['probabilities'].shape)}; export it again"
            )
        return outputs


def read_model(path: Path) -> tuple[bytes, dict[str, Any]]:
    """A file that featx exported: its bytes, and its metadata, parsed.

    The bytes are compared with the digest that they carry, and looked through, before any runtime sees them. Raises
    `ExportError` for a damaged file, for weights in other files, for graphs that may not end, and for any other file.
    """
    try:
        data = read_plain(path, MOST_NETWORK_BYTES)
        found, sealed = scan(data), is_sealed(data)
        if FORMAT_KEY in found.metadata and not is_current(int(found.metadata.get("format", "0")), sealed):
            warn_older(path)
    except NewerError as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}; `featx export RUN` writes one") from error
    except OSError as error:
        inside = path / "model.onnx"
        what = f"is a folder; its model is {inside}" if inside.is_file() else f"cannot be read ({error.strerror})"
        raise ExportError(f"{path} {what}") from error
    except ValueError as error:
        raise ExportError(
            f"{path} is damaged, or not a model that featx exported ({error}); export it again"
        ) from error
    require_whole(found, path)
    return data, parse_metadata(found.metadata, path)


def open_session(model: bytes, *, providers: list[str] | None = None, threads: int | None = None) -> Any:
    """An onnxruntime session on a file's bytes.

    Raises `ExportError` for what onnxruntime does not take, and for an unknown provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    options.intra_op_num_threads = count("threads", threads or available_threads())
    # waiting threads that spin would take the cores from those that decode
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # else bytes in a format of onnxruntime's own, which `scan` does not read, can lie between an ONNX file's fields
    options.add_session_config_entry("session.load_model_format", "ONNX")
    chosen = _providers(onnxruntime.get_available_providers(), listed(providers or "cpu"))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=chosen)
    except Exception as error:  # as above
        raise ExportError(f"onnxruntime does not take the file: {error}") from error
    HAVE_THREADS.add(session)
    return session


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
    version = raw.get(FORMAT_KEY)
    if version is None:
        raise ExportError(f"{path} was not exported by featx; `featx inspect {path}` shows what it is")
    if version != FORMAT:
        raise ExportError(f"{path} is of format {version}, this featx reads {FORMAT}; install the featx that wrote it")
    try:
        values = {name: from_json(text) for name, text in raw.items() if name not in (FORMAT_KEY, *SEAL)}
        if not convert(values, Metadata)["class_names"]:
            raise ValueError("it names no class")
        Preprocess.from_dict(values["preprocess"])
    except ValueError as error:
        raise ExportError(f"the metadata of {path} is damaged ({error}); export it again") from error
    return values
