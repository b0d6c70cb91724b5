"""An exponential moving average of a model's weights (EMA), which is what is judged and kept where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average over the steps of training of all floating-point tensors of a model, its buffers too.

    Args:
        model: averaged from the weights that it has now.
        decay: how much of the average stays at each step. The first steps count more, so that a short training is not
            held back by its start: step t keeps at most (1 + t) / (10 + t).

    Attributes:
        steps: how many have been taken in.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay, self.steps = model, decay, 0
        self._tensors = {name: value.detach().clone() for name, value in self._floating()}

    def _floating(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, t) for name, t in self._model.state_dict().items() if t.is_floating_point())

    def update(self) -> None:
        """Take the model's present weights in; a weight that did not move stays as it is, to the last bit."""
        self.steps += 1
        kept = min(self._decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in self._floating():
                self._tensors[name].lerp_(value, 1 - kept)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the model has the average for weights."""
        own = {name: value.clone() for name, value in self._floating()}
        self._put(self._tensors)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self._floating():
                value.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes: for checkpoints."""
        return dict(self._tensors)

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `tensors` gave after so many steps."""
        self.steps = steps
        for name, value in self._tensors.items():
            value.copy_(tensors[name])
