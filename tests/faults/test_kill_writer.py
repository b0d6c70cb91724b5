"""Cases 1 and 2: kill -9 of a writer at random times and at every operation; what was committed stays, once each."""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from store_kit import check_complete, known_rows, make_recipe, write_known
from store_writer import Writers
from zarr import open_group

from featurecache.store.files import STEPS

ROWS = 300


def raw_rows(path: Path) -> dict[bytes, tuple[bytes, ...]]:
    """Key -> bytes of its features, with nothing but zarr."""
    group = open_group(path / "features.zarr", mode="r")[make_recipe().id]
    keys = group["key"][:]
    held = np.flatnonzero(keys.any(axis=1))
    taps = [group[tap][:] for tap in sorted(set(group.array_keys()) - {"key"})]
    assert len({keys[at].tobytes() for at in held}) == len(held), "a key is there twice"
    return {keys[at].tobytes(): tuple(tap[at].tobytes() for tap in taps) for at in held}


def kill_at_random(folder: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """Kill writers at random times, each going on from what the one before left, until so many died at work.

    Returns:
        Kills, how many of them left fewer rows than all and more than none, and how many stores were completed.
    """
    rng = np.random.default_rng(seed)
    died = partly = 0
    with Writers() as writers:
        writers.run(folder / "warm-up", ROWS)
        start = time.monotonic()
        assert writers.run(folder / "reference", ROWS).status == 0
        span = time.monotonic() - start
        reference = raw_rows(folder / "reference")
        assert len(reference) == ROWS
        for number in itertools.count():
            store, before = folder / f"store{number}", set[int]()
            while died < kills and len(before) < ROWS:
                died += writers.start(store, ROWS).kill_after(float(rng.uniform(0, span)))
                now = known_rows(store, ROWS)
                assert now >= before, "a committed row is gone"
                partly += before < now < set(range(ROWS))
                before = now
            assert writers.run(store, ROWS).status == 0
            check_complete(store, ROWS)
            assert raw_rows(store) == reference
            shutil.rmtree(store)
            if died >= kills:
                return died, partly, number + 1


def test_killed_at_random_times(ram):
    assert kill_at_random(ram, 6, seed=1)[0] == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_two_hundred_times(ram, record):
    died, partly, stores = kill_at_random(ram, 200, seed=2)
    assert died == 200
    assert partly >= 20, "the kills must hit the writing, not only the start and the end"
    record("writer_kills_survived", died)
    record("writer_kills_between_commits", partly)
    record("writer_stores_completed", stores)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_every_operation(ram, record):
    """At each named step and before each write, fsync and rename, from making the store to closing it."""
    rows = 150
    with Writers() as writers:
        total = writers.run(ram / "reference", rows).events
        reference = raw_rows(ram / "reference")
        for at in range(1, total + 1):
            store = ram / f"store{at}"
            assert writers.run(store, rows, die_at=at).status == -signal.SIGKILL
            before = known_rows(store, rows)
            assert write_known(store, rows) == rows - len(before)
            check_complete(store, rows)
            assert raw_rows(store) == reference
            shutil.rmtree(store)
    assert total > 10 * len(STEPS)
    record("operation_kills_survived", total)
