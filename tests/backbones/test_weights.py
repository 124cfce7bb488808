"""Weights as training scripts save them: prefixes, wrappers, averaged weights, several files; and whose they are."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
from collections import defaultdict, deque
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import weights_file
from safetensors.torch import save_file
from small import normed, plain
from torch import Tensor, nn
from torchvision import models

import featx
from featx.backbones.loading import load_backbone
from featx.backbones.request import BackboneRequest
from featx.backbones.weights import load_state, read_state
from featx.backbones.zoos import torchvision
from featx.errors import FeatxError, WeightsError
from featx.options import Options, Preprocessing, fields_of
from featx.pixels.preprocess import Preprocess

State = dict[str, Tensor]


def state(factor: float = 1.0) -> State:
    """A small ResNet's, as torch gives it."""
    return {name: tensor * factor for name, tensor in normed().state_dict().items()}


def under(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def loaded(content: Any, folder: Path, part: str = "") -> tuple[float, str]:
    """What times its own weights a network was given from a file, exactly; and the note."""
    torch.save(content, folder / "a.pth")
    network = normed()
    wanted = network.state_dict()["conv1.weight"].clone()
    network.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()})
    taken = load_state(network, read_state(folder / "a.pth", part[1:]), "a.pth as small", "fc")
    (factor,) = [f for f in (1.0, 2.0) if torch.equal(network.state_dict()["conv1.weight"], wanted * f)]
    scaled = state(factor)
    for name, tensor in network.state_dict().items():
        assert not tensor.is_floating_point() or torch.equal(tensor, scaled[name])
    return factor, taken.note


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (under("learner.backbone.", state()), ""),
        ({"state_dict": under("model.", state()), "epoch": 3}, ""),
        ({"model": under("_orig_mod.module.", state())}, ""),
        ({"module": state(), "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, ""),
        ({"a": [{"b": under("_fsdp_wrapped_module.", state())}]}, ""),
        ({name.replace("layer1.", "layer1.module."): tensor for name, tensor in state().items()}, ""),
        ({"n_averaged": torch.tensor(3)} | under("module.", state()), ", leaving out n_averaged"),
        (
            {"state_dict": under("model.", state()) | {"criterion.weight": torch.ones(2)}},
            ", leaving out state_dict.criterion.weight",
        ),
        (under("net.", state()) | {"net.proj.weight": torch.ones(2)}, ", leaving out net.proj.weight"),
        ({"state_dict": under("model.", state()) | under("loss.model.", state())}, ""),
        (nn.DataParallel(normed()), ""),
    ],
)
def test_a_network_is_found_under_any_prefix_and_what_is_not_its_own_is_left_out_and_said(
    content: Any, note: str, tmp_path: Path
) -> None:
    assert loaded(content, tmp_path) == (1.0, note)


@pytest.mark.parametrize(
    ("content", "plain", "averaged"),
    [
        ({"state_dict": state(), "state_dict_ema": state(2)}, "state_dict", "state_dict_ema"),
        ({"ema": {"module": state(2), "decay": 0.9}, "model": state()}, "model", "ema"),
        ({"ema_state_dict": state(2), "weights": state()}, "weights", "ema_state_dict"),
        ({"swa_model": under("module.", state(2)), "net": state()}, "net", "swa_model"),
        ({"a": under("model.", state()) | under("ema_model.", state(2))}, "a.model", "a.ema_model"),
    ],
)
def test_plain_weights_come_before_averaged_ones_which_can_be_chosen(
    content: Any, plain: str, averaged: str, tmp_path: Path
) -> None:
    assert loaded(content, tmp_path) == (1.0, f"#{plain} (also there: #{averaged})")
    assert loaded(content, tmp_path, f"#{averaged}") == (2.0, f"#{averaged}")
    assert loaded(content, tmp_path, f"#{plain}") == (1.0, f"#{plain}")
    with pytest.raises(WeightsError, match=rf"no part 'emma' that fits; there is .*{plain}"):
        loaded(content, tmp_path, "#emma")


def test_averaged_weights_alone_are_taken(tmp_path: Path) -> None:
    assert loaded({"model_ema": state(2), "epoch": 3}, tmp_path) == (2.0, "")


