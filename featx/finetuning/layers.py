"""Owns what fine-tuning trains: the network with its new head, its layer groups, and their learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from featx.backbones.backbone import Backbone
from featx.errors import TrainingError
from featx.head import Head
from featx.text import near

HEAD = "head"
_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Tuned(nn.Module):
    """A backbone's trunk and a linear head: `uint8 [B, 3, H, W]` -> logits `float32 [B, C]`.

    `suffix`, where it is set, stands in for the trunk: the part of it that follows the cached
    activations, sharing its modules (`featx.finetuning.prefix`).
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.suffix: nn.Module | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.trunk(inputs) if self.suffix is None else self.suffix(inputs)
        # the head keeps full precision under autocast: it is a thousandth of the work
        with torch.autocast(inputs.device.type, enabled=False):
            return self.head(features.float())


@dataclass(frozen=True)
class Group:
    """One layer group and how it is trained."""

    name: str
    parameters: tuple[str, ...]
    """Names in `Tuned`, each in one group only."""
    size: int
    """Number of trained values, or of values that stay where frozen."""
    lr: float | None
    """The learning rate before its schedule; None where frozen."""


def linear(head: Head | None, features: int, classes: int, seed: int) -> nn.Linear:
    """The last layer: a fitted head's own weights, or `nn.Linear`'s initialisation drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(features, classes)
    if head is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.array(head.weight)))
            layer.bias.copy_(torch.from_numpy(np.array(head.bias)))
    return layer


def replaced_names(backbone: Backbone) -> set[str]:
    """What the layer that the head replaces is called in the network: `fc`, `classifier.6`, `heads.head`."""
    kept = {name for name, _ in backbone.module.network.named_parameters()}
    left_out = {name for name, _ in backbone.network.named_parameters()} - kept
    return {name.rpartition(".")[0] for name in left_out}


def plan(
    network: Tuned,
    groups: list[tuple[str, list[str]]],
    aliases: Iterable[str],
    *,
    lr: float,
    lrs: Mapping[str, float],
    layer_decay: float,
    freeze_until: str | None,
    freeze: Iterable[str],
    unreached: Iterable[str] = (),
) -> list[Group]:
    """Decide what is trained, and set `requires_grad` accordingly.

    groups: as in `Backbone.groups`. aliases: further names for `head`. freeze_until: the groups before
    this one are frozen, itself and what follows is trained. lrs: learning rates by group; the others get
    `lr * layer_decay ** distance`, where the head's distance is 0 and its neighbour's 1.
    unreached: parameters that no gradient reaches (beyond the layer that is tapped); they are left out.

    Returns the groups from the input to the head. Raises `TrainingError` for unknown names (the list is
    shown), a learning rate for a frozen group, and a frozen head.
    """
    names = [name for name, _ in groups] + [HEAD]
    frozen, rates = _chosen(names, set(aliases) - set(names), lrs, freeze_until, freeze)

    prefix_of = [(f"trunk.network.{p}", name) for name, prefixes in groups for p in prefixes]
    prefix_of.append(("head", HEAD))
    left_out = set(unreached)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in names}
    for path, parameter in network.named_parameters():
        owner = next((g for p, g in prefix_of if path == p or path.startswith(p + ".")), None)
        parameter.requires_grad_(owner is not None and owner not in frozen and path not in left_out)
        if owner is not None and path not in left_out:
            members[owner].append((path, parameter))

    planned = []
    for distance, name in enumerate(reversed(names)):
        size = sum(p.numel() for _, p in members[name])
        given = None if name in frozen else rates.get(name, lr * layer_decay**distance)
        planned.append(Group(name, tuple(path for path, _ in members[name]), size, given))
    return planned[::-1]


def _chosen(
    names: list[str], aliases: set[str], lrs: Mapping[str, float], freeze_until: str | None, freeze: Iterable[str]
) -> tuple[set[str], dict[str, float]]:
    """The groups that are frozen, and the learning rates given by group."""

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

    frozen = {known(name) for name in freeze}
    if freeze_until is not None:
        frozen |= set(names[: names.index(known(freeze_until))])
    if HEAD in frozen:
        raise TrainingError("the head is always trained; freeze other groups")
    rates: dict[str, float] = {}
    for name, rate in lrs.items():
        group = known(name)
        if group in frozen:
            raise TrainingError(f"group {name!r} is frozen and has a learning rate of {rate:g}; drop one of the two")
        if group in rates:
            raise TrainingError(f"group {group!r} has two learning rates, one of them as {name!r}")
        rates[group] = rate
    return frozen, rates


def unreached(network: Tuned, crop: int) -> list[str]:
    """The parameters that get no gradient from one image: those beyond a tapped layer.

    Runs in eval mode, on the CPU, and leaves nothing behind.
    """
    network.eval()
    logits = network(torch.zeros((1, 3, crop, crop), dtype=torch.uint8))
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]


def train_mode(network: Tuned, groups: list[tuple[str, list[str]]], planned: list[Group], norms: bool) -> None:
    """Put the network into training mode, and what is frozen into eval mode.

    A frozen group's batch norm thus keeps using its stored statistics, which do not move, and its
    dropout drops nothing. norms: freeze the statistics of every other batch norm too.
    """
    network.train()
    still = {group.name for group in planned if group.lr is None}
    modules = dict(network.named_modules())
    for name, prefixes in groups:
        for prefix in prefixes if name in still else ():
            module = modules.get(f"trunk.network.{prefix}")  # None for a lone parameter, such as cls_token
            if module is not None:
                module.eval()
    if norms:
        for module in modules.values():
            if isinstance(module, _NORMS):
                module.eval()


def table(planned: list[Group]) -> str:
    """What is trained, for people: one line a group."""
    width = max(len(group.name) for group in planned)
    lines = [f"{'group':<{width}}  {'parameters':>12}  learning rate"]
    for group in planned:
        rate = "frozen" if group.lr is None else f"{group.lr:.3g}"
        lines.append(f"{group.name:<{width}}  {group.size:>12,}  {rate}")
    trained = sum(group.size for group in planned if group.lr is not None)
    lines.append(f"{trained:,} of {sum(group.size for group in planned):,} parameters are trained")
    return "\n".join(lines)
