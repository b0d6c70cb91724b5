"""Kill -9 at every named step of writing: what was committed stays, nothing is there twice."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from store_kit import check_complete, known_rows

from featurecache.errors import FeatureCacheError, StoreError
from featurecache.store import files
from featurecache.store.files import STEPS
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify

ROWS = 300
COUNTS = {
    "chunk-written": (1, 2, 3, 9),
    "rows-committed": (1, 2, 8),
    "rows-inserted": (1, 5),
    "io:rename": (1, 3, 6, 20),
}


def die_at(path: Path, kit, name: str, count: int) -> None:
    """Write in a forked process that is killed when the named step is done for the `count`th time."""
    left = [count]

    def kill(step: str) -> None:
        if step == name:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            kit.write(path, ROWS, kill)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


STEP_KILLS = [(name, count) for name in [*STEPS, "io:rename"] for count in COUNTS.get(name, (1,))]


@pytest.mark.parametrize(("name", "count"), STEP_KILLS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_at_a_named_step(tmp_path, kit, name, count):
    path = tmp_path / "store"
    die_at(path, kit, name, count)
    before = known_rows(path, ROWS)
    assert kit.write(path, ROWS) == ROWS - len(before)
    check_complete(path, ROWS)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_again_and_again(tmp_path, kit):
    """Killed at each step in turn, each time in what the last one left behind."""
    path = tmp_path / "store"
    for name, count in [
        ("chunk-written", 4),
        ("rows-committed", 2),
        ("rows-inserted", 1),
        ("shape-grown", 1),
        ("chunks-synced", 3),
    ]:
        die_at(path, kit, name, count)
    before = known_rows(path, ROWS)
    assert kit.write(path, ROWS) == ROWS - len(before)
    check_complete(path, ROWS)


@pytest.mark.parametrize("operation", ["io:write", "io:fsync", "io:rename"])
@pytest.mark.parametrize("kth", [1, 2, 3, 4, 6])
def test_a_disk_that_fails_is_a_typed_error_and_work_goes_on(filled, kit, operation, kth):
    left = [kth]

    def fail(step: str) -> None:
        if step == operation:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")

    store = FeatureStore(filled.path, write=True)
    appender = store.appender(filled.recipe.id)
    files.hook = fail
    with pytest.raises(
        StoreError, match=r"No space left on device. What was committed before is intact; when the cause"
    ):
        appender.append(kit.keys(range(40, 100)), kit.features(range(40, 100)))
    files.hook = None
    with pytest.raises(FeatureCacheError, match="this appender is closed"):
        appender.append(kit.keys([500]), kit.features([500]))
    rows = store.rows(filled.recipe.id, kit.keys(range(100)))
    known = np.flatnonzero(rows >= 0)
    assert set(known) >= set(range(40))
    expected = kit.features(known)["penultimate@none"]
    np.testing.assert_array_equal(store.read(filled.recipe.id, "penultimate@none", rows[known]), expected)
    with store.appender(filled.recipe.id) as again:  # in the same session
        again.append(kit.keys(range(100)), kit.features(range(100)))
    store.close()
    filled.check(range(100))
    assert verify(filled.path).ok
