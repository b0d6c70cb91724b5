"""How to train: the phases, what learns in each and how fast, and when to save."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from torch import nn

from featurecache.errors import InputError
from featurecache.joint.schedule import WARM_UP, Phase

Group = tuple[str, list[nn.Parameter], float]
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Groups:
    """What learns: (name, parameters, peak rate) of the head, and of the bodies' layers from the input to the top."""

    head: list[Group]
    bodies: list[Group]

    def of(self, phase: Phase) -> list[Group]:
        """The groups that learn in a phase, sooner or later."""
        return self.head if phase.frozen else self.bodies + self.head

    def learning(self, phase: Phase, epoch: int) -> list[Group]:
        """The groups that learn in an epoch."""
        closed = len(self.bodies) - phase.depth(epoch, len(self.bodies))
        return self.bodies[closed:] + self.head

    def scaled(self, factor: float) -> Groups:
        """The same at other rates."""
        head, bodies = (
            [(name, parameters, rate * factor) for name, parameters, rate in part] for part in (self.head, self.bodies)
        )
        return Groups(head, bodies)


@dataclass(frozen=True)
class Every:
    """How often to save within an epoch: after so many optimiser steps, or after so many seconds."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Self:
        """`200` steps, `90s`, `10m`, `1h`, or `none`.

        Raises:
            InputError: something else.
        """
        if text == "none":
            return cls()
        match = re.fullmatch(r"(\d+)([smh]?)", text)
        if match is None or int(match[1]) < 1:
            raise InputError(f"checkpoint_every={text!r}: give steps (200), a time (90s, 10m, 1h), or none")
        number = int(match[1])
        return cls(seconds=number * _UNITS[match[2]]) if match[2] else cls(steps=number)

    def due(self, steps: int, seconds: float) -> bool:
        """Whether to save after so many steps of the epoch, so long after the last time."""
        return seconds >= self.seconds or (math.isfinite(self.steps) and steps % int(self.steps) == 0)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        phases: in order.
        groups: what learns in each.
        batch_size: samples that each process takes at a time.
        workers, seed, clip, weight_decay, accumulate, warm_up, patience: as in JointConfig.
        judge_start: whether the model as it is before the first step may be the best one (a warm start may).
        mixing: ways in which samples are mixed: `mixup`, `cutmix`.
        every: how often to save within an epoch.
        least: samples that a batch needs: two for a head with BatchNorm.
    """

    phases: tuple[Phase, ...]
    groups: Groups
    batch_size: int
    workers: int
    seed: int
    clip: float
    weight_decay: float
    judge_start: bool
    accumulate: int = 1
    warm_up: float = WARM_UP
    patience: int | None = None
    mixing: tuple[str, ...] = ()
    every: Every = Every()
    least: int = 2
