"""One optimiser step: batches in, forward, backward, the gradients of all processes, clipping, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featurecache.heads.decodermodule import DenseLoss
from featurecache.heads.losses import HeadLoss
from featurecache.joint.images import Batch, Failure
from featurecache.joint.mixing import mix
from featurecache.joint.parallel import Processes
from featurecache.joint.plan import Plan
from featurecache.joint.runner import Runner

_MIXING = 0x6D6978  # tells the draw of mixup and CutMix apart from the other draws of a step


@dataclass(frozen=True)
class Taken:
    """What a step used.

    Attributes:
        sums: (2,) sum of the losses and sum of their weights, over all processes.
        failures: of this process: samples that could not be read.
        samples: of this process, the failed ones too.
    """

    sums: Tensor
    failures: list[Failure]
    samples: int


class Stepper:
    """Takes optimiser steps; what one draws depends on its key alone.

    The losses of all known labels of all batches of all processes are added up and divided by the sum of their weights:
    so N batches, or N processes, make the step of one batch of N times the size.

    Args:
        runner: of the model.
        processes: that train together.
        loss: of the training target, on the device.
        targets: of every sample of the manifest, as `target_tensor` gives them.
        plan: how to train.
    """

    def __init__(
        self, runner: Runner, processes: Processes, loss: HeadLoss | DenseLoss, targets: Tensor, plan: Plan
    ) -> None:
        self.runner, self.processes, self.loss, self.targets, self.plan = runner, processes, loss, targets, plan
        # Losses are divided by a fixed number before the backward pass, to keep fp16 gradients in range, and the
        # gradients are put right once the weights of all processes are known.
        self._nominal = float(plan.batch_size * plan.accumulate * processes.count)

    def take(self, stream: Iterator[Batch], count: int, key: tuple[int, ...], wrapped: Any) -> Taken:
        """One step with the optimiser `wrapped`, over the next `count` batches of `stream`; `key` seeds its draws."""
        key = (*key, self.processes.rank)
        torch.manual_seed(draw_seed(*key))
        rng = np.random.default_rng([*key, _MIXING])
        wrapped.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.runner.device)
        failures: list[Failure] = []
        samples = 0
        for batch in islice(stream, count):
            failures += batch.failures
            samples += len(batch.samples) + len(batch.failures)
            if len(batch.samples) >= self.plan.least:
                total, weight = self._losses(batch, rng)
                self.runner.fabric.backward(total / self._nominal)
                sums += torch.stack([total.detach(), weight.detach()])
        sums = self.processes.total(sums)
        factor = self._nominal / sums[1].clamp(min=1e-12)
        if self.processes.sum_gradients(self.runner.module.parameters(), factor):
            if self.plan.clip > 0:
                self.runner.fabric.clip_gradients(
                    self.runner.module, wrapped, max_norm=self.plan.clip, error_if_nonfinite=False
                )
            wrapped.step()
        return Taken(sums, failures, samples)

    def _losses(self, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch, and sum of their weights."""
        targets = (self.targets[batch.samples] if batch.masks is None else batch.masks).to(self.runner.device)
        if not self.plan.mixing:
            return self.loss.sums(self.runner.outputs(batch), targets)
        mixed = mix(batch, self.plan.mixing, rng)
        outputs = self.runner.outputs(mixed.batch)
        own, others = self.loss.sums(outputs, targets), self.loss.sums(outputs, targets[mixed.partner])
        total, weight = (mixed.own * a + (1 - mixed.own) * b for a, b in zip(own, others, strict=True))
        return total, weight


def draw_seed(*key: int) -> int:
    """Seed of torch's generators from (seed, epoch, step, process)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
