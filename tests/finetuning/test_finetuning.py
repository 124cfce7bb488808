"""Fine-tuning from end to end, on tiny networks: what moves, what is kept, what is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file

from featx.backbones.loading import load_backbone
from featx.backbones.request import BackboneRequest
from featx.classifier import load
from featx.errors import TrainingError
from featx.extraction.pipeline import Extraction, sync
from featx.features import Features
from featx.files import write_atomic
from featx.finetuning.augment import Draws
from featx.finetuning.pixels import Material, Pictures
from featx.finetuning.preparing import hold_out, prepare
from featx.finetuning.processes import World
from featx.finetuning.recipes import FinetuneConfig
from featx.finetuning.training import Setup
from featx.finetuning.tuning import Finetuned, finetune, tune
from featx.fitting import fit
from featx.head import Head
from featx.shipping.exporting import export

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 0.02, "warmup": 0.0, "select": "val"}


def draw(root: Path, count: int = 20) -> Path:
    """Images of random colours, a little redder in `warm` than in `cold`: the classes overlap."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(() if root.exists() else ("cold", "warm")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            base = rng.integers(40, 120, 3) + np.array([40 * number, 0, 0])
            pixels = base + rng.integers(0, 90, (40, 48, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


class Bench:
    """One data set with its cache, on which several networks are tuned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = draw(root / "images")
        self.count = 0

    def extraction(self, name: str = "plain") -> Extraction:
        request = BackboneRequest(f"small:backbone_{name}")
        return sync(self.images, request, cache=self.root / "cache", device="cpu")

    def folder(self) -> Path:
        self.count += 1
        path = self.root / f"run-{self.count}"
        path.mkdir()
        return path

    def head(self, features: Features) -> Head:
        """Ridge regression on the training images: enough of a fitted head."""
        train = features.split("train")
        A = np.hstack([train.X, np.ones((len(train), 1))])
        targets = 2 * np.eye(len(features.class_names))[train.y] - 1
        solution = np.linalg.solve(A.T @ A + np.eye(A.shape[1]), A.T @ targets).astype(np.float32)
        return Head(solution[:-1].T.copy(), solution[-1], tuple(features.class_names))

    def tune(
        self,
        name: str = "plain",
        folder: Path | None = None,
        arm: Callable[[Setup], None] | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> tuple[Finetuned, Path]:
        """arm: puts what fails, or waits, into the place of what works, before training starts."""
        config = FinetuneConfig(**{**QUICK, **settings})
        extraction = self.extraction(name)
        features = hold_out(extraction.features(), config)
        head = self.head(features) if config.init == "fitted" else None
        folder = folder or self.folder()
        if arm is None:
            return finetune(extraction, features, head, config, folder, device), folder
        with torch.random.fork_rng(devices=[]):
            setup = prepare(extraction, features, head, config, folder, World(0, 1, torch.device("cpu")), 1)
            arm(setup)
            with closing(setup.inputs):
                return tune(setup), folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny network's threads wait for each other longer than they work
    yield Bench(tmp_path_factory.mktemp("finetuning"))
    torch.set_num_threads(threads)


def logits_of(tuned: Finetuned, bench: Bench) -> np.ndarray:
    """The tuned network's answers to all images, through its own file as any other backbone."""
    backbone = load_backbone(tuned.request)
    pixels = [backbone.info.preprocess(path.read_bytes()) for path in sorted(bench.images.rglob("*.png"))]
    with torch.inference_mode():
        return tuned.head(backbone.module(torch.from_numpy(np.stack(pixels))).numpy())


def start(name: str) -> dict[str, np.ndarray]:
    backbone = load_backbone(BackboneRequest(f"small:backbone_{name}"))
    return {k: v.numpy() for k, v in backbone.network.state_dict().items()}


def test_exactly_the_named_groups_move_and_no_frozen_statistic_does(bench: Bench) -> None:
    _, folder = bench.tune("normed", mode="partial", freeze_until="layer2", select="last")
    before, after = start("normed"), load_file(folder / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert set(before) == set(after)
    assert moved == {name for name in before if name.startswith(("layer2.", "layer3."))}
    assert {"layer2.0.bn.running_mean", "layer3.0.bn.running_var", "layer2.0.bn.num_batches_tracked"} <= moved


def test_a_group_frozen_in_the_middle_stays_while_those_around_it_move(bench: Bench) -> None:
    _, folder = bench.tune("normed", mode="partial", freeze=("layer2",), select="last")
    before, after = start("normed"), load_file(folder / "model.safetensors")
    moved = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {"conv1", "bn1", "layer1", "layer3"}


def test_frozen_norms_keep_their_statistics_and_train_their_scale(bench: Bench) -> None:
    _, folder = bench.tune("normed", freeze_norm=True, select="last")
    before, after = start("normed"), load_file(folder / "model.safetensors")
    still = {name for name in before if np.array_equal(before[name], after[name])}
    statistics = {n for n in before if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert still == statistics | {"fc.weight", "fc.bias"}


def test_a_rate_per_group_moves_each_by_its_own(bench: Bench) -> None:
    rates = {"stem": 1e-9, "layer1": 1e-2}
    _, folder = bench.tune("plain", lrs=rates, select="last", epochs=1)
    before, after = start("plain"), load_file(folder / "model.safetensors")
    step = {n: np.abs(before[n] - after[n]).max() for n in before}
    assert 0 <= step["conv1.weight"] < 1e-6 < 1e-5 < step["layer1.0.conv.weight"]


def test_epoch_0_is_the_fitted_head_on_cached_features(bench: Bench) -> None:
    tuned, _ = bench.tune("normed", epochs=1)
    features = bench.extraction("normed").features()
    val, head = features.split("val"), bench.head(features)
    row = tuned.history["epochs"][0]
    logits = head(val.X)
    assert row["epoch"] == 0 and len(val) > 3
    assert row["held_accuracy"] == pytest.approx((logits.argmax(1) == val.y).mean())
    expected = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(val.y))
    assert row["held_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_the_tuned_network_loads_like_any_backbone_and_answers_as_measured(bench: Bench) -> None:
    tuned, _ = bench.tune("normed", epochs=3)
    features = bench.extraction("normed").features()
    val = np.flatnonzero(features.splits == "val")
    again = sync(bench.images, tuned.request, cache=bench.root / "cache", device="cpu").features()
    assert np.abs(again.X - features.X).max() > 0.01
    np.testing.assert_allclose(tuned.head(again.X), logits_of(tuned, bench), rtol=1e-3, atol=1e-4)
    accuracy = (tuned.head(again.X)[val].argmax(1) == features.y[val]).mean()
    best = tuned.history["epochs"][tuned.history["best_epoch"]]
    assert best["held_accuracy"] == pytest.approx(accuracy)
    assert tuned.history["best_epoch"] > 0


def test_training_lowers_the_loss(bench: Bench) -> None:
    tuned, _ = bench.tune("plain", epochs=12, lr=0.2, augment="none", select="last", init="random")
    losses = [row["loss"] for row in tuned.history["epochs"][1:]]
    assert losses[-1] < 0.75 * losses[0]


def test_one_seed_gives_one_network_and_leaves_the_global_generators_alone(bench: Bench) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    files = [bench.tune("dropping", seed=seed, select="last")[1] / "model.safetensors" for seed in (5, 5, 6)]
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (path.read_bytes() for path in files)
    assert a == b and a != c


def test_accumulated_parts_give_the_whole_batchs_gradient(bench: Bench) -> None:
    whole, parts = (logits_of(bench.tune("plain", accumulate=n, select="last")[0], bench) for n in (1, 3))
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["balanced", {"cold": 3.0}])
def test_class_weights_give_torchs_weighted_mean(bench: Bench, weights: str | dict[str, float]) -> None:
    extraction = bench.extraction("plain")
    features = extraction.features()
    rows = np.flatnonzero(features.splits == "train")
    features.splits[rows[features.y[rows] == 1][:8]] = "test"  # an uneven set
    config = FinetuneConfig(
        **{**QUICK, "epochs": 1, "lr": 1e-30, "augment": "none", "select": "last"},
        class_weight=weights,
        label_smoothing=0.1,
    )
    head = bench.head(features)
    tuned = finetune(extraction, features, head, config, bench.folder(), "cpu")
    train = features.split("train")
    counts = np.bincount(train.y)
    assert counts[0] > counts[1]
    w = torch.tensor(len(train) / (2 * counts) if weights == "balanced" else [3.0, 1.0], dtype=torch.float32)
    expected = F.cross_entropy(torch.from_numpy(head(train.X)), torch.from_numpy(train.y), w, label_smoothing=0.1)
    assert tuned.history["epochs"][1]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_worse_epoch_is_not_kept_and_patience_ends_the_run(bench: Bench) -> None:
    extraction = bench.extraction("plain")
    features = extraction.features()
    config = FinetuneConfig(**{**QUICK, "epochs": 9, "lr": 0.1}, patience=2)
    head = bench.head(features)
    folder = bench.folder()
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "best-of-all.safetensors").write_bytes(b"somebody's")
    tuned = finetune(extraction, features, head, config, folder, "cpu")
    rows = tuned.history["epochs"]
    best = max(range(len(rows)), key=lambda i: (rows[i]["held_accuracy"], -rows[i]["held_loss"]))
    assert tuned.history["best_epoch"] == best
    assert len(rows) - 1 == min(9, best + 2)
    kept = {f"best-{best:04d}.safetensors", "last.safetensors", "best-of-all.safetensors"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == kept


def test_metrics_are_one_json_line_an_epoch(bench: Bench) -> None:
    tuned, folder = bench.tune("plain", epochs=3, layer_decay=0.5)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == tuned.history["epochs"] and [row["epoch"] for row in lines] == [0, 1, 2, 3]
    assert lines[1]["lr"]["layer3"] == pytest.approx(lines[1]["lr"]["head"] / 2)
    assert set(lines[1]) >= {"loss", "accuracy", "held_loss", "held_accuracy", "seconds", "images_per_second"}


def test_what_is_trained_is_said_before_it_starts(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.tune("plain", mode="partial", epochs=1)
    said = capsys.readouterr().err
    assert said.splitlines()[3].split() == ["layer2", "584", "frozen"]
    assert "602 of 2,746 parameters are trained" in said


def test_scratch_starts_from_random_weights(bench: Bench) -> None:
    before = start("plain")
    _, folder = bench.tune("plain", mode="scratch", lr=1e-12, epochs=1, select="last", seed=1)
    after = load_file(folder / "model.safetensors")
    assert np.abs(before["conv1.weight"] - after["conv1.weight"]).max() > 0.01


@pytest.mark.parametrize("augment", ["none", "flip", "views", "crop-flip+trivialaugment", "small:halved"])
def test_every_augmentation_trains_and_changes_the_result(bench: Bench, augment: str) -> None:
    tuned, _ = bench.tune("plain", augment=augment, epochs=1, select="last")
    plain, _ = bench.tune("plain", augment="crop-flip", epochs=1, select="last")
    assert np.isfinite(tuned.history["epochs"][1]["loss"])
    assert tuned.history["epochs"][1]["loss"] != plain.history["epochs"][1]["loss"]


@pytest.mark.parametrize("augment", ["none", "flip", "views", "crop-flip+trivialaugment"])
def test_images_that_do_not_fit_into_memory_look_the_same(bench: Bench, augment: str) -> None:
    train, held = np.arange(3, 13), np.array([0, 20, 30])
    config = FinetuneConfig(augment=augment, views=3)
    material = Material(bench.extraction(), config, torch.device("cpu"), 2, train, held)
    draws = Draws.of(len(train), seed=0, epoch=1)
    batches = [np.array([7, 0, 2]), np.array([9, 1, 3]), np.array([4, 8])]
    with closing(Pictures(material)) as kept, closing(Pictures(material, room=0.0)) as streamed:
        assert kept.train_pixels.table is not None and streamed.train_pixels.table is None
        for rows, then in zip(batches, [batches[1], None, None], strict=True):  # with and without what comes next
            images = streamed.train(rows, draws, then)
            assert images.shape == (len(rows), 3, 32, 32) and images.float().std() > 0
            assert torch.equal(images, kept.train(rows, draws, then))
        assert torch.equal(streamed.held(np.array([2, 0])), kept.held(np.array([2, 0])))


def test_bf16_is_close_to_fp32(bench: Bench) -> None:
    exact, rough = (logits_of(bench.tune("plain", precision=p, select="last")[0], bench) for p in ("fp32", "bf16"))
    assert 0 < np.abs(exact - rough).max() < 0.05 * np.abs(exact).max()


def test_adamw_with_decay_trains(bench: Bench) -> None:
    tuned, folder = bench.tune("normed", optimizer="adamw", weight_decay=0.1, select="last", lr=1e-3)
    before, after = start("normed"), load_file(folder / "model.safetensors")
    assert not np.array_equal(before["conv1.weight"], after["conv1.weight"])
    assert tuned.history["epochs"][2]["loss"] < 2


@pytest.mark.parametrize("freeze_until", ["layer2", "head"])
def test_a_cached_prefix_gives_the_uncached_runs_logits(bench: Bench, freeze_until: str) -> None:
    shared = {"mode": "partial", "freeze_until": freeze_until, "augment": "views", "views": 3, "epochs": 3}
    plain, _ = bench.tune("normed", **shared)
    cached, _ = bench.tune("normed", **shared, cache_prefix=True)
    for a, b in zip(plain.history["epochs"], cached.history["epochs"], strict=True):
        assert a["held_loss"] == pytest.approx(b["held_loss"], rel=5e-3)
    a, b = logits_of(plain, bench), logits_of(cached, bench)
    assert np.abs(a - b).max() < 5e-3 * np.abs(a).max()


def test_a_filled_prefix_runs_the_frozen_layers_no_more(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"mode": "partial", "freeze_until": "layer3", "cache_prefix": True, "views": 2}
    first, _ = bench.tune("plain", **settings)
    assert "cached prefix: " in capsys.readouterr().err
    stored = {path: path.stat().st_mtime_ns for path in (bench.root / "cache").rglob("*.h5")}
    second, _ = bench.tune("plain", **settings)
    assert "cached prefix: " not in capsys.readouterr().err
    assert stored == {path: path.stat().st_mtime_ns for path in (bench.root / "cache").rglob("*.h5")}
    np.testing.assert_array_equal(first.head.weight, second.head.weight)


def test_a_prefix_that_needs_more_disk_than_allowed_is_refused_before_it_starts(bench: Bench) -> None:
    with pytest.raises(TrainingError, match=r"need .* GB, more than the limit of 1e-06 GB"):
        bench.tune("plain", mode="partial", freeze_until="layer2", cache_prefix=True, views=5, prefix_gb=1e-6)


def test_the_held_out_part_is_stable_and_keeps_duplicates_together(bench: Bench) -> None:
    features = bench.extraction("plain").features()
    config = FinetuneConfig(holdout=0.3)
    held = hold_out(features, config)
    assert 0 < (held.splits == "holdout").sum() < (features.splits == "train").sum()
    assert np.array_equal(held.splits == "val", features.splits == "val")
    fewer = hold_out(features.take(np.arange(0, len(features), 2)), config)
    assert np.array_equal(fewer.splits, held.splits[::2])
    twice = hold_out(features.take(np.repeat(np.arange(len(features)), 2)), config)
    assert np.array_equal(twice.splits[::2], twice.splits[1::2])
    assert np.array_equal(hold_out(features, FinetuneConfig(select="val")).splits, features.splits)


def test_no_class_is_held_out_as_a_whole(bench: Bench) -> None:
    features = bench.extraction("plain").features()
    train = np.flatnonzero(features.splits == "train")
    held = hold_out(features, FinetuneConfig(holdout=0.5))
    lone = held.splits == "holdout"
    kept = [i for i in train if features.y[i] == 0 or lone[i]]
    again = hold_out(features.take(np.array(kept)), FinetuneConfig(holdout=0.5))
    assert (again.splits[again.y == 1] == "train").all() and (again.splits[again.y == 0] == "holdout").any()
    with pytest.raises(TrainingError, match="leave none to choose the epoch by"):
        hold_out(features.take(train[:1]), FinetuneConfig())


def test_a_nan_loss_stops_names_the_batch_and_keeps_the_last_good_checkpoint(bench: Bench) -> None:
    folder = bench.folder()
    with pytest.raises(TrainingError, match=r"NaN or infinite in epoch 1, on the batch of (cold|warm)/\d+\.png"):
        bench.tune("plain", folder, lr=1e25, epochs=4)
    kept = load_file(folder / "checkpoints" / "last.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in kept.values())
    np.testing.assert_array_equal(kept["network.trunk.network.conv1.weight"], start("plain")["conv1.weight"])


def test_out_of_memory_halves_what_is_passed_at_once_and_keeps_the_arithmetic(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    def room_for(images: int) -> Callable[[Setup], None]:
        def refuse(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if network.training and len(inputs[0]) > images:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return lambda setup: setup.network.register_forward_pre_hook(refuse) and None

    expected = logits_of(bench.tune("plain", select="last")[0], bench)
    tuned, _ = bench.tune("plain", None, room_for(3), select="last")
    assert tuned.history["micro_batch"] == 2
    assert "continuing from the last checkpoint with 4" in capsys.readouterr().err
    np.testing.assert_allclose(logits_of(tuned, bench), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TrainingError, match="one image does not fit"):
        bench.tune("plain", None, room_for(0), select="last")


class Killed(BaseException):
    """What a test raises where a machine would lose power."""


def at_step(number: int) -> Callable[[Setup], None]:
    left = [number]

    def step(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return lambda setup: setup.optimizer.register_step_pre_hook(step) and None


def at_write(number: int, error: BaseException | None = None) -> Callable[[Setup], None]:
    left = [number]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error or Killed
        write_atomic(path, data)

    def arm(setup: Setup) -> None:
        setup.checkpoints = replace(setup.checkpoints, write=write)

    return arm


# of the 12 steps; the start is two writes, each step one, and a better epoch one more
KILLS = [
    *((at_write, 0), (at_write, 1), (at_step, 0), (at_write, 1)),
    *((at_step, 2), (at_write, 2), (at_step, 1), (at_write, 0)),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_goes_on_to_the_same_bits(bench: Bench, optimizer: str) -> None:
    settings = {"epochs": 3, "optimizer": optimizer, "lr": 0.01, "weight_decay": 0.01, "warmup": 1.0}
    tuned, whole = bench.tune("dropping", **settings)
    folder, stopped = bench.folder(), 0
    for kind, number in KILLS:
        kill = kind(number)

        def arm(setup: Setup, kill: Callable[[Setup], None] = kill) -> None:
            # each step is saved too: the state of the epoch's sums, and of half an epoch's data order
            setup.save_seconds = -1.0
            kill(setup)

        try:
            bench.tune("dropping", folder, arm, **settings)
        except Killed:
            stopped += 1
    again, _ = bench.tune("dropping", folder, **settings)
    assert stopped == len(KILLS)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    np.testing.assert_array_equal(tuned.head.weight, again.head.weight)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in t.history["epochs"]]
        for t in (tuned, again)
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_can_go_on(bench: Bench) -> None:
    folder, settings = bench.folder(), {"epochs": 3, "select": "last"}
    full = at_write(3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(TrainingError, match=r"No space left on device.; the one before is kept"):
        bench.tune("plain", folder, full, **settings)
    kept = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert kept["epoch"] == 2
    bench.tune("plain", folder, **settings)
    _, whole = bench.tune("plain", **settings)
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_checkpoint_of_another_configuration_is_refused(bench: Bench) -> None:
    _, folder = bench.tune("plain", epochs=1)
    with pytest.raises(TrainingError, match=r"another configuration \(epochs 1 -> 2, lr 0.02 -> 0.03\)"):
        bench.tune("plain", folder, epochs=2, lr=0.03)
    with pytest.raises(TrainingError, match="another configuration"):
        bench.tune("normed", folder, epochs=1)


def test_a_damaged_checkpoint_is_refused(bench: Bench) -> None:
    _, folder = bench.tune("plain", epochs=1)
    path = folder / "checkpoints" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"cannot be read .*start over with --overwrite"):
        bench.tune("plain", folder, epochs=1)


def test_batches_with_fewer_images_than_processes_are_refused_by_each_of_them(bench: Bench) -> None:
    extraction = bench.extraction()
    features = extraction.features()
    count = int((features.splits == "train").sum())
    half = count // 2  # what two batches share, where one holds an image less than all of them
    for batch, smallest, size in ((4, count // -(-count // 4), 8), (count - 1, half, half + 1)):
        config = FinetuneConfig(**{**QUICK, "batch_size": batch, "init": "random"})
        said = rf"batches of {batch} give some batches {smallest} images.* {size} processes; use a larger batch size"
        for rank in (0, size - 1):
            world = World(rank, size, torch.device("cpu"))
            with pytest.raises(TrainingError, match=said):
                prepare(extraction, features, None, config, bench.folder(), world, 1)


def test_what_cannot_be_tuned_is_refused(bench: Bench) -> None:
    extraction = bench.extraction("plain")
    features = extraction.features()
    with pytest.raises(TrainingError, match="use bf16 or fp32"):
        bench.tune("plain", precision="fp16")
    with pytest.raises(TrainingError, match="no images in 'holdout'"):
        finetune(extraction, features, bench.head(features), FinetuneConfig(), bench.folder(), "cpu")
    with pytest.raises(TrainingError, match="does not know warm"):
        only = Head(np.zeros((1, 8), np.float32), np.zeros(1, np.float32), ("cold",))
        finetune(extraction, features, only, FinetuneConfig(select="val"), bench.folder(), "cpu")
    several = replace(features, y=np.eye(2, dtype=np.int64)[features.y])
    with pytest.raises(TrainingError, match="one label per image"):
        finetune(extraction, several, None, FinetuneConfig(init="random"), bench.folder(), "cpu")


def test_overwrite_starts_fine_tuning_over_and_a_misspelt_group_costs_no_run(bench: Bench, tmp_path: Path) -> None:
    options = {"cache": bench.root / "cache", "device": "cpu", "output": tmp_path / "run"}
    config = FinetuneConfig(**{**QUICK, "epochs": 1, "select": "last"})
    run = fit(bench.images, "small:backbone_plain", "logreg", finetune=config, **options)
    before = {p.name: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    misspelt = replace(config, lrs={"layer9": 1e-3})
    with pytest.raises(TrainingError, match="layer9"):
        fit(bench.images, "small:backbone_plain", "logreg", finetune=misspelt, overwrite=True, **options)
    assert {p.name: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    (run.path / "report.json").unlink()
    (run.path / "checkpoints" / "last.safetensors").write_bytes(b"junk")
    with pytest.raises(TrainingError, match="start over with --overwrite"):
        fit(bench.images, "small:backbone_plain", "logreg", finetune=config, **options)
    again = fit(bench.images, "small:backbone_plain", "logreg", finetune=config, overwrite=True, **options)
    assert (again.path / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_a_fine_tuned_run_is_a_run_like_any_other_wherever_it_is_moved(bench: Bench, tmp_path: Path) -> None:
    options = {"cache": bench.root / "cache", "device": "cpu"}
    config = FinetuneConfig(**{**QUICK, "holdout": 0.3, "select": "holdout"})
    run = fit(bench.images, "small:backbone_normed", "logreg", finetune=config, output=tmp_path / "run", **options)
    report = run.report
    assert report["fit"]["finetune"]["selected_on"] > 0 and report["count"] > 3
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    classifier = load(moved, factory="small:backbone_normed")
    features = bench.extraction("normed").features()
    val = np.flatnonzero(features.splits == "val")
    pixels = [classifier.preprocess((bench.images / features.ids[i]).read_bytes()) for i in val]
    answers = classifier(np.stack(pixels)).argmax(1)
    assert (answers == features.y[val]).mean() == pytest.approx(report["accuracy"])
    parity = export(moved, factory="small:backbone_normed")
    assert parity.passed and parity.equal_labels == parity.images > 3
    assert parity.accuracy == pytest.approx(report["accuracy"])


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpus_curve(bench: Bench) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: training on a GPU is untested on this machine")
    curves = {}
    for device in ("cpu", "cuda"):
        tuned, _ = bench.tune("normed", device=device, init="random")
        assert tuned.history["device"] == {"cpu": "cpu", "cuda": "cuda:0"}[device]
        curves[device] = [epoch["held_loss"] for epoch in tuned.history["epochs"]]
    assert curves["cuda"] == pytest.approx(curves["cpu"], rel=0.02)
    half, _ = bench.tune("normed", device="cuda", init="random", precision="bf16")
    assert [epoch["held_loss"] for epoch in half.history["epochs"]] == pytest.approx(curves["cpu"], rel=0.1)
