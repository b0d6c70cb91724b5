"""The training loop: frozen and unfrozen epochs, a checkpoint after each, the best weights put back at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featurecache.errors import FeatureCacheError
from featurecache.heads.losses import HeadLoss
from featurecache.joint.checkpoint import Progress, load_best, save_best, save_state
from featurecache.joint.images import Batch, Failure, SampleImages, plan_batches, shuffled
from featurecache.joint.model import JointModel
from featurecache.joint.runner import Runner
from featurecache.joint.schedule import (
    Phase,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)
from featurecache.progress import Reporter


@dataclass(frozen=True)
class Groups:
    """What learns: per phase the (name, parameters, peak rate) groups."""

    head: list[tuple[str, list[nn.Parameter], float]]
    bodies: list[tuple[str, list[nn.Parameter], float]]

    def of(self, phase: Phase) -> list[tuple[str, list[nn.Parameter], float]]:
        """The groups that learn in a phase."""
        return self.head if phase.frozen else self.bodies + self.head


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        phases: in order.
        groups: what learns in each.
        batch_size, workers, seed, clip, weight_decay: as in JointConfig.
        judge_start: whether the model as it is before the first step may be the best one (a warm start may).
    """

    phases: tuple[Phase, ...]
    groups: Groups
    batch_size: int
    workers: int
    seed: int
    clip: float
    weight_decay: float
    judge_start: bool


