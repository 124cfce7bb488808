"""The network that fine-tuning trains: a trunk with its new head, layer groups, and their learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featx.backbones.backbone import Backbone
from featx.errors import TrainingError
from featx.finetuning.recipes import FinetuneConfig
from featx.head import Head
from featx.text import near

HEAD = "head"


@dataclass(frozen=True)
class Group:
    """One layer group and how it is trained."""

    name: str
    modules: tuple[str, ...]
    """Names in `Tuned` of modules, or of single parameters."""
    parameters: tuple[str, ...]
    """Names in `Tuned`, each in one group only."""
    size: int
    """Number of values in `parameters`."""
    lr: float | None
    """The learning rate before its schedule; None where frozen."""


class Tuned(nn.Module):
    """A backbone's trunk and a linear head: `uint8 [B, 3, H, W]` -> logits `float32 [B, C]`.

    `suffix`, where it is set, replaces the trunk: the part of it that follows the cached activations,
    which shares its modules (`featx.finetuning.prefix`).
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear, *, freeze_norm: bool = False) -> None:
        """freeze_norm: keep the statistics of batch norm in trained groups too."""
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.freeze_norm = freeze_norm
        self.suffix: nn.Module | None = None
        self.groups: list[Group] = []
        """As planned by `plan`, from the input to the head."""

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.trunk(inputs) if self.suffix is None else self.suffix(inputs)
        # the head keeps full precision under autocast: it is a thousandth of the work
        with torch.autocast(inputs.device.type, enabled=False):
            logits: Tensor = self.head(features.float())
        return logits

    def train(self, mode: bool = True) -> Tuned:
        """Put the network into training mode, but what is frozen into eval mode.

        The batch norm of a frozen group thus uses its stored statistics, which do not move, and its
        dropout drops nothing.
        """
        super().train(mode)
        modules = dict(self.named_modules())
        frozen = [modules.get(name) for group in self.groups if group.lr is None for name in group.modules]
        if self.freeze_norm:
            frozen += [m for m in modules.values() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for module in frozen:
            if module is not None:  # the name is a single parameter's, such as cls_token
                module.eval()
        return self


def make_linear(head: Head | None, features: int, classes: int, seed: int) -> nn.Linear:
    """The last layer: with a fitted head's weights, or with `nn.Linear`'s initialisation drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(features, classes)
    if head is not None:
        layer.load_state_dict({"weight": torch.tensor(head.weight), "bias": torch.tensor(head.bias)})
    return layer


def find_replaced(backbone: Backbone) -> set[str]:
    """The names in the network of the layer that the head replaces: `fc`, `classifier.6`, `heads.head`."""
    kept = dict(backbone.module.network.named_parameters())
    return {name.rpartition(".")[0] for name, _ in backbone.network.named_parameters() if name not in kept}


def plan(
    network: Tuned,
    groups: list[tuple[str, list[str]]],
    aliases: Iterable[str],
    settings: FinetuneConfig,
    unreached: Iterable[str] = (),
) -> list[Group]:
    """Decide what is trained; set `network.groups` and every `requires_grad` accordingly.

    groups: as in `Backbone.groups`. aliases: further names for `head`. A group without a rate of its own in
    `settings.lrs` gets `rate * layer_decay ** distance`; the head's distance is 0, its neighbour's 1.
    unreached: parameters that no gradient reaches (beyond the layer that is tapped); they are left out.

    Returns the groups from the input to the head. Raises `TrainingError` for unknown names (the list is
    shown), a learning rate for a frozen group, and a frozen head.
    """
    members = [(name, tuple(f"trunk.network.{p}" for p in prefixes)) for name, prefixes in groups] + [(HEAD, (HEAD,))]
    names = [name for name, _ in members]
    frozen, rates = _choose(names, set(aliases) - set(names), settings)

    left_out = set(unreached)
    named = {path: parameter for path, parameter in network.named_parameters() if path not in left_out}
    network.requires_grad_(False)
    planned = []
    for distance, (name, modules) in enumerate(reversed(members)):
        mine = {path: p for path, p in named.items() if any(f"{path}.".startswith(f"{m}.") for m in modules)}
        rate = None if name in frozen else rates.get(name, settings.rate * settings.layer_decay**distance)
        for parameter in mine.values():
            parameter.requires_grad_(rate is not None)
        planned.append(Group(name, modules, tuple(mine), sum(p.numel() for p in mine.values()), rate))

    network.groups = planned[::-1]
    return network.groups


def _choose(names: list[str], aliases: set[str], settings: FinetuneConfig) -> tuple[set[str], dict[str, float]]:
    """Names of the groups that are frozen, and the learning rates given by group."""

    def known(name: str) -> str:
        if name in aliases:
            return HEAD
        if name not in names:
            also = f" ({', '.join(sorted(aliases))} means head)" if aliases else ""
            raise TrainingError(
                f"unknown layer group {name!r}; from the input on there are {', '.join(names)}{also}."
                f"{near(name, [*names, *aliases])}"
            )
        return name

    frozen, until = {known(name) for name in settings.freeze}, settings.freeze_until
    if settings.mode == "partial" and until is None and not frozen:
        until = names[-2]  # the last group before the head
    if until is not None:
        frozen |= set(names[: names.index(known(until))])
    if HEAD in frozen:
        raise TrainingError("the head is always trained; freeze other groups")

    rates: dict[str, float] = {}
    for name, rate in settings.lrs.items():
        group = known(name)
        if group in frozen:
            raise TrainingError(f"group {name!r} is frozen and has a learning rate of {rate:g}; drop one of the two")
        if group in rates:
            raise TrainingError(f"group {group!r} has two learning rates, one of them as {name!r}")
        rates[group] = rate
    return frozen, rates


def find_unreached(network: Tuned, crop: int) -> list[str]:
    """The parameters that get no gradient from one image: those beyond a tapped layer.

    Runs in eval mode, on the CPU, and leaves nothing behind.
    """
    network.eval()
    logits = network(torch.zeros((1, 3, crop, crop), dtype=torch.uint8))
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]


def format_table(planned: list[Group]) -> str:
    """A table of what is trained, one line per group."""
    width = max(len(group.name) for group in planned)
    rows = [(g.name, f"{g.size:,}", "frozen" if g.lr is None else f"{g.lr:.3g}") for g in planned]
    lines = [f"{a:<{width}}  {b:>12}  {c}" for a, b, c in [("group", "parameters", "learning rate"), *rows]]
    trained = sum(group.size for group in planned if group.lr is not None)
    lines.append(f"{trained:,} of {sum(group.size for group in planned):,} parameters are trained")
    return "\n".join(lines)
