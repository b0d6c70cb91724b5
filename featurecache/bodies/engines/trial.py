"""The batch size that an engine runs fastest, found by a short trial."""

from __future__ import annotations

import time

import torch

from featurecache.bodies.engines.base import Engine

# On CPUs whose second-level cache is small, small batches cost least: ResNet-50 in torch took 176 ms of processor time
# an image at 4, 193 at 8, 239 at 16 and 269 at 32 (AVX2, 512 KiB a core, medians of three on a busy machine).
SIZES = (4, 8, 16, 32, 64)
CUDA_SIZES = (16, 32, 64, 128, 256, 512)
GAIN = 1.03  # a larger batch must be this much faster, since it costs memory


def choose_batch_size(engine: Engine, size: tuple[int, int], channels: int, *, seconds: float = 3.0) -> int:
    """Time growing batches of random pixels and return the fastest size.

    Each is run once to warm up (the first low-precision batch reorders weights) and once for the clock, with as many
    batches in flight as the engine computes at a time. The trial stops when it would take longer than `seconds`, when
    a size is no faster, or when memory runs out.

    Args:
        engine: what will run.
        size: (height, width) of the images.
        channels: of the images.
        seconds: for the whole trial; a very slow body ends it after the smallest size.
    """
    cuda, at_once = engine.device.type == "cuda", engine.in_flight
    sizes = CUDA_SIZES if cuda else SIZES
    pixels = torch.randint(0, 256, (sizes[0], *size, channels), dtype=torch.uint8)
    end = time.perf_counter() + seconds
    best, rate = sizes[0], 0.0
    for n in sizes:
        batch = pixels.repeat(n // sizes[0], 1, 1, 1).permute(0, 3, 1, 2)  # in memory as `stack` gives it
        if rate and time.perf_counter() + 2 * n * at_once / rate > end:
            break
        try:
            _keep_busy(engine, batch)
            start = time.perf_counter()
            _keep_busy(engine, batch)
        except (torch.OutOfMemoryError, MemoryError):
            break
        found = n * at_once / (time.perf_counter() - start)
        if found > rate * GAIN:
            best = n
        elif rate:
            break
        rate = max(rate, found)
    return best


def _keep_busy(engine: Engine, batch: torch.Tensor) -> None:
    """As many batches as are computed at a time."""
    for handle in [engine.submit(batch) for _ in range(engine.in_flight)]:
        engine.collect(handle)
