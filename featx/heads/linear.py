"""The linear head trained by SGD in torch, as the transfer-learning tutorials do; GPU when there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from featx import metrics
from featx.devices import choose_device
from featx.errors import HeadError
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.examples import Examples
from featx.solvers.finishing import finish
from featx.solvers.moments import Asked
from featx.solvers.training import Task
from featx.text import near

if TYPE_CHECKING:
    import torch

LEARNS, STREAMS = True, False
# Relative to the mean loss: scikit-learn's C is 1 / (N * decay).
DECAYS = tuple(np.logspace(-4, 1, 11))
# Used where neither the caller nor a recipe gives a value. The data choose the learning rate and the decay.
DEFAULTS: dict[str, Any] = {"epochs": 60, "batch_size": 64, "schedule": "cosine", "standardise": True}
# the schedule of the transfer-learning tutorials, on unscaled features
TUTORIAL = {"epochs": 25, "batch_size": 4, "lr": 0.001, "schedule": "step", "weight_decay": 0.0, "standardise": False}
RECIPES: dict[str, dict[str, Any]] = {"tutorial": TUTORIAL}


@dataclass(frozen=True)
class _Sgd:
    """The settings of SGD."""

    epochs: int
    batch_size: int
    lr: float | None
    momentum: float
    schedule: str
    step_size: int
    gamma: float
    label_smoothing: float
    seed: int

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "step", "constant"):
            raise HeadError(f"schedule is cosine, step or constant, not {self.schedule!r}")
        if self.epochs < 1 or self.batch_size < 1 or not 0 <= self.momentum < 1 or not 0 <= self.label_smoothing < 1:
            raise HeadError("epochs and batch_size are at least 1, momentum and label_smoothing in [0, 1)")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted over all epochs of `steps` each."""
        assert self.lr is not None
        if self.schedule == "step":
            return self.lr * self.gamma ** (step // steps // self.step_size)
        if self.schedule == "cosine":
            return self.lr * 0.5 * float(1 + np.cos(np.pi * step / (self.epochs * steps)))
        return self.lr


def fit(
    examples: Examples,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    device: str = "auto",
    recipe: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    momentum: float = 0.9,
    schedule: str | None = None,
    step_size: int = 7,
    gamma: float = 0.1,
    weight_decay: float | None = None,
    label_smoothing: float = 0.0,
    standardise: bool | None = None,
    folds: int = 5,
    class_weight: str | Mapping[str, float] | None = None,
    calibrate: bool = False,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """Minimise the mean cross-entropy `+ weight_decay / 2 * ||W||^2` by SGD with momentum.

    lr: None for a quarter of the largest step size that is stable on these data; schedule: `cosine` (to 0
    over all steps), `step` (times `gamma` every `step_size` epochs) or `constant`. weight_decay: None
    chooses among `DECAYS` by the log-loss of scored rows over `folds` stratified folds.
    All folds and decays are trained at once, on the same batches. recipe: `tutorial` is SGD 0.001, momentum
    0.9, StepLR(7, 0.1), 25 epochs of batches of 4, on unscaled features; settings given beside it win. A
    setting of `DEFAULTS` that is None takes the recipe's value, or else the default. The same seed gives the
    same head on the same machine. Raises `HeadError`, also where training diverges.
    """
    if recipe is not None and recipe not in RECIPES:
        raise HeadError(f"unknown recipe {recipe!r}; there is {', '.join(RECIPES)}.{near(recipe, RECIPES)}")
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "schedule": schedule}
    given |= {"weight_decay": weight_decay, "standardise": standardise}
    own = DEFAULTS | RECIPES.get(recipe or "", {}) | {name: value for name, value in given.items() if value is not None}
    steps = (own["epochs"], own["batch_size"], own.get("lr"), momentum, own["schedule"], step_size, gamma)
    sgd = _Sgd(*steps, label_smoothing, seed)

    task, fold, counted = _training.prepared(examples, class_names, folds, seed)
    task = _training.measured(task, Asked())
    if not own["standardise"]:  # constant columns stay out here too
        task = replace(task, mean=0 * task.mean, scale=np.where(np.isinf(task.scale), np.inf, 1.0))
    info: dict[str, Any] = {"notes": task.notes}

    decays = np.array([own["weight_decay"]] if "weight_decay" in own else DECAYS)
    if len(decays) > 1 and not counted.any():
        decays = decays[len(decays) // 2 :][:1]
        info["notes"].append(f"weight decay {decays[0]:g} was taken without measuring")
    measure = len(decays) > 1 or calibrate or reject is not None or threshold is not None
    weights = _training.class_weights(task, class_weight)
    weight, bias, held_out = _fitted(task, sgd, decays, weights, fold, counted & measure, device, info)

    head = task.head(weight, bias)
    head = finish(head, task, info, held_out, counted, calibrate=calibrate, threshold=threshold, reject=reject)
    return Fitted(head, info)


def _fitted(
    task: Task,
    sgd: _Sgd,
    decays: np.ndarray,
    row_weights: np.ndarray | None,
    fold: np.ndarray,
    counted: np.ndarray,
    device: str,
    info: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Weight `[C, D]` and bias `[C]` with the decay that is best on the rows `counted` (the first decay, if there are
    none), and the logits of these rows, each by the fold that left it out. Writes its figures to `info`.
    """
    import torch

    Z = torch.from_numpy(task.standard()).to(choose_device(device))
    count = int(fold.max()) + 1 if counted.any() else 0
    masks = np.stack([fold != k for k in range(count)] + [np.ones(len(fold), bool)], axis=1)
    shares = np.ones(len(fold)) if row_weights is None else row_weights / row_weights.mean()
    masks = masks * shares[:, None]
    lr = _largest_step(task, Z, shares, sgd.momentum, float(decays.max())) if sgd.lr is None else sgd.lr
    sgd = replace(sgd, lr=lr, batch_size=min(sgd.batch_size, len(fold)))
    targets, trained, rates = (torch.from_numpy(a.astype(np.float32)) for a in (task.one_hot(), masks, decays))
    weight, bias, curve = _train(Z, targets.to(Z.device), trained.to(Z.device), rates.to(Z.device), sgd, task.several)

    best, held_out = 0, None
    if count:
        logits = torch.empty((len(decays), len(fold), len(task.class_names)))
        for k in range(count):
            numbers = torch.from_numpy(np.flatnonzero(fold == k)).to(Z.device)
            part = torch.einsum("nd,scd->snc", Z[numbers], weight[k]) + bias[k][:, None]
            logits[:, numbers.cpu()] = part.cpu()
        each = metrics.binary_losses if task.several else metrics.losses
        held = [each(part[counted].numpy(), task.y[counted]).reshape(int(counted.sum()), -1) for part in logits]
        loss = np.array([np.average(rows.mean(axis=1), weights=shares[counted]) for rows in held])
        best = int(np.argmin(loss))
        held_out = logits[best, counted].numpy()
        info["cross_validation"] = {"weight_decays": decays.tolist(), "log_loss": loss.tolist(), "folds": count}
        if len(decays) > 1 and best in (0, len(decays) - 1):
            info["notes"].append(f"the best weight decay, {decays[best]:g}, is at the end of the grid")
    training_loss = curve[:, -1, best].tolist()
    info |= {"weight_decay": float(decays[best]), "lr": lr, "training_loss": training_loss, "device": str(Z.device)}
    return weight[-1, best].cpu().numpy(), bias[-1, best].cpu().numpy(), held_out


def _largest_step(task: Task, Z: torch.Tensor, shares: np.ndarray, momentum: float, decay: float) -> float:
    """Heavy-ball SGD is stable below `2 (1 + momentum) / L`; a quarter of it leaves room for batch noise.

    L, the largest curvature of the mean loss, is at most 1/2 (softmax) or 1/4 (sigmoid) of the largest
    eigenvalue of `Z^T Z / N` with weighted rows, here by 20 power iterations, plus the decay.
    """
    import torch

    v, w = torch.ones(Z.shape[1], device=Z.device), torch.from_numpy(shares.astype(np.float32)).to(Z.device)
    eigenvalue = 1.0
    for _ in range(20):
        v = Z.T @ (w * (Z @ (v / v.norm()))) / len(Z)
        eigenvalue = float(v.norm())
    bound = (0.25 if task.several else 0.5) * max(eigenvalue, 1.0) + decay
    return 0.5 * (1 + momentum) / bound


def _train(
    Z: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, decays: torch.Tensor, sgd: _Sgd, several: bool
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Train `F x S` heads at once: every mask `[N, F]` with every decay `[S]`, on the same batches.

    Returns weight `[F, S, C, D]`, bias `[F, S, C]`, and each epoch's mean training loss `[epochs, F, S]`.
    """
    import torch

    (count, size), classes = Z.shape, targets.shape[1]
    shape = (masks.shape[1], len(decays), classes)
    generator = torch.Generator().manual_seed(sgd.seed)
    # nn.Linear's own initialisation, the same for every fold and decay
    bound = size**-0.5
    weight = (torch.rand((classes, size), generator=generator) * 2 - 1) * bound
    bias = (torch.rand(classes, generator=generator) * 2 - 1) * bound
    weight, bias = weight.to(Z.device).repeat(*shape[:2], 1, 1), bias.to(Z.device).repeat(*shape[:2], 1)
    pushed, pushed_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    targets = targets * (1 - sgd.label_smoothing) + sgd.label_smoothing / (2 if several else classes)
    steps = -(-count // sgd.batch_size)
    curve = torch.zeros((sgd.epochs, *shape[:2]), device=Z.device)
    seen = torch.zeros(shape[0], device=Z.device)

    with torch.inference_mode():
        for step in range(sgd.epochs * steps):
            epoch, batch = divmod(step, steps)
            if batch == 0:
                order = torch.randperm(count, generator=generator).to(Z.device)
                seen.zero_()
            numbers = order[batch * sgd.batch_size : (batch + 1) * sgd.batch_size]
            z, wanted, m = Z[numbers], targets[numbers][:, None, None, :], masks[numbers]

            logits = (z @ weight.reshape(-1, size).T).reshape(len(numbers), *shape) + bias
            probability, loss = _answered(logits, wanted, several)
            total = m.sum(dim=0).clamp_min(1e-12)
            curve[epoch] += (loss.sum(dim=-1) * m[:, :, None]).sum(dim=0)
            seen += m.sum(dim=0)

            residual = (probability - wanted) * (m / total)[:, :, None, None]
            gradient = (residual.reshape(len(numbers), -1).T @ z).reshape(weight.shape)
            pushed.mul_(sgd.momentum).add_(gradient).add_(weight * decays[None, :, None, None])
            pushed_bias.mul_(sgd.momentum).add_(residual.sum(dim=0))
            weight.sub_(sgd.rate(step, steps) * pushed)
            bias.sub_(sgd.rate(step, steps) * pushed_bias)
            if batch == steps - 1:
                curve[epoch] /= seen[:, None]
    if not torch.isfinite(weight).all():
        raise HeadError(f"training diverged with a learning rate of {sgd.lr:g}; give a smaller one")
    return weight, bias, curve.cpu().numpy()


def _answered(logits: torch.Tensor, wanted: torch.Tensor, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and each class's part of the cross-entropy with the targets `wanted`."""
    import torch

    if several:
        return torch.sigmoid(logits), torch.nn.functional.softplus(logits) - logits * wanted
    log_probability = torch.log_softmax(logits, dim=-1)
    return log_probability.exp(), -log_probability * wanted
