"""torchvision's networks: names, weights from everywhere, preprocessing, layers, and the memo that spares torch."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from networks import calibrated, weights_file
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from featx.backbones.backbone import tensors_digest
from featx.backbones.loading import load_backbone, locate, resolve
from featx.backbones.measure import measure
from featx.backbones.request import BackboneInfo, BackboneRequest
from featx.backbones.table import listing, names, table
from featx.backbones.zoos.torchvision import _renamed, create, preprocessing
from featx.engines.onnx import backbone_onnx
from featx.errors import BackboneError, WeightsError
from featx.features import TOLERANCE, difference
from featx.pixels.preprocess import Preprocess

SQUEEZE = "squeezenet1_1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub folder, and no network: its `checkpoints`."""

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(models, "get_model", fail)


def images_of(info: BackboneInfo, count: int = 2) -> torch.Tensor:
    crop = info.preprocess.crop
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, crop, crop), dtype=np.uint8))


def rows_of(request: BackboneRequest) -> np.ndarray:
    backbone = load_backbone(request)
    with torch.inference_mode():
        return backbone.module(images_of(backbone.info)).numpy()


# --- names


def test_every_classification_network_is_listed() -> None:
    assert names() == models.list_models(module=models)
    assert len(names()) == 80
    assert table()["torchvision"] == __import__("torchvision").__version__.partition("+")[0]


@pytest.mark.parametrize("name", ["resnet18", SQUEEZE, "vit_b_32", "maxvit_t", "googlenet", "swin_v2_t"])
def test_the_packaged_table_says_what_the_network_is(name: str) -> None:
    (row,) = [row for row in table()["networks"] if row["name"] == name]
    assert measure(name) == row
    weights = models.get_model_weights(name)
    assert row["weights"] == [member.name for member in weights]
    assert row["default"] == weights.DEFAULT.name
    if name not in ("googlenet",):  # torchvision counts its auxiliary classifiers
        assert row["parameters"] == weights.DEFAULT.meta["num_params"]


def test_listing_needs_no_torch() -> None:
    script = (
        "import sys; from featx.backbones.table import listing; rows = listing(); "
        "print(len(rows), 'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["80", "False", "False"]
    assert {row["name"]: row["features"] for row in listing()}["vgg16"] == 4096


def test_an_unknown_name_lists_near_matches() -> None:
    with pytest.raises(BackboneError, match=r"no classification network 'rsnet18'.*Did you mean resnet18"):
        load_backbone(BackboneRequest("rsnet18", weights="random"))
    with pytest.raises(BackboneError, match=r"unknown backbone 'tmm/resnet18'.*Did you mean timm"):
        load_backbone(BackboneRequest("tmm/resnet18"))
    with pytest.raises(BackboneError, match="expected a torchvision network's name"):
        load_backbone(BackboneRequest(""))


def test_a_name_says_where_its_backbone_comes_from() -> None:
    assert locate("resnet18") == locate("torchvision/resnet18") == ("torchvision", "resnet18")
    assert locate("timm/resnet18.a1_in1k") == ("timm", "resnet18.a1_in1k")
    assert locate("a.b:c") == locate("custom/a.b:c") == ("custom", "a.b:c")


# --- random weights


def test_random_weights_follow_from_the_seed_and_leave_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone(BackboneRequest(SQUEEZE, weights="random", seed=1))
    assert torch.equal(torch.rand(3), expected)
    again = load_backbone(BackboneRequest(SQUEEZE, weights="random", seed=1))
    other = load_backbone(BackboneRequest(SQUEEZE, weights="random", seed=2))
    assert first.info == again.info
    assert first.info.weights_note == "random, seed 1"
    assert first.info.weights_digest != other.info.weights_digest
    torch.manual_seed(1)
    assert torch.equal(first.network.features[0].weight, models.squeezenet1_1().features[0].weight)


def test_a_digest_is_of_names_types_shapes_and_bytes() -> None:
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}
    digest = tensors_digest(state)
    assert digest == tensors_digest(dict(reversed(state.items())))
    wanted = hashlib.sha256()
    for name, dtype, shape, data in (("a", "int64", [], b"\x07" + bytes(7)), ("b", "float32", [2, 3], None)):
        wanted.update(json.dumps([name, dtype, shape]).encode())
        wanted.update(np.arange(6, dtype="<f4").tobytes() if data is None else data)
    assert digest == wanted.hexdigest()
    changes = (
        {"b": state["b"].reshape(3, 2)},
        {"b": state["b"].double()},
        {"b": state["b"] + 1},
        {"c": torch.zeros(0)},
    )
    assert len({digest, *(tensors_digest(state | change) for change in changes)}) == 5


