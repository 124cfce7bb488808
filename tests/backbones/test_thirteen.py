"""The thirteen networks of the write-ups: features, logits and export against torchvision's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import THIRTEEN, calibrated, weights_file
from sharing import session_cache
from torch import nn
from torchvision import models

from featx.backbones.loading import load_backbone
from featx.backbones.table import listing
from featx.engines.opening import open_engine
from featx.features import TOLERANCE, difference

# GoogLeNet and Inception v3 were trained on inputs that torchvision's own loading rescales inside them
OPTIONS = {
    name: {"transform_input": True, "aux_logits": False, "init_weights": False}
    for name in ("googlenet", "inception_v3")
}


# VGG-16 alone takes as long as five others: its weights have half a gigabyte
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] * (n == "vgg16")) for n in THIRTEEN])
def test_features_logits_and_export_are_torchvisions_own(name: str) -> None:
    reference = models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    reference.load_state_dict(torch.load(weights_file(name), weights_only=True))
    preset = models.get_model_weights(name).IMAGENET1K_V1.transforms()
    crop = preset.crop_size[0]
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (2, 3, crop // 8, crop // 8), dtype=np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    images = np.ascontiguousarray(np.pad(images, [(0, 0), (0, 0), (0, crop % 8), (0, crop % 8)], mode="edge"))
    preset.resize_size = [crop]  # the pixels are cropped already; its normalisation is what is compared
    features = torch.empty(0)

    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal features
        features = inputs[0]

    squeeze = name.startswith("squeezenet")
    if squeeze:
        reference.classifier.register_forward_pre_hook(keep)
    else:
        [module for module in reference.modules() if isinstance(module, nn.Linear)][-1].register_forward_pre_hook(keep)
    with torch.inference_mode():
        logits = reference(preset(torch.from_numpy(images))).numpy()
    wanted = (features.mean((2, 3)) if squeeze else features).numpy()
    assert np.abs(wanted).max() > 0.5  # a real scale, so that the relative tolerances below mean something
    assert difference(wanted[:1], wanted[1:]) > 100 * TOLERANCE

    backbone = load_backbone(calibrated(name))
    with torch.inference_mode():
        rows = backbone.module(torch.from_numpy(images)).numpy()
        own = backbone.network(preset(torch.from_numpy(images))).numpy()
    info = backbone.info
    assert difference(rows, wanted) <= TOLERANCE
    assert difference(own, logits) <= TOLERANCE
    assert info.affine is not squeeze
    assert info.row_shape == wanted.shape[1:]
    assert info.class_names is not None
    assert len(info.class_names) == 1000
    assert info.class_names[310] == "ant"
    assert info.weights_note == f"local file {name}.pth, preprocessed as IMAGENET1K_V1"
    if squeeze:
        assert backbone.classifier is None
    else:
        assert backbone.classifier is not None
        weight, bias = backbone.classifier
        assert difference(rows @ weight.T + bias, logits) <= TOLERANCE

    engine = open_engine(calibrated(name), info, cache=session_cache(), device="cpu", batch_size=2)
    assert engine.name == "onnxruntime"
    assert difference(engine(images), wanted) <= TOLERANCE
    engine.close()

    row = next(row for row in listing() if row["name"] == name)
    assert (row["features"], row["parameters"], row["crop"]) == (wanted.shape[1], info.parameters, crop)
    # every parameter below the classifier is in exactly one group, the classifier in none
    prefixes = [prefix for _, group in backbone.groups for prefix in group]
    below = [parameter for parameter, _ in backbone.module.network.named_parameters()]
    owners = [[p for p in prefixes if parameter == p or parameter.startswith(f"{p}.")] for parameter in below]
    assert below
    assert all(len(found) == 1 for found in owners)
    assert len(backbone.groups) >= 3


def test_squeezenets_logits_are_a_layer() -> None:
    info = load_backbone(calibrated("squeezenet1_0", layer="logits")).info
    assert info.row_shape == (1000,)
    assert not info.affine


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("resnet18", ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("vgg16", ["features", "classifier.0", "classifier.3"]),
    ],
)
def test_layer_groups_are_the_ones_tutorials_name(name: str, groups: list[str]) -> None:
    backbone = load_backbone(calibrated(name))
    assert [group for group, _ in backbone.groups] == groups
    if name == "resnet18":
        assert backbone.groups[0] == ("stem", ["conv1", "bn1"])
