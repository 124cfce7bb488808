"""Owns the packaged table of torchvision's networks, which `python -m featx.backbones.measure` writes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

# parts that only help training, and that a state dict may lack
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@functools.cache
def table() -> dict[str, Any]:
    """`{"torchvision": version, "networks": [row, ...]}`, the rows as `_measure.measure` gives them."""
    found: dict[str, Any] = json.loads(resources.files(__package__).joinpath("torchvision.json").read_text())
    return found


def fingerprint(shapes: Mapping[str, tuple[int, ...]], head: str) -> str:
    """Names an architecture by its tensors' names and shapes, whatever its number of classes."""
    kept = {
        name: list(shape)
        for name, shape in shapes.items()
        if not name.startswith((f"{head}.", *AUXILIARY)) and not name.endswith("num_batches_tracked")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def listing() -> list[dict[str, Any]]:
    """The torchvision networks, from a packaged table, for `featx backbones`: no network is built.

    Each has `name`, `features` (the size of a row), `parameters`, `crop` (input side, pixels),
    `weights` (enum names) and `default` (the enum name that `pretrained` stands for).
    """
    keys = ("name", "features", "parameters", "crop", "weights", "default")
    return [{key: row[key] for key in keys} for row in table()["networks"]]


def names() -> list[str]:
    """The torchvision networks' names; timm networks and factories come on top."""
    return [row["name"] for row in listing()]
