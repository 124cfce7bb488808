"""Owns a spec's folder: its name, its `spec.json`, its shards, and which of them were verified."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from featx.cache import shards
from featx.cache.shards import Form, Shard, StaleError
from featx.errors import DamageError, NewerError
from featx.features import FeatureSpec
from featx.files import aside_name, make_folder, stat_row, sync_folder, unsealed, write_sealed


def folder_name(spec: FeatureSpec) -> str:
    """`resnet18-0123456789abcdef`: the backbone's own name, for people, and the start of the spec's digest."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", spec.backbone.rpartition("/")[2])[:60].lstrip(".")
    return f"{name}-{spec.digest[:16]}"


def list_shards(folder: Path) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Names and stats of the shards in a folder, in the order of their commits."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if shards.NAME.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.name, stat_row(os.lstat(entry.path))))
    return sorted(found)


def create(folder: Path, form: Form) -> None:
    """Make a spec's folder with its `spec.json` in it, in one step; where one exists it stays as it is."""
    make_folder(folder.parent)
    aside = folder.parent / aside_name()
    try:
        aside.mkdir()
        write_form(aside / "spec.json", form)
        os.rename(aside, folder)  # fails where another writer's folder is
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError) or not folder.is_dir():
            raise
        if not (folder / "spec.json").exists():
            write_form(folder / "spec.json", form)


def read_form(path: Path) -> Form:
    """What a `spec.json` says. Raises `DamageError`, `NewerError`, `OSError`."""
    values = _unsealed(path)
    try:
        shape = tuple(int(size) for size in values["row_shape"])
        form = Form(FeatureSpec.from_dict(values["spec"]), str(values["engine"]), shape)
    except NewerError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{path} holds no spec ({error})") from None
    if values.get("kind") != shards.KIND or min(shape, default=1) < 0:
        raise DamageError(f"{path} is of another kind ({values.get('kind')})")
    return form


def write_form(path: Path, form: Form) -> None:
    """Write a `spec.json`. Raises `OSError`."""
    values = {
        "kind": shards.KIND,
        "spec": form.spec.to_dict(),
        "engine": form.engine,
        "tolerance": form.spec.tolerance,
        "row_shape": list(form.row_shape),
    }
    write_sealed(path, values)


def read_verified(folder: Path) -> dict[str, Shard]:
    """The shards whose bytes were checked before. Empty where that is not known: then they are checked again."""
    try:
        values = _unsealed(folder / "verified.json")["shards"]
        return {name: Shard(name, tuple(v[:4]), v[4], v[5], v[6]) for name, v in values.items()}
    except (OSError, StaleError, DamageError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def write_verified(folder: Path, verified: dict[str, Shard]) -> None:
    values = {s.name: [*s.stat, s.count, s.keys_at, s.rows_at] for s in verified.values()}
    with contextlib.suppress(OSError):  # read-only or full: the next opening checks the bytes again
        write_sealed(folder / "verified.json", {"shards": values})


def _unsealed(path: Path) -> dict[str, Any]:
    with shards.open_regular(path) as file:
        data = file.read(1 << 26)
    try:
        return unsealed(data or b"")
    except ValueError as error:
        raise DamageError(f"{path} {error}") from None
