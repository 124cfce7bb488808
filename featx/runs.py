"""A run's folder: its files, when it counts as finished, and what may be overwritten."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featx.backbones.loading import locate, resolve
from featx.backbones.request import SUFFIXES, BackboneInfo, BackboneRequest
from featx.engines.wire import FORMAT_KEY, scan
from featx.errors import FeatxError, HeadError, NewerError, RunError, WeightsError
from featx.features import FeatureSpec
from featx.files import MOST_NETWORK_BYTES, read_plain, sweep, write_atomic
from featx.head import Head
from featx.records import array_bytes, array_of, convert, opened, read_record, warn_older, write_record
from featx.stored import Compared, check_report
from featx.text import printable

# What decides the result, and so the run's name; where the data and the cache lie does not.
IDENTITY = ("spec", "head", "settings", "data_digest", "views", "seed", "finetune")
# What featx writes into a run's folder beside its configuration: what a fit or its page writes again, what only
# fine-tuning writes, the figures in plots/, the files in checkpoints/, the exports (each with its record), the card.
WRITTEN = ("report.json", "report.html", "held-out-by-key.npy", "held-out.npy", "trained-on.npy", "head.safetensors")
TUNED = ("metrics.jsonl", "model.safetensors")
FIGURES = ("confusion", "reliability", "map", "curves", "path", "learning", "mistakes", "predictions", "batch")
CHECKPOINT = re.compile(r"(last|best-\d{4,})\.safetensors")
FIGURE = re.compile(rf"({'|'.join(FIGURES)})\.png")
EXPORTS = (
    *("model.onnx", "model-tensor.onnx", "head.onnx"),
    *(f"{stem}-{precision}.onnx" for stem in ("model", "model-tensor") for precision in ("int8", "fp16")),
)
CARD = "README.md"
CARD_MARK = "<!-- Written by `featx export`, which keeps it up to date as long as this line is there. -->"


Part = BackboneRequest | BackboneInfo | FeatureSpec
PARTS: dict[str, type[Part]] = {"request": BackboneRequest, "backbone": BackboneInfo, "spec": FeatureSpec}
"""The fields of `RunConfig` with a type of their own; a fine-tuned run keeps their former values in `base`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`config.json`: all that is needed to make a run again, or to load, evaluate and export it."""

    featx: str = ""
    """The version that fitted it."""
    data: str
    """An absolute path, as is `cache`."""
    data_digest: str
    """`Features.digest`."""
    cache: str
    request: BackboneRequest
    """How its backbone is loaded."""
    backbone: BackboneInfo
    spec: FeatureSpec
    views: int = 0
    """Augmented views of each training image that were learned from."""
    head: str
    settings: dict[str, Any]
    """The head's settings."""
    finetune: dict[str, Any] | None = None
    """`FinetuneConfig.to_dict()`; None where the backbone is as it was."""
    seed: int = 0
    class_names: list[str]
    splits: dict[str, int] = field(default_factory=dict)
    """Images in `train`, `val` and `test`."""
    digest: str = ""
    """`digest` of the configuration that fitting, or fine-tuning, began with."""
    base: dict[str, Any] | None = None
    """`request`, `backbone` and `spec` of the backbone that fine-tuning began with."""

    def to_dict(self) -> dict[str, Any]:
        values = vars(self) | {name: getattr(self, name).to_dict() for name in PARTS}
        return {name: value for name, value in values.items() if name != "base" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; fields with a default may be missing. Raises `ValueError`."""
        return convert(values | {name: part.from_dict(values.get(name)) for name, part in PARTS.items()}, cls)


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: what its folder held when it was opened."""

    path: Path
    config: RunConfig = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    """`report.json`, the evaluation."""
    head: Head = field(repr=False)
    trained_on: np.ndarray | None = field(default=None, repr=False)
    """`uint64 [M]`: `short_keys` of the training images, sorted; None where it is unknown, as in older runs."""
    factory: str | None = field(default=None, repr=False)
    """`package.module:function` that the user has named, and which may be imported if the run names it, too."""
    weights: str | Path | None = field(default=None, repr=False)
    """Where the user says that the weights file lies now."""

    @cached_property
    def request(self) -> BackboneRequest:
        """How its backbone is loaded: with the run's own preprocessing, and from where its weights lie now.

        The folder may be anyone's: it is read, and what it names runs no code. Raises `RunError` for a factory that the
        user has not named, and `WeightsError` for a weights file that is not there, or other weights than the run's.
        """
        source, name = locate(self.config.request.name)
        if source == "custom" and name != (self.factory or "").removeprefix("custom/"):
            other = f", not {self.factory}" if self.factory else ""
            raise RunError(
                f"{self.path} was fitted with {name}{other}: code that is not featx's, imported only if you name it; "
                f"if you trust it, add --factory {shlex.quote(name)} (factory={name!r} in Python)"
            )
        request, preprocess = self.config.request, self.config.spec.preprocess
        own = replace(request, preprocess=tuple(vars(preprocess).items()))
        if self.weights is not None:
            alone = replace(own, weights=os.fspath(self.weights))  # without the part that was taken, if saved by itself
            if moved := self._same([own.at(self.weights), alone]):
                return moved
            resolve(alone, Path(self.config.cache))  # says what cannot be read
            raise WeightsError(
                f"{self.weights} holds other weights than {self.path} was fitted on "
                f"({self.config.backbone.weights_digest[:12]}): give the same ones, wherever they lie, or fit again"
            )
        if request.file and not request.file.exists():
            size, folders = self.config.backbone.parameters, (request.file.parent, self.path)
            files = [file for folder in folders for file in sorted(folder.glob("*")) if file.name.endswith(SUFFIXES)]
            moved = self._same(own.at(file) for file in files if size < file.stat().st_size < 40 * size)
            if moved:
                print(printable(f"{request.file} is not there; {moved.weights} is the same"), file=sys.stderr)
            return moved or request
        if request.file is None or source == "custom":
            return request
        # an older featx may have chosen other preprocessing for this file
        return request if resolve(request, Path(self.config.cache)).preprocess == preprocess else own

    def _same(self, requests: Iterable[BackboneRequest]) -> BackboneRequest | None:
        """The first of these whose weights are the run's, by the digest of their tensors."""
        for request in requests:
            with contextlib.suppress(FeatxError):
                if resolve(request, Path(self.config.cache)).weights_digest == self.config.backbone.weights_digest:
                    return request
        return None

    def require_alike(self, y: np.ndarray, data: object) -> None:
        """Raise `HeadError` where one of the run and the data has several labels for an image. y: `int [N]` or 0/1
        `[N, L]`.
        """
        if (self.head.activation == "sigmoid") != (y.ndim == 2):
            kinds = ("one label for each image", "several labels for an image")
            mine, theirs = kinds if y.ndim == 2 else kinds[::-1]
            raise HeadError(f"{self.path} was fitted on {mine}, and {data} has {theirs}: they cannot be compared")


def open_run(run: str | Path | Run, factory: str | None = None, weights: str | Path | None = None) -> Run:
    """Read a finished run. Raises `RunError` for anything else. factory, weights: see `Run`."""
    if isinstance(run, Run):
        named = replace(run, factory=factory or run.factory, weights=weights or run.weights)
        return named if factory or weights else run
    path = Path(run)
    (config, sealed), (report, current) = read_config(path), _read(path, "report.json")
    name, trained_on = "report.json", None
    try:
        check_report(report)
        files = report.pop("files", {})
        if sealed != current:
            raise ValueError("one of it and config.json has a SHA-256, and the other has none")

        name = "head.safetensors"
        head, sealed = Head.from_bytes(_written(path, name, files))
        if sealed != current:
            raise ValueError("it has lost the SHA-256 that it was written with")
        if head.weight.shape[1:] != config.backbone.row_shape:
            given = list(config.backbone.row_shape)
            raise ValueError(f"it takes {head.weight.shape[1]} features, and the backbone of config.json gives {given}")

        name = "trained-on.npy"
        if (path / name).exists():
            trained_on = array_of(_written(path, name, files), "<u8", 1, sealed=current)
    except (ValueError, OSError) as error:
        raise _damaged(path / name, error) from error
    if not current:
        warn_older(path)
    return Run(path, config, report, head, trained_on, factory, weights)


def _written(path: Path, name: str, files: dict[str, str]) -> bytes:
    """A file of a run, which must be the one that its report was written with. Raises `OSError` and `ValueError`."""
    data = read_plain(path / name)
    if name in files and hashlib.sha256(data).hexdigest() != files[name]:
        raise ValueError("it is not the file that report.json was written with")
    return data


def read_config(path: Path) -> tuple[RunConfig, bool]:
    """The configuration of a run, finished or not, where its folder lies now; and whether its file carries a digest.

    Raises `RunError`.
    """
    values, current = _read(path, "config.json")
    try:
        config = RunConfig.from_dict(values)
        places = {"data": config.data, "cache": config.cache, "weights": _file(config)}
        moved = {
            name: os.path.realpath(path / relative)
            for name, relative in convert(values.get("from_here", {}), dict[str, str]).items()
            if not os.path.exists(places[name])
        }
    except (KeyError, ValueError) as error:
        raise _damaged(path / "config.json", error) from error

    if all(map(os.path.exists, moved.values())):  # the project has moved as a whole, and the run was not copied
        places |= moved
    if config.base:  # fine-tuned: its network lies in the run, wherever the run lies now
        places["weights"] = str(path.absolute() / "model.safetensors")
    request = config.request.at(places["weights"])
    return replace(config, data=places["data"], cache=places["cache"], request=request), current


def _file(config: RunConfig) -> str:
    """The weights without the part that is taken of them: a path, where they are local."""
    return str(config.request.file or config.request.weights)


def write_config(path: Path, config: RunConfig) -> None:
    """Write `config.json`, with where the data, the cache and the weights lie from the run's folder."""
    here = path.resolve()
    relative: dict[str, str] = {}
    for name, place in (("data", config.data), ("cache", config.cache), ("weights", _file(config))):
        with contextlib.suppress(ValueError):  # on another drive
            relative |= {name: os.path.relpath(place, here)} if os.path.isabs(place) else {}
    write_record(path / "config.json", config.to_dict() | {"from_here": relative})


def _read(path: Path, name: str) -> tuple[dict[str, Any], bool]:
    """The values of a JSON file of a run, and whether it carries a digest. Raises `RunError`."""
    try:
        return opened(read_plain(path / name))
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a run" if name == "config.json" else f"has no {name}: the run is unfinished"
        raise RunError(f"{path} {what}; `featx fit DATA` makes one") from None
    except ValueError as error:
        raise _damaged(path / name, error) from error
    except OSError as error:
        raise RunError(f"{path / name} cannot be read ({error.strerror or error})") from error


def _damaged(path: Path, error: Exception) -> RunError:
    if isinstance(error, NewerError):
        return RunError(f"{path} cannot be read: {error}")
    return RunError(f"{path} is damaged ({error}); fit again into another --output")


def own_folder(path: Path, name: str) -> Path:
    """A folder in the run's. Raises `RunError` for a link: what lies behind it is not featx's to replace."""
    if (path / name).is_symlink():
        raise RunError(f"{path / name} is a link, and featx writes into folders of the run alone; remove it")
    return path / name


def record_of(model: Path) -> Path:
    """Where the record of an exported file lies: what was compared, and the file's SHA-256."""
    return model.with_name("parity.json" if model.name == "model.onnx" else f"{model.stem}.parity.json")


def is_export(path: Path) -> bool:
    """Whether featx exported this ONNX file."""
    with contextlib.suppress(OSError, ValueError):
        return FORMAT_KEY in scan(read_plain(path, MOST_NETWORK_BYTES)).metadata
    return False


def is_record(path: Path) -> bool:
    """Whether featx wrote this record, of the file that lies, or lay, beside it."""
    with contextlib.suppress(OSError, ValueError):
        return record_of(path.with_name(read_record(path, Compared)[0]["file"])) == path
    return False


def is_card(path: Path) -> bool:
    """Whether featx wrote this model card, and keeps it up to date."""
    return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def is_finished(path: Path) -> bool:
    """Whether a run's folder holds its report, which is written last."""
    return (path / "report.json").is_file()


def default_path(root: str | Path, config: RunConfig) -> Path:
    """`<root>/<data>-<backbone>-<head>-<8 hex of the configuration>`."""
    parts = (Path(config.data).resolve().stem, config.backbone.name.removeprefix("torchvision/"), config.head)
    words = [re.sub(r"[^\w.]+", "_", part).strip("_.") for part in parts]
    return Path(root) / "-".join([*words, config.digest[:8]])


def digest(config: RunConfig) -> str:
    """SHA-256, in hex, of the part of a configuration that decides the result."""
    identity = {name: getattr(config, name) for name in IDENTITY} | {"spec": config.spec.to_dict()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check(path: Path, config: RunConfig, *, overwrite: bool = False) -> None:
    """Raise `RunError` where a run with this configuration may not be written to `path`; changes nothing.

    It may where there is nothing, an unfinished run with the same configuration, or, with `overwrite`, any run.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    former: dict[str, Any] = {}
    with contextlib.suppress(RunError):
        former, _ = _read(path, "config.json")

    if not former.keys() >= {"featx", "digest", "spec", "head"}:  # others have a config.json too
        raise RunError(f"{path} exists and is not a run of featx; give another --output")
    others = [path / name for name in TUNED if config.finetune and not former.get("finetune")]
    if there := [other for other in others if os.path.lexists(other)]:
        raise RunError(f"{there[0]} was not written by featx, and fine-tuning would replace it; move it away")
    if not overwrite and is_finished(path):
        raise RunError(f"{path} holds a finished run; use --overwrite to replace it, or another --output")
    if not overwrite and former["digest"] != config.digest:
        raise RunError(
            f"{path} holds an unfinished run with another configuration; "
            "use --overwrite to replace it, or another --output"
        )


def start(path: Path, config: RunConfig, *, overwrite: bool = False) -> None:
    """Make a run's folder and write its configuration, where `check` lets it.

    When a run is replaced, the files that featx wrote are removed, `report.json` first; others in its folder stay.
    Those that no fit writes again, such as exports, are named on standard error. An unfinished run with the same
    configuration is continued, unless `overwrite` starts it over.
    """
    check(path, config, overwrite=overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if overwrite and (path / "config.json").is_file() and (gone := _clear(path)):
            exported = any(name.endswith(".onnx") for name in gone)
            again = f"; export again with `featx export {shlex.quote(str(path))}`" * exported
            print(printable(f"removed with the former run: {', '.join(gone)}{again}"), file=sys.stderr)
        write_config(path, config)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); give another --output") from error


def finish(path: Path, head: Head, trained_on: np.ndarray, report: dict[str, Any], factory: str | None = None) -> Run:
    """Write what a started run lacks, its report last, and open it. The arguments are as in `Run`."""
    files = {"head.safetensors": head.to_bytes(), "trained-on.npy": array_bytes(trained_on)}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    try:
        for name, data in files.items():
            write_atomic(path / name, data)
        write_record(path / "report.json", report | {"files": digests})
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); make room and run the same command again, which "
            "finishes the run: its features are cached"
        ) from error
    return open_run(path, factory)


def _clear(path: Path) -> list[str]:
    """Remove from a run's folder what featx has written there, but for `config.json`, which tells that it is a run.

    That is decided by the exact name and, where the name could be anybody's, by the content. Nothing that lies
    behind a link is touched. Returns the names of what no fit writes again.
    """
    tuned = bool(_read(path, "config.json")[0].get("finetune"))
    again = [path / name for name in WRITTEN]
    gone = [path / "curve.json", *(path / name for name in TUNED if tuned)]
    named = {record.name.removesuffix(".parity.json") + ".onnx" for record in path.glob("*.parity.json")}
    for model in [path / name for name in sorted({*EXPORTS, *named})]:
        recorded = is_record(record_of(model))
        gone += [model] if (recorded or model.name in EXPORTS) and is_export(model) else []
        gone += [record_of(model)] if recorded else []
    gone += [path / CARD] if is_card(path / CARD) else []
    gone = [each for each in gone if each.is_symlink() or each.is_file()]

    inside = {path / "plots": FIGURE} | ({path / "checkpoints": CHECKPOINT} if tuned else {})
    folders = [folder for folder in inside if folder.is_dir() and not folder.is_symlink()]
    again += [each for folder in folders for each in folder.iterdir() if inside[folder].fullmatch(each.name)]
    for each in [*(each for each in again if each.is_symlink() or each.is_file()), *gone]:  # report.json first
        each.unlink(missing_ok=True)
    for folder in folders:
        sweep(folder)
        with contextlib.suppress(OSError):  # it holds somebody's files
            folder.rmdir()
    return [each.name for each in gone]
