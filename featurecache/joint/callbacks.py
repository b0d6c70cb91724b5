"""What follows a training while it runs: history.csv after every epoch, TensorBoard where it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from torch import Tensor

from featurecache.errors import DependencyError

FOLDER = "tensorboard"


class Callback(Protocol):
    """Is told of a training; only the first of several processes calls it."""

    def on_step(self, step: int, loss: Tensor, rate: float) -> None:
        """After an optimiser step: its number over the whole training, mean loss (a scalar), the head's rate."""

    def on_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """After an epoch, whose row of history.csv is the last one."""

    def close(self) -> None:
        """When training ends, for whatever reason."""


class HistoryFile:
    """history.csv of the run being written, replaced after every epoch, so that it can be watched.

    Args:
        directory: of the run.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "history.csv"

    def on_step(self, step: int, loss: Tensor, rate: float) -> None:
        """Nothing."""

    def on_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        beside = self._path.with_name(".history.csv")
        pl.DataFrame([dict(row) for row in history], infer_schema_length=None).write_csv(beside)
        beside.replace(self._path)

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files in RUN/tensorboard: loss and rate every few steps, and the figures of each epoch.

    Args:
        directory: of the run.
        every: steps between two points; reading a loss waits for the device.

    Raises:
        DependencyError: tensorboard is not installed.
    """

    def __init__(self, directory: Path, *, every: int = 10) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise DependencyError(
                "--tensorboard needs the package tensorboard. Install it with: pip install 'featurecache[tensorboard]'"
            ) from None
        self._writer: Any = SummaryWriter(str(directory / FOLDER))
        self._every = every

    def on_step(self, step: int, loss: Tensor, rate: float) -> None:
        """See `Callback`."""
        if step % self._every == 0:
            self._writer.add_scalar("step/loss", float(loss), step)
            self._writer.add_scalar("step/lr", rate, step)

    def on_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        row = history[-1]
        for name, value in row.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"epoch/{name}", value, int(row["epoch"]))

    def close(self) -> None:
        """See `Callback`."""
        self._writer.close()


class Callbacks:
    """Several callbacks as one."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_step(self, step: int, loss: Tensor, rate: float) -> None:
        """See `Callback`."""
        for callback in self._callbacks:
            callback.on_step(step, loss, rate)

    def on_epoch(self, history: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        for callback in self._callbacks:
            callback.on_epoch(history)

    def close(self) -> None:
        """See `Callback`."""
        for callback in self._callbacks:
            callback.close()
