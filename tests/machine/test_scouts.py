"""Processes that look at files: the very answers of this process, and what they leave unanswered is not waited for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from featurecache.machine import scout, scouts
from featurecache.machine.scouts import RECORD, ask, gather, look


@pytest.fixture
def files(tmp_path):
    """Forty files of many sizes, and all that may stand in their place."""
    paths = [tmp_path / f"{i} é\n.bin" for i in range(40)]
    for size, path in enumerate(paths):
        path.write_bytes(os.urandom(size * 700))
    (tmp_path / "link").symlink_to(paths[3])
    return pl.Series([*map(str, paths), *(str(tmp_path / name) for name in ("link", "gone", "")), os.devnull])


@pytest.fixture
def many(monkeypatch):
    """Blocks of seven files, and processes for any number."""
    monkeypatch.setattr(scouts, "BLOCK", {"look": 7, "read": 7})
    monkeypatch.setattr(scouts, "WORTH_IT", 1)


def here(do, paths: pl.Series) -> np.ndarray:
    return np.frombuffer(b"".join(map(do, paths.to_list())), RECORD)


def test_the_script_and_numpy_mean_the_same_record(files):
    assert scout.RECORD.size == RECORD.itemsize
    (record,) = here(scout.read, files[5:6])
    status = os.stat(files[5])
    assert record["ok"]
    assert (record["size"], record["mtime_ns"], record["ctime_ns"]) == (3500, status.st_mtime_ns, status.st_ctime_ns)
    assert (record["inode"], record["device"]) == (status.st_ino, status.st_dev)
    with open(files[5], "rb") as file:
        assert record["sha256"].tobytes() == hashlib.sha256(file.read()).digest()
    assert 0 <= time.time_ns() - record["recorded_ns"] < 60e9


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_answer_as_this_one_does(files, many, processes):
    assert np.array_equal(look(files), here(scout.look, files))
    assert look(files)["ok"].tolist() == [True] * 41 + [False, True, True]
    found = np.zeros(len(files), RECORD)
    for start, records in ask("read", files, processes):
        found[start : start + len(records)] = records
    expected = here(scout.read, files)
    assert expected["ok"].tolist() == [True] * 41 + [False] * 3, "what is no regular file is not read"
    for name in set(RECORD.names) - {"recorded_ns"}:
        assert np.array_equal(found[name], expected[name])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert scout.read(str(tmp_path / "pipe")) == scout.NOTHING


def test_a_file_that_changes_while_it_is_read_has_no_record(tmp_path, monkeypatch):
    path, real = tmp_path / "a", os.fstat
    for after in (b"12345678", b"1"):
        path.write_bytes(b"1234")

        def change(descriptor, after=after):
            status = real(descriptor)
            path.write_bytes(after)
            return status

        monkeypatch.setattr(scout.os, "fstat", change)
        assert scout.read(str(path)) == scout.NOTHING


def test_a_large_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(scout, "_PART", 1000)
    for size in (0, 999, 1000, 1001, 4321):
        data = os.urandom(size)
        (tmp_path / "a").write_bytes(data)
        assert scout.read(str(tmp_path / "a"))[-32:] == hashlib.sha256(data).digest()


def test_a_zero_byte_in_a_table_shifts_no_answer(files, many):
    odd = pl.concat([files[:9], pl.Series([f"{files[0]}\0{files[1]}"]), files[9:20]])
    assert np.array_equal(look(odd), here(scout.look, odd))


SILENT = "import time; time.sleep(60)"
DYING = "import sys; sys.stdin.buffer.read(100); sys.stdout.buffer.write(b'x' * 100)"


@pytest.mark.parametrize("code", [SILENT, DYING, None], ids=["hangs", "dies", "can not start"])
def test_what_is_not_answered_is_looked_at_here(files, many, monkeypatch, code):
    started = []

    def start(what):
        if code is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            started.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", code], **pipes))
        return started[-1] if started else None

    monkeypatch.setattr(scouts, "_start", start)
    monkeypatch.setattr(scouts, "PATIENCE", 0.5)
    assert list(ask("read", files, 2)) == []
    assert np.array_equal(gather(files, ask("look", files, 2)), here(scout.look, files))
    assert all(process.returncode is not None for process in started), "they are ended"


def test_who_stops_listening_ends_the_processes(files, many, monkeypatch):
    started, real = [], scouts._start
    monkeypatch.setattr(scouts, "_start", lambda what: started.append(real(what)) or started[-1])
    answers = ask("look", pl.concat([files] * 200), 2)
    next(iter(answers))
    answers.close()
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
