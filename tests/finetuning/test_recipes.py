"""What fine-tuning can be asked for, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch

from featx.errors import TrainingError
from featx.finetuning.recipes import FinetuneConfig, configure


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "ful"}, "Did you mean full"),
        ({"optimizer": "adam"}, "Did you mean adamw"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"lrs": {"layer1": -1.0}}, "lr of layer1 is above 0"),
        ({"freeze_until": "layer3"}, "mode full freezes nothing"),
        ({"mode": "scratch", "freeze": ("stem",)}, "mode scratch freezes nothing"),
        ({"cache_prefix": True}, "mode partial, not full"),
        ({"mode": "partial", "cache_prefix": True, "augment": "crop-flip"}, "fixed pixels"),
        ({"select": "last", "patience": 2}, "patience needs images"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"layer_decay": 1.5}, "layer_decay is out of range: 1.5"),
        ({"warmup": 11.0, "epochs": 10}, "warmup is out of range"),
        ({"class_weight": "even"}, "class_weight is out of range"),
        ({"epochs": "many"}, "epochs is int, not 'many'"),
        ({"compile": "yes"}, "compile is bool, not 'yes'"),
        ({"patience": True}, "patience is int | None, not True"),
        ({"mode": "partial", "freeze": 3}, "freeze is tuple[str, ...], not 3"),
        ({"augment": "mixup"}, "unknown augmentation 'mixup'"),
    ],
)
def test_a_bad_combination_is_refused_before_anything_starts(fields: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(message)):
        FinetuneConfig(**fields)


def test_the_tutorials_schedule_is_torchs_step_lr() -> None:
    settings = configure("tutorial")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=settings.rate, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for epoch in range(25):
        for step in (0, 60):
            mine = settings.rate * settings.factor(epoch * 61 + step, 61)
            assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert (settings.init, settings.batch_size, settings.epochs, settings.select) == ("random", 4, 25, "val")


def test_cosine_rises_over_the_warm_up_and_falls_to_nothing() -> None:
    settings = FinetuneConfig(epochs=5, warmup=1.0)
    rates = [settings.factor(step, 10) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[30] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_scratch_starts_from_a_random_head() -> None:
    assert FinetuneConfig(mode="scratch").init == "random"


def test_a_configuration_survives_json() -> None:
    settings = FinetuneConfig(mode="partial", freeze=("stem",), lrs={"layer1": 0.1}, class_weight={"ants": 2.0})
    assert FinetuneConfig(**json.loads(json.dumps(settings.to_dict()))) == settings


def test_unknown_recipes_and_settings_are_refused_with_near_matches() -> None:
    with pytest.raises(TrainingError, match="there is tutorial"):
        configure("tutorials")
    with pytest.raises(TrainingError, match="Did you mean epochs"):
        configure(epoch=3)


def test_one_group_to_freeze_may_be_given_by_its_name_alone() -> None:
    assert FinetuneConfig(mode="partial", freeze="stem").freeze == ("stem",)
    assert FinetuneConfig(mode="partial", freeze=["stem", "layer1"]).freeze == ("stem", "layer1")
