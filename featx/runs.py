"""Owns the run folder: what lies in it, when it counts as finished, and that none is overwritten in silence."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featx.backbones import BackboneRequest
from featx.errors import RunError
from featx.files import to_json, write_atomic
from featx.heads import Head

if TYPE_CHECKING:
    from featx.features import Features
    from featx.sources import Source

# What decides the result, and so the run's name; where the data and the cache lie does not.
IDENTITY = ("spec", "head", "settings", "data_digest", "views", "seed", "finetune")


@dataclass(frozen=True)
class Run:
    """One run's folder: `config.json`, `head.safetensors`, `report.json` (written last), and its exports."""

    path: Path
    features: Features | None = field(default=None, repr=False, compare=False)
    """What it was fitted and measured on, with `source`, in the process that fitted it; else None."""
    source: Source | None = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> dict[str, Any]:
        """What was asked and what it resolved to. Raises `RunError` where there is none."""
        values = self._json("config.json")
        if "base" in values:  # fine-tuned: its network lies in the run, wherever the run lies now
            values["request"]["weights"] = str(self.path.absolute() / "model.safetensors")
        return values

    @property
    def report(self) -> dict[str, Any]:
        """The evaluation. Raises `RunError` while the run is unfinished."""
        return self._json("report.json")

    @property
    def request(self) -> BackboneRequest:
        """How the run's backbone is loaded."""
        return BackboneRequest.from_dict(self.config["request"])

    @property
    def head(self) -> Head:
        return Head.load(self.path / "head.safetensors")

    @property
    def finished(self) -> bool:
        return (self.path / "report.json").is_file()

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_atomic(self.path / name, to_json(values).encode() + b"\n")

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            what = "is no run" if name == "config.json" else f"has no {name}: the run is unfinished"
            raise RunError(f"{self.path} {what}; `featx fit DATA` makes one") from None
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); fit again with --overwrite") from error


def open_run(run: str | Path | Run) -> Run:
    """A finished run. Raises `RunError` for anything else."""
    run = run if isinstance(run, Run) else Run(Path(run))
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


def start(path: Path, config: dict[str, Any], *, overwrite: bool = False) -> Run:
    """Make a run's folder and write its configuration.

    An unfinished run with the same configuration is continued. Anything else that lies at `path` raises
    `RunError`, unless `overwrite`, which removes a former run (and only a run).
    """
    run = Run(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        mine = (path / "config.json").is_file()
        if not mine:
            raise RunError(f"{path} exists and is no run of featx; give another --output")
        if overwrite:
            shutil.rmtree(path)
        elif run.finished:
            raise RunError(f"{path} holds a finished run; use --overwrite to replace it, or another --output")
        elif run.config.get("digest") != config["digest"]:
            raise RunError(
                f"{path} holds an unfinished run with another configuration; "
                "use --overwrite to replace it, or another --output"
            )
    try:
        path.mkdir(parents=True, exist_ok=True)
        run.write("config.json", config)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error}); give another --output") from error
    return run
