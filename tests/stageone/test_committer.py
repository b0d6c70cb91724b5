"""The writer thread: everything handed over is committed, in time, and its errors reach the one who feeds it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from featurecache.errors import StoreError
from featurecache.stageone import committer
from featurecache.stageone.committer import Committer, Learnt
from featurecache.stageone.keys import key_array
from featurecache.stageone.producer import Seconds
from featurecache.store import appender, files
from featurecache.store.recipe import Recipe
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

RECIPE = Recipe({"storage_dtype": "float32"}, ({"name": "tap@none"},))


@pytest.fixture
def store(tmp_path):
    with FeatureStore(tmp_path / "store", write=True) as opened:
        opened.add_recipe(RECIPE, {"tap@none": ((3,), ("features",))}, rows_per_chunk=4)
        yield opened
    files.hook = None


def batch(first: int, n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    keys = [bytes([1, *(0,) * 27]) + (first + i).to_bytes(4, "big") for i in range(n)]
    return key_array(keys), {"tap@none": np.arange(first, first + n, dtype=np.float32)[:, None].repeat(3, 1)}


def rows(store: FeatureStore) -> int:
    return store.recipe(RECIPE.id).rows


def test_everything_is_committed_at_the_end(store):
    writer, seconds = None, Seconds()
    writer = Committer(store, RECIPE.id, seconds)
    for first in range(0, 30, 3):
        writer.put(*batch(first, 3))
    writer.close()
    writer.close()
    assert rows(store) == 30
    assert seconds.write > 0
    found = store.rows(RECIPE.id, batch(0, 30)[0])
    np.testing.assert_array_equal(store.read(RECIPE.id, "tap@none", found)[:, 0], np.arange(30))


def test_rows_do_not_wait_for_a_slow_device(store, monkeypatch):
    """A commit is due after a time even if no further batch comes."""
    monkeypatch.setattr(appender, "COMMIT_SECONDS", 0.05)
    monkeypatch.setattr(committer, "DUE_EVERY", 0.02)
    writer = Committer(store, RECIPE.id, Seconds())
    writer.put(*batch(0, 2))
    end = time.monotonic() + 10
    while rows(store) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert rows(store) == 2
    writer.close()


def test_refused_rows_are_told_before_the_end(store):
    writer = Committer(store, RECIPE.id, Seconds())
    keys, arrays = batch(0, 3)
    arrays["tap@none"][1, 2] = np.nan
    writer.put(keys, arrays)
    end = time.monotonic() + 10
    while not writer.refused and time.monotonic() < end:
        time.sleep(0.01)
    assert writer.refused == {keys[1].tobytes(): "tap@none: features are not finite in float32"}
    writer.close()
    assert rows(store) == 2


def test_an_error_of_the_disk_reaches_the_feeder(store):
    def full(name: str) -> None:
        if name == "io:write" and threading.current_thread().name == "committer":
            raise OSError(28, "No space left on device")

    writer = Committer(store, RECIPE.id, Seconds())
    writer.put(*batch(0, 4))
    while rows(store) < 4:
        time.sleep(0.005)
    files.hook = full

    def feed() -> None:
        for first in range(4, 4000, 4):
            writer.put(*batch(first, 4))

    with pytest.raises(StoreError, match="No space left on device"):
        feed()
    files.hook = None
    with pytest.raises(StoreError, match="No space left on device"):
        writer.close()
    assert rows(store) == 4


def test_ctrl_c_waits_for_the_writer(store, monkeypatch):
    writer = Committer(store, RECIPE.id, Seconds())
    writer.put(*batch(0, 3))
    real, pressed = writer._thread.join, []

    def join(timeout=None):
        if not pressed:
            pressed.append(1)
            raise KeyboardInterrupt
        real(timeout)

    monkeypatch.setattr(writer._thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert rows(store) == 3
    assert not writer._thread.is_alive()


def test_what_is_learnt_is_written_every_few_seconds(store, monkeypatch):
    learnt = Learnt(store)
    record = StatRecord("/a", 1, 2, 3, 4, 5, bytes(32))
    learnt.file(record)
    assert store.payloads(["/a"]) == {}
    monkeypatch.setattr(committer, "LEARNT_MOST", 2)
    learnt.file(record._replace(path="/0"))
    assert set(store.payloads(["/a", "/0"])) == {"/a", "/0"}, "or when there are many"
    monkeypatch.setattr(committer, "LEARNT_EVERY", 0.0)
    learnt.file(record._replace(path="/b"))
    assert set(store.payloads(["/a", "/b"])) == {"/a", "/b"}
    learnt.failure(RECIPE.id, b"k" * 32, "image/1", "broken")
    learnt.flush()
    assert store.failures(RECIPE.id) == {b"k" * 32: ("image/1", "broken")}
