"""Engines: what runs a tapped body. One seam, one file per engine."""

from __future__ import annotations

from torch import device as Device
from torch import set_num_threads

from featurecache.bodies.engines.base import Engine, Features
from featurecache.bodies.engines.devices import (
    cpu_has_bf16,
    fast_precision,
    resolve_device,
    resolve_precision,
)
from featurecache.bodies.engines.torch import TorchEngine
from featurecache.bodies.engines.trial import choose_batch_size
from featurecache.bodies.tapped import Tapped
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError, did_you_mean

__all__ = [
    "Engine",
    "Features",
    "choose_batch_size",
    "cpu_has_bf16",
    "fast_precision",
    "make_engine",
    "resolve_device",
    "resolve_precision",
]

ENGINES = {"torch": TorchEngine}


def make_engine(
    tapped: Tapped,
    preprocessing: Preprocessing,
    *,
    engine: str = "torch",
    precision: str = "auto",
    device: str | Device = "cpu",
    threads: int | None = None,
) -> Engine:
    """An engine for a tapped body.

    Args:
        tapped: the body with its taps; it stays as it is.
        preprocessing: of the images; normalises them on the device.
        engine: `torch`.
        precision: `auto` (what the device runs fast), `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or a torch device.
        threads: of the CPU, for the whole process; None leaves torch's choice.

    Raises:
        InputError: no such engine, precision or device here.
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r}.{did_you_mean(engine, ENGINES)} Known: {', '.join(ENGINES)}.")
    where = resolve_device(device)
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads={threads}: at least one is needed")
        set_num_threads(threads)
    return ENGINES[engine](tapped, preprocessing, precision=resolve_precision(precision, where), device=where)
