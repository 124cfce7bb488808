"""Owns the linear head trained by SGD in torch, as the transfer-learning tutorials do; GPU when there is one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featx import metrics
from featx.devices import choose_device
from featx.errors import HeadError
from featx.head import Fitted
from featx.solvers import training as _training
from featx.solvers.training import Rows, Task
from featx.text import near

if TYPE_CHECKING:
    import torch

# Of the mean loss: scikit-learn's C is 1 / (N * decay).
DECAYS = tuple(np.logspace(-4, 1, 11))
# What holds where neither the caller nor a recipe says otherwise. Without a rate or a decay, the data choose.
DEFAULTS: dict[str, Any] = {
    "epochs": 60,
    "batch_size": 64,
    "lr": None,
    "schedule": "cosine",
    "weight_decay": None,
    "standardise": True,
}
# `--recipe tutorial`: the schedule of the five write-ups, on features as they come
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {
        "epochs": 25,
        "batch_size": 4,
        "lr": 0.001,
        "schedule": "step",
        "weight_decay": 0.0,
        "standardise": False,
    }
}


def fit(
    X: Rows,
    y: np.ndarray,
    class_names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    scored: np.ndarray | None = None,
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
    class_weight: str | None = None,
    calibrate: bool = False,
    threshold: float | None = None,
    reject: float | None = None,
) -> Fitted:
    """Minimise the mean cross-entropy `+ weight_decay / 2 * ||W||^2` by SGD with momentum.

    X: float `[N, D]`; y: `int [N]`, or 0/1 `[N, C]` for several labels per image (one sigmoid each).
    lr: None for the largest step that the data's curvature allows with momentum; schedule: `cosine` (to 0
    over all steps), `step` (times `gamma` every `step_size` epochs) or `constant`. weight_decay: None
    chooses among `DECAYS` by log-loss over `folds` stratified folds, equal `groups` (`int [N]`) together;
    `scored` (`bool [N]`) names the rows that count when held out, for the decay, calibration and rejection.
    All folds and decays are trained at once, on the same batches. recipe: `tutorial` is SGD 0.001, momentum
    0.9, StepLR(7, 0.1), 25 epochs of batches of 4, on unscaled features; what is given beside it wins. None,
    for a setting in `DEFAULTS`, is the recipe's, or else that one. The same seed gives the same head on the
    same machine.
    Raises `HeadError`.
    """
    import torch

    started = time.perf_counter()
    if recipe is not None and recipe not in RECIPES:
        raise HeadError(f"unknown recipe {recipe!r}; there is {', '.join(RECIPES)}.{near(recipe, RECIPES)}")
    own = DEFAULTS | (RECIPES[recipe] if recipe else {})
    epochs = own["epochs"] if epochs is None else epochs
    batch_size = own["batch_size"] if batch_size is None else batch_size
    lr = own["lr"] if lr is None else lr
    schedule = own["schedule"] if schedule is None else schedule
    weight_decay = own["weight_decay"] if weight_decay is None else weight_decay
    standardise = own["standardise"] if standardise is None else standardise
    if schedule not in ("cosine", "step", "constant"):
        raise HeadError(f"schedule is cosine, step or constant, not {schedule!r}")
    if epochs < 1 or batch_size < 1 or not 0 <= momentum < 1 or not 0 <= label_smoothing < 1:
        raise HeadError("epochs and batch_size are at least 1, momentum and label_smoothing in [0, 1)")
    task = _training.check(X, y, class_names)
    if not standardise:
        scale = np.where(np.isinf(task.scale), np.inf, 1.0)  # constant columns stay out here too
        task = Task(task.X, task.y, task.class_names, 0 * task.mean, scale, task.notes)
    fold, notes = _training.folds(task.y, folds, groups=groups, seed=seed)
    held = np.flatnonzero(_training.counted(fold >= 0, scored))
    info: dict[str, Any] = {"notes": [*task.notes, *notes]}
    decays = np.array(DECAYS if weight_decay is None else [weight_decay])
    if weight_decay is None and not len(held):
        decays = decays[len(decays) // 2 :][:1]
        info["notes"].append(f"weight decay {decays[0]:g} was taken without measuring")
    measure = len(held) > 0 and (len(decays) > 1 or calibrate or reject is not None or threshold is not None)
    where = choose_device(device)
    Z = torch.from_numpy(task.standard()).to(where)

    count = int(fold.max()) + 1 if measure else 0
    masks = np.stack([fold != k for k in range(count)] + [np.ones(len(fold), bool)], axis=1)
    row_weights = _training.class_weights(task, class_weight)
    masks = masks * (1.0 if row_weights is None else row_weights[:, None])
    lr = _largest_step(task, Z, momentum, float(decays.max())) if lr is None else lr
    weight, bias, curve = _train(
        Z,
        torch.from_numpy(task.one_hot()).to(where),
        torch.from_numpy(masks.astype(np.float32)).to(where),
        torch.from_numpy(decays.astype(np.float32)).to(where),
        several=task.several,
        seed=seed,
        epochs=epochs,
        batch_size=min(batch_size, len(fold)),
        lr=lr,
        momentum=momentum,
        schedule=schedule,
        step_size=step_size,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )
    best, held_out = 0, None
    if measure:
        logits = torch.empty((len(decays), len(fold), len(task.class_names)))
        for k in range(count):
            rows = torch.from_numpy(np.flatnonzero(fold == k)).to(where)
            part = torch.einsum("nd,scd->snc", Z[rows], weight[k]) + bias[k][:, None]
            logits[:, rows.cpu()] = part.cpu()
        each = metrics.binary_losses if task.several else metrics.losses
        per_decay = np.array([each(part[held].numpy(), task.y[held]).mean() for part in logits])
        best = int(np.argmin(per_decay))
        held_out = logits[best, held].numpy()
        info["cross_validation"] = {
            "weight_decays": decays.tolist(),
            "log_loss": per_decay.tolist(),
            "folds": count,
        }
        if len(decays) > 1 and best in (0, len(decays) - 1):
            info["notes"].append(f"the best weight decay, {decays[best]:g}, is at the end of the grid")
    head = task.head(weight[-1, best].cpu().numpy(), bias[-1, best].cpu().numpy())
    head = _training.finish(head, task, info, held_out, held, calibrate=calibrate, threshold=threshold, reject=reject)
    info |= {
        "weight_decay": float(decays[best]),
        "lr": lr,
        "training_loss": curve[:, -1, best].tolist(),
        "device": str(Z.device),
        "seconds": time.perf_counter() - started,
    }
    return Fitted(head, info)


def _largest_step(task: Task, Z: torch.Tensor, momentum: float, decay: float) -> float:
    """Heavy-ball SGD is stable below `2 (1 + momentum) / L`; a quarter of it leaves room for batch noise.

    L, the largest curvature of the mean loss, is at most 1/2 (softmax) or 1/4 (sigmoid) of the largest
    eigenvalue of `Z^T Z / N`, here by 20 power iterations, plus the decay.
    """
    import torch

    v = torch.ones(Z.shape[1], device=Z.device)
    eigenvalue = 1.0
    for _ in range(20):
        v = Z.T @ (Z @ (v / v.norm())) / len(Z)
        eigenvalue = float(v.norm())
    bound = (0.25 if task.several else 0.5) * max(eigenvalue, 1.0) + decay
    return 0.5 * (1 + momentum) / bound


def _train(
    Z: torch.Tensor,
    targets: torch.Tensor,
    masks: torch.Tensor,
    decays: torch.Tensor,
    *,
    several: bool,
    seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    schedule: str,
    step_size: int,
    gamma: float,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Train `F x S` heads at once: every mask `[N, F]` with every decay `[S]`, on the same batches.

    Returns weight `[F, S, C, D]`, bias `[F, S, C]`, and each epoch's mean training loss `[epochs, F, S]`.
    """
    import torch

    (count, size), classes = Z.shape, targets.shape[1]
    shape = (masks.shape[1], len(decays), classes)
    generator = torch.Generator().manual_seed(seed)
    # nn.Linear's own initialisation, the same for every fold and decay
    bound = size**-0.5
    weight = (torch.rand((classes, size), generator=generator) * 2 - 1) * bound
    bias = (torch.rand(classes, generator=generator) * 2 - 1) * bound
    weight, bias = weight.to(Z.device).repeat(*shape[:2], 1, 1), bias.to(Z.device).repeat(*shape[:2], 1)
    pushed, pushed_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    targets = targets * (1 - label_smoothing) + label_smoothing / (2 if several else classes)
    steps = -(-count // batch_size)
    curve = torch.zeros((epochs, *shape[:2]), device=Z.device)
    seen = torch.zeros(shape[0], device=Z.device)
    with torch.inference_mode():
        for epoch in range(epochs):
            order = torch.randperm(count, generator=generator).to(Z.device)
            seen.zero_()
            for step in range(steps):
                rate = lr
                if schedule == "step":
                    rate = lr * gamma ** (epoch // step_size)
                elif schedule == "cosine":
                    rate = lr * 0.5 * (1 + np.cos(np.pi * (epoch * steps + step) / (epochs * steps)))
                rows = order[step * batch_size : (step + 1) * batch_size]
                z, t, m = Z[rows], targets[rows], masks[rows]
                logits = (z @ weight.reshape(-1, size).T).reshape(len(rows), *shape) + bias
                wanted = t[:, None, None, :]
                if several:
                    probability = torch.sigmoid(logits)
                    loss = torch.nn.functional.softplus(logits) - logits * wanted
                else:
                    log_probability = torch.log_softmax(logits, dim=-1)
                    probability = log_probability.exp()
                    loss = -log_probability * wanted
                total = m.sum(dim=0).clamp_min(1e-12)
                curve[epoch] += (loss.sum(dim=-1) * m[:, :, None]).sum(dim=0)
                seen += m.sum(dim=0)
                residual = (probability - wanted) * (m / total)[:, :, None, None]
                gradient = (residual.reshape(len(rows), -1).T @ z).reshape(weight.shape)
                pushed.mul_(momentum).add_(gradient).add_(weight * decays[None, :, None, None])
                pushed_bias.mul_(momentum).add_(residual.sum(dim=0))
                weight.sub_(rate * pushed)
                bias.sub_(rate * pushed_bias)
            curve[epoch] /= seen[:, None]
    if not torch.isfinite(weight).all():
        raise HeadError(f"training diverged with a learning rate of {lr:g}; give a smaller one")
    return weight, bias, curve.cpu().numpy()
