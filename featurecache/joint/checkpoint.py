"""Where fine-tuning stands, after an epoch or within one: a safetensors file with the facts in it, replaced at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featurecache.errors import InputError, RunError

FOLDER = "checkpoint"
STATE = "state.safetensors"
PATTERN = f"*{FOLDER}/{STATE}"  # in a run that is written; while it is published the folder is hidden
SCHEMA = 2


@dataclass(frozen=True)
class Progress:
    """The facts of a checkpoint.

    Every random draw (order of samples, augmentation, view dropout, mixing, dropout) depends on seed, epoch, and sample
    or step alone: so epoch and step *are* the state of all generators, of the sampler and of the schedule.

    Attributes:
        fingerprint: what the run was started with; a checkpoint of another start is refused.
        epoch: epochs done (0: none).
        best_epoch: the epoch whose weights are best by validation loss, -1: none yet.
        best_loss: its validation loss.
        history: a row per epoch.
        failed: samples that could not be read while training: the fields of `images.Failure`.
        scaler: the gradient scaler's state (fp16 only).
        lr: the learning rate that the finder found, where it was asked.
        averaged: steps that the average of the weights has taken in.
        within: of the epoch that was begun but not ended: the fields of `loop.Within`.
    """

    fingerprint: dict[str, Any]
    epoch: int = 0
    best_epoch: int = -1
    best_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    averaged: int = 0
    within: dict[str, Any] = field(default_factory=dict)


def _replace(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write beside, fsync, rename, fsync the directory: at any instant the old file or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    # safetensors wants contiguous tensors without shared storage; layouts are restored by copying into the live ones.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, beside, metadata)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _best_path(directory: Path, epoch: int) -> Path:
    return directory / FOLDER / f"best-{epoch}.safetensors"


def save_best(directory: Path, epoch: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep the weights of one epoch; they count once a later `save_state` names that epoch."""
    _replace(_best_path(directory, epoch), tensors, {})


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Attributes:
        progress: the facts.
        model, optimizer, average: named tensors; `average` is empty without one.
    """

    progress: Progress
    model: Mapping[str, torch.Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)
    average: Mapping[str, torch.Tensor] = field(default_factory=dict)


PARTS = ("model", "optimizer", "average")


def save_state(directory: Path, state: State) -> None:
    """Commit all of a state in one file; then drop best weights that it no longer names."""
    progress = state.progress
    tensors = {f"{part}/{name}": value for part in PARTS for name, value in getattr(state, part).items()}
    facts = json.dumps({"schema": SCHEMA, **asdict(progress)})
    _replace(directory / FOLDER / STATE, tensors, {"progress": facts})
    for old in (directory / FOLDER).glob("best-*.safetensors"):
        if old != _best_path(directory, progress.best_epoch):
            old.unlink()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path}: not a checkpoint that can be read ({error}). Start again without --resume, with --overwrite."
        ) from None


def refuse_unfinished(out: Path) -> None:
    """See that no checkpoint gets lost to a training that begins afresh.

    Raises:
        InputError: there is one of an earlier attempt at the run `out`.
    """
    beside = out.with_name(f"{out.name}.tmp")
    if not out.exists() and any(beside.glob(PATTERN)):  # what is there is refused by the writer
        raise InputError(
            f"{out}: an unfinished training is in {beside.name} beside it. Give --resume to go on from there, "
            "--overwrite to begin afresh, or another name to --out."
        )


@contextmanager
def telling_how(directory: Path, how: str) -> Iterator[None]:
    """A note on an interrupt says how to go on from the checkpoint in `directory`, if there is one."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if any(directory.glob(PATTERN)):
            told = f"What was learnt up to the last checkpoint is kept; the same command with {how} goes on from there."
            interrupt.add_note(told)
        raise


def load_best(directory: Path, epoch: int) -> dict[str, torch.Tensor]:
    """The weights that `save_best` kept for this epoch."""
    return _read(_best_path(directory, epoch))[0]


def load_state(directory: Path) -> State | None:
    """What was committed last; None where nothing was.

    Raises:
        RunError: the file is damaged, or written by a newer version.
    """
    path = directory / FOLDER / STATE
    if not path.is_file():
        return None
    tensors, metadata = _read(path)
    facts = json.loads(metadata.get("progress", "{}"))
    if facts.pop("schema", None) != SCHEMA:
        raise RunError(f"{path}: written by another version of featurecache. Start again with --overwrite.")

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return State(Progress(**facts), *(part(f"{name}/") for name in PARTS))
