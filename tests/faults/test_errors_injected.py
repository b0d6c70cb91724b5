"""Case 3: the k-th write, fsync or rename fails, for every k: a typed error, commits intact, and work goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import store_writer
from store_kit import check_complete, fill, known_rows, make_features, make_keys, write_known
from store_writer import TYPED, Writers

from featurecache.errors import StoreError
from featurecache.store import files
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

OPERATIONS = {"write": 0, "fsync": 1, "rename": 2}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
ROWS, BEFORE = 100, 40


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory) -> Path:
    """The library that makes system calls fail, SQLite's too."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faulty_disk.so"
    source = Path(store_writer.__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def fail_at_every(ram: Path, library: Path, operation: str, error: str, step: int = 1) -> int:
    """Let each operation in turn fail while rows are added to a store that has some; how many were made to fail.

    ENOSPC stays, as on a full disk; EIO comes once.
    """
    kind, number, stays = OPERATIONS[operation], ERRORS[error], int(error == "ENOSPC")
    write_known(ram / "before", BEFORE)
    failed = 0
    with Writers(library) as writers:
        store = ram / "store"
        shutil.copytree(ram / "before", store)
        total = writers.run(store, ROWS, fault=[kind, 0, number, 0]).events
        check_complete(store, ROWS)
        for kth in range(1, total + 1, step):
            shutil.rmtree(store)
            shutil.copytree(ram / "before", store)
            writer = writers.run(store, ROWS, fault=[kind, kth, number, stays])
            where = f"{operation} {kth} of {total}"
            if writer.status:
                assert writer.status == TYPED, f"{where}: {writer.error}"
                assert "intact" in writer.error, f"{where}: {writer.error}"
                failed += 1
            now = known_rows(store, ROWS)
            assert now >= set(range(BEFORE)), where
            assert writer.status or len(now) == ROWS, f"{where}: the failure went by in silence"
            assert verify(store).ok, (where, verify(store).problems)
            assert write_known(store, ROWS) == ROWS - len(now)
            check_complete(store, ROWS)
    assert total >= 6
    assert failed
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_some_operations_fail(ram, faulty_disk, operation):
    fail_at_every(ram, faulty_disk, operation, "ENOSPC" if operation == "write" else "EIO", step=9)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_fails(ram, faulty_disk, operation, error, record):
    record("disk_operations_failed", fail_at_every(ram, faulty_disk, operation, error))


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["io:write", "io:fsync", "io:rename"])
def test_work_goes_on_in_the_same_session(ram, operation, error):
    """As long as the process lives: every k of the commits of 60 rows, each on a store of its own."""
    fill(ram / "before")
    for kth in range(1, 100):
        shutil.rmtree(ram / "store", ignore_errors=True)
        shutil.copytree(ram / "before", ram / "store")
        if not goes_on(ram / "store", operation, kth, ERRORS[error]):
            break
    assert kth > 6


def goes_on(path: Path, operation: str, kth: int, number: int) -> bool:
    """Append, fail, look, and append again; False where there are fewer than k such operations."""
    left = [kth]

    def fail(step: str) -> None:
        left[0] -= step == operation
        if step == operation and left[0] == 0:
            raise OSError(number, os.strerror(number))

    with FeatureStore(path, write=True) as store:
        (recipe,) = store.recipes()
        appender = store.appender(recipe.id)
        files.hook = fail
        said = ""
        try:
            appender.append(make_keys(range(40, 100)), make_features(range(40, 100)))
            appender.close()
        except StoreError as error:
            said = str(error)
        files.hook = None
        if left[0] > 0:
            return False
        assert f"{os.strerror(number)}. What was committed before is intact; when the cause is removed" in said
        with pytest.raises(StoreError, match="this appender is closed"):
            appender.append(make_keys([500]), make_features([500]))
        rows = store.rows(recipe.id, make_keys(range(100)))
        known = np.flatnonzero(rows >= 0)
        assert set(known) >= set(range(40))
        for tap, expected in make_features(known).items():
            np.testing.assert_array_equal(store.read(recipe.id, tap, rows[known]), expected)
        with store.appender(recipe.id) as again:
            again.append(make_keys(range(100)), make_features(range(100)))
        assert store.recipe(recipe.id).rows == 100
    report = verify(path)
    assert report.ok, report.problems
    assert report.notes == []
    return True
