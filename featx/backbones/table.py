"""The packaged table of torchvision's networks, which `python -m featx.backbones.measure` writes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from featx.errors import BackboneError
from featx.text import near

# Parts that only help training; a state dict may lack them.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@functools.cache
def table() -> dict[str, Any]:
    """`{"torchvision": version, "networks": [row, ...]}`, each row made by `featx.backbones.measure.measure`."""
    found: dict[str, Any] = json.loads(resources.files(__package__).joinpath("torchvision.json").read_text())
    return found


def fingerprint(shapes: Mapping[str, tuple[int, ...]], head: str) -> str:
    """A name for an architecture: a hash of its tensors' names and shapes, except its last layer's (`head`)."""
    kept = {
        name: list(shape)
        for name, shape in shapes.items()
        if not name.startswith((f"{head}.", *AUXILIARY)) and not name.endswith("num_batches_tracked")
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def listing() -> list[dict[str, Any]]:
    """The torchvision networks, from the packaged table, for `featx backbones`; builds no network.

    Each has `name`, `features` (the size of a row), `parameters`, `crop` (input side, pixels),
    `weights` (enum names) and `default` (the enum name that `pretrained` stands for).
    """
    keys = ("name", "features", "parameters", "crop", "weights", "default")
    return [{key: row[key] for key in keys} for row in table()["networks"]]


def unknown(name: str, known: list[str]) -> BackboneError:
    return BackboneError(
        f"torchvision has no classification network {name!r}; `featx backbones` lists the {len(known)} it has, "
        f"timm's are called timm/NAME, your own package.module:factory.{near(name, known)}"
    )


def names() -> list[str]:
    """The torchvision networks' names, without timm networks and factories."""
    return [row["name"] for row in listing()]
