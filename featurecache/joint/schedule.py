"""Which parameters learn when and how fast: phases, discriminative rates, one-cycle as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# One-cycle after Smith (2018), with fastai's constants: a quarter of the steps up from lr/25, the rest down to lr/1e5,
# momentum the other way round between 0.95 and 0.85.
WARM_UP = 0.25
START, END = 1 / 25, 1e-5
HIGH, LOW = 0.95, 0.85


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with one optimiser and one cycle.

    Attributes:
        name: `frozen` (the head alone learns) or `unfrozen`.
        start: its first epoch, counted from 1 over the whole run.
        epochs: how many epochs it lasts.
        gradual: whether the bodies' layer groups begin to learn one after the other, from the top.
    """

    name: str
    start: int
    epochs: int
    gradual: bool = False

    @property
    def frozen(self) -> bool:
        """Whether the bodies stay as they are."""
        return self.name == "frozen"

    @property
    def last(self) -> int:
        """Its last epoch."""
        return self.start + self.epochs - 1

    def depth(self, epoch: int, groups: int) -> int:
        """How many of the bodies' `groups` learn in an epoch, counted from the top.

        Gradual unfreezing begins with the topmost and has come to the lowest by half of the epochs.
        """
        if self.frozen:
            return 0
        if not self.gradual or groups < 2:
            return groups
        return sum(1 for k in range(groups) if epoch - self.start >= k * self.epochs // (2 * (groups - 1)))

    def settled(self, groups: int, warm_up: float) -> int:
        """The epoch from which a loss that no longer falls means something: past the peak rate, with all unfrozen."""
        most = self.depth(self.last, groups)
        opened = next(e for e in range(self.start, self.last + 1) if self.depth(e, groups) == most)
        return max(opened, self.start - 1 + math.ceil(warm_up * self.epochs))


def make_phases(freeze_epochs: int, epochs: int, *, gradual: bool = False) -> tuple[Phase, ...]:
    """`freeze_epochs` with frozen bodies, then `epochs` with all learning; a phase of no epochs is left out."""
    phases = (Phase("frozen", 1, freeze_epochs), Phase("unfrozen", freeze_epochs + 1, epochs, gradual))
    return tuple(phase for phase in phases if phase.epochs)


def _cosine(begin: float, end: float, part: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * part))


def one_cycle(step: int, steps: int, warm_up: float = WARM_UP) -> tuple[float, float]:
    """Factor of the learning rate and momentum at one step; nothing is remembered, so a resumed run can't drift.

    Args:
        step: 0 ... steps - 1, counted over the whole phase.
        steps: optimiser steps of the phase.
        warm_up: part of the steps in which the rate rises, in [0, 1).

    Returns:
        (factor in (0, 1], momentum in [0.85, 0.95]).
    """
    part = step / max(steps - 1, 1)
    if part < warm_up:
        up = part / warm_up
        return _cosine(START, 1.0, up), _cosine(HIGH, LOW, up)
    down = (part - warm_up) / (1 - warm_up)
    return _cosine(1.0, END, down), _cosine(LOW, HIGH, down)


def body_rates(body_lr: float | tuple[float, float], lr: float, groups: int) -> list[float]:
    """Peak rate of each of the bodies' layer groups, from the input to the top.

    Args:
        body_lr: (lowest, highest), spread geometrically over the groups; or the lowest alone, from where the rates rise
            so that the next one would be the head's.
        lr: of the head.
        groups: how many.
    """
    if isinstance(body_lr, tuple):
        lowest, highest = body_lr
        steps = max(groups - 1, 1)  # a single group learns at the highest rate
        return [highest * (lowest / highest) ** ((groups - 1 - i) / steps) for i in range(groups)]
    return [body_lr * (lr / body_lr) ** (i / groups) for i in range(groups)]


def _without_decay(module: nn.Module) -> set[int]:
    """Ids of the parameters of a module tree that weight decay must leave alone: biases and those of norms."""
    # Told by shape: every bias and every norm's scale is a vector, no weight that decay is meant for is.
    return {id(parameter) for parameter in module.parameters() if parameter.ndim <= 1}


def make_optimizer(
    model: nn.Module,
    groups: Sequence[tuple[str, Iterable[nn.Parameter], float]],
    *,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over (name, parameters, peak rate) groups, each split into a part with and one without weight decay.

    Each parameter group carries `name` and `peak`; `set_rates` scales `peak`.
    """
    plain = _without_decay(model)
    taken: set[int] = set()
    made: list[dict[str, Any]] = []
    for name, parameters, peak in groups:
        fresh = [p for p in parameters if id(p) not in taken]  # shared bodies: the first group that names it has it
        taken |= {id(p) for p in fresh}
        for suffix, decay, part in (
            ("", weight_decay, [p for p in fresh if id(p) not in plain]),
            (":plain", 0.0, [p for p in fresh if id(p) in plain]),
        ):
            if part:
                made.append({"params": part, "lr": peak, "peak": peak, "weight_decay": decay, "name": name + suffix})
    return torch.optim.AdamW(made, betas=(HIGH, 0.99), eps=1e-5)  # eps as fastai's: 1e-8 is lost in bf16 gradients


def set_rates(optimizer: torch.optim.Optimizer, factor: float, momentum: float) -> float:
    """Scale every group's peak rate by a factor, and set the momentum; returns the head's (the highest) rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
        group["betas"] = (momentum, group["betas"][1])
    return max(float(group["lr"]) for group in optimizer.param_groups)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors: `<parameter>/<field>`; `names` maps id(parameter) to its name."""
    return {
        f"{names[id(parameter)]}/{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, in each parameter's own memory layout."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = names[id(parameter)] + "/"
            fields = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for field, value in fields.items():
                if value.shape == parameter.shape and field != "step":
                    value = torch.empty_like(parameter).copy_(value)
                optimizer.state[parameter][field] = value
