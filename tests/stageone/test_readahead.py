"""Working ahead: in order and bounded; what hangs is given up, and nothing that a thread meets ends another's work."""

from __future__ import annotations

import threading
import time

import pytest

from featurecache.stageone import readahead
from featurecache.stageone.readahead import work_ahead


def results(do, n=100, workers=3, ahead=lambda: 16, give_up=lambda task: -task):
    return work_ahead(range(n), do, give_up, workers=workers, ahead=ahead, name="test")


@pytest.fixture
def hang():
    """A call that returns only when the test is over."""
    over = threading.Event()
    yield lambda: over.wait(30)
    over.set()


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("test")]


def test_results_in_order():
    assert list(results(lambda task: task * 2)) == [task * 2 for task in range(100)]
    assert list(results(lambda task: task, n=0)) == []
    assert alive() == []


@pytest.mark.parametrize("ahead", [1, 5, 64])
def test_bounded(ahead):
    started: list[int] = []
    for taken, _ in enumerate(results(started.append, ahead=lambda: ahead), 1):
        time.sleep(0.0005)
        assert len(started) <= taken + ahead


def test_the_bound_may_grow_and_shrink():
    bound = [2]
    found = []
    for result in results(lambda task: task, ahead=lambda: bound[0]):
        found.append(result)
        bound[0] = 40 if len(found) < 50 else 1
    assert found == list(range(100))


def test_an_error_comes_in_its_turn():
    def do(task: int) -> int:
        if task == 7:
            raise SystemExit("seven")  # would end a thread silently
        return task

    generator = results(do)
    assert [next(generator) for _ in range(7)] == list(range(7))
    with pytest.raises(SystemExit, match="seven"):
        next(generator)
    assert alive() == []


@pytest.mark.parametrize("hung", [{0}, {5, 6}, {0, 8, 16, 24, 99}])
def test_what_hangs_is_given_up(monkeypatch, hang, hung):
    monkeypatch.setattr(readahead, "PATIENCE", 0.05)
    monkeypatch.setattr(readahead, "FAREWELL", 0.05)
    done: list[int] = []

    def do(task: int) -> int:
        if task in hung:
            hang()
        done.append(task)
        return task

    start = time.monotonic()
    assert list(results(do, workers=2)) == [-task if task in hung else task for task in range(100)]
    assert time.monotonic() - start < 10
    assert sorted(done) == sorted(set(range(100)) - hung)  # the others once each


def test_a_slow_block_is_not_a_hung_task(monkeypatch):
    monkeypatch.setattr(readahead, "PATIENCE", 0.5)

    def slow(task: int) -> int:
        time.sleep(0.1)  # eight of them take longer than the patience for one
        return task

    assert list(results(slow, n=16, workers=1, ahead=lambda: 16)) == list(range(16))


def test_closing_does_not_wait_for_what_hangs(monkeypatch, hang):
    monkeypatch.setattr(readahead, "FAREWELL", 0.1)
    generator = results(lambda task: hang() if task == 12 else task, workers=1)
    assert next(generator) == 0
    start = time.monotonic()
    generator.close()
    assert time.monotonic() - start < 5
