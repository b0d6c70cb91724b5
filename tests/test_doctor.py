import subprocess
import sys
from importlib import import_module, metadata

import pytest
from stage_two import command, samples, write_store, write_table

from featurecache.store.format import StorePaths
from featurecache.store.lock import WriterLock, writer_of

doctor = import_module("featurecache.doctor")  # `featurecache.doctor` is the function


def named(checks):
    return {check.name: check for check in checks}


def test_this_installation_works():
    checks = named(doctor.examine())
    assert {check.status for check in checks.values()} <= {"PASS", "WARN"}
    assert metadata.version("torch") in checks["packages"].found
    assert metadata.version("torch") in checks["torch"].found
    assert "cores" in checks["device"].found
    assert checks["free disk"].found.endswith(str(doctor.Path.cwd()))
    assert {name for name, check in checks.items() if check.fix} == {
        name for name, check in checks.items() if check.status != "PASS"
    }


def test_a_package_that_is_missing_or_old_fails(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return "1.9.9" if name == "polars" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    check = named(doctor._packages())["packages"]
    assert check.status == "FAIL"
    assert "zarr is missing" in check.found
    assert "polars 1.9.9 is older than 1.20" in check.found
    assert "pip install" in check.fix


def test_a_check_that_breaks_is_a_failure():
    def broken():
        raise RuntimeError("no driver")
        yield

    assert [(c.status, c.found) for c in doctor._safely("device", broken)] == [("FAIL", "RuntimeError: no driver")]


@pytest.mark.parametrize(("free", "status"), [(10**8, "FAIL"), (5 * 10**9, "WARN"), (10**12, "PASS")])
def test_free_disk(monkeypatch, tmp_path, free, status):
    usage = type("Usage", (), {"free": free})()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (check,) = doctor._disk(tmp_path / "not" / "yet")
    assert (check.status, bool(check.fix)) == (status, status != "PASS")
    assert str(tmp_path) in check.found


def test_a_network_file_system_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "file_system", lambda path: "nfs4")
    (check,) = doctor._file_system(tmp_path)
    assert check.status == "WARN"
    assert "nfs4" in check.found
    assert "local disk" in check.fix


def test_store(tmp_path):
    checks = named(doctor._store(write_store(tmp_path, 8, state={"a3.png": "failed"})))
    assert checks["store"].status == "PASS"
    assert "1 recipe," in checks["store"].found
    assert checks["writer lock"].found == "nobody writes"
    assert checks["dataset m"].found == "8 samples, 1 failed"


def test_store_that_is_incomplete_or_behind_its_manifest(tmp_path):
    path = write_store(tmp_path, 8, state={"a3.png": "pending"})
    check = named(doctor._store(path))["dataset m"]
    assert (check.status, "1 images not yet extracted" in check.found) == ("WARN", True)
    other = write_store(tmp_path / "other", 8)
    write_table(tmp_path / "other" / "m.csv", samples(9))
    check = named(doctor._store(other))["dataset m"]
    assert (check.status, "has changed since" in check.found) == ("WARN", True)
    assert "--manifest" in check.fix


def test_a_damaged_store_fails(tmp_path):
    path = write_store(tmp_path, 4)
    StorePaths(path).index.unlink()
    (check,) = doctor._store(path)
    assert check.status == "FAIL"
    assert "index.sqlite is missing" in check.found
    assert check.fix == f"featurecache verify {path}"


def test_writer_is_named_and_not_disturbed(tmp_path):
    lock = tmp_path / "lock"
    assert writer_of(lock) is None
    hold = f"""
import sys, pathlib
from featurecache.store.lock import WriterLock
lock = WriterLock(pathlib.Path({str(lock)!r}))
print("held", flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as held:
        assert held.stdout.readline() == "held\n"
        assert writer_of(lock) == held.pid
        assert writer_of(lock) == held.pid
        held.stdin.write("\n")
        held.stdin.flush()
        held.wait()
    assert writer_of(lock) is None
    own = WriterLock(lock)
    assert writer_of(lock) == own.pid
    own.release()


def test_command(tmp_path):
    path = write_store(tmp_path, 4)
    done = command("doctor", path)
    assert done.status == 0
    assert "PASS  store" in done.out
    found = command("doctor", path, "--json").json
    assert found["n_fail"] == 0
    assert found["n_pass"] + found["n_warn"] == len(found["checks"])
    missing = command("doctor", tmp_path / "nowhere")
    assert missing.status == 1
    assert "FAIL  store" in missing.out
    assert "no such store" in missing.out
    assert "fix: " in missing.out
