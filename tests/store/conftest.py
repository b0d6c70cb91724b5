"""Fixtures of the store's tests; see tests/plugins/store_kit.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_kit
from store_kit import Filled, fill

from featurecache.store import files


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return fill(tmp_path / "store")


@pytest.fixture
def filler() -> Callable[..., Filled]:
    return fill


@pytest.fixture
def kit() -> Any:
    """The helpers of this file, for tests that need them by name."""
    from types import SimpleNamespace

    return SimpleNamespace(
        TAPS=store_kit.TAPS,
        recipe=store_kit.make_recipe,
        keys=store_kit.make_keys,
        features=store_kit.make_features,
        binding=store_kit.make_binding,
        fill=fill,
        write=store_kit.write_known,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No test cuts the power, so none waits for the disk; `files.hook` is taken away at the end."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    yield
    files.hook = None
