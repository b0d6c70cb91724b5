"""Threads that work ahead of whoever takes the results: in order, bounded, and a task that hangs is given up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 300.0  # seconds that one task may take; a file of any size is read and decoded in less
BLOCK = 8  # tasks handed to a thread at once: waking threads for each would cost some per cent of decoding
FAREWELL = 5.0  # seconds that threads get to finish what they are at when the results are no longer wanted


@dataclass(eq=False)
class _Block(Generic[T, R]):
    """Some tasks, and what has become of the first of them.

    `begun` is when the task at hand was started, None while none was. Under `lock`, since it is asked for while the
    thread that works on it may be gone for good.
    """

    tasks: list[T]
    results: list[R] = field(default_factory=list)
    error: BaseException | None = None
    begun: float | None = None
    given_up: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, do: Callable[[T], R]) -> bool:
        """Do the tasks; False where the block was given up meanwhile."""
        self.begun = time.monotonic()
        for task in self.tasks:
            try:
                result = do(task)
            except BaseException as error:  # handed to whoever takes the results
                self.error = error
                break
            with self.lock:
                if self.given_up:
                    return False
                self.results.append(result)
                self.begun = time.monotonic()
        self.ended.set()
        return not self.given_up

    def hangs(self) -> bool:
        """Whether the task at hand takes too long; then the block is given up, and its results stay as they are."""
        with self.lock:
            late = self.begun is not None and time.monotonic() - self.begun > PATIENCE
            self.given_up |= late and not self.ended.is_set()
            return self.given_up


class _Crew(Generic[T, R]):
    """Daemon threads, so that one that hangs doesn't keep the process from ending."""

    def __init__(self, do: Callable[[T], R], size: int, name: str) -> None:
        self._do, self._name = do, name
        self._queue: SimpleQueue[_Block[T, R] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(size):
            self.hire()

    def hire(self, first: _Block[T, R] | None = None) -> None:
        """One more thread, which begins with a block of its own."""
        thread = threading.Thread(target=self._run, args=(first,), name=f"{self._name}-{len(self._threads)}")
        thread.daemon = True
        self._threads.append(thread)
        thread.start()

    def put(self, block: _Block[T, R]) -> None:
        self._queue.put(block)

    def dismiss(self) -> None:
        """Wait for the threads to end; not for ever."""
        end = time.monotonic() + FAREWELL
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, block: _Block[T, R] | None) -> None:
        if block is not None and not block.work(self._do):
            return
        while (block := self._queue.get()) is not None:
            if not block.given_up and not block.work(self._do):
                return  # another thread has taken this one's place


def work_ahead(
    tasks: Iterable[T],
    do: Callable[[T], R],
    give_up: Callable[[T], R],
    *,
    workers: int,
    ahead: Callable[[], int],
    name: str = "worker",
) -> Generator[R, None, None]:
    """Yield `do(task)` of each task, in order, with at most `ahead()` tasks begun and not yet yielded.

    Args:
        tasks: what to do.
        do: called in threads; what it raises is raised here, in its turn.
        give_up: called here for a task that took longer than `PATIENCE`: gives its result, or raises. Its thread is
            left to itself, since threads can't be ended, and a new one goes on with the next task.
        workers: threads.
        ahead: how many results may wait; asked again and again.
        name: of the threads.
    """
    crew: _Crew[T, R] = _Crew(do, workers, name)
    source, waiting, begun = iter(tasks), deque[_Block[T, R]](), 0
    try:
        while True:
            while (room := ahead() - begun) > 0:
                size = max(1, min(BLOCK, ahead() // (2 * workers)))  # every thread has one, and one waits for it
                if waiting and room < size:
                    break
                block: _Block[T, R] = _Block(list(islice(source, min(size, room))))
                if not block.tasks:
                    break
                begun += len(block.tasks)
                waiting.append(block)
                crew.put(block)
            if not waiting:
                return
            block = waiting.popleft()
            while not block.ended.wait(min(1.0, PATIENCE / 4)):
                if block.hangs():
                    done = len(block.results)
                    block.results.append(give_up(block.tasks[done]))
                    rest: _Block[T, R] = _Block(block.tasks[done + 1 :])
                    waiting.appendleft(rest)
                    crew.hire(rest)
                    break
            begun -= len(block.results)
            yield from block.results
            if block.error is not None:
                raise block.error
    finally:
        for block in waiting:
            block.given_up = True
        crew.dismiss()
