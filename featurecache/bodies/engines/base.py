"""The engine seam: how a tapped body is run, whatever runs it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch import device as Device

Features = list[NDArray[np.float32]]


class Engine(Protocol):
    """Runs a tapped body over batches. Not to be shared between threads."""

    name: str
    """`torch` or `openvino`; part of the recipe."""
    precision: str
    """`fp32`, `bf16` or `fp16`: what the numbers are computed in; part of the recipe."""
    device: Device
    """Where it runs."""
    in_flight: int
    """Batches that are computed at a time; one more may wait, so that none is waited for."""

    def submit(self, batch: Tensor) -> Any:
        """Start on a batch.

        Args:
            batch: (n, channels, height, width) uint8, or float32 in 0..1, not normalised, on the CPU; not to be changed
                until it is collected.

        Returns:
            A handle for `collect`; several may be in flight.
        """

    def collect(self, handle: Any) -> Features:
        """Wait for a batch: one float32 array per tap, (n, *tap.shape), in the order of the taps."""

    def __call__(self, batch: Tensor) -> Features:
        """`submit` and `collect` at once."""
