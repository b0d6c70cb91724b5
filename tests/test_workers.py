"""Reading threads that hang or meet the worst: the run ends in bounded time and lists what it could not read."""

from __future__ import annotations

import os
import threading
import time

import pytest
from extract_kit import config, counts, read_rows, run, states, write_images

from featurecache.data.readers import image as image_reader
from featurecache.data.readers.base import ReadFailure
from featurecache.errors import FeatureCacheError
from featurecache.extract import extract
from featurecache.stageone import producer, readahead
from featurecache.stageone.keys import Cell, read_payload

N = 20
real = image_reader.inspect


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", N, side=8)


@pytest.fixture
def odd(data):
    """The bytes of three images whose reading goes wrong."""
    return {data.with_name(f"image{i:04d}.png").read_bytes() for i in (3, 4, 11)}


def meets(monkeypatch, payloads, what):
    monkeypatch.setattr(
        image_reader, "inspect", lambda payload, kind: what() if payload in payloads else real(payload, kind)
    )


class Unpicklable(Exception):
    """Can't cross to another process."""

    def __init__(self) -> None:
        super().__init__("a lock", threading.Lock())


class Strange(BaseException):
    """No Exception, as if a library ended the thread."""


@pytest.mark.parametrize(("error", "again"), [(Unpicklable, 0), (SystemExit, 3), (Strange, 3), (KeyboardInterrupt, 3)])
def test_an_error_in_a_reader_costs_one_image(data, tmp_path, monkeypatch, odd, error, again):
    def fail():
        raise error

    with monkeypatch.context() as patch:
        meets(patch, odd, fail)
        assert counts(run(data, tmp_path / "store")) == (N - 3, 0, 3)
    assert {row["sample_id"] for row in read_rows(tmp_path / "store" / "failures.csv")} == {"s0003", "s0004", "s0011"}
    # What a decoder says of bytes in memory is remembered; what ends a thread may not happen again.
    assert counts(run(data, tmp_path / "store")) == (again, N - 3, 3 - again)
    assert counts(run(data, tmp_path / "store", retry_failed=True)) == (3 - again, N - 3 + again, 0)


def test_a_read_that_hangs_costs_one_image(data, tmp_path, monkeypatch, odd):
    monkeypatch.setattr(readahead, "PATIENCE", 0.3)
    monkeypatch.setattr(readahead, "FAREWELL", 0.1)
    over = threading.Event()
    start = time.monotonic()
    try:
        with monkeypatch.context() as patch:
            meets(patch, odd, lambda: over.wait(60))
            assert counts(run(data, tmp_path / "store", workers=2)) == (N - 3, 0, 3)
    finally:
        over.set()
    assert time.monotonic() - start < 20
    rows = read_rows(tmp_path / "store" / "failures.csv")
    assert {row["error"] for row in rows} == {"not read and decoded within 0.3 s"}
    assert list(states(tmp_path / "store").values()).count("pending") == 3  # no missing views: only not yet read
    assert counts(run(data, tmp_path / "store")) == (3, N - 3, 0)


def test_a_disk_that_is_gone_ends_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(readahead, "PATIENCE", 0.2)
    monkeypatch.setattr(readahead, "FAREWELL", 0.1)
    monkeypatch.setattr(producer, "MOST_HUNG", 3)
    payloads = {data.with_name(f"image{i:04d}.png").read_bytes() for i in range(4, N)}
    over = threading.Event()
    try:
        with monkeypatch.context() as patch:
            meets(patch, payloads, lambda: over.wait(60))
            message = r"image\d+\.png: not read and decoded within 0\.2 s, like 2 before it.*still there.*run the same"
            with pytest.raises(FeatureCacheError, match=message):
                extract(config(data, tmp_path / "store", workers=2, batch_size=1))
    finally:
        over.set()
    found = states(tmp_path / "store")
    done = [name for name, state in found.items() if state == "done"]
    assert done == ["s0000", "s0001", "s0002"]  # the fourth was with the device
    assert counts(run(data, tmp_path / "store")) == (N - 3, 3, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_became_a_pipe_is_not_waited_for(tmp_path):
    """A manifest that names a pipe is refused; this one was put there since."""
    os.mkfifo(tmp_path / "pipe")
    failure = ReadFailure("InputError", "not a regular file but a pipe, device or socket", False)
    for path in (str(tmp_path / "pipe"), os.devnull):
        assert read_payload(Cell(0, "file", path, path, "{}")) == failure
