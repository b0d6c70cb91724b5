import os
import time
from types import SimpleNamespace

import polars as pl

from featurecache.store.records import StatRecord, look_same
from featurecache.store.store import FeatureStore

SECOND = 10**9


def record_of(path, age=5 * SECOND):
    status = os.stat(path)
    return StatRecord.of(str(path), status, status.st_ctime_ns + age, b"\1" * 32)


def same(*records, keeps=lambda path: True):
    return look_same(pl.DataFrame(records, schema=StatRecord._fields, orient="row"), keeps).tolist()


def test_a_record_matches_the_very_same_file_only(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    record = record_of(path)
    others = [
        record._replace(**{name: getattr(record, name) + 1}) for name in ("size", "mtime_ns", "ctime_ns", "inode")
    ]
    gone = record._replace(path=str(tmp_path / "gone"))
    assert same(gone, record, *others, record) == [False, True, *[False] * 4, True]
    assert same(record, keeps=lambda path: False) == [False]
    assert same() == []
    # The same size and mtime, other bytes: the change time tells.
    status = os.stat(path)
    time.sleep(0.02)
    path.write_bytes(b"54321")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert same(record) == [False]


def test_a_record_taken_right_after_a_change_does_not_count(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    assert same(record_of(path, age=2 * SECOND - 1), record_of(path, age=2 * SECOND)) == [False, True]


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
    assert store.payloads(names) == expected
    assert store.payloads([names[3], "/img/other.png"]) == {names[3]: expected[names[3]]}
    assert store.payloads([]) == {}

    def table(paths):
        found = store.payload_table(pl.Series(paths, dtype=pl.String))
        return {row[0]: StatRecord(*row[:-1], bytes(row[-1])) for row in found.iter_rows()}

    del expected[names[-1]]  # of a path that no manifest can name
    assert table([*names[:-1], names[0], None, "/img/other.png"]) == expected  # many
    assert table([names[3], "/img/other.png", None]) == {names[3]: expected[names[3]]}  # few
    assert table([]) == {}


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


def test_large_inode_numbers(tmp_path, monkeypatch):
    status = SimpleNamespace(st_ino=2**64 - 5, st_size=9, st_mtime_ns=3, st_ctime_ns=3, st_dev=1)
    record = StatRecord.of("/a", status, status.st_ctime_ns + 5 * SECOND, b"\1" * 32)
    assert record.inode == -5
    monkeypatch.setattr("featurecache.machine.scout.os.stat", lambda path: status)
    assert same(record, record._replace(inode=-6)) == [True, False]
