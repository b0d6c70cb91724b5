"""Several processes that train one model, each on a share of every batch: started by torchrun, joined by Fabric.

Gradients are added up once per optimiser step, and so are the weights of the known labels that normalise them: the step
is that of one process with all the samples. Nothing wraps the model, so layers may begin to learn in any epoch, and a
process whose share lacks a view, or is empty, takes part as any other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # the first process reads all images, and predicts them, while the others wait


def launched() -> tuple[int, int]:
    """(processes, of which on this machine) that torchrun has started together; (1, 1) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1, 1
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])


def replicated() -> Any:
    """A strategy of Fabric that starts and joins processes and leaves the model as it is."""
    from lightning_fabric.strategies.ddp import DDPStrategy

    class Replicated(DDPStrategy):
        def setup_module(self, module: nn.Module) -> Any:
            return module

    return Replicated(timeout=PATIENCE)


class Processes:
    """The processes of a training; with one of them every method is trivial.

    Args:
        fabric: made by `runner.make_fabric`.

    Attributes:
        rank: this process, from 0.
        count: how many there are.
    """

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self.rank, self.count = int(fabric.global_rank), int(fabric.world_size)

    def share(self, batch: NDArray[np.int64], least: int) -> NDArray[np.int64]:
        """This process's part of a batch: of at least `least` samples, or empty where there are too few for all."""
        parts = np.array_split(batch, min(self.count, max(1, len(batch) // least)))
        return parts[self.rank] if self.rank < len(parts) else batch[:0]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count == 1:
            return tensor
        found: Tensor = self._fabric.all_reduce(tensor, reduce_op="sum")
        return found

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, those of the first one first."""
        if self.count == 1:
            return list(items)
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def same(self, value: T) -> T:
        """What the first process holds, on all of them."""
        found: T = self._fabric.broadcast(value) if self.count > 1 else value
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._fabric.barrier()

    def same_weights(self, module: nn.Module) -> None:
        """Every process gets the weights and buffers of the first one."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                whole = tensor.contiguous()
                torch.distributed.broadcast(whole, 0)
                tensor.copy_(whole)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor) -> bool:
        """Add gradients up over the processes and multiply them by `factor`; False where there are none at all.

        A parameter that no process used keeps no gradient, so that the optimiser leaves it alone.
        """
        learning = [p for p in parameters if p.requires_grad]
        if self.count > 1:
            self._exchange(learning)
        gradients = [p.grad for p in learning if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor)
        return bool(gradients)

    def _exchange(self, learning: Sequence[nn.Parameter]) -> None:
        used = [float(p.grad is not None) for p in learning]
        device = learning[0].device
        parts = [p.grad.reshape(-1) if p.grad is not None else torch.zeros_like(p).reshape(-1) for p in learning]
        flat = self.total(torch.cat([*parts, torch.tensor(used, device=device)]))
        anywhere = flat[len(flat) - len(learning) :].tolist()
        sums = torch.split(flat, [*(p.numel() for p in learning), len(learning)])
        for parameter, found, count in zip(learning, sums, anywhere, strict=False):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(found.view(parameter.shape))
