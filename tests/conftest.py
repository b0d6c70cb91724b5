"""Shared by all tests; loaded before anything imports torch."""

import json
import os
from collections.abc import Callable

import pytest

# Waiting threads that spin make everything else on a busy machine crawl; the command line sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted graphs go where the tests' other files go, for commands in processes of their own too."""
    os.environ["FEATURECACHE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def record() -> Callable[[str, int], None]:
    """Notes a figure for the summary table: benchmarks/faults.py names the file that they go to."""

    def note(name: str, value: int) -> None:
        if path := os.environ.get("FEATURECACHE_FAULTS"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({name: value}) + "\n")

    return note
