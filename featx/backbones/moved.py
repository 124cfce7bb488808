"""Weights files that were moved or renamed since a run was fitted: known by what they hold."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from featx.backbones.loading import resolve
from featx.backbones.request import SUFFIXES, BackboneInfo, BackboneRequest
from featx.errors import FeatxError, WeightsError
from featx.text import printable


def at(request: BackboneRequest, file: str | Path, digest: str, cache: Path) -> BackboneRequest | None:
    """The request with its weights in `file`; None where that holds others than those of `digest`."""
    with contextlib.suppress(WeightsError):  # without the part that was taken, if they were saved by themselves
        if resolve(moved := request.at(file), cache).weights_digest == digest:
            return moved
    moved = replace(request, weights=os.fspath(file))
    return moved if resolve(moved, cache).weights_digest == digest else None


def near(request: BackboneRequest, info: BackboneInfo, folders: Iterable[Path], cache: Path) -> BackboneRequest | None:
    """The same weights in some file of these folders, which is named on standard error."""
    for folder in folders:
        for file in sorted(folder.glob("*")):
            with contextlib.suppress(FeatxError, OSError):
                # 1 to 8 bytes a parameter, and whatever a training script keeps beside them
                alike = file.name.endswith(SUFFIXES) and 1 < file.stat().st_size / info.parameters < 40
                if alike and resolve(moved := request.at(file), cache).weights_digest == info.weights_digest:
                    print(printable(f"{request.file} is not there; {moved.weights} is the same"), file=sys.stderr)
                    return moved
    return None
