"""Layer groups: what is trained, at which rate, and what stays still."""

from __future__ import annotations

import pytest
import small
import torch
from torch import nn

from featx.backbones.backbone import Trunk, groups, without
from featx.errors import TrainingError
from featx.finetuning.layers import Group, Tuned, find_unreached, format_table, make_linear, plan
from featx.finetuning.recipes import FinetuneConfig
from featx.pixels.preprocess import Preprocess

RESNET = ["stem", "layer1", "layer2", "layer3", "head"]


def tuned(network: nn.Module, head: str, **options: bool) -> tuple[Tuned, list[tuple[str, list[str]]]]:
    cut = without(network, head)
    trunk = Trunk(cut, Preprocess(resize=32, crop=32))
    size = network.get_submodule(head).in_features
    return Tuned(trunk, make_linear(None, size, 2, seed=0), **options), groups(cut, head)


def planned(network: nn.Module, head: str, **options: object) -> tuple[Tuned, list[Group]]:
    made, named = tuned(network, head)
    mode = "partial" if {"freeze", "freeze_until"} & set(options) else "full"
    return made, plan(made, named, {head}, FinetuneConfig(mode=mode, lr=0.01, **options))


def test_groups_follow_the_network_and_end_at_the_head() -> None:
    _, found = planned(small.normed(), "fc")
    assert [g.name for g in found] == RESNET
    assert [g.lr for g in found] == [0.01] * 5
    assert found[0].parameters == (
        "trunk.network.conv1.weight",
        "trunk.network.conv1.bias",
        "trunk.network.bn1.weight",
        "trunk.network.bn1.bias",
    )
    assert found[0].size == 8 * 3 * 16 + 8 + 8 + 8


def test_freezing_until_a_group_trains_it_and_all_that_follows() -> None:
    network, found = planned(small.normed(), "fc", freeze_until="layer2")
    assert [g.name for g in found if g.lr is None] == ["stem", "layer1"]
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {p for g in found if g.lr is not None for p in g.parameters}
    assert not any("layer1" in name or "conv1" in name for name in trained)


def test_the_layer_decay_is_geometric_from_the_head_back() -> None:
    _, found = planned(small.plain(), "fc", layer_decay=0.5)
    assert [g.lr for g in found] == pytest.approx([0.01 / 16, 0.01 / 8, 0.01 / 4, 0.01 / 2, 0.01])


def test_partial_trains_the_last_group_and_the_head_unless_it_is_said_what_to_freeze() -> None:
    for options, trained in (({}, ["layer3", "head"]), ({"freeze": "stem"}, RESNET[1:])):
        network, named = tuned(small.normed(), "fc")
        found = plan(network, named, (), FinetuneConfig(mode="partial", **options))
        assert [g.name for g in found if g.lr is not None] == trained


def test_vgg_takes_the_rates_of_the_write_up_with_the_replaced_layers_old_name() -> None:
    rates = {"features": 1e-4, "classifier.0": 5e-4, "classifier.3": 5e-4, "classifier.6": 1e-3}
    _, found = planned(small.vgg_like(), "classifier.6", lrs=rates)
    assert [(g.name, g.lr) for g in found] == [
        ("features", 1e-4),
        ("classifier.0", 5e-4),
        ("classifier.3", 5e-4),
        ("head", 1e-3),
    ]


@pytest.mark.parametrize("option", [{"freeze_until": "layer9"}, {"freeze": ("layer9",)}, {"lrs": {"layer9": 1.0}}])
def test_an_unknown_group_is_refused_with_the_list(option: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=r"stem, layer1, layer2, layer3, head .fc means head") as error:
        planned(small.plain(), "fc", **option)
    assert "Did you mean layer" in str(error.value)


def test_a_learning_rate_for_a_frozen_group_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"'layer1' is frozen and has a learning rate of 0\.1"):
        planned(small.plain(), "fc", freeze_until="layer2", lrs={"layer1": 0.1})


def test_one_group_takes_one_learning_rate_and_the_head_is_never_frozen() -> None:
    with pytest.raises(TrainingError, match="'head' has two learning rates"):
        planned(small.plain(), "fc", lrs={"fc": 0.1, "head": 0.2})
    with pytest.raises(TrainingError, match="head is always trained"):
        planned(small.plain(), "fc", freeze=("fc",))


def test_frozen_groups_stay_in_eval_mode_and_others_train() -> None:
    network, _ = planned(small.normed(), "fc", freeze_until="layer2")
    assert network.train() is network and network.training
    inner = network.trunk.network
    assert not inner.bn1.training and not inner.layer1[0].bn.training
    assert inner.layer2[0].bn.training and inner.layer3[0].bn.training and inner.dropout.training
    network.eval()
    assert not any(module.training for module in network.modules())


def test_frozen_norms_stay_in_eval_mode_in_trained_groups_too() -> None:
    network, named = tuned(small.normed(), "fc", freeze_norm=True)
    plan(network, named, (), FinetuneConfig())
    inner = network.train().trunk.network
    assert not inner.layer2[0].bn.training and inner.layer2.training


def test_parameters_beyond_a_tapped_layer_are_left_out() -> None:
    cut = small.plain()
    trunk = Trunk(cut, Preprocess(resize=32, crop=32), tap="layer2")
    trunk.pool = (2, 3)
    network = Tuned(trunk, make_linear(None, 8, 2, seed=0))
    beyond = find_unreached(network, 32)
    assert {name.split(".")[2] for name in beyond} == {"layer3", "fc"}
    found = plan(network, groups(cut, "fc"), (), FinetuneConfig(), unreached=beyond)
    assert {g.name: g.size for g in found}["layer3"] == 0
    assert not any(p.requires_grad for n, p in network.named_parameters() if n in beyond)


def test_a_random_head_follows_from_its_seed_and_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (make_linear(None, 8, 2, seed=s).weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_table_says_what_is_trained() -> None:
    _, found = planned(small.plain(), "fc", freeze_until="layer3")
    lines = format_table(found).splitlines()
    assert lines[1].split() == ["stem", "392", "frozen"]
    assert lines[5].split() == ["head", "18", "0.01"]
    assert lines[-1] == "602 of 2,746 parameters are trained"