class Loop:
    """Trains a joint model.

    Args:
        runner: of the model, on its device.
        model: the model itself, unwrapped.
        loss: of the training target, on the device.
        images: with augmentation and view dropout.
        targets: of every sample of the manifest, as `target_tensor` gives them.
        train, valid: samples (rows of the manifest) to learn from and to judge by.
        plan: how.
        directory: where checkpoints go.
        reporter: told of progress.
    """

    def __init__(
        self,
        runner: Runner,
        model: JointModel,
        loss: HeadLoss,
        images: SampleImages,
        targets: Tensor,
        train: NDArray[np.int64],
        valid: NDArray[np.int64],
        plan: Plan,
        directory: Path,
        reporter: Reporter,
    ) -> None:
        self.runner, self.model, self.loss, self.images = runner, model, loss, images
        self.targets, self.train, self.valid = targets, train, valid
        self.plan, self.directory, self.reporter = plan, directory, reporter
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.epochs = sum(phase.epochs for phase in plan.phases)

    def run(self, progress: Progress, optimizer_state: Mapping[str, Tensor]) -> Progress:
        """All epochs that `progress` has not seen; the model ends with the best weights.

        Args:
            progress: where an earlier attempt stands, or a fresh one; the model holds its weights already.
            optimizer_state: of that attempt.
        """
        with own_generator(self.runner.device):
            if progress.epoch == 0 and self.plan.judge_start and len(self.valid):
                loss, failures = self.judge("before the first epoch")
                row = {"epoch": 0, "phase": "start", "train_loss": None, "valid_loss": loss, "lr": 0.0, "seconds": 0.0}
                progress = self.note(progress, row, loss, failures)
            for phase in self.plan.phases:
                last = phase.start + phase.epochs - 1
                if progress.epoch >= last:
                    continue
                optimizer = self.enter(phase)
                if progress.epoch >= phase.start:
                    load_optimizer_tensors(optimizer, self.names, optimizer_state)
                wrapped = self.runner.fabric.setup_optimizers(optimizer)
                if progress.scaler:
                    self.runner.fabric.strategy.precision.load_state_dict(progress.scaler)
                for epoch in range(max(progress.epoch + 1, phase.start), last + 1):
                    progress = self.epoch(epoch, phase, optimizer, wrapped, progress)
        if progress.best_epoch >= 0:
            self.model.load_state_dict(load_best(self.directory, progress.best_epoch))
        self.model.eval()
        return progress

    def enter(self, phase: Phase) -> torch.optim.Optimizer:
        """Freeze or unfreeze, and make the phase's optimiser."""
        self.model.requires_grad_(False)
        self.model.frozen = phase.frozen
        groups = self.plan.groups.of(phase)
        for _, parameters, _ in groups:
            for parameter in parameters:
                parameter.requires_grad_(True)
        return make_optimizer(self.model, groups, weight_decay=self.plan.weight_decay)

    def epoch(
        self, epoch: int, phase: Phase, optimizer: torch.optim.Optimizer, wrapped: Any, progress: Progress
    ) -> Progress:
        """One pass over the training samples, judged and checkpointed."""
        started = time.perf_counter()
        torch.manual_seed(draw_seed(self.plan.seed, epoch))
        plan = plan_batches(shuffled(self.train, self.plan.seed, epoch), self.plan.batch_size)
        steps, step = phase.epochs * len(plan), (epoch - phase.start) * len(plan)
        total = torch.zeros((), device=self.runner.device)
        weight = torch.zeros((), device=self.runner.device)
        failures: list[Failure] = []
        rate = 0.0
        task = f"epoch {epoch}/{self.epochs} ({phase.name} bodies)"
        self.reporter.begin(task, len(self.train), "samples")
        self.runner.module.train()
        self.loss.train()
        try:
            for batch in self.images.batches(plan, epoch=epoch, workers=self.plan.workers):
                rate = max(rate, set_rates(optimizer, step, steps))
                step += 1
                failures += batch.failures
                if len(batch.samples) > 1:  # the head's BatchNorm can't learn from one
                    found, counted = self.step(batch, wrapped)
                    total += found
                    weight += counted
                self.reporter.advance(task, len(batch.samples) + len(batch.failures))
        finally:
            self.reporter.end(task)
        train_loss = float(total / weight.clamp(min=1e-12))
        valid_loss: float | None = None
        if len(self.valid):
            valid_loss, more = self.judge(f"validation {epoch}/{self.epochs}")
            failures += more
        if not math.isfinite(train_loss + (valid_loss or 0.0)):
            raise FeatureCacheError(
                f"the loss is not finite in epoch {epoch}. Lower lr and body_lr, or use precision fp32."
            )
        row = {
            "epoch": epoch, "phase": phase.name, "train_loss": train_loss, "valid_loss": valid_loss, "lr": rate,
            "seconds": round(time.perf_counter() - started, 3),
        }  # fmt: skip
        progress = self.note(progress, row, valid_loss, failures)
        progress = replace(progress, scaler=dict(self.runner.fabric.strategy.precision.state_dict()))
        save_state(self.directory, progress, self.model.state_dict(), optimizer_tensors(optimizer, self.names))
        return progress

    def step(self, batch: Batch, wrapped: Any) -> tuple[Tensor, Tensor]:
        """One optimiser step: (sum of the losses, sum of their weights), detached."""
        wrapped.zero_grad(set_to_none=True)
        outputs = self.runner.outputs(batch)
        total, weight = self.loss.sums(outputs, self.targets[batch.samples].to(self.runner.device))
        self.runner.fabric.backward(total / weight.clamp(min=1e-12))
        if self.plan.clip > 0:
            self.runner.fabric.clip_gradients(
                self.runner.module, wrapped, max_norm=self.plan.clip, error_if_nonfinite=False
            )
        wrapped.step()
        return total.detach(), weight.detach()

    def judge(self, task: str) -> tuple[float, list[Failure]]:
        """Mean loss over the validation samples."""
        self.reporter.begin(task, len(self.valid), "samples")
        self.loss.eval()
        try:
            samples, outputs, failures = self.runner.predict(
                self.images, self.valid, batch_size=2 * self.plan.batch_size, workers=self.plan.workers,
                advance=lambda n: self.reporter.advance(task, n),
            )  # fmt: skip
        finally:
            self.reporter.end(task)
        if not len(samples):
            raise FeatureCacheError("none of the validation samples can be read")
        device = self.runner.device
        total, weight = self.loss.sums(outputs.to(device), self.targets[samples].to(device))
        return float(total / weight.clamp(min=1e-12)), failures

    def note(self, progress: Progress, row: dict[str, Any], loss: float | None, failures: list[Failure]) -> Progress:
        """Progress after an epoch; its weights are kept if they are the best so far."""
        epoch = int(row["epoch"])
        best_epoch, best_loss = progress.best_epoch, progress.best_loss
        if loss is None or best_loss is None or loss < best_loss:  # without validation the latest counts
            save_best(self.directory, epoch, self.model.state_dict())
            best_epoch, best_loss = epoch, loss
        seen = {(entry["sample"], entry["view"]) for entry in progress.failed}
        failed = [vars(failure) for failure in failures if (failure.sample, failure.view) not in seen]
        return replace(
            progress, epoch=epoch, best_epoch=best_epoch, best_loss=best_loss,
            history=[*progress.history, row], failed=[*progress.failed, *failed],
        )  # fmt: skip


def draw_seed(seed: int, epoch: int) -> int:
    """Seed of torch's generators for one epoch."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves torch's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield
