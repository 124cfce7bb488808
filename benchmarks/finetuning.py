"""Fine-tuning beside the transfer-learning tutorials' loop, on the same photographs, in one run.

    python benchmarks/finetuning.py DATA [--only last full prefix] [--rounds 2] [--weights FILE]

DATA holds train/ and val/ with class folders. ResNet-18 has random weights, which cost the same time;
`--weights` names a SqueezeNet 1.1 file. `last`: 25 epochs of the last layer (the tutorials' loop is timed for
one epoch and counted 25 times; featx's time is that of a fresh process with an empty cache). `full`: an epoch of
the whole network, batch 4. `prefix`: an epoch of `layer4` and the head, batch 32. Epochs include validation;
rounds are interleaved, medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from featx.backbones.request import BackboneRequest
from featx.extraction.pipeline import sync
from featx.extraction.result import Extraction
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.tuning import finetune

EPOCHS = 25


def tutorial_network(name: str, weights: str | None, frozen: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """As in the tutorials: a new last layer, everything else frozen or not."""
    network = models.get_model(name, weights=None)
    if weights:
        network.load_state_dict(torch.load(weights, weights_only=True))
    for parameter in network.parameters():
        parameter.requires_grad = not frozen
    if name.startswith("squeezenet"):
        network.classifier[1] = nn.Conv2d(512, 2, 1)
    else:
        network.fc = nn.Linear(network.fc.in_features, 2)
    return network, [p for p in network.parameters() if p.requires_grad]


def tutorial_epoch(data: Path, name: str, weights: str | None = None, *, frozen: bool) -> float:
    """Seconds of one epoch, training and validation, of the tutorials' loop: batch 4, 4 loader workers."""
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    shown = {
        "train": [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()],
        "val": [transforms.Resize(256), transforms.CenterCrop(224)],
    }
    loaders = {}
    for split, steps in shown.items():
        chain = transforms.Compose([*steps, transforms.ToTensor(), normalise])
        images = datasets.ImageFolder(data / split, chain)
        loaders[split] = DataLoader(images, batch_size=4, shuffle=True, num_workers=4)
    network, trained = tutorial_network(name, weights, frozen)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(trained, lr=0.001, momentum=0.9)
    begin = time.perf_counter()
    for split in ("train", "val"):
        network.train(split == "train")
        loss_sum, right = 0.0, 0
        for inputs, labels in loaders[split]:
            optimizer.zero_grad()
            with torch.set_grad_enabled(split == "train"):
                outputs = network(inputs)
                loss = criterion(outputs, labels)
                if split == "train":
                    loss.backward()
                    optimizer.step()
            loss_sum += loss.item() * len(inputs)
            right += int((outputs.argmax(1) == labels).sum())
    return time.perf_counter() - begin


def featx_last(data: Path, name: str, weights: str) -> float:
    """Seconds of a fresh `featx fit` with an empty cache: extraction, 25 epochs of the head, evaluation.

    Without `report.html`, which the tutorials' loop does not draw either.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "featx", "fit", str(data), "--backbone", name, "--weights", weights]
        command += ["--head", "linear", "--set", "recipe=tutorial", "--cache", f"{folder}/cache", "--no-report"]
        begin = time.perf_counter()
        subprocess.run([*command, "--output", f"{folder}/run"], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begin


def featx_epoch(extraction: Extraction, **settings: Any) -> float:
    """Seconds of the median epoch of three, the first left out: it fills caches and allocators."""
    config = FinetuneConfig(epochs=4, init="random", select="val", warmup=0.0, **settings)
    with tempfile.TemporaryDirectory() as folder:
        tuned = finetune(extraction, extraction.features(), None, config, Path(folder))
    return statistics.median(float(row["seconds"]) for row in tuned.history["epochs"][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=["last", "full", "prefix"], default=["last", "full", "prefix"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--weights", help="a SqueezeNet 1.1 state dict")
    options = parser.parse_args()
    data, seconds = options.data, dict[str, list[float]]()

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)
        print(f"{name}: {value:.2f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as cache:
        request = BackboneRequest("resnet18", weights="random")
        extraction = sync(data, request, cache=cache) if set(options.only) != {"last"} else None
        for _ in range(options.rounds):
            if "last" in options.only:
                note("last/resnet18/tutorial epoch", tutorial_epoch(data, "resnet18", frozen=True))
                note("last/resnet18/featx in all", featx_last(data, "resnet18", "random"))
                if options.weights:
                    epoch = tutorial_epoch(data, "squeezenet1_1", options.weights, frozen=True)
                    note("last/squeezenet1_1/tutorial epoch", epoch)
                    note("last/squeezenet1_1/featx in all", featx_last(data, "squeezenet1_1", options.weights))
            if "full" in options.only:
                assert extraction is not None
                note("full/tutorial epoch", tutorial_epoch(data, "resnet18", frozen=False))
                four = {"batch_size": 4, "min_area": 0.08}
                note("full/featx epoch", featx_epoch(extraction, **four))
                note("full/featx epoch bf16", featx_epoch(extraction, **four, precision="bf16"))
                note("full/featx epoch batch 32", featx_epoch(extraction, min_area=0.08))
                note("full/featx epoch batch 32 bf16", featx_epoch(extraction, min_area=0.08, precision="bf16"))
            if "prefix" in options.only:
                assert extraction is not None
                same = {"mode": "partial", "freeze_until": "layer4", "augment": "views"}
                note("prefix/full epoch", featx_epoch(extraction, augment="views"))
                note("prefix/same layers, uncached", featx_epoch(extraction, **same))
                note("prefix/cached", featx_epoch(extraction, **same, cache_prefix=True))

    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {}
    for name in ("resnet18", "squeezenet1_1"):
        if f"last/{name}/featx in all" in median:
            tutorial = EPOCHS * median[f"last/{name}/tutorial epoch"]
            ratios[f"last layer, {name}, 25 epochs"] = tutorial / median[f"last/{name}/featx in all"]
    if "full/featx epoch" in median:
        tutorial = median["full/tutorial epoch"]
        ratios["full epoch, fp32"] = tutorial / median["full/featx epoch"]
        ratios["full epoch, bf16"] = tutorial / median["full/featx epoch bf16"]
    if "prefix/cached" in median:
        cached = median["prefix/cached"]
        ratios["cached prefix over full"] = median["prefix/full epoch"] / cached
        ratios["cached prefix over same layers"] = median["prefix/same layers, uncached"] / cached
    result = {
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "all": {name: [round(v, 2) for v in values] for name, values in seconds.items()},
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
