"""Owns `FinetuneConfig`, what fine-tuning is asked for, and the published recipes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_type_hints

from featx.errors import TrainingError
from featx.finetuning.augment import Augmentation
from featx.kinds import fits
from featx.text import near

MODES = ("full", "partial", "scratch")
# Each is what differs from the defaults. `tutorial`: the schedule of the transfer-learning write-ups.
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {
        "init": "random",
        "lr": 0.001,
        "schedule": "step",
        "warmup": 0.0,
        "epochs": 25,
        "batch_size": 4,
        "min_area": 0.08,
        "select": "val",
    }
}


@dataclass(frozen=True)
class FinetuneConfig:
    """How a network is trained further. All of it decides the result; none of it depends on the machine."""

    mode: str = "full"
    """`full` trains every layer, `partial` freezes some, `scratch` starts from random weights."""
    init: str = "fitted"
    """Where the head starts: `fitted` on the cached features first, or `random` as in the tutorials.
    Fitted is better on the same and on other data (Kumar et al. 2022, arXiv 2202.10054)."""
    freeze_until: str | None = None
    """Groups before this one are frozen; it and what follows is trained. `partial` alone; by default the
    last group before the head."""
    freeze: tuple[str, ...] = ()
    """Further groups to freeze, wherever they are. `partial` alone."""
    freeze_norm: bool = False
    """Batch norm keeps its stored statistics in trained groups too; its scale and shift still train."""
    optimizer: str = "sgd"
    """`sgd` with momentum, or `adamw`."""
    lr: float | None = None
    """Before the schedule; None is 0.001 for SGD and 0.0001 for AdamW."""
    lrs: dict[str, float] = field(default_factory=dict)
    """Learning rates of single groups, instead of `lr` and `layer_decay`."""
    layer_decay: float = 1.0
    """Each group's learning rate as a share of the next one's, counted from the head; in (0, 1]."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Of matrices and kernels; biases and norms have none."""
    schedule: str = "cosine"
    """`cosine` (to 0, each step), `step` (times `gamma` every `step_size` epochs) or `constant`."""
    warmup: float = 1.0
    """Epochs of linear increase before it."""
    step_size: int = 7
    """Epochs; of `step`."""
    gamma: float = 0.1
    """Of `step`."""
    epochs: int = 10
    """Over the training images."""
    batch_size: int = 32
    """Images a step, over all processes and accumulated parts; batches differ by at most one image."""
    accumulate: int = 1
    """Parts that a batch is passed through in, for memory. Batch norm sees the parts."""
    label_smoothing: float = 0.0
    """In [0, 1)."""
    class_weight: str | dict[str, float] | None = None
    """`balanced` (N / (C * images of the class)), weights by class name (1 where left out), or None."""
    augment: str | None = None
    """See `featx.finetuning.augment.Augmentation`; None is `crop-flip`, or `views` with a cached prefix."""
    min_area: float = 0.25
    """Smallest crop of `crop-flip`, of the image's area; the tutorials take 0.08."""
    views: int = 4
    """Fixed crops an image; of `views`."""
    cache_prefix: bool = False
    """Run the frozen layers once a view and keep their activations (float16) in the cache."""
    prefix_gb: float = 20.0
    """Most disk that they may take, in 1e9 bytes."""
    select: str = "holdout"
    """What chooses the epoch: `holdout` (a part of the training images), `val` (the validation images, as
    the tutorials do: the result then looks better than it is), or `last` (none)."""
    holdout: float = 0.15
    """Its share of the training images, by content hash; in (0, 0.5]."""
    patience: int | None = None
    """Stop after so many epochs without a better one; None goes through all."""
    precision: str = "fp32"
    """Arithmetic of the passes: `fp32`, `bf16`, or `fp16` on a GPU (with a scaled loss)."""
    channels_last: bool = True
    """Memory layout of maps: faster on nearly every machine."""
    compile: bool = False
    """Through `torch.compile`: minutes at the start, faster steps on a GPU."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        given_as = (self.freeze,) if isinstance(self.freeze, str) else self.freeze
        object.__setattr__(self, "freeze", tuple(given_as))
        for name, kind in get_type_hints(FinetuneConfig).items():
            if not fits(getattr(self, name), kind):
                raise TrainingError(f"{name} is {self.__annotations__[name]}, not {getattr(self, name)!r}")
        choices = {
            "mode": MODES,
            "init": ("fitted", "random"),
            "optimizer": ("sgd", "adamw"),
            "schedule": ("cosine", "step", "constant"),
            "select": ("holdout", "val", "last"),
            "precision": ("fp32", "bf16", "fp16"),
        }
        for name, known in choices.items():
            given = getattr(self, name)
            if given not in known:
                raise TrainingError(f"{name} is {', '.join(known)}, not {given!r}.{near(str(given), known)}")
        for name, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("step_size", 1), ("views", 1)):
            if getattr(self, name) < low:
                raise TrainingError(f"{name} is at least {low}, not {getattr(self, name)}")
        rates = {"lr": self.rate, **{f"lr of {name}": rate for name, rate in self.lrs.items()}}
        for name, rate in rates.items():
            if not isinstance(rate, int | float) or not 0 < rate < float("inf"):
                raise TrainingError(f"{name} is above 0, not {rate}; to train nothing of a group, freeze it")
        bounds = {
            "layer_decay": 0 < self.layer_decay <= 1,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "warmup": 0 <= self.warmup <= self.epochs,
            "gamma": 0 < self.gamma <= 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "min_area": 0 < self.min_area <= 1,
            "prefix_gb": self.prefix_gb > 0,
            "holdout": 0 < self.holdout <= 0.5,
            "patience": self.patience is None or self.patience >= 1,
            "class_weight": self.class_weight in (None, "balanced") or isinstance(self.class_weight, dict),
        }
        for name, good in bounds.items():
            if not good:
                raise TrainingError(f"{name} is out of range: {getattr(self, name)!r}")
        if self.mode != "partial" and (self.freeze_until is not None or self.freeze):
            raise TrainingError(f"mode {self.mode} freezes nothing; use partial, or leave out what to freeze")
        if self.mode == "scratch" and self.init != "random":
            object.__setattr__(self, "init", "random")  # no fitted head fits features that do not exist yet
        if self.cache_prefix and self.mode != "partial":
            raise TrainingError(f"a cached prefix needs frozen layers, so mode partial, not {self.mode}")
        steps = Augmentation.parse(self.augmentation)
        if self.cache_prefix and (steps.geometry not in ("none", "views") or steps.policies):
            raise TrainingError(f"a cached prefix sees fixed pixels: augment is views or none, not {self.augment!r}")
        if self.select == "last" and self.patience is not None:
            raise TrainingError("patience needs images to measure on; select is last")

    @property
    def rate(self) -> float:
        """The learning rate of the head, before the schedule."""
        return self.lr if self.lr is not None else {"sgd": 1e-3, "adamw": 1e-4}[self.optimizer]

    @property
    def augmentation(self) -> str:
        return self.augment or ("views" if self.cache_prefix else "crop-flip")

    def factor(self, step: int, steps: int) -> float:
        """What learning rates are multiplied by at `step`, counted over all epochs of `steps` each."""
        at = step / steps
        if at < self.warmup:
            return (step + 1) / (self.warmup * steps) if self.warmup * steps > 1 else 1.0
        if self.schedule == "step":
            return self.gamma ** (step // steps // self.step_size)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (at - self.warmup) / (self.epochs - self.warmup)))
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"freeze": list(self.freeze)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        return cls(**{**values, "freeze": tuple(values.get("freeze", ()))})


def configure(recipe: str | None = None, **chosen: Any) -> FinetuneConfig:
    """A configuration from a recipe's name and what differs from it. Raises `TrainingError`."""
    if recipe is not None and recipe not in RECIPES:
        raise TrainingError(f"unknown recipe {recipe!r}; there is {', '.join(RECIPES)}.{near(recipe, RECIPES)}")
    known = [f.name for f in fields(FinetuneConfig)]
    for name in chosen:
        if name not in known:
            raise TrainingError(f"unknown setting {name!r}; there are {', '.join(known)}.{near(name, known)}")
    return FinetuneConfig(**{**(RECIPES[recipe] if recipe else {}), **chosen})
