"""Stage one: every cell of a manifest through reader and body into the store, unless its features are there already."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featurecache.amounts import human_bytes
from featurecache.config import ExtractConfig
from featurecache.data.likely import likely_target
from featurecache.data.manifest import read_manifest, with_readers
from featurecache.progress import Reporter, Silent
from featurecache.stageone.extraction import Extraction
from featurecache.stageone.jobs import (
    Job,
    check_replaced,
    plan_jobs,
    plan_replicas,
    set_up_views,
    with_earlier_views,
)
from featurecache.stageone.outcome import list_failures, make_binding, moved_views, write_failures
from featurecache.stageone.producer import Seconds
from featurecache.stageone.survey import Survey
from featurecache.stageone.viewsetup import check_engines, check_options
from featurecache.store.store import FeatureStore


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
    bytes_written: int  # of the features that were added, before compression
    recipes: dict[str, str]
    engines: dict[str, str]
    failures: list[dict[str, str]] = field(default_factory=list)
    replicas: int = 0  # of each image
    replicas_computed: int = 0
    replicas_reused: int = 0
    target: str = ""  # the column that is most likely what to predict; a guess

    @property
    def images_per_second(self) -> float:
        """Images (and replicas) computed per second of the whole run, start-up included."""
        return (self.computed + self.replicas_computed) / max(self.seconds["seconds_total"], 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Flat figures; which samples failed is told beside them, as `failed`."""
        return {
            "dataset": self.dataset,
            "samples": self.samples,
            "images": self.images,
            "computed": self.computed,
            "reused": self.reused,
            "n_failed": self.failed,
            "replicas": self.replicas,
            "replicas_computed": self.replicas_computed,
            "replicas_reused": self.replicas_reused,
            "images_per_second": round(self.images_per_second, 2),
            "bytes": self.bytes_written,
            "recipes": self.recipes,
            "engines": self.engines,
            **self.seconds,
        }

    def lines(self) -> list[str]:
        """As a person reads it."""
        share = 100 * self.reused / self.images if self.images else 100.0
        rate = f" ({self.images_per_second:,.1f} images/s)" if self.computed else ""
        lines = [
            f"dataset   {self.dataset}: {self.samples:,} samples, {self.images:,} images",
            f"computed  {self.computed:,}{rate}",
            f"reused    {self.reused:,} ({math.floor(share * 10) / 10:g} % reused)",
        ]
        if self.replicas:
            counts = f"computed {self.replicas_computed:,}, reused {self.replicas_reused:,}"
            lines.append(f"replicas  {self.replicas} of each image: {counts}")
        lines.append(f"failed    {self.failed:,}" + (f", see {self.store}/failures.csv" if self.failed else ""))
        lines.append(f"written   {human_bytes(self.bytes_written)} to {self.store}")
        lines += [f"view      {view}: recipe {recipe}, {self.engines[view]}" for view, recipe in self.recipes.items()]
        parts = ", ".join(f"{name.removeprefix('seconds_')} {value:.1f} s" for name, value in self.seconds.items())
        return [*lines, f"time      {parts}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def extract(config: ExtractConfig, reporter: Reporter | None = None, survey: Survey | None = None) -> Summary:
    """Run stage one.

    Args:
        config: what to read, which bodies and taps, where to store.
        reporter: told of progress.
        survey: of this configuration, begun while this module was imported.

    Returns:
        Counts and times. Failed cells are listed in `failures` and in STORE/failures.csv.

    Raises:
        InputError: the manifest or the configuration is not valid; nothing was written.
        LockedError: another process writes to the store.
        StoreError: the store can't be written, or this process computes other numbers than the recipe's (see canary).
        KeyboardInterrupt: passed on, after what was complete has been committed and bound.
    """
    start = time.perf_counter()
    with survey or Survey(config) as begun:
        return _extract(config, reporter or Silent(), begun, start)


def _extract(config: ExtractConfig, reporter: Reporter, survey: Survey, start: float) -> Summary:
    check_options(config)
    manifest = survey.manifest()
    for note in manifest.notes:
        reporter.note(note)
    config = with_readers(config, manifest)
    name = config.name or manifest.path.stem
    setups = set_up_views(config, manifest.views)
    check_engines(config, setups.values())
    survey.wait_for_store()
    with FeatureStore.create_or_open(config.store, write=True) as store:
        previous = store.binding(name) if name in store.bindings() else None
        check_replaced(previous, manifest, name, replace=config.replace, reporter=reporter)
        merged = with_earlier_views(config, previous, manifest)
        if merged is not config:
            manifest = read_manifest(merged)
        jobs = plan_jobs(config, manifest, setups, store, survey.unchanged())
        seconds = Seconds()
        work = [Extraction(job, config, store, seconds, reporter) for job in jobs]
        replicas: list[Job] = []
        for extraction in work:
            extraction.check_space()
        for extraction in work:  # every recipe is in the store before the first row: a binding needs them all
            extraction.prepare()
        try:
            for extraction in work:
                extraction.run()
            for job in jobs:
                for replica in plan_replicas(config, job, store):
                    replicas.append(replica)
                    work.append(Extraction(replica, config, store, seconds, reporter))
                    work[-1].check_space()
                    work[-1].prepare()
                    work[-1].run()
        finally:  # also on Ctrl-C: what was committed is bound, so that the next run goes on from there
            earlier = None if config.replace else previous
            held = {info.id for info in store.recipes() if info.rows}
            binding = make_binding(name, manifest, merged, jobs, earlier, held)
            if previous is None or not binding.same(previous):
                store.bind(binding, replace=True)
            for note in moved_views(binding, earlier):
                reporter.note(note)
            failures = list_failures(manifest, [*jobs, *replicas])
            write_failures(Path(config.store) / "failures.csv", failures)
        computed, drawn = (sum(job.computed for job in some) for some in (jobs, replicas))
        return Summary(
            dataset=name,
            store=str(config.store),
            samples=manifest.table.height,
            images=sum(job.images for job in jobs),
            computed=computed,
            reused=sum(job.stored for job in jobs) - computed,
            failed=sum(len(job.failures) for job in jobs),
            seconds={**seconds.to_json(), "seconds_total": round(time.perf_counter() - start, 3)},
            bytes_written=sum(extraction.bytes_written for extraction in work),
            recipes={view: job.recipe.id for job in jobs for view in job.views},
            engines={view: str(job.choice) for job in jobs for view in job.views},
            failures=failures,
            replicas=config.replicas,
            replicas_computed=drawn,
            replicas_reused=sum(job.stored for job in replicas) - drawn,
            target=likely_target(manifest.table, config),
        )
