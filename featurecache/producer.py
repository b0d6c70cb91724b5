"""Reads, hashes, decodes and preprocesses cells ahead of the device, in order and with bounded memory."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

from featurecache.data.readers.base import Decoded, Reader, ReadFailure, read
from featurecache.data.transforms import Preprocessing
from featurecache.keys import Cell, Payload, read_payload
from featurecache.store.records import StatRecord


@dataclass(frozen=True)
class Item:
    """What became of one cell: an `image` to run, a `failure`, or neither where its key is known already."""

    cell: Cell
    key: bytes | None
    record: StatRecord | None
    image: torch.Tensor | None = None
    failure: ReadFailure | None = None


@dataclass
class Seconds:
    """Time spent by part, summed over threads."""

    read: float = 0.0
    decode: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    _lock: Any = field(default_factory=Lock, repr=False)

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds` for a part; safe from any thread."""
        with self._lock:
            setattr(self, part, getattr(self, part) + seconds)

    def to_json(self) -> dict[str, float]:
        """Flat names as the command line prints them."""
        return {f"seconds_{name}": round(getattr(self, name), 3) for name in ("read", "decode", "compute", "write")}


class Claims:
    """Which keys need work: neither known (stored already, failed before) nor under way in this run."""

    def __init__(self, known: Callable[[bytes], bool]) -> None:
        self._known = known
        self._taken: set[bytes] = set()
        self._lock = Lock()

    def take(self, key: bytes) -> bool:
        """True for the first who asks for a key that needs work; equal content is computed once."""
        with self._lock:
            if key in self._taken:
                return False
            self._taken.add(key)
        return not self._known(key)


def decode(reader: Reader, preprocessing: Preprocessing, data: bytes, selector: str) -> torch.Tensor | ReadFailure:
    """Payload to preprocessed image, (channels, height, width), or the reason why not."""
    decoded = read(reader, data, json.loads(selector))
    if isinstance(decoded, ReadFailure):
        return decoded
    return preprocess(preprocessing, decoded)


def preprocess(preprocessing: Preprocessing, decoded: Decoded) -> torch.Tensor | ReadFailure:
    """A decoded image to the size that the body takes; what can't be resized is a failure, not an exception."""
    try:
        return preprocessing.apply(decoded)
    except (ValueError, RuntimeError) as error:
        return ReadFailure(type(error).__name__, f"can't be preprocessed: {error}", True)
    except MemoryError:
        return ReadFailure("MemoryError", "out of memory", False)


def produce(
    cells: Sequence[Cell],
    reader: Reader,
    preprocessing: Preprocessing,
    claims: Claims,
    *,
    workers: int,
    ahead: int,
    seconds: Seconds,
    load: Callable[[Cell], Payload | ReadFailure] = read_payload,
) -> Iterator[Item]:
    """Yield an Item per cell, in the order of `cells`, with at most `ahead` in memory.

    Threads, not processes: decoders, resizing and hashing release the GIL, and nothing has to be copied between.
    """

    def work(cell: Cell) -> Item:
        start = time.perf_counter()
        payload = load(cell)
        seconds.add("read", time.perf_counter() - start)
        if isinstance(payload, ReadFailure):
            return Item(cell, None, None, failure=payload)
        if not claims.take(payload.key):
            return Item(cell, payload.key, payload.record)
        start = time.perf_counter()
        image = decode(reader, preprocessing, payload.data, cell.selector)
        seconds.add("decode", time.perf_counter() - start)
        if isinstance(image, ReadFailure):
            return Item(cell, payload.key, payload.record, failure=image)
        return Item(cell, payload.key, payload.record, image=image)

    waiting: deque[Future[Item]] = deque()
    remaining = iter(cells)
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        try:
            for cell in remaining:
                waiting.append(pool.submit(work, cell))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
