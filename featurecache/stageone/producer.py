"""Reads, hashes, decodes and preprocesses cells ahead of the device, in order and with bounded memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Any

import torch

from featurecache.data.readers.base import Reader, ReadFailure, read
from featurecache.data.transforms import Preprocessing
from featurecache.errors import FeatureCacheError, InputError, ReadError, StoreError
from featurecache.stageone import readahead
from featurecache.stageone.keys import Cell, KeySet, Payload, read_payload
from featurecache.stageone.replicas import DrawnVersion, Replica
from featurecache.store.records import StatRecord

WARM = 5  # batches after which the speed of the device is known
MOST_HUNG = 8  # reads that may hang before the run ends: a disk or server that is gone
SLACK = 4  # an image that holds on to more than so many times its own bytes is copied out


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
        self._taken = KeySet()
        self._lock = Lock()

    def take(self, key: bytes) -> bool:
        """True for the first who asks for a key that needs work; equal content is computed once."""
        with self._lock:
            if not self._taken.add(key):
                return False
        return not self._known(key)


def decode(
    reader: Reader, preprocessing: Preprocessing | DrawnVersion, data: bytes, selector: str
) -> torch.Tensor | ReadFailure:
    """Payload to preprocessed image, (channels, height, width), or the reason why not.

    Only what a reader or the preprocessing refuses in words will fail again for sure; whatever else goes wrong (memory,
    which torch reports as RuntimeError too, or a defect) is tried again on the next run.
    """
    decoded = read(reader, data, _selector(selector))
    if isinstance(decoded, ReadFailure):
        return decoded
    try:
        image = preprocessing.apply(decoded)
        # A crop is a view: what waits for the device must not keep a large photograph in memory.
        return image.clone() if image.untyped_storage().nbytes() > SLACK * image.nbytes else image
    except ReadError as error:
        return ReadFailure("ReadError", str(error), error.deterministic)
    except InputError as error:  # an image with other channels than the body takes
        return ReadFailure("InputError", str(error), True)
    except MemoryError:
        return ReadFailure("MemoryError", "out of memory while resizing", False)
    except Exception as error:
        return ReadFailure(type(error).__name__, f"can't be preprocessed: {one_line(error)}", False)


@lru_cache(maxsize=1024)
def _selector(text: str) -> Mapping[str, Any]:
    """Most cells share one; readers only look at it."""
    found: dict[str, Any] = json.loads(text)
    return found


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def produce(
    cells: Sequence[Cell],
    reader: Reader,
    preprocessing: Preprocessing | Replica,
    claims: Claims,
    *,
    workers: int,
    ahead: Callable[[], int],
    seconds: Seconds,
    load: Callable[[Cell], Payload | ReadFailure] = read_payload,
) -> Generator[Item, None, None]:
    """Yield an Item per cell, in the order of `cells`, with at most `ahead()` in memory.

    Whatever goes wrong with one cell is its failure; of what a reading thread raises, only a damaged store ends the
    run. Threads, not processes: decoders, resizing and hashing release the GIL, and nothing has to be copied. A cell
    that hangs (a network drive that is gone) is given up after a while, and tried again on the next run.

    Raises:
        FeatureCacheError: cell after cell hangs.
    """
    hung: list[Cell] = []

    def work(cell: Cell) -> Item:
        try:
            return item_of(cell)
        except StoreError:
            raise
        except BaseException as error:  # of a thread: nothing that ends the process, not even what a reader exits with
            return Item(cell, None, None, failure=ReadFailure(type(error).__name__, one_line(error), False))

    def give_up(cell: Cell) -> Item:
        hung.append(cell)
        message = f"not read and decoded within {readahead.PATIENCE:g} s"
        if len(hung) == MOST_HUNG:
            raise FeatureCacheError(
                f"{cell.value}: {message}, like {len(hung) - 1} before it. Is the disk or server that holds the images "
                "still there? What was complete is kept; run the same command again to go on."
            )
        return Item(cell, None, None, failure=ReadFailure("TimeoutError", message, False))

    def item_of(cell: Cell) -> Item:
        start = time.perf_counter()
        payload = load(cell)
        seconds.add("read", time.perf_counter() - start)
        if isinstance(payload, ReadFailure):
            return Item(cell, None, None, failure=payload)
        if not claims.take(payload.key):
            return Item(cell, payload.key, payload.record)
        start = time.perf_counter()
        step = preprocessing.of(payload.key) if isinstance(preprocessing, Replica) else preprocessing
        image = decode(reader, step, payload.data, cell.selector)
        seconds.add("decode", time.perf_counter() - start)
        if isinstance(image, ReadFailure):
            return Item(cell, payload.key, payload.record, failure=image)
        return Item(cell, payload.key, payload.record, image=image)

    yield from readahead.work_ahead(cells, work, give_up, workers=workers, ahead=ahead, name="read")
