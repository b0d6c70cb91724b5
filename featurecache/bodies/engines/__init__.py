"""Engines: what runs a tapped body. One seam, one file per engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import device as Device
from torch import set_num_threads

from featurecache.bodies.engines.base import Engine, Features
from featurecache.bodies.engines.convert import ConversionError, load_graph
from featurecache.bodies.engines.devices import (
    cpu_has_bf16,
    fast_precision,
    resolve_device,
    resolve_precision,
)
from featurecache.bodies.engines.openvino import OpenVINOEngine, openvino_device, openvino_precision
from featurecache.bodies.engines.torch import TorchEngine
from featurecache.bodies.engines.trial import choose_batch_size
from featurecache.bodies.identity import Identity
from featurecache.bodies.tapped import Tapped
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError, did_you_mean

__all__ = [
    "ENGINES",
    "ConversionError",
    "Engine",
    "Features",
    "choose_batch_size",
    "cpu_has_bf16",
    "fast_precision",
    "load_graph",
    "make_engine",
    "resolve_device",
    "resolve_engine",
    "resolve_precision",
]

ENGINES = ("torch", "openvino")


def resolve_engine(engine: str, precision: str, device: str | Device) -> tuple[Device, str]:
    """Device and precision that an engine runs with here, `auto` resolved.

    Raises:
        InputError: no such engine, or it can't run there, or not in that precision.
        DependencyError: openvino is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r}.{did_you_mean(engine, ENGINES)} Known: {', '.join(ENGINES)}.")
    if engine == "openvino":
        return openvino_device(device), openvino_precision(precision)
    where = resolve_device(device)
    return where, resolve_precision(precision, where)


def make_engine(
    tapped: Tapped,
    preprocessing: Preprocessing,
    *,
    engine: str = "torch",
    precision: str = "auto",
    device: str | Device = "cpu",
    identities: Sequence[Identity] | None = None,
    threads: int | None = None,
) -> Engine:
    """An engine for a tapped body.

    Args:
        tapped: the body with its taps; it stays as it is.
        preprocessing: of the images; normalises them on the device.
        engine: `torch` or `openvino`.
        precision: `auto` (what the device runs fast), `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or a torch device.
        identities: what each tap depends on; with them openvino keeps its converted graph for the next run.
        threads: of the CPU, for torch those of the whole process; None leaves the engine's choice.

    Raises:
        InputError: no such engine, precision or device here, or a body that the engine can't run.
        DependencyError: openvino is not installed.
    """
    where, precision = resolve_engine(engine, precision, device)
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: at least one is needed")
    if engine == "openvino":
        return OpenVINOEngine(tapped, preprocessing, precision=precision, identities=identities, threads=threads)
    if threads is not None:
        set_num_threads(threads)
    return TorchEngine(tapped, preprocessing, precision=precision, device=where)
