"""Stage one: every cell of a manifest through reader and body into the store, unless its features are there already."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featurecache.bodies.engines import Engine, choose_batch_size, make_engine, resolve_device
from featurecache.canary import check_canary, sing, versions
from featurecache.committer import Committer, Learnt
from featurecache.config import ExtractConfig
from featurecache.data.manifest import read_manifest
from featurecache.data.preprocessing import stack
from featurecache.errors import FeatureCacheError, InputError, StoreError
from featurecache.jobs import (
    Job,
    check_replaced,
    list_failures,
    make_binding,
    plan_jobs,
    remembered_failures,
    set_up_views,
    stored,
    with_earlier_views,
    write_failures,
)
from featurecache.keys import StoredKeys, key_array
from featurecache.producer import Claims, Clock, Item, Seconds, cores, one_line, produce
from featurecache.progress import Reporter, Silent
from featurecache.store.store import FeatureStore, RecipeInfo
from featurecache.viewsetup import check_options

TRIAL_FROM = 256  # images; below that a trial of batch sizes costs more than it saves
SMALL_BATCH = 16
IN_FLIGHT = 2  # batches that the device has and that are not yet collected
READ_RATE = 500e6  # bytes/s at which a local disk gives features back


@dataclass(frozen=True)
class Summary:
    """What a run of stage one did; `to_json` has the names of the command line."""

    dataset: str
    store: str
    samples: int
    images: int
    computed: int
    reused: int
    failed: int
    seconds: dict[str, float]
    bytes_written: int
    recipes: dict[str, str]
    engines: dict[str, str]
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Images computed per second of the whole run, start-up included."""
        return self.computed / max(self.seconds["seconds_total"], 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Flat figures; which samples failed is told beside them, as `failed`."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "images": self.images,
            "computed": self.computed,
            "reused": self.reused,
            "n_failed": self.failed,
            "images_per_second": round(self.images_per_second, 2),
            "bytes": self.bytes_written,
            "recipes": self.recipes,
            "engines": self.engines,
            **self.seconds,
        }


def extract(config: ExtractConfig, reporter: Reporter | None = None) -> Summary:
    """Run stage one.

    Args:
        config: what to read, which bodies and taps, where to store.
        reporter: told of progress.

    Returns:
        Counts and times. Failed cells are listed in `failures` and in STORE/failures.csv.

    Raises:
        InputError: the manifest or the configuration is not valid; nothing was written.
        LockedError: another process writes to the store.
        StoreError: the store can't be written, or this process computes other numbers than the recipe's (see canary).
        KeyboardInterrupt: passed on, after what was complete has been committed and bound.
    """
    start = time.perf_counter()
    reporter = reporter or Silent()
    check_options(config)
    manifest = read_manifest(config)
    name = config.name or manifest.path.stem
    setups = set_up_views(config, manifest.views)
    with FeatureStore.create_or_open(config.store, write=True) as store:
        previous = store.binding(name) if name in store.bindings() else None
        check_replaced(previous, manifest, name, replace=config.replace)
        merged = with_earlier_views(config, previous, manifest)
        if merged is not config:
            manifest = read_manifest(merged)
        jobs = plan_jobs(config, manifest, setups, store)
        seconds = Seconds()
        work = [Extraction(job, config, store, seconds, reporter) for job in jobs]
        for extraction in work:
            extraction.check_space()
        for extraction in work:  # every recipe is in the store before the first row: a binding needs them all
            extraction.prepare()
        try:
            for extraction in work:
                extraction.run()
        finally:  # also on Ctrl-C: what was committed is bound, so that the next run goes on from there
            earlier = None if config.replace else previous
            store.bind(make_binding(name, manifest, merged, jobs, earlier), replace=True)
            failures = list_failures(manifest, jobs)
            write_failures(Path(config.store) / "failures.csv", failures)
        computed = sum(job.computed for job in jobs)
        return Summary(
            dataset=name,
            store=str(config.store),
            samples=manifest.table.height,
            images=sum(len(job.cells) for job in jobs),
            computed=computed,
            reused=sum(len(job.done) for job in jobs) - computed,
            failed=len(failures),
            seconds={**seconds.to_json(), "seconds_total": round(time.perf_counter() - start, 3)},
            bytes_written=sum(extraction.bytes_written for extraction in work),
            recipes={view: job.recipe.id for job in jobs for view in job.views},
            engines={view: str(job.choice) for job in jobs for view in job.views},
            failures=failures,
        )