# --- weights files


def test_every_way_of_saving_the_same_weights_is_the_same_backbone(tmp_path: Path) -> None:
    state = torch.load(weights_file(SQUEEZE), weights_only=True)
    reference = load_backbone(calibrated(SQUEEZE)).info
    files = {
        "plain.pth": state,
        "lightning.ckpt": {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
        "parallel.pt": {"model": {f"module.{k}": v for k, v in state.items()}},
        "compiled.bin": {"model_state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "safe.safetensors")
    for name in (*files, "safe.safetensors"):
        info = load_backbone(BackboneRequest(SQUEEZE, weights=str(tmp_path / name))).info
        assert info.weights_note == f"local file {name}, preprocessed as IMAGENET1K_V1"
        assert replace(info, weights_note=reference.weights_note) == reference


def test_files_without_versions_or_counters_load(tmp_path: Path) -> None:
    """safetensors files carry no `_metadata`, which MNASNet insists on; old files have no counters."""
    for name in ("mnasnet0_5", "shufflenet_v2_x0_5"):
        state = torch.load(weights_file(name), weights_only=True)
        reference = load_backbone(calibrated(name)).info
        file = tmp_path / f"{name}.safetensors"
        save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, file)
        assert load_backbone(BackboneRequest(name, weights=str(file))).info.weights_digest == reference.weights_digest


def test_densenet_files_from_before_torch_0_4_1_are_renamed() -> None:
    state = create("densenet121", 224).state_dict()
    old = {}
    for key, tensor in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        old[key] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    renamed = _renamed(old)
    assert renamed.keys() == state.keys() != old.keys()
    assert all(renamed[key] is state[key] for key in state)
    assert _renamed(state).keys() == state.keys()


def test_auxiliary_classifiers_in_a_file_are_left_out(tmp_path: Path) -> None:
    state = torch.load(weights_file("googlenet"), weights_only=True)
    torch.save({**state, "aux1.fc2.weight": torch.zeros(3), "aux2.conv.bn.bias": torch.zeros(3)}, tmp_path / "g.pth")
    backbone = load_backbone(BackboneRequest("googlenet", weights=str(tmp_path / "g.pth")))
    assert backbone.info.weights_digest == load_backbone(calibrated("googlenet")).info.weights_digest
    assert backbone.network.transform_input
    assert not backbone.network.aux_logits


def test_the_wrong_networks_weights_name_what_differs_and_what_they_look_like() -> None:
    with pytest.raises(WeightsError) as caught:
        load_backbone(BackboneRequest("resnet18", weights=str(weights_file(SQUEEZE))))
    message = str(caught.value)
    assert "squeezenet1_1.pth as resnet18 does not fit" in message
    assert "missing: bn1.bias" in message
    assert "unexpected: classifier.1.bias" in message
    assert "looks like squeezenet1_1" in message


def test_a_near_network_is_told_by_its_shapes(tmp_path: Path) -> None:
    file = str(weights_file("squeezenet1_0"))
    with pytest.raises(
        WeightsError, match=r"of another shape: .*features\.0\.weight is \[96, 3, 7, 7\], expected \[64"
    ):
        load_backbone(BackboneRequest("squeezenet1_1", weights=file))
    torch.save({"epoch": 3}, tmp_path / "no.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_backbone(BackboneRequest(SQUEEZE, weights=str(tmp_path / "no.pth")))


@pytest.mark.parametrize("name", ["resnet18", SQUEEZE])
def test_another_number_of_classes_keeps_the_features(name: str, tmp_path: Path) -> None:
    state = dict(torch.load(weights_file(name), weights_only=True))
    head = "fc" if name == "resnet18" else "classifier.1"
    state[f"{head}.weight"], state[f"{head}.bias"] = state[f"{head}.weight"][:2], state[f"{head}.bias"][:2]
    torch.save(state, tmp_path / "two.pth")
    request = BackboneRequest(name, weights=str(tmp_path / "two.pth"))
    before = torch.get_rng_state()
    backbone = load_backbone(request)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.info.class_names is None
    assert "2 classes" in backbone.info.weights_note
    assert np.array_equal(rows_of(request), rows_of(calibrated(name)))
    wanted = rows_of(calibrated(name, "logits"))[:, :2]
    assert difference(rows_of(replace(request, layer="logits")), wanted) <= TOLERANCE
    if backbone.classifier is not None:
        assert np.array_equal(backbone.classifier[0], state["fc.weight"].numpy())


@pytest.mark.parametrize("change", ["none", "deeper"])
def test_a_file_without_this_classifier_keeps_the_features(change: str, tmp_path: Path) -> None:
    state = dict(torch.load(weights_file("resnet18"), weights_only=True))
    weight, bias = state.pop("fc.weight"), state.pop("fc.bias")
    if change == "deeper":
        state |= {"fc.1.weight": weight, "fc.1.bias": bias}
    torch.save(state, tmp_path / "headless.pth")
    request = BackboneRequest("resnet18", weights=str(tmp_path / "headless.pth"))
    backbone = load_backbone(request)
    assert (backbone.info.class_names, backbone.info.affine, backbone.classifier) == (None, False, None)
    assert "without the network's own classifier" in backbone.info.weights_note
    assert np.array_equal(rows_of(request), rows_of(calibrated("resnet18")))
    with pytest.raises(BackboneError, match="holds no classifier"):
        load_backbone(replace(request, layer="logits"))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo run by a weights file",)


def test_bad_files_are_named_and_run_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = weights_file(SQUEEZE).read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "text.pth").write_text("hello world")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"weight": torch.zeros(2)}))
    torch.save({"weight": torch.zeros(2), "also": Payload()}, tmp_path / "code.pth")
    torch.save({"weights": {"nan": torch.zeros(1)}}, tmp_path / "nested.pth")
    for name, message in {
        "cut.pth": "cannot be read|damaged",
        "empty.pth": "cannot be read|damaged",
        "text.safetensors": "cannot be read",
        "text.pth": "damaged, or not a weights file",
        "plain.pth": "damaged, or not a weights file",
        "code.pth": "does not fit: 52 missing",
        "nested.pth": "does not fit: 52 missing",
        "absent.pth": "is not there",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            load_backbone(BackboneRequest(SQUEEZE, weights=str(tmp_path / name)))
        assert name in str(caught.value)
    assert "run by" not in "".join(capfd.readouterr())


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    state = dict(torch.load(weights_file(SQUEEZE), weights_only=True))
    state["features.0.bias"] = torch.full_like(state["features.0.bias"], torch.nan)
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(WeightsError, match="NaN or infinity"):
        load_backbone(BackboneRequest(SQUEEZE, weights=str(tmp_path / "nan.pth")))


# --- pretrained weights


def test_weights_that_cannot_be_downloaded_say_which_file_from_where_to_where(hub: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_backbone(BackboneRequest("resnet50"))
    url = models.ResNet50_Weights.DEFAULT.url
    message = str(caught.value)
    assert url in message
    assert str(hub / url.rpartition("/")[2]) in message
    assert "--weights FILE" in message
    assert models.ResNet50_Weights.DEFAULT.name == "IMAGENET1K_V2"
    with pytest.raises(WeightsError, match=models.ResNet50_Weights.IMAGENET1K_V1.url.rpartition("/")[2]):
        load_backbone(BackboneRequest("resnet50", weights="IMAGENET1K_V1"))


def test_an_unknown_weights_name_lists_the_ones_there_are() -> None:
    with pytest.raises(WeightsError, match=r"there are pretrained, random, IMAGENET1K_V1.*Did you mean IMAGENET1K_V1"):
        load_backbone(BackboneRequest(SQUEEZE, weights="IMAGENET1K_V3"))


def test_a_pretrained_file_in_the_hub_folder_is_used_and_its_change_noticed(
    hub: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    file = hub / models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    shutil.copyfile(weights_file(SQUEEZE), file)
    asked = BackboneRequest(SQUEEZE)
    first = resolve(asked, tmp_path / "cache")
    assert first.weights_note == "pretrained IMAGENET1K_V1"
    assert first.weights_digest == load_backbone(calibrated(SQUEEZE)).info.weights_digest
    state = dict(torch.load(file, weights_only=True))
    state["features.0.bias"] += 1
    torch.save(state, file)
    second = resolve(asked, tmp_path / "cache")
    assert second.weights_digest != first.weights_digest
    request.getfixturevalue("forbid_loading")
    assert resolve(asked, tmp_path / "cache") == second
    file.unlink()
    with pytest.raises(WeightsError, match="could not be downloaded"):  # the memo answers only while the file is there
        resolve(asked, tmp_path / "cache")


# --- preprocessing


def test_preprocessing_is_the_weights_own() -> None:
    for name in ("resnet50", "efficientnet_b1", "efficientnet_v2_l", "inception_v3", "vit_b_16", "swin_t"):
        for weights in models.get_model_weights(name):
            preset = weights.transforms()
            found = preprocessing(weights)
            assert [found.resize] == preset.resize_size
            assert [found.crop] == preset.crop_size
            assert found.interpolation == preset.interpolation.value
            assert (list(found.mean), list(found.std)) == (list(preset.mean), list(preset.std))
    assert preprocessing(models.ResNet50_Weights.IMAGENET1K_V2).resize == 232
    assert load_backbone(calibrated("inception_v3")).info.preprocess == Preprocess(resize=342, crop=299)


def test_preprocessing_can_be_overridden_and_a_misspelt_field_is_named() -> None:
    request = replace(calibrated(SQUEEZE), preprocess=(("resize", 144), ("crop", 128), ("interpolation", "bicubic")))
    info = load_backbone(request).info
    assert info.preprocess == Preprocess(resize=144, crop=128, interpolation="bicubic")
    assert BackboneRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert BackboneInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info
    with pytest.raises(BackboneError, match=r"unknown preprocessing field 'resise'.*Did you mean resize"):
        load_backbone(replace(request, preprocess=(("resise", 144),)))


def test_a_vision_transformer_is_built_for_its_crop() -> None:
    info = load_backbone(BackboneRequest("vit_b_32", weights="random", preprocess=(("resize", 64), ("crop", 64)))).info
    assert info.row_shape == (768,)
    with pytest.raises(BackboneError, match="cannot be built for 65 x 65 pixels"):
        load_backbone(BackboneRequest("vit_b_32", weights="random", preprocess=(("resize", 65), ("crop", 65))))


# --- layers


@pytest.mark.parametrize(
    ("name", "layer", "width", "axes"),
    [
        ("resnet18", "layer2", 128, (2, 3)),
        ("resnet18", "layer3.1.relu", 256, (2, 3)),
        (SQUEEZE, "features.12", 512, (2, 3)),
        ("swin_t", "features.3.1", 192, (1, 2)),
        ("swin_t", "features.0.0", 96, (2, 3)),
        ("convnext_tiny", "features.1.0.block.2", 96, (1, 2)),
        ("vit_b_32", "encoder.layers.encoder_layer_3", 768, (1,)),
        ("resnet18", "avgpool", 512, (2, 3)),
    ],
)
def test_a_layer_by_name_is_averaged_over_its_places(name: str, layer: str, width: int, axes: tuple[int, ...]) -> None:
    small = () if name == SQUEEZE else (("resize", 64), ("crop", 64))
    request = BackboneRequest(name, weights="random", layer=layer, preprocess=small)
    backbone = load_backbone(request)
    images = images_of(backbone.info)
    outputs = []
    backbone.network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: outputs.append(output))
    normal = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.inference_mode():
        backbone.network(normal)
        wanted = outputs[-1].mean(axes).numpy()
        rows = backbone.module(images).numpy()
    assert backbone.info.row_shape == (width,)
    assert rows.shape == wanted.shape == (2, width)
    assert difference(rows, wanted) <= TOLERANCE


def test_a_layer_in_the_middle_exports(tmp_path: Path) -> None:
    """Only what leads to the layer is in the file."""
    request = replace(calibrated("resnet18", "layer1"), preprocess=(("resize", 64), ("crop", 64)))
    info = load_backbone(request).info
    assert info.row_shape == (64,)
    assert backbone_onnx(request, info, tmp_path).stat().st_size < 1_000_000  # of 45 MB


def test_an_unknown_layer_lists_near_matches_and_a_layer_that_gives_no_tensor_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"no layer 'layer5'.*Did you mean layer"):
        load_backbone(calibrated("resnet18", "layer5"))
    request = BackboneRequest(
        "vit_b_32",
        weights="random",
        layer="encoder.layers.encoder_layer_3.self_attention",
        preprocess=(("resize", 64), ("crop", 64)),
    )
    with pytest.raises(BackboneError, match="gives tuple, not one tensor"):
        load_backbone(request)


def test_the_cut_network_shares_its_tensors_with_the_whole_one() -> None:
    backbone = load_backbone(calibrated("resnet18"))
    whole, cut = dict(backbone.network.named_parameters()), dict(backbone.module.network.named_parameters())
    assert whole.keys() - cut.keys() == {"fc.weight", "fc.bias"}
    assert all(cut[name] is whole[name] for name in cut)
    assert isinstance(backbone.network.fc, nn.Linear)
    assert not backbone.network.training
    assert not backbone.module.training


# --- the memo


def test_a_memo_answers_until_something_changes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    asked = BackboneRequest(SQUEEZE, weights=str(shutil.copy(weights_file(SQUEEZE), tmp_path / "w.pth")))
    cache = tmp_path / "cache"
    first = resolve(asked, cache)
    (memo,) = (cache / "resolved").iterdir()
    good = memo.read_bytes()
    for damage in (b"", b"{}", b"[]", good[:-40], good.replace(b'"affine": false', b'"affine": true')):
        assert damage != good
        memo.write_bytes(damage)
        assert resolve(asked, cache) == first
        assert memo.read_bytes() == good
    request.getfixturevalue("forbid_loading")
    assert resolve(asked, cache) == first
    for other in (
        replace(asked, layer="logits"),
        replace(asked, seed=1),
        replace(asked, preprocess=(("resize", 300),)),
    ):
        with pytest.raises(BackboneError, match="was loaded"):
            resolve(other, cache)
    os.utime(tmp_path / "w.pth", ns=(1, 1))
    with pytest.raises(BackboneError, match="was loaded"):
        resolve(asked, cache)


def test_a_newer_library_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = calibrated(SQUEEZE)
    first = resolve(asked, tmp_path)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: f"{version(name)}.1")
    calls = []
    get_model = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, **o: calls.append(name) or get_model(name, **o))
    assert resolve(asked, tmp_path) == first
    assert calls == [SQUEEZE]


def test_a_cache_that_cannot_be_written_or_is_none_still_resolves(tmp_path: Path) -> None:
    (tmp_path / "resolved").write_text("a file where a folder should be")
    assert resolve(calibrated(SQUEEZE), tmp_path) == resolve(calibrated(SQUEEZE), None)
