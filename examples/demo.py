"""The main job, start to end, on real data that needs no download: scikit-learn's 1,797 handwritten digits.

Run by `make demo`. Everything it writes lies in `demo/`: the PNG files, the feature cache, the run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.errors import WeightsError

DEMO = Path("demo")


def write_digits(root: Path) -> None:
    """8 x 8 grey PNG files, one folder a digit; existing files are kept."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = root / str(label) / f"{number:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(path)


def featx(*arguments: str | Path) -> str:
    """Run one command as a user would, showing it; returns what it wrote to standard output."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ featx {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "featx", *words], stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def main() -> None:
    data, cache, run = DEMO / "digits", DEMO / "cache", DEMO / "run"
    write_digits(data)
    try:
        info = resolve(BackboneRequest("resnet18"), cache)
        weights = "pretrained"
        print(f"Backbone: resnet18, {info.weights_note}.")
    except WeightsError as error:
        weights = "random"
        print(f"Backbone: resnet18 with random weights, seed 0, since the pretrained ones cannot be loaded:\n{error}")
    backbone = ["--backbone", "resnet18", "--weights", weights, "--cache", cache]
    featx("extract", data, *backbone)
    featx("fit", data, *backbone, "--head", "logreg", "--output", run, "--overwrite")
    featx("export", run)
    images = [data / "3" / "0003.png", data / "7" / "0007.png", data / "9" / "0009.png"]
    featx("predict", run / "model.onnx", *images)
    print(f"\nThe classifier is {run / 'model.onnx'}; its evaluation is {run / 'report.json'}.")


if __name__ == "__main__":
    main()