class Extraction:
    """One job: threads read ahead, this thread feeds the device, a writer thread commits."""

    def __init__(
        self, job: Job, config: ExtractConfig, store: FeatureStore, seconds: Seconds, reporter: Reporter
    ) -> None:
        self.job, self.config, self.store = job, config, store
        self.seconds, self.reporter, self.task = seconds, reporter, "+".join(job.views)
        self.engine: Engine | None = None
        self.committer: Committer | None = None
        self.learnt = Learnt(store)
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
        known = {job.keys[index] for index in job.done}
        new = max(0, images - (job.info.rows - len(known) if job.info is not None else 0))
        needed, free = job.row_bytes * new, shutil.disk_usage(self.config.store).free
        self.reporter.note(f"{self.task}: {images:,} images to do, about {needed / 1e6:,.1f} MB of features to write")
        if needed > free:
            raise StoreError(
                f"{new:,} images at {job.row_bytes:,} bytes need {needed / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are "
                f"free where {self.config.store} lies. Pool the taps (NAME:avg), store float16, or use another disk."
            )

    def prepare(self) -> None:
        """Put a recipe that the store does not have there. A known one needs no engine yet."""
        self.stop_if_asked()
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
        self.stored = StoredKeys(self.store, job.recipe.id, before.rows, len(job.todo))
        workers = cores() if self.config.workers == "auto" else self.config.workers
        self.reporter.begin(self.task, len(job.todo))
        items = produce(
            job.todo,
            job.setup.reader,
            job.setup.preprocessing,
            Claims(self.is_known),
            workers=workers,
            ahead=lambda: IN_FLIGHT * self.batch_size + 4 * workers,
            seconds=self.seconds,
        )
        try:
            self.feed(items)
        finally:
            try:
                items.close()
                if self.committer is not None:
                    self.committer.close()
            finally:
                self.finish(before)
                self.reporter.end(self.task)
        self.stop_if_asked()

    def feed(self, items: Iterator[Item]) -> None:
        """Batches to the device, and from it to the writer, a few in flight."""
        batch: list[Item] = []
        flying: deque[tuple[list[Item], Any]] = deque()
        for item in items:
            if item.image is None:
                self.settle(item)
                continue
            batch.append(item)
            if len(batch) >= self.batch_size:
                flying.append((batch, self.submit(batch)))
                batch = []
                if len(flying) >= IN_FLIGHT:
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
        device = resolve_device(config.device)
        try:
            engine = make_engine(
                setup.tapped(), setup.preprocessing, engine=choice.engine, precision=choice.precision, device=device
            )
        except InputError as error:
            if not choice.held:
                raise
            raise InputError(
                f"{self.task}: {choice.reason} ({choice.engine}, {choice.precision}), but that can't run here: {error} "
                "Use a machine that can, or give --engine and --precision to compute everything anew."
            ) from error
        song = sing(engine, setup.reader, setup.preprocessing, [tap.name for tap in setup.taps])
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
                    "device": str(device),
                    "batch_size": self.batch_size,
                    "threads": torch.get_num_threads(),
                    "body": setup.body.name,
                },
            )
        self.engine = engine
        return engine

    def submit(self, batch: list[Item]) -> Any:
        """Give a batch to the device; the engine is made for the first, so that a run that reuses all makes none."""
        engine = self.engine or self.start_engine()
        images = stack([item.image for item in batch if item.image is not None])
        with self.computing(len(batch)):
            return engine.submit(images)

    def collect(self, batch: list[Item], handle: Any) -> None:
        """Take a batch's features from the device to the writer."""
        assert self.engine is not None
        with self.computing(len(batch)):
            arrays = self.engine.collect(handle)
        if self.committer is None:
            self.committer = Committer(self.store, self.job.recipe.id, self.seconds)
        names = [tap.name for tap in self.job.setup.taps]
        keys = [item.key for item in batch if item.key is not None]
        self.committer.put(key_array(keys), dict(zip(names, arrays, strict=True)))
        for item in batch:
            self.settle(item)
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

    def settle(self, item: Item) -> None:
        """Note what became of a cell.

        Raises:
            FeatureCacheError: the cell failed and the user wants to stop at the first failure.
        """
        job, index, failure = self.job, item.cell.index, item.failure
        if item.record is not None:
            self.learnt.file(item.record)
        if item.key is not None:
            job.keys[index] = item.key
        if failure is not None:
            job.failures[index] = failure.message
            if not failure.deterministic:
                job.transient.add(index)
            if item.key is not None:
                self.failed[item.key] = failure.message
                if failure.deterministic:
                    self.memorable.add(item.key)
            self.stop_if_asked()
        self.reporter.advance(self.task, 1, status=f"{len(job.failures)} failed" if job.failures else "")

    def stop_if_asked(self) -> None:
        """End the run at its first failure, where the user wants that."""
        if self.config.on_error == "stop" and self.job.failures:
            index, message = next(iter(self.job.failures.items()))
            name = next(cell.value for cell in self.job.cells if cell.index == index)
            raise FeatureCacheError(f"{name}: {message} (stopped, as --on-error stop asks)")

    def spread_failures(self) -> None:
        """Tell every cell of a failed content that it failed: of what the writer refused, and equal content."""
        if self.committer is not None:
            self.failed |= self.committer.refused
            self.memorable |= self.committer.refused.keys()
        if self.failed:
            for index, key in self.job.keys.items():
                if key in self.failed:
                    self.job.failures[index] = self.failed[key]
                    if key not in self.memorable | self.remembered:
                        self.job.transient.add(index)

    def finish(self, before: RecipeInfo) -> None:
        """Write down what was learnt, and count."""
        job = self.job
        self.spread_failures()
        for key in self.memorable:
            self.learnt.failure(job.recipe.id, key, job.reader_id, self.failed[key])
        self.learnt.flush()
        self.engine = None  # its memory is the next job's
        if self.committer is not None:
            job.info = self.store.recipe(job.recipe.id)
            job.computed = job.info.rows - before.rows
            self.bytes_written = job.info.bytes - before.bytes
        if job.todo:
            job.done = stored(job, self.store)
