import json
import os
import shutil
import sqlite3
import threading

import pytest

from featurecache.errors import CorruptionError, StoreError
from featurecache.store import verify as module
from featurecache.store.format import CODECS
from featurecache.store.rebuild import rebuild_index
from featurecache.store.records import StatRecord
from featurecache.store.repair import repair
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
    assert found == {("rows", 5000 // 16), ("keys", 1), ("index", 2)}


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


def change_root(filled, **attributes):
    path = filled.paths.zarr / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"] |= attributes
    path.write_text(json.dumps(document))


def change_meta(filled, name, value):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)", (name, value))
    index.close()


def test_a_store_says_what_it_requires(filled):
    document = json.loads((filled.paths.zarr / "zarr.json").read_bytes())
    assert document["attributes"]["required_features"] == []
    index = sqlite3.connect(filled.paths.index)
    assert dict(index.execute("SELECT name, value FROM meta"))["required_features"] == "[]"
    index.close()


@pytest.mark.parametrize("where", ["features.zarr", "index"])
def test_a_store_that_requires_what_this_version_does_not_know_is_refused(filled, where):
    if where == "index":
        change_meta(filled, "required_features", '["int8-rows", "shards"]')
    else:
        change_root(filled, required_features=["int8-rows", "shards"], uuid={"another": "kind"})
    before = {path: path.read_bytes() for path in filled.paths.zarr.rglob("*") if path.is_file()}
    message = r"a store of a newer featurecache: it requires 'int8-rows', 'shards', which this .*Update featurecache"
    for action in (FeatureStore, lambda path: FeatureStore(path, write=True), verify, repair, rebuild_index):
        with pytest.raises(StoreError, match=message):
            action(filled.path)
    assert {path: path.read_bytes() for path in filled.paths.zarr.rglob("*") if path.is_file()} == before


def test_attributes_of_a_newer_version_are_ignored(filled, kit):
    change_root(filled, hint={"any": ["thing"]})
    change_meta(filled, "hint", "any")
    for path in filled.paths.zarr.glob("*/**/zarr.json"):
        document = json.loads(path.read_bytes())
        document["attributes"]["hint"] = 1
        path.write_text(json.dumps(document))
    assert verify(filled.path).ok
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys(range(40, 120)), kit.features(range(40, 120)))
    filled.check(range(120))
    assert verify(filled.path).ok


@pytest.mark.parametrize("value", ["{}", "[1]", "x"])
def test_a_damaged_list_of_required_features(filled, value):
    change_meta(filled, "required_features", value)
    with pytest.raises(CorruptionError, match=r"index.sqlite: damaged"):
        FeatureStore(filled.path)


def test_columns_that_a_newer_version_added_are_left_alone(filled, kit):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    for table in ("bindings", "chunks", "superseded", "failures", "payloads", "recipes", "rows", "meta"):
        index.execute(f"ALTER TABLE {table} ADD COLUMN later TEXT")
    index.close()
    with FeatureStore(filled.path, write=True) as store:
        store.add_recipe(kit.recipe(precision="fp32"), kit.TAPS)
        store.add_failures(filled.recipe.id, [(b"k" * 32, "image/1", "truncated")])
        store.remember_payloads([StatRecord("/a.jpg", 1, 2, 3, 4, 5, b"s" * 32)])
        with store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys(range(40, 60)), kit.features(range(40, 60)))
        store.bind(kit.binding(filled.recipe.id, range(60)))
    assert verify(filled.path).ok
    assert rebuild_index(filled.path).kept == 60
    assert FeatureStore(filled.path).bindings() == ["birds"]


@pytest.mark.parametrize("at", ["_check_chunk", "_check_orphans", "_check_strangers", "_settled_metadata_problems"])
def test_a_writer_that_commits_meanwhile_is_no_problem(filled, kit, monkeypatch, at):
    """Rows of the partial chunk move to another one, its files go, a recipe comes: just before this part of verify."""
    plain, waiting = getattr(module, at), [True]

    def late(*arguments):
        if waiting and waiting.pop():
            with FeatureStore(filled.path, write=True) as store:
                with store.appender(filled.recipe.id) as appender:
                    appender.append(kit.keys(range(40, 130)), kit.features(range(40, 130)))
                other = store.add_recipe(kit.recipe(precision="fp32"), kit.TAPS)
                with store.appender(other.id) as appender:
                    appender.append(kit.keys(range(8)), kit.features(range(8)))
                store.bind(kit.binding(other.id, range(8)))
        return plain(*arguments)

    monkeypatch.setattr(module, at, late)
    report = verify(filled.path)
    assert report.ok, report.problems
    assert not filled.chunk(2).exists()
    assert report.notes == []
    assert verify(filled.path).rows == 138


def test_arrays_that_are_just_being_enlarged_are_waited_for(filled, monkeypatch):
    path = filled.paths.array(filled.recipe.id, "key") / "zarr.json"
    content = path.read_bytes()
    document = json.loads(content)
    document["shape"][0] *= 2
    path.write_text(json.dumps(document))
    (note,) = verify(filled.path).notes
    assert "the arrays have different numbers of rows: {'layer4@none': 4, 'penultimate@none': 4, 'key': 8}" in note
    monkeypatch.setattr(module.time, "sleep", lambda seconds: path.write_bytes(content))
    report = verify(filled.path)
    assert (report.ok, report.notes) == (True, [])
    monkeypatch.undo()
    path.write_text(json.dumps(document))
    FeatureStore(filled.path, write=True).close()
    report = verify(filled.path)
    assert (report.ok, report.notes) == (True, [])


def test_verifying_again_and_again_beside_a_writer(tmp_path, kit):
    kit.fill(tmp_path / "store", n=8)
    stop, wrong = threading.Event(), []

    def watch():
        while not stop.is_set():
            wrong.extend(verify(tmp_path / "store").problems)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with FeatureStore(tmp_path / "store", write=True) as store, store.appender(kit.recipe().id) as appender:
            for at in range(8, 160, 3):
                appender.append(kit.keys(range(at, at + 3)), kit.features(range(at, at + 3)))
                appender.flush()
    finally:
        stop.set()
        watcher.join()
    assert wrong == []


def test_a_damaged_dataset(filled):
    index = sqlite3.connect(filled.paths.index, isolation_level=None)
    index.execute("UPDATE bindings SET cells = substr(cells, 1, 40)")
    index.close()
    (problem,) = verify(filled.path).problems
    assert problem.kind == "dataset"
    assert "dataset 'birds' is damaged" in str(problem)
