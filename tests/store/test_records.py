import os
import time
from types import SimpleNamespace

from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

SECOND = 10**9


def record_of(path, age=5 * SECOND):
    status = os.stat(path)
    return StatRecord.of(str(path), status, status.st_ctime_ns + age, b"\1" * 32)


def test_a_record_matches_the_very_same_file_only(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    record = record_of(path)
    assert record.matches(os.stat(path))
    for field in ("size", "mtime_ns", "ctime_ns", "inode"):
        assert not record._replace(**{field: getattr(record, field) + 1}).matches(os.stat(path))
    # The same size and mtime, other bytes: the change time tells.
    status = os.stat(path)
    time.sleep(0.02)
    path.write_bytes(b"54321")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not record.matches(os.stat(path))


def test_a_record_taken_right_after_a_change_does_not_count(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    assert not record_of(path, age=2 * SECOND - 1).matches(os.stat(path))
    assert record_of(path, age=2 * SECOND).matches(os.stat(path))


def test_records_are_kept_by_path(filled):
    names = [f"/img/{n} é.png" for n in range(200)] + ["/img/\udcff.png"]
    records = [StatRecord(name, n, n, n, -n, n, bytes([n % 256]) * 32) for n, name in enumerate(names)]
    with FeatureStore(filled.path, write=True) as store:
        store.remember_payloads(records)
        store.remember_payloads([records[3]._replace(size=77)])
        generation = store.generation
    store = FeatureStore(filled.path)
    assert store.generation == generation
    expected = {record.path: record for record in records} | {names[3]: records[3]._replace(size=77)}
    assert store.payloads(names) == expected  # many
    assert store.payloads([names[3], "/img/other.png"]) == {names[3]: expected[names[3]]}  # few
    assert store.payloads([]) == {}


def test_failures_are_remembered_until_there_is_a_row(filled, kit):
    keys = [key.tobytes() for key in kit.keys([80, 81, 82])]
    with FeatureStore(filled.path, write=True) as store:
        store.add_failures(filled.recipe.id, [(key, "image/1", "truncated") for key in keys])
        with store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys([81]), kit.features([81]))
    with FeatureStore(filled.path, write=True) as store:
        assert store.failures(filled.recipe.id) == {
            keys[0]: ("image/1", "truncated"),
            keys[2]: ("image/1", "truncated"),
        }
        store.clear_failures(filled.recipe.id, keys[:1])
        assert list(store.failures(filled.recipe.id)) == keys[2:]
        assert store.info()["recipes"][0]["failures"] == 1
        store.clear_failures(filled.recipe.id)
        assert store.failures(filled.recipe.id) == {}


def test_large_inode_numbers(tmp_path):
    status = SimpleNamespace(st_ino=2**64 - 5, st_size=9, st_mtime_ns=3, st_ctime_ns=3)
    record = StatRecord.of("/a", status, status.st_ctime_ns + 5 * SECOND, b"\1" * 32)
    assert record.inode == -5
    assert record.matches(status)
    other = SimpleNamespace(**{**vars(status), "st_ino": 2**64 - 6})
    assert not record.matches(other)
