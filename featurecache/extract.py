"""Stage one: every cell of a manifest through reader and body into the store, unless its features are there already."""

from __future__ import annotations

import csv
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache.bodies.engines import Engine, choose_batch_size, make_engine, resolve_device
from featurecache.canary import check_canary, sing, versions
from featurecache.committer import Committer, Learnt
from featurecache.config import ExtractConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import FeatureCacheError, InputError
from featurecache.jobs import (
    Job,
    check_replaced,
    key_array,
    list_failures,
    make_binding,
    plan_jobs,
    remembered_failures,
    set_up_views,
    with_earlier_views,
)
from featurecache.producer import Claims, Item, Seconds, produce
from featurecache.progress import Reporter, Silent
from featurecache.store.store import FeatureStore, RecipeInfo

TRIAL_FROM = 256  # images; below that a trial of batch sizes costs more than it saves
SMALL_BATCH = 16
IN_FLIGHT = 2  # batches that the device has and that are not yet collected
FAILURE_COLUMNS = ("sample_id", "view", "path", "error")


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
        """Flat figures."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "images": self.images,
            "computed": self.computed,
            "reused": self.reused,
            "failed": self.failed,
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
    manifest = read_manifest(config)
    requested = manifest.views
    name = config.name or manifest.path.stem
    setups = set_up_views(config, requested)
    with FeatureStore.create_or_open(config.store, write=True) as store:
        previous = store.binding(name) if name in store.bindings() else None
        check_replaced(previous, manifest, name, replace=config.replace)
        merged = with_earlier_views(config, previous, manifest)
        if merged is not config:
            manifest = read_manifest(merged)
        jobs = plan_jobs(config, manifest, setups, store)
        seconds, before = Seconds(), stored_bytes(store)
        work = [Extraction(job, config, store, seconds, reporter) for job in jobs]
        for extraction in work:  # every recipe is in the store before the first row: a binding needs them all
            extraction.prepare()
        try:
            for extraction in work:
                extraction.run()
        finally:  # also on Ctrl-C: what was committed is bound, so that the next run goes on from there
            store.bind(make_binding(name, manifest, merged, jobs, store, previous), replace=True)
        failures = list_failures(manifest, jobs)
        write_failures(Path(config.store) / "failures.csv", failures)
        images = sum(len(job.cells) for job in jobs)
        computed = sum(job.computed for job in jobs)
        return Summary(
            dataset=name,
            store=str(config.store),
            samples=manifest.table.height,
            images=images,
            computed=computed,
            reused=images - computed - len(failures),
            failed=len(failures),
            seconds={**seconds.to_json(), "seconds_total": round(time.perf_counter() - start, 3)},
            bytes_written=stored_bytes(store) - before,
            recipes={view: job.recipe.id for job in jobs for view in job.views},
            engines={view: str(job.choice) for job in jobs for view in job.views},
            failures=failures,
        )


def stored_bytes(store: FeatureStore) -> int:
    """Bytes of all committed chunks."""
    return sum(info.bytes for info in store.recipes())


class Extraction:
    """One job: threads read ahead, this thread feeds the device, a writer thread commits."""

    def __init__(
        self, job: Job, config: ExtractConfig, store: FeatureStore, seconds: Seconds, reporter: Reporter
    ) -> None:
        self.job, self.config, self.store = job, config, store
        self.seconds, self.reporter, self.task = seconds, reporter, "+".join(job.views)
        self.info: RecipeInfo | None = {info.id: info for info in store.recipes()}.get(job.recipe.id)
        self.engine: Engine | None = None
        self.committer: Committer | None = None
        self.learnt = Learnt(store)
        self.batch_size = SMALL_BATCH
        self.known_failures = {} if config.retry_failed else remembered_failures(store, job.recipe.id)

    def prepare(self) -> None:
        """Check the space, and put a recipe that the store does not have there. A known one needs no engine yet."""
        if self.job.todo:
            self.check_space()
        if self.info is None:
            self.engine = self.start_engine()

    def run(self) -> None:
        """Work through the cells that are to do; whatever happens, what was complete is committed."""
        job = self.job
        workers = (os.cpu_count() or 1) if self.config.workers == "auto" else self.config.workers
        rows_before = self.store.recipe(job.recipe.id).rows
        self.reporter.begin(self.task, len(job.cells))
        self.reporter.advance(self.task, len(job.cells) - len(job.todo))
        items = produce(
            job.todo,
            job.setup.reader,
            job.setup.preprocessing,
            Claims(self.is_known),
            workers=workers,
            ahead=4 * workers + 64,
            seconds=self.seconds,
        )
        try:
            self.feed(items)
        finally:
            items.close()
            try:
                if self.committer is not None:
                    self.committer.close()
            finally:
                self.finish(rows_before)
                self.reporter.end(self.task)

    def feed(self, items: Iterator[Item]) -> None:
        """Batches to the device, and from it to the writer, a few in flight."""
        batch: list[Item] = []
        flying: deque[tuple[list[Item], Any]] = deque()
        for item in items:
            if item.image is None:
                self.settle(item)
                continue
            if self.engine is None:  # made for the first image that needs it: a run that reuses all makes none
                self.engine = self.start_engine()
            if self.committer is None:
                self.committer = Committer(self.store, self.job.recipe.id, self.seconds)
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
        if key in self.known_failures:
            return True
        return bool(self.store.rows(self.job.recipe.id, key_array([key]))[0] >= 0)

    def start_engine(self) -> Engine:
        """Make the engine, choose the batch size, check or record the canary."""
        job, setup, config = self.job, self.job.setup, self.config
        device = resolve_device(config.device)
        engine = make_engine(
            setup.tapped(), setup.preprocessing, engine=job.choice.engine, precision=job.choice.precision, device=device
        )
        names = [tap.name for tap in setup.taps]
        song = sing(engine, setup.reader, setup.preprocessing, names)
        if config.batch_size != "auto":
            self.batch_size = config.batch_size
        elif len(job.todo) >= TRIAL_FROM:
            self.batch_size = choose_batch_size(engine, setup.size, setup.preprocessing.channels)
        if self.info is not None:
            check_canary(song, self.info.canary or {}, job.choice.precision, dict(self.info.recorded), job.recipe.id)
        else:
            self.info = self.store.add_recipe(
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
        return engine

    def check_space(self) -> None:
        """Say how much will be written, and refuse to start what can't end.

        Raises:
            InputError: the features would not fit on the store's file system.
        """
        itemsize = np.dtype(self.config.store_dtype).itemsize
        row = sum(int(np.prod(tap.shape)) for tap in self.job.setup.taps) * itemsize
        images = len(self.job.todo)
        needed, free = row * images, shutil.disk_usage(self.config.store).free
        self.reporter.note(f"{self.task}: {images:,} images to do, up to {needed / 1e6:,.1f} MB of features to write")
        if needed > free:
            raise InputError(
                f"{images:,} images at {row:,} bytes need {needed / 1e9:,.2f} GB, but {free / 1e9:,.2f} GB are free "
                f"where {self.config.store} lies. Pool the taps (NAME:avg), store float16, or use another disk."
            )

    def submit(self, batch: list[Item]) -> Any:
        """Give a batch to the device."""
        assert self.engine is not None
        start = time.perf_counter()
        handle = self.engine.submit(torch.stack([item.image for item in batch if item.image is not None]))
        self.seconds.add("compute", time.perf_counter() - start)
        return handle

    def collect(self, batch: list[Item], handle: Any) -> None:
        """Take a batch's features from the device to the writer."""
        assert self.engine is not None
        assert self.committer is not None
        start = time.perf_counter()
        arrays = self.engine.collect(handle)
        self.seconds.add("compute", time.perf_counter() - start)
        names = [tap.name for tap in self.job.setup.taps]
        keys = [item.key for item in batch if item.key is not None]
        self.committer.put(key_array(keys), dict(zip(names, arrays, strict=True)))
        for item in batch:
            self.settle(item)

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
            if item.key is not None and failure.deterministic:
                self.known_failures[item.key] = failure.message
            if self.config.on_error == "stop":
                raise FeatureCacheError(f"{item.cell.value}: {failure.message} (stopped, as --on-error stop asks)")
        self.reporter.advance(self.task, 1, status=f"{len(job.failures)} failed" if job.failures else "")

    def finish(self, rows_before: int) -> None:
        """Write down what was learnt, and tell every cell of a failed content that it failed."""
        job = self.job
        if self.committer is not None:
            self.known_failures |= self.committer.refused
        reader = f"{job.setup.reader.name}/{job.setup.reader.version}"
        known = remembered_failures(self.store, job.recipe.id)
        for key, message in self.known_failures.items():
            if known.get(key) != message:
                self.learnt.failure(job.recipe.id, key, reader, message)
        self.learnt.flush()
        for index, key in job.keys.items():
            if key in self.known_failures:
                job.failures[index] = self.known_failures[key]
        job.computed = self.store.recipe(job.recipe.id).rows - rows_before


def write_failures(path: Path, failures: list[dict[str, str]]) -> None:
    """STORE/failures.csv of the latest run; removed when nothing failed."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, FAILURE_COLUMNS)
        writer.writeheader()
        writer.writerows(failures)
    os.replace(temporary, path)
