"""Owns the packaged table of torchvision's networks, which `python -m featx.backbones._measure` writes."""

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
