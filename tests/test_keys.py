"""Payloads to keys, and which files are known to be unchanged without reading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from featurecache import keys
from featurecache.data.readers.base import ReadFailure
from featurecache.keys import Cell, Payload, StoredKeys, key_array, last_keys, read_payload, unchanged
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
    cells = [cell(path, 4), cell(path, 5, '{"flip":true}'), Cell(6, "text", "x", "", "{}")]
    digest = hashlib.sha256(b"x").digest()
    expected = {4: content_key("file", "{}", digest), 5: content_key("file", '{"flip":true}', digest)}
    assert unchanged(cells, store) == last_keys(cells, store) == expected


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
    assert unchanged([cell(path)], store) == {}
    assert last_keys([cell(path)], store) == {0: content_key("file", "{}", record.sha256)}


def test_without_a_change_time_everything_is_read(store, tmp_path, monkeypatch):
    paths = [write(tmp_path / name, b"x") for name in "abc"]
    for path in paths:
        remember(store, path)
    asked: list[Path] = []

    def none(path):
        asked.append(path)
        return False

    cells = [cell(path, i) for i, path in enumerate(paths)]
    assert len(unchanged(cells, store)) == 3
    monkeypatch.setattr(keys, "has_change_time", none)
    assert unchanged(cells, store) == {}
    assert len(asked) == 1, "a file system is looked at once"


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
