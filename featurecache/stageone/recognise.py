"""Recognises files by their bytes, many at once, so that what is stored never goes one by one through the pipeline.

Only what is new, and what can't be read, is left to the pipeline, which reads it once more: its key is then that of the
bytes that are decoded, whatever has become of the file in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.machine import scouts
from featurecache.machine.scouts import Records
from featurecache.progress import Reporter
from featurecache.stageone.committer import Learnt
from featurecache.stageone.jobs import Job
from featurecache.stageone.keys import Cells, file_keys
from featurecache.stageone.producer import Seconds
from featurecache.store.lookup import KeyTable
from featurecache.store.records import StatRecord, settled
from featurecache.store.store import FeatureStore

Places = NDArray[np.int64]
TRIAL = 4096  # files after which it shows whether most are known


def recognise(job: Job, store: FeatureStore, learnt: Learnt, seconds: Seconds, reporter: Reporter) -> None:
    """Take the cells off the job's list whose bytes have a row already.

    Files that were hashed before come first. It ends where less than half of the files are known: to read the others
    twice, here and to decode them, would cost more than it saves.
    """
    if job.replica is not None or job.info is None or not job.info.rows or len(job.todo) < scouts.WORTH_IT:
        return
    start, cells, left = time.perf_counter(), job.todo, np.ones(len(job.todo), np.bool_)
    table, before = KeyTable(*store.keys(job.recipe.id)), _Before(cells, store)
    task = f"{job.title}, known files"
    reporter.begin(task, len(cells), "files")
    try:
        files = (cells.column("kind") == "file").to_numpy()
        for part in (files & before.known, files & ~before.known):
            for places, keys, records in _mostly_known(
                cells, np.flatnonzero(part), table, partial(reporter.advance, task)
            ):
                where = job.cells.places(cells)[places]
                job.keys.values[where], job.keys.known[where], job.done[where] = keys, True, True
                left[places] = False
                for record in before.unlike(places, records):
                    learnt.file(record)
    finally:
        reporter.end(task)
        job.todo = cells.pick(left)
        seconds.add("read", time.perf_counter() - start)


def _mostly_known(
    cells: Cells, places: Places, table: KeyTable, advance: Callable[[int], None]
) -> Iterator[tuple[Places, NDArray[np.uint8], Records]]:
    """Places, keys and records of those files that have a row, as long as these are not less than half."""
    tried = known = 0
    with closing(read_keys(cells, places)) as answers:
        for asked, found, keys, records in answers:
            held = table.find(keys, np.zeros(len(keys), np.int32)) >= 0
            yield found[held], keys[held], records[held]
            advance(asked)
            tried, known = tried + asked, known + int(held.sum())
            if tried >= TRIAL and known < tried / 2:
                return


def read_keys(cells: Cells, places: Places) -> Generator[tuple[int, Places, NDArray[np.uint8], Records], None, None]:
    """Read and hash files with all cores.

    Args:
        cells: among which they are.
        places: (n,) of the files.

    Yields:
        How many were asked for, and of those that could be read: their places (m,), keys (m, 32) and records (m,).
    """
    paths, selectors = (cells.column(name).gather(places) for name in ("location", "selector"))
    with closing(scouts.ask("read", paths, scouts.cores())) as answers:
        for start, block in answers:
            records = block[block["ok"]]
            at = start + np.flatnonzero(block["ok"])
            yield len(block), places[at], file_keys(selectors.gather(at), records["sha256"]), records


class _Before:
    """What was remembered of the files of some cells.

    Attributes:
        known: (n,) bool, whether anything was.
    """

    def __init__(self, cells: Cells, store: FeatureStore) -> None:
        self._paths = cells.column("location")
        records = store.payload_table(self._paths)
        records = records.with_columns(pl.Series("settled", settled(records)))
        places = self._paths.alias("path").to_frame().with_row_index("place")
        found = places.join(records, on="path", how="inner")
        at = found["place"].to_numpy()
        self.known = np.zeros(len(cells), np.bool_)
        self.known[at] = True
        self._records = np.zeros(len(cells), scouts.RECORD)
        for name in ("size", "mtime_ns", "ctime_ns", "inode", "sha256"):
            values = found[name].to_numpy()
            self._records[name][at] = values.view(np.uint64) if name == "inode" else values
        self._records["ok"][at] = found["settled"].to_numpy()

    def unlike(self, places: Places, records: Records) -> Iterator[StatRecord]:
        """What is to be remembered instead, of files at these places."""
        old = self._records[places]
        same = old["ok"] & (old["sha256"] == records["sha256"]).all(axis=1)
        for name in ("size", "mtime_ns", "ctime_ns", "inode"):
            same &= old[name] == records[name]
        for place, new in zip(places[~same].tolist(), records[~same], strict=True):
            size, mtime, ctime, recorded = (int(new[name]) for name in ("size", "mtime_ns", "ctime_ns", "recorded_ns"))
            inode, sha256 = int(new["inode"].astype(np.int64)), new["sha256"].tobytes()
            yield StatRecord(self._paths[place], size, mtime, ctime, inode, recorded, sha256)
