"""Runs batches of live images through a joint model on its device, by Lightning Fabric."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurecache.errors import InputError
from featurecache.joint.images import Batch, Failure, SampleImages
from featurecache.joint.parallel import launched, replicated

PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def make_fabric(device: torch.device, precision: str, *, together: bool = False) -> Any:
    """Lightning Fabric for one device, or for the processes that torchrun started; it stays quiet.

    Args:
        device: of a single process; of several each one takes its own of that kind.
        precision: of the bodies.
        together: join the other processes of torchrun, where there are any.

    Raises:
        InputError: fp16 somewhere else than on a CUDA device.
    """
    from lightning_fabric import Fabric  # three seconds to import, and only training needs it

    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision fp16 trains on CUDA devices only, not on {device.type}. Use bf16 or fp32.")
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    processes, here = launched() if together else (1, 1)
    options: dict[str, Any] = {"accelerator": device.type, "precision": PRECISIONS[precision]}
    try:
        if processes == 1:
            return Fabric(**options, devices=[device.index or 0] if device.type == "cuda" else 1)
        fabric = Fabric(**options, devices=here, num_nodes=processes // here, strategy=replicated())
        fabric.launch()
        return fabric
    finally:
        logger.setLevel(level)


class Normalises(Protocol):
    """What turns a batch as it was read into what a body takes: a `Preprocessing`, for one."""

    def normalise(self, batch: Tensor, layout: torch.memory_format) -> Tensor:
        """(n, ...) float32."""


class Runner:
    """Runs batches of live images through a joint model on its device.

    Args:
        fabric: made by `make_fabric`; `module` has been set up by it.
        module: the wrapped model.
        preprocessings: per view, what normalises its images.
    """

    def __init__(self, fabric: Any, module: Any, preprocessings: Mapping[str, Normalises]) -> None:
        self.fabric, self.module, self._preprocessings = fabric, module, dict(preprocessings)
        self.device: torch.device = fabric.device

    def outputs(self, batch: Batch) -> Tensor:
        """Logits (n, outputs) of a batch; images are normalised on the device."""
        images = {
            view: self._preprocessings[view].normalise(
                image.to(self.device, non_blocking=True), torch.contiguous_format
            )
            for view, image in batch.images.items()
        }
        owner = {view: rows.to(self.device) for view, rows in batch.owner.items()}
        return self.module(images, batch.present.to(self.device), owner)  # type: ignore[no-any-return]

    def stream(
        self,
        images: SampleImages,
        samples: NDArray[np.int64],
        failures: list[Failure],
        *,
        batch_size: int,
        workers: int,
        epoch: int | None = None,
        alone: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Batch by batch the samples that could be read and their logits on the device; arguments as `predict`.

        What can't be read is added to `failures`.
        """
        self.module.eval()
        plan = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        with closing(images.batches(plan, epoch=epoch, workers=workers)) as batches:
            for batch in batches:
                failures += batch.failures
                if alone is not None:
                    batch = batch.alone(images.views, alone)
                if len(batch.samples):
                    with torch.no_grad():
                        logits = self.outputs(batch).float()
                    yield batch.samples, logits
                advance(len(batch.samples) + len(batch.failures))

    def predict(
        self,
        images: SampleImages,
        samples: NDArray[np.int64],
        *,
        batch_size: int,
        workers: int,
        epoch: int | None = None,
        alone: int | None = None,
        advance: Callable[[int], None] = lambda n: None,
    ) -> tuple[NDArray[np.int64], Tensor, list[Failure]]:
        """Logits: (samples that could be read, (n, outputs) on the CPU, failures); of plain images without an epoch.

        Where `alone` is the number of a view, the model gets that view of each sample, which all of them need to have.
        """
        done: list[NDArray[np.int64]] = []
        outputs: list[Tensor] = []
        failures: list[Failure] = []
        options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "epoch": epoch, "alone": alone}
        for some, logits in self.stream(images, samples, failures, advance=advance, **options):
            outputs.append(logits.cpu())
            done.append(some)
        if not outputs:
            return np.empty(0, dtype=np.int64), torch.empty(0, 0), failures
        return np.concatenate(done), torch.cat(outputs), failures
