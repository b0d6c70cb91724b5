import json
import os
import shutil
import sqlite3

import pytest

from featurecache.errors import CorruptionError, StoreError
from featurecache.store.format import CODECS
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify


def flip(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("codec", CODECS)
def test_a_sound_store(tmp_path, kit, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    before = {p: p.stat().st_mtime_ns for p in filled.path.rglob("*")}
    report = verify(filled.path)
    assert report.ok, report.problems
    assert (report.recipes, report.chunks, report.rows, report.notes) == (1, 3, 40, [])
    assert report.bytes == sum(p.stat().st_size for p in filled.paths.zarr.rglob("c.*"))
    assert {p: p.stat().st_mtime_ns for p in filled.path.rglob("*")} == before
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 100), "has 100 bytes instead of"),
        (flip, "its bytes were changed"),
    ],
)
@pytest.mark.parametrize("array", ["penultimate@none", "layer4@none", "key"])
def test_damaged_chunks_are_named_with_array_and_samples(filled, damage, message, array):
    damage(filled.chunk(1, array))
    report = verify(filled.path)
    (problem,) = report.problems
    assert (problem.kind, problem.recipe, problem.array, problem.chunk) == ("chunk", filled.recipe.id, array, 1)
    assert message in str(problem)
    assert problem.samples == tuple(f"bird-{n}" for n in range(16, 32))
    assert "samples bird-16, bird-17" in str(problem)
    assert "and 6 more" in str(problem)


def test_swapped_chunks_with_good_checksums(filled):
    a, b, spare = filled.chunk(0), filled.chunk(1), filled.path / "spare"
    shutil.move(a, spare)
    shutil.move(b, a)
    shutil.move(spare, b)
    assert [(p.kind, p.chunk) for p in verify(filled.path).problems] == [("chunk", 0), ("chunk", 1)]
    assert "is not the chunk that was committed" in str(verify(filled.path).problems[0])


def test_metadata(filled):
    group = filled.paths.zarr / filled.recipe.id
    flip(group / "key" / "zarr.json")
    document = json.loads((group / "zarr.json").read_bytes())
    document["attributes"]["recipe"]["channels"] = 1
    (group / "zarr.json").write_text(json.dumps(document))
    (group / "layer4@none" / "zarr.json").unlink()
    messages = [str(problem) for problem in verify(filled.path).problems if problem.kind == "metadata"]
    assert len(messages) == 3
    assert "differs from what the index says" in messages[0]
    assert "layer4@none/zarr.json: missing or damaged" in messages[1]


def test_orphans_and_strangers_are_notes(filled):
    shutil.copyfile(filled.chunk(0), filled.chunk(7))
    (filled.paths.zarr / "notes.txt").touch()
    report = verify(filled.path)
    assert report.ok
    assert len(report.notes) == 2
    assert "c.7.0: no commit names it; the next extract clears it away" in report.notes[0]
    assert "notes.txt: not in the index" in report.notes[1]


def test_features_that_the_index_does_not_know(filled, tmp_path):
    shutil.copytree(filled.paths.zarr / filled.recipe.id, filled.paths.zarr / ("0" * 16))
    (problem,) = verify(filled.path).problems
    assert problem.kind == "unknown"
    assert "features that the index doesn't know; --rebuild-index adds them" in str(problem)


def test_changes_in_the_index_that_sqlite_does_not_notice(filled):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("UPDATE rows SET slot = 5000 WHERE row = 0")
    index.execute("UPDATE rows SET key = randomblob(32) WHERE row = 20")
    index.execute("UPDATE chunks SET sha256 = zeroblob(32) WHERE chunk = 2 AND array = 'key'")
    index.close()
    found = {(problem.kind, problem.chunk) for problem in verify(filled.path).problems}
    assert found == {("rows", 5000 // 16), ("keys", 1), ("chunk", 2)}


def test_an_index_that_is_no_database(filled):
    filled.paths.index.write_bytes(b"not a database" * 500)
    report = verify(filled.path)
    assert {problem.kind for problem in report.problems} == {"index"}
    with pytest.raises(CorruptionError, match="--rebuild-index` makes it anew from the key arrays"):
        FeatureStore(filled.path)


def test_a_lost_index_or_lost_features_are_told_on_opening(filled):
    filled.paths.index.rename(filled.path.parent / "index")
    for write in (False, True):
        with pytest.raises(
            StoreError, match=r"index.sqlite is missing. `featurecache verify .* --rebuild-index` makes it"
        ):
            FeatureStore(filled.path, write=write)
    (filled.path.parent / "index").rename(filled.paths.index)
    filled.paths.zarr.rename(filled.path.parent / "zarr")
    for write in (False, True):
        with pytest.raises(StoreError, match=r"features.zarr is missing: the index alone holds no features"):
            FeatureStore(filled.path, write=write)


def test_an_older_index_is_refused_and_nothing_is_cleared_away(filled, kit, tmp_path):
    shutil.copyfile(filled.paths.index, tmp_path / "old")
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys(range(40, 90)), kit.features(range(40, 90)))
    chunks = sorted(filled.paths.zarr.rglob("c.*"))
    shutil.copyfile(tmp_path / "old", filled.paths.index)
    for write in (False, True):
        with pytest.raises(StoreError, match=r"is an older copy \(generation \d, features.zarr has \d\)"):
            FeatureStore(filled.path, write=write)
    assert sorted(filled.paths.zarr.rglob("c.*")) == chunks
    assert any(problem.kind == "index" for problem in verify(filled.path).problems)


def test_an_index_of_another_store(filled, kit, tmp_path):
    other = kit.fill(tmp_path / "other")
    shutil.copyfile(other.paths.index, filled.paths.index)
    with pytest.raises(StoreError, match=r"features.zarr and index.sqlite are of different stores"):
        FeatureStore(filled.path)


def test_a_newer_format_is_refused(filled):
    path = filled.paths.zarr / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["format"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"a store of format 2; this version reads format 1. Update featurecache."):
        FeatureStore(filled.path)


def test_a_damaged_dataset(filled):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("UPDATE bindings SET cells = substr(cells, 1, 40)")
    index.close()
    (problem,) = verify(filled.path).problems
    assert problem.kind == "dataset"
    assert "dataset 'birds' is damaged" in str(problem)
