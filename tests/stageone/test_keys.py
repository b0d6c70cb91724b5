"""Payloads to keys, and which files are known to be unchanged without reading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from featurecache.data.readers.base import ReadFailure
from featurecache.stageone import keys
from featurecache.stageone.keys import (
    Cell,
    Cells,
    Keys,
    KeySet,
    Payload,
    StoredKeys,
    key_array,
    last_keys,
    read_payload,
    unchanged,
)
from featurecache.store import records
from featurecache.store.recipe import Recipe, content_key
from featurecache.store.records import StatRecord
from featurecache.store.store import FeatureStore

OLD = 10_000_000_000  # ns


@pytest.fixture
def store(tmp_path):
    with FeatureStore(tmp_path / "store", write=True) as opened:
        yield opened


def cell(path: Path, index: int = 0, selector: str = "{}", kind: str = "file") -> Cell:
    return Cell(index, kind, path.name, str(path), selector)


def cells_of(*given: Cell) -> Cells:
    """Cells as columns; the first row of the table is none of them."""
    rows = [("file", "other", "/other", "{}"), *((c.kind, c.value, c.location or None, c.selector) for c in given)]
    table = pl.DataFrame(rows, schema=["kind", "value", "location", "selector"], orient="row")
    return Cells(table, np.arange(1, len(rows), dtype=np.uint32))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def remember(store: FeatureStore, path: Path, *, later: int = OLD) -> StatRecord:
    """The record that a run would have made `later` ns after the file's change."""
    status = path.stat()
    record = StatRecord.of(str(path), status, status.st_ctime_ns + later, hashlib.sha256(path.read_bytes()).digest())
    store.remember_payloads([record])
    return record


def test_a_file_is_keyed_by_its_bytes_and_the_part_of_it(tmp_path):
    a, b = write(tmp_path / "a", b"same"), write(tmp_path / "b", b"same")
    first, second = read_payload(cell(a)), read_payload(cell(b))
    assert isinstance(first, Payload)
    assert isinstance(second, Payload)
    assert first.key == second.key == content_key("file", "{}", hashlib.sha256(b"same").digest())
    assert first.data == b"same"
    assert first.record is not None
    assert first.record.path == str(a)
    part = read_payload(cell(a, selector='{"flip":true}'))
    assert isinstance(part, Payload)
    assert part.key != first.key


def test_text_is_keyed_by_its_utf8(tmp_path):
    found = read_payload(Cell(0, "text", "größer", "", "{}"))
    assert isinstance(found, Payload)
    assert found.data == "größer".encode()
    assert found.record is None


def test_errors_are_values_that_are_tried_again(tmp_path):
    missing = read_payload(cell(tmp_path / "gone"))
    assert missing == ReadFailure("FileNotFoundError", "No such file or directory", False)
    folder = read_payload(cell(tmp_path))
    assert folder == ReadFailure("IsADirectoryError", "Is a directory", False)


def test_a_file_that_grows_while_it_is_read_leaves_no_record(tmp_path, monkeypatch):
    path = write(tmp_path / "a", b"1234")
    real = os.fstat

    def grow(descriptor):
        status = real(descriptor)
        path.write_bytes(b"12345678")
        return status

    monkeypatch.setattr(keys.os, "fstat", grow)
    found = read_payload(cell(path))
    assert isinstance(found, Payload)
    assert found.record is None
    assert found.key == content_key("file", "{}", hashlib.sha256(b"12345678").digest())


def test_unchanged(store, tmp_path):
    path = write(tmp_path / "a", b"x")
    remember(store, path)
    cells = cells_of(cell(path), cell(path, selector='{"flip":true}'), Cell(0, "text", "x", "", "{}"))
    digest = hashlib.sha256(b"x").digest()
    expected = [content_key("file", "{}", digest), content_key("file", '{"flip":true}', digest), None]
    assert unchanged(cells, store).to_list() == last_keys(cells, store).to_list() == expected


@pytest.mark.parametrize("change", ["bytes", "touch", "replace", "remove", "fresh"])
def test_what_may_have_changed_is_read(store, tmp_path, change):
    path = write(tmp_path / "a", b"x")
    record = remember(store, path, later=1_999_999_999 if change == "fresh" else OLD)
    before = path.stat()
    if change == "bytes":
        path.write_bytes(b"y")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "touch":
        os.utime(path)
    elif change == "replace":
        write(tmp_path / "b", b"y").replace(path)
    elif change == "remove":
        path.unlink()
    cells = cells_of(cell(path))
    assert unchanged(cells, store).to_list() == [None]
    assert last_keys(cells, store).to_list() == [content_key("file", "{}", record.sha256)]


