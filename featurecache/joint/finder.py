"""The learning-rate finder: a short training at rising rates (Smith, 2017), its curve, and the rate it suggests."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.errors import FeatureCacheError
from featurecache.joint.images import Batch
from featurecache.joint.loop import Loop, own_generator, telling
from featurecache.joint.schedule import HIGH, set_rates

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 100
SMOOTHING = 0.9  # of the losses of single steps
DIVERGED = 4.0  # times the lowest smoothed loss: the test ends
_EPOCH = 1 << 30  # its draws are those of no epoch of training


@dataclass(frozen=True)
class Curve:
    """What the finder saw.

    Attributes:
        rates: (n,) the head's rate at each step, rising.
        losses: (n,) of the step's samples, before the step.
        smooth: (n,) their exponential average.
        suggestion: the rate to train with.
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    smooth: NDArray[np.float64]
    suggestion: float

    def write(self, directory: Path) -> None:
        """lr_find.csv and lr_find.png."""
        names = {"lr": self.rates, "loss": self.losses, "smoothed_loss": self.smooth}
        pl.DataFrame(names).write_csv(directory / "lr_find.csv")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses, color="0.8", linewidth=1, label="loss of a step")
        axes.plot(self.rates, self.smooth, label="smoothed")
        axes.axvline(self.suggestion, color="C1", linestyle="--", label=f"suggestion {self.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate of the head", ylabel="training loss")
        low, high = float(self.smooth.min()), float(self.smooth[0])
        axes.set_ylim(low - 0.2 * abs(high - low) - 0.05, max(high, low) * 1.5 + 0.05)
        axes.legend()
        figure.savefig(directory / "lr_find.png", dpi=120)


def smoothed(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential average of the losses so far, each weighted by 0.9 to the power of its age."""
    smooth = np.empty(len(losses))
    average = 0.0
    for i, loss in enumerate(losses):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smooth[i] = average / (1 - SMOOTHING ** (i + 1))
    return smooth


def suggest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The rate at which the loss falls fastest, but no more than a tenth of the one where it is lowest.

    Args:
        rates: (n,) rising geometrically.
        losses: (n,) at each of them.

    Returns:
        The suggestion, and (n,) the smoothed losses.
    """
    smooth = smoothed(losses)
    skipped = min(5, len(losses) - 1)  # the average of a few losses says little
    lowest = skipped + int(np.argmin(smooth[skipped:]))
    if lowest - skipped < 2:  # the loss never falls: a start that is as good as it gets
        return float(rates[lowest]) / 10, smooth
    slope = np.gradient(smooth[skipped : lowest + 1], np.log(rates[skipped : lowest + 1]))
    return float(min(rates[skipped + int(np.argmin(slope))], rates[lowest] / 10)), smooth


def find_rate(loop: Loop) -> Curve:
    """Train for at most a hundred steps at rates that rise to 1; the model ends with the weights that it had.

    All groups of the first phase learn, in the proportion of their peak rates.

    Raises:
        FeatureCacheError: the loss is not finite from the start.
    """
    phase, plan = loop.plan.phases[0], loop.plan
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    losses: list[float] = []
    rates = np.geomspace(LOWEST, HIGHEST, STEPS)
    task = "learning-rate finder"
    try:
        told = telling(loop.reporter, task, STEPS, "steps")
        with told, own_generator(loop.runner.device), closing(_batches(loop)) as stream:
            optimizer = loop.enter(phase)
            loop.unfreeze(phase, phase.last)
            wrapped = loop.runner.fabric.setup_optimizers(optimizer)
            peak = max(rate for _, _, rate in plan.groups.of(phase))
            loop.runner.module.train()
            loop.loss.train()
            for number, rate in enumerate(rates):
                set_rates(optimizer, float(rate) / peak, HIGH)
                taken = loop.stepper.take(stream, plan.accumulate, (plan.seed, _EPOCH, number), wrapped)
                loss, weight = taken.sums.tolist()
                losses.append(loss / max(weight, 1e-12))
                loop.reporter.advance(task, 1)
                smooth = smoothed(np.array(losses))
                if not math.isfinite(losses[-1]) or smooth[-1] > DIVERGED * smooth.min():
                    break
    finally:
        loop.model.load_state_dict(before)
    kept = np.array(losses)[np.isfinite(losses)]
    if len(kept) < 3:
        raise FeatureCacheError("--lr find: the loss is not finite even at a learning rate of 1e-6")
    suggestion, smooth = suggest(rates[: len(kept)], kept)
    return Curve(rates[: len(kept)], kept, smooth, suggestion)


def _batches(loop: Loop) -> Generator[Batch, None, None]:
    """This process's shares of the batches of one epoch after the other, without end."""
    epoch = _EPOCH
    while True:
        shares = [loop.processes.share(batch, loop.plan.least) for step in loop.steps(epoch) for batch in step]
        yield from loop.images.batches(shares, epoch=epoch, workers=loop.plan.workers)
        epoch += 1
