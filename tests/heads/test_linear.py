"""The SGD head: near the logistic optimum by default, the tutorials' loop when asked."""

from __future__ import annotations

import numpy as np
import pytest

from featx.errors import FeatxError
from featx.heads import linear, logreg
from featx.learning import settings_of
from featx.solvers import training as _training
from featx.solvers.examples import Examples


def clouds(rows: int = 240, classes: int = 3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(rows, 20)) + 0.9 * rng.normal(size=(classes, 20))[y]
    return (4 * X + 2).astype(np.float32), y, [f"c{i}" for i in range(classes)]


def test_it_comes_near_the_logistic_optimum() -> None:
    X, y, names = clouds()
    decay = 0.05
    sgd = linear.fit(Examples(X, y), names, weight_decay=decay, epochs=120).head
    optimum = logreg.fit(Examples(X, y), names, strengths=[1 / (decay * len(y))]).head
    assert sgd.probabilities(sgd(X)) == pytest.approx(optimum.probabilities(optimum(X)), abs=0.02)


def test_all_folds_and_decays_at_once_are_what_each_gives_alone() -> None:
    X, y, names = clouds()
    several = linear.fit(Examples(X, y), names, epochs=10, lr=0.02)
    alone = linear.fit(Examples(X, y), names, epochs=10, lr=0.02, weight_decay=several.info["weight_decay"])
    assert several.head.weight == pytest.approx(alone.head.weight, abs=1e-5)
    assert len(several.info["cross_validation"]["log_loss"]) == len(linear.DECAYS)


def test_the_tutorials_recipe_is_torchs_own_loop() -> None:
    import torch

    X, y, names = clouds(40)
    head = linear.fit(Examples(X, y), names, recipe="tutorial", seed=7).head
    generator = torch.Generator().manual_seed(7)
    layer = torch.nn.Linear(20, 3)
    with torch.no_grad():
        layer.weight.copy_((torch.rand((3, 20), generator=generator) * 2 - 1) * 20**-0.5)
        layer.bias.copy_((torch.rand(3, generator=generator) * 2 - 1) * 20**-0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.001, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    for _ in range(25):
        order = torch.randperm(40, generator=generator)
        for rows in order.split(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(torch.from_numpy(X)[rows]), torch.from_numpy(y)[rows])
            loss.backward()
            optimizer.step()
        schedule.step()
    assert head.weight == pytest.approx(layer.weight.detach().numpy(), abs=1e-4)
    assert head.bias == pytest.approx(layer.bias.detach().numpy(), abs=1e-4)


def test_what_is_given_beside_a_recipe_wins_even_where_it_is_the_usual() -> None:
    X, y, names = clouds(40)
    plain = linear.fit(Examples(X, y), names, recipe="tutorial")
    assert len(plain.info["training_loss"]) == 25 and plain.info["lr"] == 0.001
    assert len(linear.fit(Examples(X, y), names, recipe="tutorial", epochs=60).info["training_loss"]) == 60
    for setting in ({"schedule": "cosine"}, {"batch_size": 64}, {"standardise": True}):
        assert (linear.fit(Examples(X, y), names, recipe="tutorial", **setting).head.weight != plain.head.weight).any()
    usual = linear.fit(Examples(X, y), names, weight_decay=0.1)
    stated = linear.fit(
        Examples(X, y), names, epochs=60, batch_size=64, schedule="cosine", standardise=True, weight_decay=0.1
    )
    assert (usual.head.weight == stated.head.weight).all()


def test_the_defaults_that_are_listed_are_the_ones_that_hold() -> None:
    listed = {name: parameter.default for name, parameter in settings_of("linear").items()}
    assert (listed["epochs"], listed["batch_size"], listed["schedule"]) == (60, 64, "cosine")
    assert listed["standardise"] is True and listed["lr"] is None and listed["folds"] == 5


def test_constant_columns_get_no_weight_on_unscaled_features_either() -> None:
    X, y, names = clouds(40)
    X[:, 3], X[:, 7] = 0.0, 5.5
    weight = linear.fit(Examples(X, y), names, recipe="tutorial").head.weight
    assert (weight[:, [3, 7]] == 0).all() and (np.delete(weight, [3, 7], axis=1) != 0).all()


def test_the_training_loss_falls_epoch_by_epoch() -> None:
    X, y, names = clouds()
    curve = linear.fit(Examples(X, y), names, epochs=20).info["training_loss"]
    assert len(curve) == 20 and curve[-1] < 0.8 * curve[0]


def test_label_smoothing_and_class_weights_change_what_they_should() -> None:
    X, y, names = clouds()
    keep = (y > 0) | (np.arange(240) % 8 == 0)
    plain = linear.fit(Examples(X[keep], y[keep]), names, weight_decay=0.1).head
    balanced = linear.fit(Examples(X[keep], y[keep]), names, weight_decay=0.1, class_weight="balanced").head
    smooth = linear.fit(Examples(X[keep], y[keep]), names, weight_decay=0.1, label_smoothing=0.3).head
    share = {h: h.probabilities(h(X)) for h in (plain, balanced, smooth)}
    assert share[balanced][:, 0].mean() > share[plain][:, 0].mean() + 0.02
    assert share[smooth].max(axis=1).mean() < share[plain].max(axis=1).mean() - 0.05


def test_several_labels_are_told_by_sign() -> None:
    X, y, _ = clouds()
    targets = np.stack([y == 0, y > 0], axis=1).astype(np.int64)
    head = linear.fit(Examples(X, targets), ["first", "rest"]).head
    assert head.activation == "sigmoid" and ((head(X) > 0) == targets).mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"schedule": "cosin"}, "cosine, step or constant"),
        ({"recipe": "tutorials"}, "Did you mean tutorial"),
        ({"epochs": 0}, "at least 1"),
        ({"lr": 1e6, "weight_decay": 1.0, "epochs": 30}, "smaller one"),
        ({"device": "cuda:99"}, "CUDA GPU|there is no device"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(FeatxError, match=says):
        X, y, names = clouds(30)
        linear.fit(Examples(X, y), names, **settings)  # type: ignore[arg-type]


def test_the_largest_step_is_stable_and_no_larger() -> None:
    import torch

    X, y, names = clouds()
    task = _training.check(X, y, names)
    Z = torch.from_numpy(task.standard())
    largest = np.linalg.eigvalsh((Z.T @ Z / len(Z)).numpy())[-1]
    assert linear._largest_step(task, Z, np.ones(len(Z)), 0.9, 0.0) == pytest.approx(0.95 / (0.5 * largest), rel=0.1)
