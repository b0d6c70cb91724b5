"""The training loop: frozen and unfrozen epochs, checkpoints, the best weights put back at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.errors import FeatureCacheError
from featurecache.joint.average import Average
from featurecache.joint.callbacks import Callback
from featurecache.joint.checkpoint import Progress, State, load_best, save_best, save_state
from featurecache.joint.images import Failure, SampleImages, plan_batches, shuffled
from featurecache.joint.model import JointModel
from featurecache.joint.plan import Plan
from featurecache.joint.schedule import (
    Phase,
    load_optimizer_tensors,
    make_optimizer,
    one_cycle,
    optimizer_tensors,
    set_rates,
)
from featurecache.joint.step import Stepper
from featurecache.progress import Reporter


@dataclass(frozen=True)
class Within:
    """Where an epoch stands that is not over: steps taken, sums of losses and weights, rate, time, what failed."""

    step: int = 0
    loss: float = 0.0
    weight: float = 0.0
    rate: float = 0.0
    seconds: float = 0.0
    failed: list[dict[str, Any]] = field(default_factory=list)


class Loop:
    """Trains a joint model.

    Args:
        stepper: takes the steps.
        model: the model itself, unwrapped.
        images: with augmentation and view dropout.
        train, valid: samples (rows of the manifest) to learn from and to judge by.
        plan: how.
        directory: where checkpoints go; None for all processes but the first.
        reporter: told of progress.
        callback: told of steps and epochs.
        average: of the weights, which is then what is judged and kept.
    """

    def __init__(
        self,
        stepper: Stepper,
        model: JointModel,
        images: SampleImages,
        train: NDArray[np.int64],
        valid: NDArray[np.int64],
        plan: Plan,
        directory: Path | None,
        reporter: Reporter,
        callback: Callback,
        average: Average | None = None,
    ) -> None:
        self.stepper, self.model, self.images, self.train, self.valid = stepper, model, images, train, valid
        self.plan, self.directory, self.reporter = plan, directory, reporter
        self.callback, self.average = callback, average
        self.runner, self.processes, self.loss = stepper.runner, stepper.processes, stepper.loss
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.epochs = sum(phase.epochs for phase in plan.phases)
        self.saved = time.monotonic()

    def run(self, state: State) -> Progress:
        """All epochs that `state` has not seen; the model ends with the best weights.

        Args:
            state: where an earlier attempt stands, or a fresh one; the model holds its weights already.
        """
        progress = state.progress
        if progress.scaler:
            self.runner.fabric.strategy.precision.load_state_dict(progress.scaler)
        if self.average is not None and state.average:
            self.average.load(state.average, progress.averaged)
        with own_generator(self.runner.device):
            if not progress.history and self.plan.judge_start and len(self.valid):
                loss, failures = self.judge("before the first epoch")
                row = {"epoch": 0, "phase": "start", "train_loss": None, "valid_loss": loss, "lr": 0.0, "seconds": 0.0}
                progress = self.note(progress, row, loss, failures)
            for phase in self.plan.phases:
                if progress.epoch >= phase.last:
                    continue
                optimizer = self.enter(phase)
                if progress.epoch >= phase.start or progress.within:
                    load_optimizer_tensors(optimizer, self.names, state.optimizer)
                wrapped = self.runner.fabric.setup_optimizers(optimizer)
                while progress.epoch < phase.last:
                    progress = self.epoch(phase, optimizer, wrapped, progress)
        if progress.best_epoch >= 0 and self.directory is not None:
            self.model.load_state_dict(load_best(self.directory, progress.best_epoch))
        self.model.eval()
        return progress

    def enter(self, phase: Phase) -> torch.optim.Optimizer:
        """Freeze or unfreeze the bodies, and make the phase's optimiser."""
        self.model.frozen = phase.frozen
        return make_optimizer(self.model, self.plan.groups.of(phase), weight_decay=self.plan.weight_decay)

    def unfreeze(self, phase: Phase, epoch: int) -> None:
        """Let those layers learn that do so in this epoch; the optimiser leaves alone what has no gradient."""
        self.model.requires_grad_(False)
        for _, parameters, _ in self.plan.groups.learning(phase, epoch):
            for parameter in parameters:
                parameter.requires_grad_(True)

    def steps(self, epoch: int) -> list[list[NDArray[np.int64]]]:
        """The batches of an epoch, of all processes together, as many as make a step side by side."""
        order = shuffled(self.train, self.plan.seed, epoch)
        batches = plan_batches(order, self.plan.batch_size * self.processes.count)
        size = self.plan.accumulate
        return [batches[i : i + size] for i in range(0, len(batches), size)]

    def epoch(self, phase: Phase, optimizer: torch.optim.Optimizer, wrapped: Any, progress: Progress) -> Progress:
        """The next epoch, or what is left of it: one pass over the training samples, judged and checkpointed."""
        epoch = max(progress.epoch + 1, phase.start)
        self.unfreeze(phase, epoch)
        within = self.learn(epoch, phase, optimizer, wrapped, progress)
        started = time.perf_counter()
        failures = [Failure(**entry) for entry in within.failed]
        train_loss = within.loss / max(within.weight, 1e-12)
        valid_loss: float | None = None
        if len(self.valid):
            valid_loss, more = self.judge(f"validation {epoch}/{self.epochs}")
            failures += more
        if not math.isfinite(train_loss + (valid_loss or 0.0)):
            raise FeatureCacheError(
                f"the loss is not finite in epoch {epoch}. Lower lr and body_lr, or use precision fp32."
            )
        row = {
            "epoch": epoch, "phase": phase.name, "train_loss": train_loss, "valid_loss": valid_loss,
            "lr": within.rate, "seconds": round(within.seconds + time.perf_counter() - started, 3),
        }  # fmt: skip
        judged = "" if valid_loss is None else f", validation loss {valid_loss:.4f}"
        self.reporter.note(f"epoch {epoch}/{self.epochs}: loss {train_loss:.4f}{judged}")
        progress = self.note(replace(progress, within={}), row, valid_loss, self.processes.gather(failures))
        if self.stalled(phase, progress):
            self.reporter.note(f"no better loss since epoch {progress.best_epoch}: the {phase.name} phase ends here")
            progress = replace(progress, epoch=phase.last)
        self.save(progress, optimizer)
        return progress

    def learn(
        self, epoch: int, phase: Phase, optimizer: torch.optim.Optimizer, wrapped: Any, progress: Progress
    ) -> Within:
        """The steps of an epoch that have not been taken yet."""
        plan, now = self.plan, Within(**progress.within)
        started = time.perf_counter() - now.seconds
        steps = self.steps(epoch)
        before, most = (epoch - phase.start) * len(steps), phase.epochs * len(steps)
        sums = torch.tensor([now.loss, now.weight], device=self.runner.device)
        failed, rate = list(now.failed), now.rate
        shares = [self.processes.share(batch, plan.least) for step in steps[now.step :] for batch in step]
        task = f"epoch {epoch}/{self.epochs} ({phase.name} bodies)"
        self.runner.module.train()
        self.loss.train()

        def reached(step: int) -> Within:
            loss, weight = sums.tolist()
            return Within(step, loss, weight, rate, time.perf_counter() - started, failed)

        told = telling(self.reporter, task, sum(map(len, shares)), "samples")
        with told, closing(self.images.batches(shares, epoch=epoch, workers=plan.workers)) as stream:
            for number in range(now.step, len(steps)):
                rate = max(rate, set_rates(optimizer, *one_cycle(before + number, most, plan.warm_up)))
                taken = self.stepper.take(stream, len(steps[number]), (plan.seed, epoch, number), wrapped)
                sums += taken.sums
                failed += map(vars, taken.failures)
                if self.average is not None:
                    self.average.update()
                self.callback.on_step(before + number + 1, taken.sums[0] / taken.sums[1].clamp(min=1e-12), rate)
                if number + 1 < len(steps) and plan.every.due(number + 1, time.monotonic() - self.saved):
                    self.save(replace(progress, within=asdict(reached(number + 1))), optimizer)
                self.reporter.advance(task, taken.samples)
        return reached(len(steps))

    def judge(self, task: str) -> tuple[float, list[Failure]]:
        """Mean loss over the validation samples, of all processes; and what this one could not read."""
        mine = self.valid[self.processes.rank :: self.processes.count]
        self.loss.eval()
        sums, failures = torch.zeros(3, device=self.runner.device), list[Failure]()
        with telling(self.reporter, task, len(mine), "samples"), self.kept_weights():
            for samples, outputs in self.runner.stream(
                self.images, mine, failures, batch_size=2 * self.plan.batch_size, workers=self.plan.workers,
                advance=lambda n: self.reporter.advance(task, n),
            ):  # fmt: skip
                targets = self.stepper.targets[samples].to(outputs.device)
                sums[:2] += torch.stack(self.loss.sums(outputs, targets))
                sums[2] += len(samples)
        total, weight, count = self.processes.total(sums).tolist()
        if not count:
            raise FeatureCacheError("none of the validation samples can be read")
        return total / max(weight, 1e-12), failures

    def kept_weights(self) -> Any:
        """Within it the model has the weights that are judged and kept."""
        return nullcontext() if self.average is None else self.average.shown()

    def stalled(self, phase: Phase, progress: Progress) -> bool:
        """Whether early stopping ends the phase."""
        if self.plan.patience is None or not len(self.valid):
            return False
        since = max(progress.best_epoch, phase.settled(len(self.plan.groups.bodies), self.plan.warm_up))
        return progress.epoch - since >= self.plan.patience

    def note(self, progress: Progress, row: dict[str, Any], loss: float | None, failures: list[Failure]) -> Progress:
        """Progress after an epoch; its weights are kept if they are the best so far."""
        epoch = int(row["epoch"])
        best_epoch, best_loss = progress.best_epoch, progress.best_loss
        if loss is None or best_loss is None or loss < best_loss:  # without validation the latest counts
            if self.directory is not None:
                with self.kept_weights():
                    save_best(self.directory, epoch, self.model.state_dict())
            best_epoch, best_loss = epoch, loss
        seen = {(entry["sample"], entry["view"]) for entry in progress.failed}
        failed = [vars(failure) for failure in failures if (failure.sample, failure.view) not in seen]
        history = [*progress.history, row]
        self.callback.on_epoch(history)
        return replace(
            progress, epoch=epoch, best_epoch=best_epoch, best_loss=best_loss,
            history=history, failed=[*progress.failed, *failed],
        )  # fmt: skip

    def save(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        """Commit everything that going on needs."""
        self.saved = time.monotonic()
        if self.directory is None:
            return
        average: Mapping[str, Tensor] = self.average.tensors() if self.average is not None else {}
        progress = replace(
            progress,
            scaler=dict(self.runner.fabric.strategy.precision.state_dict()),
            averaged=self.average.steps if self.average is not None else 0,
        )
        state = State(progress, self.model.state_dict(), optimizer_tensors(optimizer, self.names), average)
        save_state(self.directory, state)


@contextmanager
def telling(reporter: Reporter, task: str, total: int, unit: str) -> Iterator[None]:
    """Within it the task is under way, as the reporter knows it."""
    reporter.begin(task, total, unit)
    try:
        yield
    finally:
        reporter.end(task)


@contextmanager
def own_generator(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves torch's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
        yield
