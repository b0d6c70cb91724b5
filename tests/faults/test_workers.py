"""Cases 9 and 10: a DataLoader's worker that fails, dies or hangs ends in bounded time, and the store is as it was."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from store_kit import Filled, make_features, make_keys
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from featurecache import errors
from featurecache.dataset import FeatureDataset
from featurecache.errors import CorruptionError, FeatureCacheError
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

BOUND = 30.0  # seconds; torch looks for dead workers every five
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def dataset(filled: Filled) -> FeatureDataset:
    (tap,) = [tap for tap in make_features([0]) if tap.startswith("penultimate")]
    return FeatureDataset(filled.path, dataset="birds", target="label", tap=tap, memory=0)


def loader(data: FeatureDataset, **options) -> DataLoader:
    return DataLoader(data, batch_size=4, num_workers=2, prefetch_factor=1, multiprocessing_context="fork", **options)


@pytest.fixture
def birds(filled, monkeypatch):
    """A dataset whose manifest is where its binding says."""
    monkeypatch.setattr("featurecache.dataset.check_fresh", lambda binding: None)
    return filled


def check_intact(filled: Filled) -> None:
    assert verify(filled.path).ok
    filled.check()
    found = torch.cat([features for features, _ in loader(dataset(filled))]).numpy()
    np.testing.assert_array_equal(found, make_features(range(40))["penultimate@none"].astype(np.float32))


def test_a_worker_that_meets_a_damaged_chunk(birds):
    path = birds.chunk(1)
    good = path.read_bytes()
    path.write_bytes(good[:50] + b"\0" + good[51:])
    start, batches = time.monotonic(), iter(loader(dataset(birds)))
    with pytest.raises(CorruptionError, match="samples bird-16, bird-17"):
        list(batches)
    batches._shutdown_workers()
    assert time.monotonic() - start < BOUND
    path.write_bytes(good)
    check_intact(birds)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch may hear of it in a `__del__`
def test_a_worker_that_is_killed(birds):
    batches = iter(loader(dataset(birds)))
    next(batches)
    start = time.monotonic()

    def go_on() -> None:
        os.kill(batches._workers[1].pid, signal.SIGKILL)  # torch raises where it hears of it, which may be here
        list(batches)

    with pytest.raises((RuntimeError, EOFError, OSError)) as caught:  # the latter two: it died handing over a batch
        go_on()
    if caught.type is RuntimeError:
        assert re.search(r"DataLoader worker \(pid.* (exited|killed)", str(caught.value))
    assert time.monotonic() - start < BOUND
    check_intact(birds)


@pytest.mark.slow
def test_a_worker_that_hangs(birds):
    """A disk that does not answer: torch gives up after the time that it was given."""
    data = dataset(birds)
    data.features._read = lambda *arguments: time.sleep(600)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        list(loader(data, timeout=1))
    assert time.monotonic() - start < BOUND
    check_intact(birds)


OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FeatureCacheError)]


@pytest.mark.parametrize("kind", OURS)
def test_every_error_of_ours_comes_out_of_a_worker(kind):
    """torch makes it anew from its class and its text; what it can't make, or pickle, would hang or lose its kind."""
    try:
        raise kind("what was found")
    except FeatureCacheError:
        wrapped = ExceptionWrapper(where="in a worker")
    with pytest.raises(kind, match="what was found") as caught:
        pickle.loads(pickle.dumps(wrapped)).reraise()
    assert type(caught.value) is kind


WRITER = """
import sys
from torch.utils.data import DataLoader
import featurecache.dataset
from featurecache.store.store import FeatureStore

featurecache.dataset.check_fresh = lambda binding: None
writer = FeatureStore(sys.argv[1], write=True)
data = featurecache.dataset.FeatureDataset(sys.argv[1], dataset="birds", tap="penultimate@none", memory=0)
batches = iter(DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork"))
next(batches)
print("open", *(worker.pid for worker in batches._workers), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_writer_killed_while_its_dataloader_works_gives_the_lock_back(filled):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(filled.path)], **pipes) as writer:
        assert writer.stdout is not None
        word, *workers = writer.stdout.readline().split()
        assert (word, len(workers)) == ("open", 2)
        for pid in workers:  # they would end when they notice: they must not be what frees the lock
            os.kill(int(pid), signal.SIGSTOP)
        try:
            writer.kill()
            writer.wait()
            start = time.monotonic()
            with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
                appender.append(make_keys([40]), make_features([40]))
            assert time.monotonic() - start < 10
        finally:
            for pid in workers:
                os.kill(int(pid), signal.SIGKILL)
    filled.check(range(41))
