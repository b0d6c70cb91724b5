"""One job of stage one: threads read ahead, one thread feeds the device, a writer thread commits."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from featurecache.amounts import counted, human_bytes
from featurecache.bodies.engines import Engine, choose_batch_size, make_engine
from featurecache.config import ExtractConfig
from featurecache.data.preprocessing import stack
from featurecache.data.readers.base import ReadFailure
from featurecache.errors import DependencyError, FeatureCacheError, InputError, StoreError
from featurecache.machine.memory import give_back
from featurecache.machine.scouts import cores
from featurecache.progress import Reporter
from featurecache.stageone.canary import check_canary, sing, versions
from featurecache.stageone.committer import Committer, Learnt
from featurecache.stageone.jobs import Job, remembered_failures
from featurecache.stageone.keys import StoredKeys, key_array
from featurecache.stageone.producer import Claims, Clock, Item, Seconds, one_line, produce
from featurecache.stageone.recognise import recognise
from featurecache.stageone.space import bytes_to_write
from featurecache.stageone.viewbars import ViewBars
from featurecache.store.store import FeatureStore, RecipeInfo

TRIAL_FROM = 256  # images; below that a trial of batch sizes costs more than it saves
SMALL_BATCH = 8  # costs a CPU less than 16, see bodies.engines.trial
MOST_WAITING = 2**30  # bytes of images that wait for the device, but at least two batches
READ_RATE = 500e6  # bytes/s at which a local disk gives features back


class Extraction:
    """One job: threads read ahead, this thread feeds the device, a writer thread commits."""

    def __init__(
        self, job: Job, config: ExtractConfig, store: FeatureStore, seconds: Seconds, reporter: Reporter
    ) -> None:
        self.job, self.config, self.store = job, config, store
        self.seconds, self.reporter, self.task = seconds, reporter, job.title
        self.bars = ViewBars(job, reporter)
        self.engine: Engine | None = None
        self.committer: Committer | None = None
        self.learnt = Learnt(store)
        self.in_flight = 1  # batches that the engine computes at a time; one more waits for it
        self.batch_size = SMALL_BATCH if config.batch_size == "auto" else config.batch_size
        self.bytes_written = 0
        # Contents that are not tried (again) in this run, with the reason; those that may be remembered.
        self.failed: dict[bytes, str] = {} if config.retry_failed else remembered_failures(job, store)
        self.remembered = frozenset(self.failed)
        self.memorable: set[bytes] = set()
        self.clock = Clock()

    def check_space(self) -> None:
        """Say how much will be written, and refuse to start what can't end.

        Raises:
            StoreError: the features would not fit on the store's file system.
        """
        job, images = self.job, len(self.job.todo)
        if not images:
            return
        # Rows that none of the recognised cells stand for may belong to those that are to be read: files that moved.
        moved = job.info.rows - job.known_contents() if job.info is not None and job.replica is None else 0
        new = max(0, images - moved)
        needed = bytes_to_write(job, self.config, job.recipe, job.info, new)
        free = shutil.disk_usage(self.config.store).free
        most = human_bytes(images * job.row_bytes)
        self.reporter.note(f"{self.task}: {counted(images, 'image')} to do, at most {most} of features")
        if needed > free:
            raise StoreError(
                f"{new:,} images at {job.row_bytes:,} bytes need {needed / 1e9:,.2f} GB in whole chunks, but "
                f"{free / 1e9:,.2f} GB are free where {self.config.store} lies. Pool the taps (NAME:avg), store "
                "float16, give fewer --rows-per-chunk, or use another disk."
            )

    def prepare(self) -> None:
        """Put a recipe that the store does not have there. A known one needs no engine yet."""
        self.stop_if_asked()
        if self.job.info is None:  # another replica may have put it there meanwhile
            found = self.store.find(self.job.recipe)
            self.job.info = next((info for info in found if info.recipe == self.job.recipe), None)
        if self.job.info is None:
            self.start_engine()

    def run(self) -> None:
        """Work through the cells that are to do; whatever happens, what was complete is committed.

        Raises:
            FeatureCacheError: a cell failed and the user wants to stop at the first failure.
        """
        job = self.job
        assert job.info is not None  # prepare has seen to it
        before = job.info
        recognise(job, self.store, self.learnt, self.seconds, self.reporter)
        if job.todo:
            give_back()  # what reading the manifest and planning took, before images take theirs
        self.stored = StoredKeys(self.store, job.recipe.id, before.rows, len(job.todo), job.number)
        workers = cores() if self.config.workers == "auto" else self.config.workers
        channels, (height, width) = job.setup.preprocessing.channels, job.setup.size
        most = MOST_WAITING // (4 * channels * height * width)
        self.bars.begin()
        items = produce(
            job.todo,
            job.setup.reader,
            job.replica or job.setup.preprocessing,
            Claims(self.is_known),
            workers=workers,
            ahead=lambda: self.batch_size + max(self.batch_size, min(self.batch_size + 4 * workers, most)),
            seconds=self.seconds,
        )
        with ExitStack() as ending:  # the last first, each of them even if another fails or a second Ctrl-C comes
            ending.callback(self.bars.end)
            ending.callback(self.finish, before)
            ending.callback(self.commit)
            ending.callback(items.close)
            self.feed(items)
        self.stop_if_asked()

    def commit(self) -> None:
        """Wait until all that was computed is in the store."""
        if self.committer is not None:
            self.committer.close()

    def feed(self, items: Iterator[Item]) -> None:
        """Batches to the device, and from it to the writer, a few in flight."""
        batch: list[Item] = []
        flying: deque[tuple[list[Item], Any]] = deque()
        for item in items:
            if item.image is None:
                self.settle([item])
                continue
            batch.append(item)
            if len(batch) >= self.batch_size:
                flying.append((batch, self.submit(batch)))
                batch = []
                if len(flying) > self.in_flight:
                    self.collect(*flying.popleft())
        if batch:
            flying.append((batch, self.submit(batch)))
        while flying:
            self.collect(*flying.popleft())

    def is_known(self, key: bytes) -> bool:
        """Whether a key has a row, or failed before and is not to be tried again."""
        return key in self.failed or key in self.stored

    def start_engine(self) -> Engine:
        """Make the engine, choose the batch size, check or record the canary."""
        job, setup, config, choice = self.job, self.job.setup, self.config, self.job.choice
        try:
            engine = make_engine(
                setup.tapped(),
                setup.preprocessing,
                engine=choice.engine,
                precision=choice.precision,
                device=config.device,
                identities=setup.identities,
            )
        except (InputError, DependencyError) as error:
            if not choice.held:
                raise
            raise InputError(
                f"{self.task}: {choice.reason} ({choice.engine}, {choice.precision}), but that can't run here: {error} "
                "Use a machine that can, or give --engine and --precision to compute everything anew."
            ) from error
        step = job.replica.of_canary() if job.replica is not None else setup.preprocessing
        song = sing(engine, setup.reader, step, [tap.name for tap in setup.taps])
        if job.info is not None:
            check_canary(song, job.info.canary, choice.precision, job.info.recorded, job.recipe.id)
        if config.batch_size == "auto" and len(job.todo) >= TRIAL_FROM:
            self.batch_size = choose_batch_size(engine, setup.size, setup.preprocessing.channels)
        if job.info is None:
            job.info = self.store.add_recipe(
                job.recipe,
                {tap.name: (tap.shape, tap.dims) for tap in setup.taps},
                codec=config.codec,
                rows_per_chunk=config.rows_per_chunk,
                canary=song,
                recorded={
                    "versions": versions(),
                    "device": str(engine.device),
                    "batch_size": self.batch_size,
                    "threads": torch.get_num_threads(),
                    "body": setup.body.name,
                },
            )
        self.engine, self.in_flight = engine, engine.in_flight
        return engine

    def submit(self, batch: list[Item]) -> Any:
        """Give a batch to the device; the engine is made for the first, so that a run that reuses all makes none."""
        engine = self.engine or self.start_engine()
        pinned = engine.device.type == "cuda"
        images = stack([item.image for item in batch if item.image is not None], pinned=pinned)
        with self.computing(len(batch)):
            return engine.submit(images)

    def collect(self, batch: list[Item], handle: Any) -> None:
        """Take a batch's features from the device to the writer."""
        assert self.engine is not None
        with self.computing(len(batch)):
            arrays = self.engine.collect(handle)
        if self.committer is None:
            number = self.job.number if self.job.replica is not None else None
            self.committer = Committer(self.store, self.job.recipe.id, self.seconds, number)
        names = [tap.name for tap in self.job.setup.taps]
        keys = [item.key for item in batch if item.key is not None]
        self.committer.put(key_array(keys), dict(zip(names, arrays, strict=True)))
        self.settle(batch)
        if self.committer.refused:
            self.spread_failures()
            self.stop_if_asked()
        if self.clock.tick(len(batch)) and self.clock.per_image < self.job.row_bytes / READ_RATE:
            self.reporter.note(
                f"{self.task}: reading {self.job.row_bytes / 1e6:,.1f} MB an image back takes longer than computing "
                f"it ({self.clock.per_image * 1e3:,.1f} ms). Pool the taps (NAME:avg), or tap a later module."
            )

    @contextmanager
    def computing(self, images: int) -> Iterator[None]:
        """Time the device; what goes wrong there is told in words.

        Raises:
            FeatureCacheError: the body, or the device, failed on a batch.
        """
        start = time.perf_counter()
        try:
            yield
        except FeatureCacheError:
            raise
        except Exception as error:
            body, text = self.job.setup.body.name, one_line(error)
            memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text
            advice = f" Give a --batch-size below {self.batch_size}." if memory and self.batch_size > 1 else ""
            raise FeatureCacheError(
                f"{self.task}: {body} failed on a batch of {images} images: {type(error).__name__}: {text}{advice}"
            ) from error
        finally:
            self.seconds.add("compute", time.perf_counter() - start)

    def settle(self, items: Sequence[Item]) -> None:
        """Note what became of cells.

        Raises:
            FeatureCacheError: a cell failed and the user wants to stop at the first failure.
        """
        job = self.job
        for item in items:
            if item.record is not None:
                self.learnt.file(item.record)
            if item.key is not None:
                job.learn(item.cell, item.key)
            if item.failure is not None:
                self.note_failure(item, item.failure)
        self.bars.settle(items, self.failed)

    def note_failure(self, item: Item, failure: ReadFailure) -> None:
        """Remember why a cell could not be read."""
        self.job.fail(item.cell, failure.message, transient=not failure.deterministic)
        if item.key is not None:
            self.failed[item.key] = failure.message
            if failure.deterministic:
                self.memorable.add(item.key)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End the run at its first failure, where the user wants that."""
        if self.config.on_error == "stop" and self.job.failures:
            name, message = self.job.first_failure()
            raise FeatureCacheError(f"{name}: {message} (stopped, as --on-error stop asks)")

    def spread_failures(self) -> None:
        """Tell every cell of a failed content that it failed: of what the writer refused, and equal content."""
        if self.committer is not None:
            self.failed |= self.committer.refused
            self.memorable |= self.committer.refused.keys()
        self.job.spread(self.failed, lasting=self.memorable | self.remembered)

    def finish(self, before: RecipeInfo) -> None:
        """Write down what was learnt, and count."""
        job = self.job
        self.spread_failures()
        for key in self.memorable:
            self.learnt.failure(job.recipe.id, key, job.reader_id, self.failed[key])
        self.learnt.flush()
        self.engine = None  # its memory is the next job's
        give_back()  # as much as counting takes
        if self.committer is not None:
            job.info = self.store.recipe(job.recipe.id)
            job.computed = job.info.rows - before.rows
            self.bytes_written = job.computed * job.row_bytes  # not of files: a chunk has its full size from the start
        job.settle(self.store)
        give_back()  # and binding the cells after that
