"""`FinetuneConfig`, the settings of fine-tuning, and published recipes by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, ParamSpec, Protocol, get_args, get_origin, get_type_hints

from featx.errors import TrainingError
from featx.finetuning.augment import Augmentation
from featx.options import fits, plain
from featx.text import near

P = ParamSpec("P")

# Settings that differ from the defaults. `tutorial`: the schedule of the transfer-learning write-ups.
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


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a network is trained further: all settings that decide the result, none that depends on the machine."""

    mode: Literal["full", "partial", "scratch"] = "full"
    """`full` trains every layer, `partial` freezes some, `scratch` starts from random weights."""
    init: Literal["fitted", "random"] = "fitted"
    """Where the head starts: `fitted` on the cached features first, or `random` as in the tutorials.
    Fitted is better on the same and on other data (Kumar et al. 2022, arXiv 2202.10054)."""
    freeze_until: str | None = None
    """The first group that is trained; those before it are frozen. For `partial` only; by default the last
    group before the head, unless `freeze` is given."""
    freeze: tuple[str, ...] = ()
    """Further groups to freeze, wherever they are. For `partial` only."""
    freeze_norm: bool = False
    """Batch norm keeps its stored statistics in trained groups too; its scale and shift still train."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum, or `adamw`."""
    lr: float | None = None
    """Learning rate before the schedule; None is 0.001 for SGD and 0.0001 for AdamW."""
    lrs: dict[str, float] = field(default_factory=dict)
    """Learning rates of single groups, instead of `lr` and `layer_decay`."""
    layer_decay: float = 1.0
    """Each group's learning rate as a share of the next one's, counted from the head; in (0, 1]."""
    momentum: float = 0.9
    """SGD's; in [0, 1)."""
    weight_decay: float = 0.0
    """For matrices and kernels; biases and norms have none."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """`cosine` (to 0, each step), `step` (times `gamma` every `step_size` epochs) or `constant`."""
    warmup: float = 1.0
    """Epochs of linear increase before the schedule."""
    step_size: int = 7
    """Epochs between two steps of the schedule `step`."""
    gamma: float = 0.1
    """The factor at each of them; in (0, 1]."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step, over all processes and accumulated parts; batches differ by at most one image."""
    accumulate: int = 1
    """Parts that a batch is split into, to save memory. Batch norm sees the parts."""
    label_smoothing: float = 0.0
    """As in `torch.nn.CrossEntropyLoss`; in [0, 1)."""
    class_weight: str | dict[str, float] | None = None
    """`balanced` (N / (C * images of the class)), weights by class name (1 where left out), or None."""
    augment: str | None = None
    """See `featx.finetuning.augment.Augmentation`; None is `crop-flip`, or `views` with a cached prefix."""
    min_area: float = 0.25
    """Smallest crop of `crop-flip`, as a share of the image's area; the tutorials take 0.08."""
    views: int = 4
    """Fixed crops per image, for the augmentation `views`."""
    cache_prefix: bool = False
    """Run the frozen layers once per view and keep their activations (float16) in the cache."""
    prefix_gb: float = 20.0
    """Most disk that the activations may take, in 1e9 bytes."""
    select: Literal["holdout", "val", "last"] = "holdout"
    """Which images choose the epoch: `holdout` (a part of the training images), `val` (the validation images,
    as the tutorials do: the result then looks better than it is), or `last` (none)."""
    holdout: float = 0.15
    """Share of the training images that is held out, by content hash; in (0, 0.5]."""
    patience: int | None = None
    """Stop after so many epochs without a better one; None runs all."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the passes: `fp32`, `bf16`, or `fp16` on a GPU (with a scaled loss)."""
    channels_last: bool = True
    """Memory layout of maps: faster on nearly every machine."""
    compile: bool = False
    """Use `torch.compile`: minutes at the start, faster steps on a GPU."""
    seed: int = 0
    """For everything that is drawn."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        if isinstance(self.freeze, str | list):
            object.__setattr__(self, "freeze", (self.freeze,) if isinstance(self.freeze, str) else tuple(self.freeze))
        for name, kind in get_type_hints(FinetuneConfig).items():
            given, known = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and given not in known:
                raise TrainingError(f"{name} is {', '.join(known)}, not {given!r}.{near(str(given), known)}")
            if not fits(given, kind):
                raise TrainingError(f"{name} is {self.__annotations__[name]}, not {given!r}")
        for name in ("epochs", "batch_size", "accumulate", "step_size", "views"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is at least 1, not {getattr(self, name)}")

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
        steps = self.steps
        if self.cache_prefix and (steps.geometry not in ("none", "views") or steps.policies):
            raise TrainingError(f"a cached prefix sees fixed pixels: augment is views or none, not {self.augment!r}")
        if self.select == "last" and self.patience is not None:
            raise TrainingError("patience needs images to measure on; select is last")

    @property
    def rate(self) -> float:
        """The learning rate of the head, before the schedule."""
        return self.lr if self.lr is not None else {"sgd": 1e-3, "adamw": 1e-4}[self.optimizer]

    @property
    def steps(self) -> Augmentation:
        """The augmentation. Raises `TrainingError` for unknown steps."""
        return Augmentation.parse(self.augment or ("views" if self.cache_prefix else "crop-flip"))

    def factor(self, step: int, steps: int) -> float:
        """The factor on learning rates at `step`, counted over all epochs of `steps` each."""
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


class Configure(Protocol[P]):
    def __call__(self, recipe: str | None = None, /, *unnamed: P.args, **chosen: P.kwargs) -> FinetuneConfig: ...


def _from_recipes(make: Callable[P, FinetuneConfig]) -> Configure[P]:
    """`make` with a recipe before its own settings, which mypy and editors know by their types."""

    def configure(recipe: str | None = None, /, *unnamed: P.args, **chosen: P.kwargs) -> FinetuneConfig:
        """A `FinetuneConfig` from a recipe's name and the settings that differ from it. Raises `TrainingError`."""
        if recipe is not None and recipe not in RECIPES:
            raise TrainingError(f"unknown recipe {recipe!r}; there is {', '.join(RECIPES)}.{near(recipe, RECIPES)}")

        known = [f.name for f in fields(FinetuneConfig)]
        for name in chosen:
            if name not in known:
                raise TrainingError(f"unknown setting {name!r}; there are {', '.join(known)}.{near(name, known)}")

        return make(*unnamed, **{**(RECIPES[recipe] if recipe else {}), **chosen})

    return configure


configure = _from_recipes(FinetuneConfig)
