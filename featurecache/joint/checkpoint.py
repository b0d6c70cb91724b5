"""Where fine-tuning stands, after every epoch: a safetensors file with the facts as JSON inside, replaced at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featurecache.errors import RunError

FOLDER = "checkpoint"
STATE = "state.safetensors"
SCHEMA = 1


@dataclass(frozen=True)
class Progress:
    """The facts of a checkpoint.

    Every random draw (order of samples, augmentation, view dropout, dropout) depends on (seed, epoch, sample or step)
    alone, so the epoch *is* the state of all generators and of the sampler.

    Attributes:
        fingerprint: what the run was started with; a checkpoint of another start is refused.
        epoch: epochs done (0: none).
        best_epoch: the epoch whose weights are best by validation loss, -1: none yet.
        best_loss: its validation loss.
        history: a row per epoch.
        failed: samples that could not be read while training: the fields of `images.Failure`.
        scaler: the gradient scaler's state (fp16 only).
    """

    fingerprint: dict[str, Any]
    epoch: int = 0
    best_epoch: int = -1
    best_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


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


def save_state(
    directory: Path, progress: Progress, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
) -> None:
    """Commit an epoch: weights, optimiser and facts in one file; then drop best weights that it no longer names."""
    tensors = {f"model/{name}": value for name, value in model.items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.items()}
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


def load_best(directory: Path, epoch: int) -> dict[str, torch.Tensor]:
    """The weights that `save_best` kept for this epoch."""
    return _read(_best_path(directory, epoch))[0]


def load_state(directory: Path) -> tuple[Progress, dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """(facts, model, optimiser) of the last committed epoch; None where no epoch was committed.

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

    return Progress(**facts), part("model/"), part("optimizer/")
