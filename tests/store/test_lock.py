import os
import signal
import subprocess
import sys
import time

import pytest

from featurecache.errors import LockedError, StoreError
from featurecache.store.files import file_system, has_change_time, is_network
from featurecache.store.lock import WriterLock
from featurecache.store.store import FeatureStore

HOLDER = """
import os, sys, time
from featurecache.store.store import FeatureStore
store = FeatureStore(sys.argv[1], write=True)
if len(sys.argv) > 2 and os.fork() == 0:  # a worker that outlives its writer
    time.sleep(30)
    os._exit(0)
print("open", flush=True)
time.sleep(60)
"""


def start(path, *options):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    return process


def test_a_second_writer_is_refused_with_the_holders_pid(filled, kit):
    holder = start(filled.path)
    try:
        with pytest.raises(LockedError, match=f"store: process {holder.pid} is writing to this store") as caught:
            FeatureStore(filled.path, write=True)
        assert caught.value.pid == holder.pid
        filled.check()  # reading goes on
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("options", [(), ("worker",)])
def test_a_killed_writer_gives_the_lock_back_even_while_its_worker_lives(filled, kit, options):
    holder = start(filled.path, *options)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    start_time = time.monotonic()
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys([40]), kit.features([40]))
    assert time.monotonic() - start_time < 10
    filled.check(range(41))


def test_a_second_writer_within_the_process_is_refused(filled):
    with FeatureStore(filled.path, write=True):
        with pytest.raises(LockedError, match="this process is writing to this store") as caught:
            FeatureStore(filled.path, write=True)
        assert caught.value.pid == os.getpid()
        # The refusal must not have dropped the first one's lock: no descriptor of the file was opened and closed.
        code = f"from featurecache.store.store import FeatureStore; FeatureStore({str(filled.path)!r}, write=True)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} is writing" in other.stderr
    FeatureStore(filled.path, write=True).close()


def test_a_lock_is_released_once_and_by_its_owner(tmp_path):
    lock = WriterLock(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    lock.release()
    again = WriterLock(tmp_path / "lock")
    lock.release()  # does nothing: `again` holds it now
    with pytest.raises(LockedError):
        WriterLock(tmp_path / "lock")
    again.release()


def test_a_store_that_failed_to_open_gives_the_lock_back(filled):
    (filled.paths.zarr / "zarr.json").write_text("{")
    for _ in range(2):
        with pytest.raises(Exception, match="missing or damaged"):
            FeatureStore(filled.path, write=True)


def test_a_store_that_can_not_be_written_says_so_and_is_read_as_before(filled, kit):
    filled.paths.lock.unlink(missing_ok=True)
    filled.paths.lock.mkdir()  # what stops root, too
    with pytest.raises(
        StoreError, match=r"store: this store can't be written: .* \(lock\)\. Commands that only read it"
    ):
        FeatureStore(filled.path, write=True)
    filled.check()
    filled.paths.lock.rmdir()
    FeatureStore(filled.path, write=True).close()


def test_a_store_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/store: creating the store failed: Not a directory"):
        FeatureStore(tmp_path / "file" / "store", write=True)


def test_file_systems(tmp_path):
    assert is_network("nfs4")
    assert is_network("cifs")
    assert not is_network("ext4")
    assert not is_network(file_system(tmp_path))
    assert has_change_time(tmp_path)


def test_a_network_file_system_gets_a_warning(filled, monkeypatch):
    monkeypatch.setattr("featurecache.store.opening.file_system", lambda path: "nfs4")
    with pytest.warns(UserWarning, match=r"is on a network file system \(nfs4\), where locks may not exclude"):
        FeatureStore(filled.path, write=True).close()
