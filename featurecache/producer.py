"""Reads, hashes, decodes and preprocesses cells ahead of the device, in order and with bounded memory."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import torch

from featurecache.data.readers.base import Reader, ReadFailure, read
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError, ReadError, StoreError
from featurecache.keys import Cell, Payload, read_payload
from featurecache.store.records import StatRecord

WARM = 5  # batches after which the speed of the device is known


@dataclass(frozen=True, slots=True)
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
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, part: str, seconds: float) -> None:
        """Count `seconds` for a part; safe from any thread."""
        with self._lock:
            setattr(self, part, getattr(self, part) + seconds)

    def to_json(self) -> dict[str, float]:
        """Flat names as the command line prints them."""
        return {f"seconds_{name}": round(getattr(self, name), 3) for name in ("read", "decode", "compute", "write")}


class Clock:
    """How long an image takes on the device, once it has warmed up."""

    def __init__(self) -> None:
        self.batches, self.images = 0, 0
        self.start = self.per_image = 0.0

    def tick(self, images: int) -> bool:
        """Count a batch; True once, when `per_image` (seconds) is known."""
        self.batches += 1
        if self.batches == 1:
            self.start = time.perf_counter()
        elif self.batches <= WARM:
            self.images += images
            self.per_image = (time.perf_counter() - self.start) / self.images
        return self.batches == WARM


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
    """Payload to preprocessed image, (channels, height, width), or the reason why not.

    Only what a reader or the preprocessing refuses in words will fail again for sure; whatever else goes wrong (memory,
    which torch reports as RuntimeError too, or a defect) is tried again on the next run.
    """
    decoded = read(reader, data, json.loads(selector))
    if isinstance(decoded, ReadFailure):
        return decoded
    try:
        return preprocessing.apply(decoded)
    except ReadError as error:
        return ReadFailure("ReadError", str(error), error.deterministic)
    except InputError as error:  # an image with other channels than the body takes
        return ReadFailure("InputError", str(error), True)
    except MemoryError:
        return ReadFailure("MemoryError", "out of memory while resizing", False)
    except Exception as error:
        return ReadFailure(type(error).__name__, f"can't be preprocessed: {one_line(error)}", False)


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def produce(
    cells: Sequence[Cell],
    reader: Reader,
    preprocessing: Preprocessing,
    claims: Claims,
    *,
    workers: int,
    ahead: Callable[[], int],
    seconds: Seconds,
    load: Callable[[Cell], Payload | ReadFailure] = read_payload,
) -> Generator[Item, None, None]:
    """Yield an Item per cell, in the order of `cells`, with at most `ahead()` in memory.

    Whatever goes wrong with one cell is its failure; of what a reading thread raises, only a damaged store ends the
    run. Threads, not processes: decoders, resizing and hashing release the GIL, and nothing has to be copied.
    """

    def work(cell: Cell) -> Item:
        try:
            return item_of(cell)
        except StoreError:
            raise
        except Exception as error:
            return Item(cell, None, None, failure=ReadFailure(type(error).__name__, one_line(error), False))

    def item_of(cell: Cell) -> Item:
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
                if len(waiting) >= ahead():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
