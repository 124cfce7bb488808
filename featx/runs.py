"""Owns the run folder: what lies in it, when it counts as finished, and that none is overwritten in silence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featx.backbones.loading import locate
from featx.backbones.request import BackboneRequest
from featx.errors import RunError
from featx.files import write_atomic
from featx.head import Head
from featx.text import to_json

if TYPE_CHECKING:
    from featx.features import Features
    from featx.sources.source import Source

# What decides the result, and so the run's name; where the data and the cache lie does not.
IDENTITY = ("spec", "head", "settings", "data_digest", "views", "seed", "finetune")
# What featx writes into a run's folder beside its configuration, its exports and its card. The folders are its own.
WRITTEN = (
    *("report.json", "report.html", "plots", "curve.json", "held-out-by-key.npy", "held-out.npy", "trained-on.npy"),
    *("metrics.jsonl", "checkpoints", "head.safetensors", "model.safetensors"),
)
CARD = "README.md"
CARD_MARK = "<!-- Written by `featx export`, which keeps it up to date as long as this line is there. -->"


@dataclass(frozen=True)
class Run:
    """One run's folder: `config.json`, `head.safetensors`, `report.json` (written last), and its exports."""

    path: Path
    features: Features | None = field(default=None, repr=False, compare=False)
    """What it was fitted and measured on, with `source`, in the process that fitted it; else None."""
    source: Source | None = field(default=None, repr=False, compare=False)
    factory: str | None = field(default=None, repr=False, compare=False)
    """`package.module:function` that the user has named, and which may be imported if the run names it, too."""

    @property
    def config(self) -> dict[str, Any]:
        """What was asked and what it resolved to. Raises `RunError` where there is none."""
        values = self._json("config.json")
        holders = {"data": values, "cache": values, "weights": values.get("request", {})}
        moved = {
            name: os.path.realpath(self.path / relative)
            for name, relative in values.pop("from_here", {}).items()
            if not os.path.exists(holders[name][name])
        }
        if all(map(os.path.exists, moved.values())):  # the project has moved as a whole, and the run was not copied
            for name, path in moved.items():
                holders[name][name] = path
        if "base" in values:  # fine-tuned: its network lies in the run, wherever the run lies now
            values["request"]["weights"] = str(self.path.absolute() / "model.safetensors")
        return values

    @property
    def report(self) -> dict[str, Any]:
        """The evaluation. Raises `RunError` while the run is unfinished."""
        return self._json("report.json")

    @property
    def request(self) -> BackboneRequest:
        """How the run's backbone is loaded. Raises `RunError` for a factory that the user has not named.

        The folder may be anyone's: it is read, and what it names runs no code.
        """
        request = BackboneRequest.from_dict(self.config["request"])
        source, name = locate(request.name)
        if source == "custom" and name != (self.factory or "").removeprefix("custom/"):
            other = f", not {self.factory}" if self.factory else ""
            raise RunError(
                f"{self.path} was fitted with {name}{other}: code that is not featx's, imported only if you name it; "
                f"if you trust it, add --factory {shlex.quote(name)} (factory={name!r} in Python)"
            )
        return request

    def folder(self, name: str) -> Path:
        """A folder in the run's. Raises `RunError` for a link: what lies behind it is not featx's to replace."""
        if (self.path / name).is_symlink():
            raise RunError(f"{self.path / name} is a link, and featx writes into folders of the run alone; remove it")
        return self.path / name

    @property
    def head(self) -> Head:
        return Head.load(self.path / "head.safetensors")

    @property
    def trained_on(self) -> np.ndarray | None:
        """`uint64 [M]`: `short_keys` of the training images, sorted; None where that is not known, as of older runs."""
        try:
            found: np.ndarray = np.load(self.path / "trained-on.npy", allow_pickle=False)
            return found
        except (OSError, ValueError):
            return None

    @property
    def finished(self) -> bool:
        return (self.path / "report.json").is_file()

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`, with where the data, the cache and the weights lie from the run's folder."""
        paths = {name: config[name] for name in ("data", "cache")} | {"weights": config["request"]["weights"]}
        here = self.path.resolve()
        relative: dict[str, str] = {}
        for name, path in paths.items():
            with contextlib.suppress(ValueError):  # on another drive
                relative |= {name: os.path.relpath(path, here)} if os.path.isabs(path) else {}
        self.write("config.json", config | {"from_here": relative})

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_atomic(self.path / name, to_json(values).encode() + b"\n")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError("it holds no object")
            return values
        except (FileNotFoundError, NotADirectoryError):
            what = "is no run" if name == "config.json" else f"has no {name}: the run is unfinished"
            raise RunError(f"{self.path} {what}; `featx fit DATA` makes one") from None
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); fit again into another --output") from error
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror or error})") from error


def open_run(run: str | Path | Run, factory: str | None = None) -> Run:
    """A finished run. Raises `RunError` for anything else. factory: see `Run.factory`."""
    run = run if isinstance(run, Run) else Run(Path(run))
    run = replace(run, factory=factory) if factory else run
    _ = run.config, run.report
    return run


def default_path(root: str | Path, config: dict[str, Any]) -> Path:
    """`<root>/<data>-<backbone>-<head>-<8 hex of the configuration>`."""
    data = Path(config["data"]).resolve().stem
    backbone = config["backbone"]["name"].removeprefix("torchvision/")
    words = [re.sub(r"[^\w.]+", "_", word).strip("_.") for word in (data, backbone, config["head"])]
    return Path(root) / "-".join([*words, config["digest"][:8]])


def digest(config: dict[str, Any]) -> str:
    """SHA-256, in hex, of the part of a configuration that decides the result."""
    identity = {name: config.get(name) for name in IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check(path: Path, config: dict[str, Any], *, overwrite: bool = False) -> None:
    """Raise `RunError` where a run with this configuration may not be written to `path`; changes nothing.

    It may where there is nothing, an unfinished run with the same configuration, or, with `overwrite`, any run.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    run = Run(path)
    try:
        former = run.config
    except (RunError, OSError):
        former = {}
    if not former.keys() >= {"featx", "digest", "spec", "head"}:  # others have a config.json too
        raise RunError(f"{path} exists and is no run of featx; give another --output")
    if not overwrite and run.finished:
        raise RunError(f"{path} holds a finished run; use --overwrite to replace it, or another --output")
    if not overwrite and former["digest"] != config["digest"]:
        raise RunError(
            f"{path} holds an unfinished run with another configuration; "
            "use --overwrite to replace it, or another --output"
        )


def start(path: Path, config: dict[str, Any], *, overwrite: bool = False) -> Run:
    """Make a run's folder and write its configuration, where `check` lets it.

    Of a run that is replaced, what featx wrote goes, `report.json` first; other files in its folder stay.
    An unfinished one with the same configuration is continued, unless `overwrite` starts it anew.
    """
    check(path, config, overwrite=overwrite)
    run = Run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if overwrite and (path / "config.json").is_file():
            _clear(path)
        run.write_config(config)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); give another --output") from error
    return run


def _clear(path: Path) -> None:
    """Remove from a run's folder what featx has written there, but for `config.json`, which tells that it is a run."""
    found = [path / name for name in WRITTEN]
    for record in path.glob("*parity.json"):  # each lies beside the file it is about
        stem = "model" if record.name == "parity.json" else record.name.removesuffix(".parity.json")
        found += [record, path / f"{stem}.onnx"]
    card = path / CARD
    if card.is_file() and CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
        found.append(card)  # and not somebody's own
    for each in found:
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)
