"""The writer thread of stage one: takes batches of features from a bounded queue and appends them to the store."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from featurecache.stageone.producer import Seconds
from featurecache.store.appender import Appender
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

WAITING = 4  # batches between device and disk
DUE_EVERY = 5.0  # seconds between looks at whether a commit is due while no batch comes
LEARNT_EVERY = 5.0  # seconds between commits of stat records and failures,
LEARNT_MOST = 1024  # or files: what is known of one takes half a kilobyte

Batch = tuple[NDArray[np.uint8], Mapping[str, NDArray[np.float32]]]


class Committer:
    """Appends in a thread of its own, so that the device never waits for the disk (unless the queue is full).

    Attributes:
        refused: contents whose features were not finite, so far: {key: reason}.
    """

    def __init__(self, store: FeatureStore, recipe_id: str, seconds: Seconds, replica: int | None = None) -> None:
        self._store, self._recipe_id, self._seconds, self._replica = store, recipe_id, seconds, replica
        self._queue: queue.Queue[Batch | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self.refused: dict[bytes, str] = {}
        self._thread = threading.Thread(target=self._work, name="committer", daemon=True)
        self._thread.start()

    def put(self, keys: NDArray[np.uint8], arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Hand over a batch: keys (n, 32) and per tap (n, ...) features.

        Raises:
            BaseException: whatever stopped the writer; nothing given after that is stored.
        """
        self._offer((keys, arrays))
        self._check()

    def close(self) -> None:
        """Commit all that was handed over and wait for it, through any Ctrl-C: it takes moments, and ends the run."""
        interrupted: KeyboardInterrupt | None = None
        ending = False
        while self._thread.is_alive():
            try:
                if not ending:
                    self._offer(None)
                    ending = True
                self._thread.join(0.5)
            except KeyboardInterrupt as error:
                interrupted = error
        self._check()
        if interrupted is not None:
            raise interrupted

    def _offer(self, batch: Batch | None) -> None:
        """Put into the queue as soon as there is room; in vain where the writer has stopped."""
        while self._thread.is_alive():
            try:
                self._queue.put(batch, timeout=0.5)
                return
            except queue.Full:
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            with self._store.appender(self._recipe_id) as appender:
                while (batch := self._next(appender)) is not None:
                    keys, arrays = batch
                    number = None if self._replica is None else np.full(len(keys), self._replica, np.int32)
                    with self._writing():
                        appender.append(keys, arrays, number)
                    if len(appender.refused) > len(self.refused):
                        self.refused = dict(appender.refused)
                with self._writing():
                    appender.flush()
        except BaseException as error:  # handed to the thread that feeds, which raises it
            self._error = error

    def _next(self, appender: Appender) -> Batch | None:
        """The next batch; rows do not wait for it longer than the store allows."""
        while True:
            try:
                return self._queue.get(timeout=DUE_EVERY)
            except queue.Empty:
                with self._writing():
                    appender.commit_if_due()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds.add("write", time.perf_counter() - start)


class Learnt:
    """What a run learns beside features (stat of files, failures that will repeat), committed every few seconds."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._records: list[StatRecord] = []
        self._failures: list[tuple[str, bytes, str, str]] = []
        self._since = time.monotonic()

    def file(self, record: StatRecord) -> None:
        """A file was read and hashed."""
        self._records.append(record)
        if len(self._records) >= LEARNT_MOST or time.monotonic() - self._since > LEARNT_EVERY:
            self.flush()

    def failure(self, recipe_id: str, key: bytes, reader_id: str, message: str) -> None:
        """A content can't be turned into features by this recipe and reader."""
        self._failures.append((recipe_id, key, reader_id, message))

    def flush(self) -> None:
        """Write it down."""
        self._since = time.monotonic()
        if self._records:
            self._store.remember_payloads(self._records)
            self._records = []
        for recipe_id in {failure[0] for failure in self._failures}:
            self._store.add_failures(recipe_id, [entry[1:] for entry in self._failures if entry[0] == recipe_id])
        self._failures = []
