"""What the fault cases share: a filled store, no waiting for the disk."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_kit import Filled, fill

from featurecache.store import files


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of stores, and no test cuts the power."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shutil.disk_usage(shared).free < 2**28:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture
def filled(ram: Path) -> Filled:
    return fill(ram / "store")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No test cuts the power, so none waits for the disk; `files.hook` is taken away at the end."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    yield
    files.hook = None
