"""One flipped bit in any file that featx writes: named, or made again, never served."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images
from torch import nn

import featx
from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.engines.onnx import accelerated, backbone_onnx, session
from featx.errors import FeatxError, TrainingError
from featx.extraction.job import prepare
from featx.extraction.planning import recall_rate, remember_rate
from featx.extraction.report import ExtractionReport
from featx.finetuning.checkpoints import Checkpoints, Progress
from featx.measuring.curve import Curve, learning_curve
from featx.options import complete
from featx.records import array_of, read_record
from featx.runs import open_run
from featx.shipping import card
from featx.shipping.deployed import Model
from featx.shipping.parity import load_rows
from featx.sweeping import sweep

BACKBONE = "small:backbone_plain"
CHEAP, COSTLY = 80, 12
"""Flips for each kind of file, by whether reading it takes milliseconds or, since something is computed again, more."""


@dataclass(frozen=True)
class Kind:
    """One kind of file: where one lies, and what is read from it."""

    name: str
    file: Path
    read: Callable[[], Any]
    flips: int = CHEAP


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that featx writes: a cache, a run, an exported file, a curve, a sweep, checkpoints."""
    root = tmp_path_factory.mktemp("damage")
    data = write_images(root / "data", per_class=40)
    options: dict[str, Any] = {"cache": root / "cache"}
    run = featx.fit(data, BACKBONE, output=root / "run", settings={"calibrate": True}, **options)
    featx.export(run)
    learning_curve(run, repeats=2)
    sweep(data, [BACKBONE], ["ncm"], output=root / "sweep", **options)
    network, optimizer = trained()
    checkpoints(root).save(network, optimizer, Progress(epoch=3, history=[{"epoch": 3, "loss": 0.25}]), best=True)
    return root


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        network(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    return network, optimizer


def checkpoints(root: Path) -> Checkpoints:
    return Checkpoints(root / "checkpoints", {"lr": 0.1})


def plain(value: Any) -> Any:
    """Arrays, tensors and dataclasses as values that can be compared."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return np.asarray(value).tolist()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def kinds(root: Path) -> Iterator[Kind]:
    """Every kind of file, with what a user reads from it."""
    request = BackboneRequest(BACKBONE)
    data, cache, run = root / "data", root / "cache", root / "run"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)

    def whole_run() -> Any:
        opened = open_run(run)
        head = opened.head
        return (
            opened.config.to_dict(),
            opened.report,
            head.weight,
            head.bias,
            vars(head)["class_names"],
            opened.trained_on,
        )

    for name in ("config.json", "report.json", "head.safetensors", "trained-on.npy"):
        yield Kind(name, run / name, whole_run)
    yield Kind("curve.json", run / "curve.json", lambda: Curve.from_dict(read_record(run / "curve.json")[0]).to_dict())
    yield Kind("parity.json", run / "parity.json", lambda: card.card(open_run(run)))

    def answers() -> Any:
        model = Model(run / "model.onnx")
        return model.metadata, [p.to_dict() for p in featx.predict(model, list(pictures), features=True)]

    yield Kind("model.onnx", run / "model.onnx", answers)
    yield Kind("sweep.json", root / "sweep" / "sweep.json", lambda: read_record(root / "sweep" / "sweep.json")[0])
    (held,) = (root / "sweep").rglob("held-out-by-key.npy")
    yield Kind("held-out-by-key.npy", held, lambda: array_of(held.read_bytes(), "<f8", 2))

    def restored(best: bool) -> Any:
        network, optimizer = trained()
        progress = checkpoints(root).load(network, optimizer)
        assert progress is not None
        if best:
            checkpoints(root).load_best(network, progress)
        return network.state_dict(), optimizer.state_dict(), vars(progress)

    yield Kind("last.safetensors", root / "checkpoints" / "last.safetensors", lambda: restored(False))
    yield Kind("best.safetensors", root / "checkpoints" / "best-0000.safetensors", lambda: restored(True))

    def features() -> Any:
        return featx.extract(data, BACKBONE, cache=cache).X

    (folder,) = (cache / "features").iterdir()
    yield Kind("shard", next(folder.glob("*.h5")), features, COSTLY)
    yield Kind("spec.json", folder / "spec.json", features, COSTLY)
    yield Kind("verified.json", folder / "verified.json", features, COSTLY)
    time.sleep(2.1)  # keys of files that changed this shortly before are not remembered
    features()
    yield Kind("memo", next((cache / "memo").glob("*.2/*")), features, COSTLY)

    job = prepare(data, BACKBONE, complete({"cache": cache}))
    remember_rate(job, ExtractionReport(200, 0, 0, 200, 0, 0, images_per_second=123.5))
    rate = recall_rate(job)
    yield Kind("rate", next((cache / "rates").iterdir()), lambda: recall_rate(job) or rate)
    known = BackboneRequest("squeezenet1_1", "random")
    resolve(known, cache)
    (memo,) = (cache / "resolved").iterdir()
    yield Kind("resolved", memo, lambda: resolve(known, cache).to_dict(), COSTLY)

    info = job.info

    def engine() -> Any:
        graph = accelerated(backbone_onnx(request, info, cache))
        return session(graph).run(None, {"images": pictures.transpose(0, 3, 1, 2)[:, :, :32, :32]})[0]

    (graph,) = (path for path in (cache / "engines").glob("*.onnx") if "winograd" not in path.name)
    yield Kind("engine", graph, engine, COSTLY)
    yield Kind("engine's record", graph.with_suffix(".json"), engine, COSTLY)
    (kept,) = (cache / "engines").glob("*.verified.*")
    truth = load_rows(kept)
    yield Kind("verified rows", kept, lambda: vars(load_rows(kept) or truth))


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    at, bit = int(rng.integers(len(data))), int(rng.integers(8))
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_a_thousand_flipped_bits_are_named_or_mended_and_never_served(place: Path) -> None:
    rng, served, named = np.random.default_rng(0), [], 0
    found = list(kinds(place))
    for kind in found:
        data = kind.file.read_bytes()
        intact = plain(kind.read())
        for number in range(kind.flips):
            kind.file.write_bytes(flipped(data, rng))
            try:
                if plain(kind.read()) != intact:
                    served.append((kind.name, number))
            except FeatxError as error:
                named += 1
                assert kind.file.name.split("-")[0].split(".")[0] in str(error), (kind.name, str(error))
            except ValueError:  # of the readers in this file that are not a user's
                named += 1
            kind.file.write_bytes(data)
            mended = kind.file.parent / "damaged"
            shutil.rmtree(mended, ignore_errors=True)
    assert not served
    assert sum(kind.flips for kind in found) > 1000 and named > 500


def test_a_kept_epoch_of_another_configuration_or_network_is_named(tmp_path: Path) -> None:
    network, optimizer = trained()
    progress = Progress(epoch=1, best_epoch=1)
    for name, configuration, saved in (("other", {"lr": 0.2}, network), ("wide", {"lr": 0.1}, nn.Linear(7, 3))):
        Checkpoints(tmp_path / name, configuration).save(saved, optimizer, progress, best=True)
        expected = "another configuration .*lr 0.2 -> 0.1" if name == "other" else "holds another network"
        ours = Checkpoints(tmp_path / name, {"lr": 0.1})
        with pytest.raises(TrainingError, match=f"best-0001.safetensors .*{expected}"):
            ours.load_best(network, progress)
        with pytest.raises(TrainingError, match=f"last.safetensors .*{expected}"):
            ours.load(network, optimizer)