def test_two_networks_that_fit_are_a_question(tmp_path: Path) -> None:
    both = {"student": under("module.", state()), "teacher": under("backbone.", state(2))}
    with pytest.raises(WeightsError, match=r"2 networks that fit, student, teacher.backbone; choose .*a.pth#student"):
        loaded(both, tmp_path)
    assert loaded(both, tmp_path, "#teacher") == (2.0, "#teacher.backbone")
    with pytest.raises(WeightsError, match=r"two tensors called conv1\.weight, one with `module.` before it"):
        loaded(state() | under("module.", state(2)), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({n: t for n, t in state().items() if n != "layer1.0.conv.bias"}, r"1 missing: layer1\.0\.conv\.bias"),
        (state() | {"layer1.2.conv.weight": torch.ones(8, 8, 3, 3)}, r"1 unexpected: layer1\.2\.conv\.weight"),
        (
            state() | {"conv1.weight": torch.ones(8, 3, 5, 5)},
            r"conv1\.weight is \[8, 3, 5, 5\], expected \[8, 3, 4, 4\]",
        ),
        (under("model.", {n: t for n, t in state().items() if n != "bn1.weight"}), r"1 missing: bn1\.weight"),
    ],
)
def test_a_network_that_is_not_all_there_or_has_more_layers_is_refused(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        loaded(content, tmp_path)


class Config(dict[str, Any]):
    """A dict of a class of its own, as yacs, EasyDict, mmengine and Lightning have."""


class Listed(list[Any]): ...


class Settings:
    """A class of a training script's."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("print('run by a weights file')",)


def test_what_scripts_keep_beside_the_tensors_is_neither_run_nor_in_the_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = {"args": argparse.Namespace(lr=1, path=tmp_path), "best": np.float64(0.5), "hooks": defaultdict(list)}
    assert loaded({"state_dict": state(), **kept, "settings": Settings()}, tmp_path) == (1.0, "")
    configs = Config(lr=1, model=Config(heads=Listed([Settings(), 2]))), defaultdict(list, a=[1]), deque([1])
    assert loaded({"model": state(), "config": configs, "call": os.getcwd}, tmp_path) == (1.0, "")
    assert loaded(Config(model=Config(state())), tmp_path) == (1.0, "")
    torch.save({"model": state(), "config": Config(lr=1)}, tmp_path / "a.pth", pickle_protocol=4)
    assert "model.conv1.weight" in read_state(tmp_path / "a.pth").tensors
    assert "run by" not in "".join(capfd.readouterr())


def test_weights_in_several_files_are_one_network(tmp_path: Path) -> None:
    names, folder = list(state()), tmp_path / "shards"
    folder.mkdir()
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    saved = {name: tensor.clone() for name, tensor in state().items()}
    for file, some in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: saved[name] for name in some}, file)

    def check(path: Path) -> None:
        network, found = plain_zeros(), read_state(path)
        load_state(network, found, "small", "fc")
        assert torch.equal(network.state_dict()["fc.weight"], state()["fc.weight"])
        assert set(found.files) == {str(file) for file in files}

    for path in (folder, *files):
        check(path)
    places = {name: files[name in names[9:]].name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for path in (folder, folder / "model.safetensors.index.json"):
        check(path)
    files[0].unlink()
    with pytest.raises(WeightsError, match=r"model-00001-of-00002.safetensors is not there; --weights FILE"):
        check(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.pth"}}')
    with pytest.raises(WeightsError, match=r"names \.\./b\.pth, and a part of the weights lies beside it"):
        check(folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state(), folder / "last.pth")
    with pytest.raises(WeightsError, match=r"not one set of weights but last\.pth, model-00002-of-00002\.safetensors"):
        check(folder)


def plain_zeros() -> nn.Module:
    network = normed()
    network.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()})
    return network


def test_a_network_without_norms_has_no_counters_to_miss(tmp_path: Path) -> None:
    torch.save({"model": plain().state_dict()}, tmp_path / "a.pth")
    assert load_state(plain(), read_state(tmp_path / "a.pth"), "small", "fc").whole


# --- whose preprocessing


def test_torchvisions_own_file_is_known_by_its_content_or_its_name(tmp_path: Path) -> None:
    file = tmp_path / "renamed.pth"
    file.write_bytes(b"anything")
    digits = sha256(b"anything").hexdigest()[:8]
    own = argparse.Namespace(name="IMAGENET1K_V2", url=f"https://x.org/resnet50-{digits}.pth")
    members = [models.ResNet50_Weights.IMAGENET1K_V1, own]
    assert torchvision.published(members, file) is members[1]
    assert torchvision.published(members[:1], file) is None
    again = tmp_path / f"resnet50-{digits}.pth"
    again.write_bytes(b"saved again")
    assert torchvision.published(members, again) is members[1]
    assert torchvision.published(members, tmp_path) is None


def test_a_local_v2_file_gets_v2s_preprocessing_and_any_other_file_says_what_is_assumed(tmp_path: Path) -> None:
    torch.save(torchvision.create("mobilenet_v2", 224).state_dict(), tmp_path / "mobilenet_v2-7ebf99e0.pth")
    info = load_backbone(BackboneRequest("mobilenet_v2", str(tmp_path / "mobilenet_v2-7ebf99e0.pth"))).info
    assert (info.preprocess.resize, info.preprocess.crop) == (232, 224)
    assert info.weights_note == "local file mobilenet_v2-7ebf99e0.pth, torchvision's IMAGENET1K_V2"
    shutil.move(tmp_path / "mobilenet_v2-7ebf99e0.pth", tmp_path / "mine.pth")
    info = load_backbone(BackboneRequest("mobilenet_v2", str(tmp_path / "mine.pth"))).info
    assert (info.preprocess.resize, info.weights_note) == (256, "local file mine.pth, preprocessed as IMAGENET1K_V1")
    asked = BackboneRequest("mobilenet_v2", str(tmp_path / "mine.pth"), preprocess=(("crop_pct", 0.965),))
    info = load_backbone(asked).info
    assert (info.preprocess.resize, info.weights_note) == (232, "local file mine.pth")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"size": np.int64(160)}, Preprocess(resize=182, crop=160)),
        ({"crop_pct": 1.0}, Preprocess(resize=224, crop=224)),
        ({"size": 384, "crop_pct": np.float64(0.95)}, Preprocess(resize=404, crop=384)),
        ({"crop_pct": 1.15, "crop_mode": "border"}, Preprocess(resize=194, crop=224, crop_mode="border")),
        ({"mean": np.array([0.5, 0.5, 0.5]), "std": [1, 1, 1]}, Preprocess(mean=(0.5, 0.5, 0.5), std=(1, 1, 1))),
    ],
)
def test_size_and_crop_pct_give_the_resize_and_numpys_numbers_are_numbers(
    asked: dict[str, Any], wanted: Preprocess
) -> None:
    request = BackboneRequest("resnet18", preprocess=tuple(asked.items()))
    assert request.override(Preprocess()) == wanted
    assert BackboneRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert hash(request) == hash(BackboneRequest("resnet18", preprocess=tuple(asked.items())))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": 0}, "size is 1 or more"),
        ({"size": 10.5}, "size is int"),
        ({"crop_pct": float("nan")}, "crop_pct is 0.1 or more"),
        ({"crop_pct": 87.5}, "does not fit into a short side of 2 px"),
        ({"crop_pct": 1.15}, "crop modes border and pad"),
        ({"size": 100, "crop": 90}, "size decides the crop"),
        ({"crop_mode": "zoom"}, "zoom"),
        ({"std": (1, float("nan"), 1)}, "std"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatxError, match=message):
        BackboneRequest("resnet18", preprocess=tuple(asked.items())).override(Preprocess())


def test_a_file_that_is_torchvisions_is_read_whatever_it_holds_beside(tmp_path: Path) -> None:
    weights = torch.load(weights_file("squeezenet1_1"), weights_only=True)
    inside = {name.replace("features.", "features.module.", 1): tensor for name, tensor in weights.items()}
    torch.save({"state_dict": under("model.", inside), "state_dict_ema": weights}, tmp_path / "a.pth")
    info = load_backbone(BackboneRequest("squeezenet1_1", str(tmp_path / "a.pth"))).info
    reference = load_backbone(BackboneRequest("squeezenet1_1", str(weights_file("squeezenet1_1")))).info
    assert info.weights_digest == reference.weights_digest
    assert info.weights_note.startswith("local file a.pth, preprocessed")


@pytest.mark.parametrize("name", ["swin_t", "googlenet"])
def test_a_network_that_a_file_will_fill_is_built_without_drawing_and_has_all_its_tables(name: str) -> None:
    with torchvision._Undrawn():
        network = torchvision.create(name, 224)
    buffers = dict(torchvision.create(name, 224).named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in network.named_buffers())
    assert not network.get_parameter(f"{torchvision.last_layer(name, network)}.weight").any()


def test_every_option_of_preprocessing_is_one_of_extract_and_of_the_transformer() -> None:
    parameters = inspect.signature(featx.ImageFeatures).parameters
    assert fields_of(Preprocessing).keys() <= fields_of(Options).keys() & parameters.keys()
    assert all(parameters[name].default is None for name in fields_of(Preprocessing))
