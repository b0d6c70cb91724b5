"""Shared by all tests; loaded before anything imports torch."""

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

# Waiting threads that spin make everything else on a busy machine crawl; the command line sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are taken by the other processes


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The default suite as a whole runs in several processes where pytest-xdist is there; `-n 0` runs it in one.

    Parts of it, named on the command line, don't: each process would import torch first. Nor do the slow tests, some of
    which take the time.
    """
    options = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "not slow" in options.markexpr
    if whole and config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput") and not options.usepdb:
        if options.numprocesses is None and options.dist == "no":
            options.numprocesses, options.dist = min(4, os.cpu_count() or 1), "worksteal"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted graphs go where the tests' other files go, for commands in processes of their own too."""
    os.environ["FEATURECACHE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A command that ran within a test leaves its handlers, for which the next Ctrl-C may be the second."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def record() -> Callable[[str, int], None]:
    """Notes a figure for the summary table: benchmarks/faults.py names the file that they go to."""

    def note(name: str, value: int) -> None:
        if path := os.environ.get("FEATURECACHE_FAULTS"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({name: value}) + "\n")

    return note
