"""Factories of one's own, and timm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import write_images

import featx
from featx.backbones.loading import load_backbone, resolve
from featx.backbones.request import BackboneRequest
from featx.backbones.zoos.custom import load as load_custom
from featx.cli import cli
from featx.engines.opening import open_engine
from featx.errors import BackboneError, RunError, WeightsError
from featx.features import TOLERANCE, difference
from featx.pixels.preprocess import Preprocess
from featx.records import read_record, write_record
from featx.runs import open_run
from featx.shipping.exporting import check
from featx.sweeping import sweep

NETS = """
import torch
from torch import nn
from featx.pixels.preprocess import Preprocess

TINY = Preprocess(resize=36, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.drop = nn.Dropout(0.9)
        self.fc = nn.Linear(6, 2)
    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.conv(x)).mean((2, 3))))

class Maps(Net):
    def forward(self, x):
        return self.conv(x)

class Scaled(Net):
    def forward(self, x):
        return super().forward(x) * 2

class Repeated(Net):
    def forward(self, x):
        return super().forward(x).repeat(1, 2)

def encoder(): return Net(), TINY
def maps(): return Maps(), TINY
def bare(): return nn.Sequential(nn.Conv2d(3, 5, 32, stride=32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def classifier(): return Net(), TINY, ["no", "yes"]
def miscounted(): return Net(), TINY, ["no", "yes", "maybe"]
def scaled(): return Scaled(), TINY, ["no", "yes"]
def repeated(): return Repeated(), TINY, ["no", "yes"]
def wrong(): return "resnet18"
def string(): return Net(), TINY, "ab"
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mynets.py` in the current folder, which is not on Python's path."""
    (tmp_path / "mynets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    return tmp_path


def load(function: str, **options: object):  # type: ignore[no-untyped-def]
    return load_backbone(BackboneRequest(f"mynets:{function}", **options))  # type: ignore[arg-type]


def pixels(crop: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, crop, crop), dtype=np.uint8)


def test_without_class_names_features_are_what_the_network_returns(nets: Path) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    backbone = load("encoder", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.info.name == "custom/mynets:encoder"
    assert backbone.info.row_shape == (2,)
    assert backbone.info.preprocess == Preprocess(resize=36, crop=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = torch.from_numpy(pixels(32))
    with torch.inference_mode():
        wanted = backbone.network((images / 255 - 0.5) / 0.25)
        assert torch.allclose(backbone.module(images), wanted)
    assert load("encoder", seed=4).info == backbone.info
    assert load("encoder", seed=5).info.weights_digest != backbone.info.weights_digest
    assert load("bare").info.preprocess == Preprocess()
    assert load("bare").info.row_shape == (5,)
    assert load("maps").info.row_shape == (6,)


def test_with_class_names_features_are_the_input_of_the_last_linear(nets: Path) -> None:
    backbone = load("classifier")
    assert backbone.info.row_shape == (6,)
    assert backbone.info.class_names == ("no", "yes")
    assert backbone.info.affine
    assert backbone.classifier is not None
    weight, bias = backbone.classifier
    images = torch.from_numpy(pixels(32))
    with torch.inference_mode():
        rows = backbone.module(images).numpy()
        logits = load("classifier", layer="logits").module(images).numpy()
    assert difference(rows @ weight.T + bias, logits) <= TOLERANCE


def test_a_custom_backbone_runs_in_onnxruntime_and_takes_a_weights_file(nets: Path) -> None:
    torch.save(load("encoder", seed=8).network.state_dict(), "own.pth")
    request = BackboneRequest("mynets:encoder", weights="own.pth")
    info = resolve(request, nets / "cache")
    assert info.weights_digest == load("encoder", seed=8).info.weights_digest
    assert info.weights_note == "local file own.pth"
    engine = open_engine(request, info, cache=nets / "cache", device="cpu")
    assert engine.name == "onnxruntime"
    with torch.inference_mode():
        wanted = load("encoder", seed=8).module(torch.from_numpy(pixels(32))).numpy()
    assert difference(engine(pixels(32)), wanted) <= TOLERANCE


def test_a_factorys_source_is_part_of_its_identity_and_nothing_is_remembered(nets: Path) -> None:
    request = BackboneRequest("mynets:encoder")
    first = resolve(request, nets / "cache")
    (nets / "mynets.py").write_text(NETS.replace("torch.relu", "torch.tanh"))
    sys.modules.pop("mynets")
    second = resolve(request, nets / "cache")
    assert first.weights_digest != second.weights_digest
    assert not (nets / "cache").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mynets:encodr", r"no function 'encodr'.*Did you mean encoder"),
        ("mynet:encoder", "no module 'mynet'"),
        ("mynets.sub:encoder", "no module 'mynets.sub'"),
        ("mynets:", "expected package.module:function"),
        ("mynets:wrong", r"returned str; expected a torch module"),
        ("mynets:string", r"returned Net, Preprocess, str; expected"),
        ("mynets:miscounted", "3 class names, but its network does not end"),
        ("mynets:scaled", "2 class names, but its network does not end"),
        ("mynets:repeated", "2 class names, but its network does not end"),
        ("broken:make", r"broken cannot be imported \(ZeroDivisionError"),
        ("needy:make", "needs no_such_package"),
    ],
)
def test_a_factory_that_cannot_be_used_is_told_why(name: str, message: str, nets: Path) -> None:
    (nets / "broken.py").write_text("1 / 0")
    (nets / "needy.py").write_text("import no_such_package")
    with pytest.raises(BackboneError, match=message):
        load_custom(BackboneRequest(name), name)


def test_named_weights_mean_nothing_to_a_factory(nets: Path) -> None:
    with pytest.raises(WeightsError, match="as it makes them"):
        load("encoder", weights="IMAGENET1K_V1")


# --- timm


@pytest.fixture
def timm():  # type: ignore[no-untyped-def]
    return pytest.importorskip("timm", reason="the extra featx[timm] is not installed")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_timm_features_are_its_pre_logits(name: str, timm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    request = BackboneRequest(f"timm/{name}", weights="random", seed=2)
    backbone = load_backbone(request)
    info = backbone.info
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        reference = timm.create_model(name).eval()
    images = torch.from_numpy(pixels(160))
    config = timm.data.resolve_data_config({}, model=reference)
    normal = (images / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.inference_mode():
        wanted = reference.forward_head(reference.forward_features(normal), pre_logits=True).numpy()
        logits = reference(normal).numpy()
        rows = backbone.module(images).numpy()
    assert difference(rows, wanted) <= TOLERANCE
    assert info.affine
    assert backbone.classifier is not None
    assert np.allclose(rows @ backbone.classifier[0].T + backbone.classifier[1], logits, rtol=1e-4, atol=1e-5)
    assert info.license == "apache-2.0"
    transform = timm.data.create_transform(**config)
    assert (info.preprocess.resize, info.preprocess.crop) == (transform.transforms[0].size, 160)
    assert info.preprocess.interpolation == config["interpolation"]
    assert resolve(request, tmp_path) == info
    if name == "test_vit":
        engine = open_engine(request, info, cache=tmp_path, device="cpu")
        assert engine.name == "onnxruntime"
        assert difference(engine(pixels(160)), wanted) <= TOLERANCE


def test_timm_takes_weights_files_and_another_size(timm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), file)
    info = load_backbone(BackboneRequest("timm/test_vit", weights=str(file))).info
    assert info.class_names is None
    assert "3 classes" in info.weights_note
    with pytest.raises(WeightsError, match="does not fit"):
        load_backbone(BackboneRequest("timm/test_resnet", weights=str(file)))
    small = BackboneRequest("timm/test_vit", weights="random", preprocess=(("crop", 96),))
    assert load_backbone(small).info.preprocess.crop == 96
    assert load_backbone(small).info.preprocess.resize == 101  # 96 / 0.95, rounded down as timm does


def test_timm_names_and_weights_that_are_not_there(timm, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BackboneError, match=r"no network 'test_vitt'.*Did you mean test_vit"):
        load_backbone(BackboneRequest("timm/test_vitt", weights="random"))
    with pytest.raises(BackboneError, match=r"no weights 'test_vit.r161_in1k'.*Did you mean test_vit.r160_in1k"):
        load_backbone(BackboneRequest("timm/test_vit.r161_in1k"))
    with pytest.raises(WeightsError, match="picks them by the name's tag"):
        load_backbone(BackboneRequest("timm/test_vit", weights="IMAGENET1K_V1"))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"Fetch .*test_vit.r160_in1k/.*model.safetensors .*--weights FILE"):
        load_backbone(BackboneRequest("timm/test_vit"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "zoom"}, "featx knows center, squash, border"),
        ({"input_size": (3, 224, 160)}, "square RGB"),
        ({"interpolation": "lanczos"}, "override `interpolation`"),
    ],
)
def test_timm_preprocessing_that_featx_does_not_do_is_refused(change: dict[str, object], message: str, timm) -> None:  # type: ignore[no-untyped-def]
    from dataclasses import replace

    from featx.backbones.zoos.timm import preprocessing

    config = replace(timm.get_pretrained_cfg("test_vit"), **change)
    with pytest.raises(BackboneError, match=message):
        preprocessing("test_vit", config, {})
    if "interpolation" in change:
        assert preprocessing("test_vit", config, {"interpolation": "bicubic"}).interpolation == "bicubic"


def test_timm_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackboneError, match=r"pip install featx\[timm\]"):
        load_backbone(BackboneRequest("timm/test_vit", weights="random"))


MARK = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
"""
FACTORY = ["--factory", "mynets:encoder"]


def forgotten(folder: Path) -> bool:
    """Whether `mynets` was imported since the last call; then it is as if it never was."""
    found = (folder / "imported").exists() or "mynets" in sys.modules
    (folder / "imported").unlink(missing_ok=True)
    sys.modules.pop("mynets", None)
    return found


@pytest.fixture
def received(nets: Path) -> Path:
    """A folder with `data/`, and an exported `run/` whose factory's module leaves a mark when it is imported."""
    (nets / "mynets.py").write_text(MARK + NETS)
    write_images(nets / "data", per_class=20)
    run = featx.fit(nets / "data", "mynets:encoder", cache=nets / "cache", output=nets / "run")
    featx.export(run)  # this one the user has named
    assert forgotten(nets)
    return nets


@pytest.mark.parametrize(
    "command",
    [
        "evaluate run data",
        "export run",
        "export run --input tensor",
        "export run --input features",
        "export run --precision int8",
        "check run/model.onnx run",
        "curve run --repeats 1",
    ],
)
def test_a_factory_that_a_run_names_is_imported_only_if_the_user_names_it(received: Path, command: str) -> None:
    done = CliRunner().invoke(cli, command.split())
    assert done.exit_code == 1 and not forgotten(received)
    assert "run was fitted with mynets:encoder: code" in done.stderr
    assert "add --factory mynets:encoder (factory='mynets:encoder' in Python)" in done.stderr
    done = CliRunner().invoke(cli, [*command.split(), "--factory", "mynets:maps"])
    assert done.exit_code == 1 and "mynets:encoder, not mynets:maps" in done.stderr and not forgotten(received)
    done = CliRunner().invoke(cli, [*command.split(), *FACTORY])
    assert done.exit_code == 0 or "int8 is not faster here" in done.stderr, done.output
    assert forgotten(received)


def test_commands_that_need_no_backbone_import_none(received: Path) -> None:
    for command in (
        "report run",
        "inspect run/model.onnx",
        "predict run/model.onnx data",
        "cache list",
        "cache verify",
    ):
        done = CliRunner().invoke(cli, command.split())
        assert done.exit_code == 0, (command, done.output)
        assert not forgotten(received), command


def test_python_takes_a_factory_by_name_too(received: Path) -> None:
    run = received / "run"
    calls = (
        lambda **named: featx.load(run, **named),
        lambda **named: featx.evaluate(run, received / "data", **named),
        lambda **named: check(run / "model.onnx", open_run(run), **named),
    )
    for call in calls:
        with pytest.raises(RunError, match="imported only if you name it"):
            call()
        assert not forgotten(received)
        call(factory="mynets:encoder")
        assert forgotten(received)
    featx.load(run, factory="custom/mynets:encoder")


def test_a_run_that_names_a_module_of_its_own_folder_runs_nothing_in_another_process(received: Path) -> None:
    config = received / "run" / "config.json"
    (received / "run" / "evil.py").write_text(MARK)
    values, _ = read_record(config)
    values["request"]["name"] = "run.evil:factory; true"
    write_record(config, values)
    words = ["evaluate", "run", "data"]
    code = f"from featx.cli import cli; cli({words!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=received, capture_output=True, text=True)
    assert done.returncode == 1 and "--factory 'run.evil:factory; true'" in done.stderr
    assert not (received / "run" / "imported").exists()


def test_the_winner_of_a_sweep_over_factories_knows_what_the_user_named(received: Path) -> None:
    options = {"cache": received / "cache", "output": received / "sweep"}
    for _ in range(2):  # made, and found there
        found = sweep(received / "data", backbones=["mynets:encoder"], heads=["ncm"], **options)
        assert found.points[0].backbone == "custom/mynets:encoder"
        assert featx.load(found.winner).class_names == ("cold", "warm")
        with pytest.raises(RunError, match="only if you name it"):
            featx.load(found.winner.path)
