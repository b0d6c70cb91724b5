"""The batch size that an engine runs fastest, found by a short trial."""

from __future__ import annotations

import time

import torch

from featurecache.bodies.engines.base import Engine

SIZES = (8, 16, 32, 64)
CUDA_SIZES = (16, 32, 64, 128, 256, 512)
GAIN = 1.03  # a larger batch must be this much faster, since it costs memory


def choose_batch_size(engine: Engine, size: tuple[int, int], channels: int, *, seconds: float = 3.0) -> int:
    """Time growing batches of random pixels and return the fastest size.

    Each is run once to warm up (the first low-precision batch reorders weights) and once for the clock. The trial
    stops when it would take longer than `seconds`, when a size is no faster, or when memory runs out.

    Args:
        engine: what will run.
        size: (height, width) of the images.
        channels: of the images.
        seconds: for the whole trial; a very slow body ends it after the smallest size.
    """
    cuda = getattr(getattr(engine, "device", None), "type", "cpu") == "cuda"
    sizes = CUDA_SIZES if cuda else SIZES
    pixels = torch.randint(0, 256, (sizes[0], channels, *size), dtype=torch.uint8)
    end = time.perf_counter() + seconds
    best, rate = sizes[0], 0.0
    for n in sizes:
        batch = pixels.repeat(n // sizes[0], 1, 1, 1)
        if rate and time.perf_counter() + 2 * n / rate > end:
            break
        try:
            engine(batch)
            start = time.perf_counter()
            engine(batch)
        except (torch.OutOfMemoryError, MemoryError):
            break
        found = n / (time.perf_counter() - start)
        if found > rate * GAIN:
            best = n
        elif rate:
            break
        rate = max(rate, found)
    return best
