"""Write the packaged table of torchvision's networks: `python -m featx.backbones.measure`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchvision
from torchvision import models

from featx.backbones.table import fingerprint
from featx.backbones.zoos import torchvision as source


def measure(name: str) -> dict[str, Any]:
    """One network's row, measured on the network itself; takes seconds for the largest."""
    weights = models.get_model_weights(name)
    preprocess = source.preprocessing(weights.DEFAULT)
    network = source.create(name, preprocess.crop)
    head = source.last_layer(name, network)
    state = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}

    return {
        "name": name,
        "features": state[f"{head}.weight"][1],
        "parameters": sum(p.numel() for p in network.parameters()),
        "crop": preprocess.crop,
        "weights": [member.name for member in weights],
        "default": weights.DEFAULT.name,
        "head": head,
        "fingerprint": fingerprint(state, head),
    }


def write(path: Path) -> None:
    """Measure every network of the installed torchvision and write the table."""
    lines = ",\n".join(json.dumps(measure(name)) for name in models.list_models(module=models))
    version = torchvision.__version__.partition("+")[0]
    path.write_text(f'{{"torchvision": "{version}", "networks": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    write(Path(__file__).with_name("torchvision.json"))
