import os
import subprocess
import sys

import pytest

from featurecache.heads.scratch import LOCK, YOUNG, remove_dead, scratch_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders in use can't be removed there anyhow")

HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "wb")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def leave(folder, age=2 * YOUNG):
    """A folder as a killed process leaves it."""
    folder.mkdir()
    (folder / "train.page").write_bytes(b"pages")
    (folder / LOCK).touch()
    then = (folder / LOCK).stat().st_mtime - age
    os.utime(folder / LOCK, (then, then))
    return folder


def test_what_the_dead_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead, live, young = leave(tmp_path / "x-dead"), leave(tmp_path / "x-live"), leave(tmp_path / "x-young", age=0)
    other = leave(tmp_path / "other-dead")
    child = subprocess.Popen([sys.executable, "-c", HOLD, live / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        os.utime(live / LOCK, (0, 0))
        with scratch_folder("x-") as mine:
            assert list(mine.iterdir()) == []
            os.utime(mine.parent / LOCK, (0, 0))
            remove_dead(tmp_path, "x-")  # as another fit of this process would
            assert sorted(tmp_path.iterdir()) == sorted([other, live, young, mine.parent])
        assert not dead.exists()
        assert not mine.parent.exists()
    finally:
        child.kill()
        child.communicate()
    remove_dead(tmp_path, "x-")
    assert sorted(tmp_path.iterdir()) == sorted([other, young])


def test_it_goes_with_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupted():
        with scratch_folder("x-") as mine:
            (mine / "page").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
