"""Processes that look at many files at once, each with a core of its own, while this one does something else.

A look at a small file is a few microseconds of the system and a few of the interpreter. Threads of one process take
turns at the latter, so that two of them are hardly faster than one, and none gets on while torch is being imported.
What the processes do not answer, because one died or a read hangs, is left to whoever asked.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.machine import scout

Records = NDArray[np.void]

RECORD = np.dtype(
    [
        ("ok", "?"), ("size", "<i8"), ("mtime_ns", "<i8"), ("ctime_ns", "<i8"), ("inode", "<u8"), ("device", "<u8"),
        ("recorded_ns", "<i8"), ("sha256", "u1", (32,)),
    ]
)  # fmt: skip
"""`featurecache.machine.scout.RECORD` as numpy has it."""
BLOCK = {"look": 4096, "read": 512}  # files to a question: what takes about as long as asking it or longer
WORTH_IT = 5_000  # files below which starting processes takes as long as looking
PATIENCE = 300.0  # seconds without any answer
FAREWELL = 1.0  # seconds for a process that was killed to be gone


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def look(paths: pl.Series) -> Records:
    """(n,) records of the files' stat; `ok` is False where there is none."""
    return gather(paths, ask("look", paths, cores()) if len(paths) >= WORTH_IT else ())


def gather(paths: pl.Series, answers: Iterable[tuple[int, Records]]) -> Records:
    """(n,) records of the files' stat, from what was answered; at the rest this process looks itself."""
    found, seen = np.zeros(len(paths), RECORD), np.zeros(len(paths), np.bool_)
    for start, records in answers:
        found[start : start + len(records)], seen[start : start + len(records)] = records, True
    left = np.flatnonzero(~seen)
    if len(left):
        found[left] = np.frombuffer(b"".join(map(scout.look, paths.gather(left).to_list())), RECORD)
    return found


def ask(what: Literal["look", "read"], paths: pl.Series, processes: int) -> Answers:
    """Have processes look at files, beginning now.

    Args:
        what: at their stat, or at the bytes too (`sha256`, `recorded_ns`).
        paths: (n,) text without nulls.
        processes: how many look.
    """
    blocks = _Blocks(paths, BLOCK[what])
    answers: SimpleQueue[tuple[int, Records] | None] = SimpleQueue()
    crew = [found for _ in range(processes) if (found := _start(what)) is not None]
    for process in crew:
        _Dialogue(process, blocks, answers).start()
    return Answers(crew, answers)


class Answers:
    """(Number of the first path, records) of blocks of paths, as they come in; of a block there may be no answer."""

    def __init__(self, crew: list[subprocess.Popen[bytes]], queue: SimpleQueue[tuple[int, Records] | None]) -> None:
        self._crew, self._queue = crew, queue

    def __iter__(self) -> Iterator[tuple[int, Records]]:
        working = len(self._crew)
        try:
            while working:
                answer = self._queue.get(timeout=PATIENCE)
                if answer is None:
                    working -= 1
                else:
                    yield answer
        except Empty:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """End the processes; no more answers are wanted."""
        for process in self._crew:
            process.kill()
        for process in self._crew:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(FAREWELL)


def _start(what: str) -> subprocess.Popen[bytes] | None:
    """A process that looks; None where there can be none."""
    command = [sys.executable or "", "-I", "-S", scout.__file__ or "", what]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None


class _Blocks:
    """Blocks of paths, each given to one process only."""

    def __init__(self, paths: pl.Series, size: int) -> None:
        self._paths, self._size, self._lock = paths, size, Lock()
        self._starts = iter(range(0, len(paths), size))

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        """(first, number of paths, as a process is asked) of the blocks that nobody has taken."""
        while True:
            with self._lock:
                start = next(self._starts, None)
            if start is None:
                return
            block = self._paths[start : start + self._size]
            text = os.fsencode(block.str.join("\0").item())
            if text.count(b"\0") == len(block) - 1:  # a zero byte can stand in a table, if not in the name of a file
                yield start, len(block), len(text).to_bytes(scout.LENGTH, "little") + text


class _Dialogue:
    """Asks one process and listens to it, in two threads: pipes hold little, and who only asks would wait for ever."""

    def __init__(self, process: subprocess.Popen[bytes], blocks: _Blocks, answers: SimpleQueue[Any]) -> None:
        self._process, self._blocks, self._answers = process, blocks, answers
        self._asked: SimpleQueue[tuple[int, int] | None] = SimpleQueue()

    def start(self) -> None:
        """Begin."""
        for work in (self._speak, self._listen):
            Thread(target=work, name="scouts", daemon=True).start()

    def _speak(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdin as sink:
            for start, count, question in self._blocks:
                self._asked.put((start, count))
                sink.write(question)
                sink.flush()
        self._asked.put(None)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError), self._process.stdout as source:
            while (asked := self._asked.get()) is not None:
                start, count = asked
                answer = source.read(count * RECORD.itemsize)
                if len(answer) < count * RECORD.itemsize:
                    break
                self._answers.put((start, np.frombuffer(answer, RECORD)))
        self._answers.put(None)