def test_without_a_change_time_everything_is_read(store, tmp_path, monkeypatch):
    paths = [write(tmp_path / name, b"x") for name in "abc"]
    for path in paths:
        remember(store, path)
    asked: list[Path] = []

    def none(path):
        asked.append(path)
        return False

    cells = cells_of(*map(cell, paths))
    assert unchanged(cells, store).known.all()
    monkeypatch.setattr(records, "has_change_time", none)
    assert not unchanged(cells, store).known.any()
    assert len(asked) == 1, "a file system is looked at once"


def test_cells_are_made_when_asked_for():
    given = [Cell(i + 1, "file", f"{i}.png", f"/data/{i}.png", "{}") for i in range(5000)]
    cells = cells_of(*given)
    assert list(cells) == given
    assert (len(cells), cells[4999], cells[-1]) == (5000, given[4999], given[4999])
    assert list(cells[10:12]) == given[10:12]
    assert list(cells.pick(np.array([7, 3]))) == [given[7], given[3]]
    assert list(cells[:1].joined(cells[9:10])) == [given[0], given[9]]
    assert cells[100:200].place(150) == 49
    assert cells[:2].column("value").to_list() == ["0.png", "1.png"]


def test_keys_by_place():
    keys = Keys(4)
    first, second = hashlib.sha256(b"1").digest(), hashlib.sha256(b"2").digest()
    keys[1] = keys[3] = first
    keys[2] = second
    assert keys.to_list() == [None, first, second, first]
    assert [keys[place] for place in range(4)] == keys.to_list()
    twin = first[:8] + bytes(24)  # the same first bytes
    assert keys.places_of([first, twin]) == [(1, first), (3, first)]
    assert keys.places_of([bytes(32)]) == keys.places_of([]) == [], "unknown is no key"
    assert keys.distinct(np.array([True, True, True, True])) == 2
    assert keys.distinct(np.array([True, True, False, True])) == 1


def test_key_set():
    keys, plain = KeySet(), set()
    random = np.random.default_rng(0)
    for number in random.integers(0, 3000, 5000).tolist():
        key = hashlib.sha256(number.to_bytes(4, "little")).digest()
        key = key[:8] + key[9:10] * 24 if number % 3 else b"the same" + key[8:]
        assert keys.add(key) is (key not in plain)
        plain.add(key)
    assert len(keys) == len(plain)
    again = KeySet(key_array(sorted(plain)))
    assert all(key in keys and key in again for key in plain)
    assert not again.add(next(iter(plain)))
    assert hashlib.sha256(b"other").digest() not in again
    assert b"the same" + bytes(24) not in again


def test_key_array():
    found = key_array([bytes(range(32)), bytes(32)])
    assert found.shape == (2, 32)
    assert found.dtype == np.uint8
    assert found[0].tolist() == list(range(32))
    assert key_array([]).shape == (0, 32)


@pytest.mark.parametrize("questions", [1000, 0], ids=["held", "asked"])
def test_stored_keys(store, monkeypatch, questions):
    recipe = Recipe({"storage_dtype": "float32"}, ({"name": "tap@none"},))
    store.add_recipe(recipe, {"tap@none": ((1,), ("features",))})
    known = [hashlib.sha256(bytes([i])).digest() for i in range(50)]
    with store.appender(recipe.id) as appender:
        appender.append(key_array(known), {"tap@none": np.zeros((50, 1), np.float32)})
    stored = StoredKeys(store, recipe.id, 50, questions)
    assert all(key in stored for key in known)
    twin = known[0][:8] + bytes(24)  # the same first bytes
    assert twin not in stored
    others = [hashlib.sha256(bytes([0, i])).digest() for i in range(50)]
    assert not any(key in stored for key in others)
    assert known[0] not in StoredKeys(store, recipe.id, 0, 10), "a recipe that was empty when the run began"
    monkeypatch.setattr(store, "rows", lambda *args: pytest.fail("looked up"))
    if questions:
        assert others[0] not in stored
        assert known[0] in stored
