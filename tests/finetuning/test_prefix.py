"""The cached prefix: cut before the first trained layer, the same answers as without."""

from __future__ import annotations

import pytest
import small
import torch
from torch import nn
from torchvision import models

from featx.backbones.backbone import Trunk, groups, without
from featx.errors import BackboneError, TrainingError
from featx.finetuning.layers import Tuned, make_linear, plan
from featx.finetuning.prefix import Cut, cut
from featx.finetuning.recipes import FinetuneConfig
from featx.pixels.preprocess import Preprocess


def split(network: nn.Module, head: str, side: int, freeze_until: str | None) -> tuple[Tuned, Cut]:
    trunk_network = without(network, head)
    trunk = Trunk(trunk_network, Preprocess(resize=side, crop=side))
    named = groups(trunk_network, head)
    size = network.get_submodule(head).in_features
    tuned = Tuned(trunk, make_linear(None, size, 2, seed=0))
    plan(tuned, named, {head}, FinetuneConfig(mode="partial" if freeze_until else "full", freeze_until=freeze_until))
    return tuned, cut(tuned, side)


def pixels(side: int, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "head", "freeze_until", "shape"),
    [
        ("resnet18", "fc", "layer4", (256, 4, 4)),
        ("mobilenet_v3_small", "classifier.3", "classifier.0", (576,)),
        ("shufflenet_v2_x0_5", "fc", "stage4", (96, 4, 4)),
        ("swin_t", "head", "features.7", (2, 2, 768)),
    ],
)
def test_prefix_and_suffix_together_are_the_network(
    name: str, head: str, freeze_until: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tuned, part = split(models.get_model(name, weights=None), head, 64, freeze_until)
    assert part.row_shape == shape
    tuned.suffix = part.suffix
    tuned.eval()
    with torch.no_grad():
        whole = tuned.trunk(pixels(64))
        halves = part.suffix(part.prefix(pixels(64)))
    assert whole.std() > 0
    assert torch.equal(whole, halves)


def test_gradients_through_the_suffix_are_the_networks() -> None:
    tuned, part = split(small.normed(), "fc", 32, "layer2")
    train = [p for p in tuned.parameters() if p.requires_grad]
    expected = torch.autograd.grad(tuned(pixels(32)).square().sum(), train)
    with torch.no_grad():
        activations = part.prefix(pixels(32))
    tuned.suffix = part.suffix
    got = torch.autograd.grad(tuned(activations).square().sum(), train)
    assert len(got) == 10
    for a, b in zip(expected, got, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b)


def test_dropout_between_frozen_and_trained_layers_is_not_cached() -> None:
    _, part = split(small.vgg_like(), "classifier.6", 32, "classifier.3")
    assert part.row_shape == (16,)
    names = [node.target for node in part.prefix.graph.nodes if node.op == "call_module"]
    assert names[-1] == "network.classifier.1"
    assert any(node.target == "network.classifier.2" for node in part.suffix.parts[True].graph.nodes)


def test_a_network_whose_first_layer_is_trained_has_nothing_to_cache() -> None:
    with pytest.raises(TrainingError, match="nothing before the first trained layer is frozen"):
        split(small.plain(), "fc", 32, None)


class Deciding(small.Small):
    """Its path depends on the pixels, which no trace can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Moody(small.Small):
    """Computes something else in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x if self.training else x)


@pytest.mark.parametrize(("kind", "message"), [(Deciding, "cannot be traced"), (Moody, "another path in training")])
def test_a_network_that_cannot_be_cut_is_refused(kind: type[small.Small], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        split(kind(norm=False), "fc", 32, "layer2")
