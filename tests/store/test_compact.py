"""Compaction: the same rows bit by bit, without gaps, in a dataset's order; killed, it is never taken for a store."""

import numpy as np
import pytest
from killed_upkeep import shared
from people_store import AUGMENTED, BROKEN, NAMES, PLAIN, VIEWS, check_people, key, write_people

from featurecache.errors import InputError, StoreError
from featurecache.store import files
from featurecache.store.compact import compact
from featurecache.store.rebuild import rebuild_index
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify
from featurecache.upkeep.dropping import carry_out
from featurecache.upkeep.forget import plan_forget


@pytest.fixture
def people(tmp_path):
    return write_people(tmp_path / "store")


@pytest.fixture
def upkeep():
    return shared()


def keys_of(path, recipe):
    """(key, replica) in the order in which rows lie."""
    with FeatureStore(path) as store:
        ids, keys, replicas = store.keys(recipe.id)
        slots = store.slots(recipe.id, ids)
    assert slots.tolist() == list(range(len(slots)))  # no gaps
    return [(k.tobytes(), replica) for k, replica in zip(keys, replicas.tolist(), strict=True)]


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_same_in_the_order_of_a_dataset(people, tmp_path):
    before = contents(people)
    report = compact(people, tmp_path / "out", order="people")
    assert contents(people) == before
    assert (report.recipes, report.rows, report.datasets) == (2, 46 + 92, 2)
    check_people(tmp_path / "out", set(NAMES))
    wanted = dict.fromkeys(key(name, view) for name in NAMES for view in VIEWS if (name, view) != (BROKEN, "back"))
    assert keys_of(report.path, PLAIN) == [(k, 0) for k in wanted]
    assert keys_of(report.path, AUGMENTED) == [(k, replica) for k in wanted for replica in (0, 1)]
    with FeatureStore(people) as old, FeatureStore(report.path) as new:
        assert old.uuid != new.uuid
        for name in old.bindings():
            assert old.binding(name).digest == new.binding(name).digest
            assert old.binding(name).same(new.binding(name))
        for a, b in zip(old.recipes(), new.recipes(), strict=True):
            assert (a.recipe, a.canary, a.recorded, a.codec) == (b.recipe, b.canary, b.recorded, b.codec)
            assert old.failures(a.id) == new.failures(b.id) != {}
        paths = ["/data/portraits/anna100/face.png"]
        assert old.payloads(paths) == new.payloads(paths) != {}
    assert (report.path / "failures.csv").read_bytes() == (people / "failures.csv").read_bytes()
    assert sorted(p.name for p in report.path.iterdir()) == sorted(p.name for p in people.iterdir())
    rebuild_index(report.path)  # the files alone tell the same
    check_people(report.path, set(NAMES))


def test_what_the_dataset_does_not_read_comes_last_as_it_lay(people, tmp_path):
    old = keys_of(people, PLAIN)
    compact(people, tmp_path / "out", order="faces")
    first = list(dict.fromkeys((key(name, "face"), 0) for name in NAMES[::2]))
    assert keys_of(tmp_path / "out", PLAIN) == first + [entry for entry in old if entry not in first]


@pytest.mark.parametrize("codec", ["zstd", None])
def test_gaps_and_codecs(filled, tmp_path, codec):
    with FeatureStore(filled.path, write=True) as store, store.index.writing() as connection:
        connection.execute("DELETE FROM rows WHERE slot IN (0, 7, 20)")  # gaps, as a repair leaves them
    report = compact(filled.path, tmp_path / "out", codec=codec)
    assert FeatureStore(report.path).recipe(filled.recipe.id).codec == (codec or "none")
    assert len(keys_of(report.path, filled.recipe)) == 37
    type(filled)(report.path, filled.recipe, filled.numbers).check(sorted({*range(40)} - {0, 7, 20}))
    assert verify(report.path).chunks == 3


def test_in_small_blocks(people, tmp_path, monkeypatch):
    monkeypatch.setattr("featurecache.store.compact.BLOCK_BYTES", 100)
    compact(people, tmp_path / "out", order="people")
    check_people(tmp_path / "out", set(NAMES))


def test_nothing_of_what_was_forgotten(people, tmp_path):
    from people_store import traces

    with FeatureStore(people) as store:
        plan = plan_forget(store, [NAMES[0]])
    carry_out(plan)
    compact(people, tmp_path / "out", order="people")
    assert traces(tmp_path / "out", NAMES[0]) == {}


def test_refusals(people, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp" / "thesis.txt").write_text("all of it")
    for out, message in {
        tmp_path / "there": "A store is never overwritten",
        people / "inside": "Give an --out outside of the store",
        tmp_path / "no" / "folder": "no such folder for --out",
        tmp_path / "mine": "is in the way, and is no unfinished copy",
    }.items():
        with pytest.raises(InputError, match=message):
            compact(people, out)
    with pytest.raises(InputError, match="no dataset 'peple'"):
        compact(people, tmp_path / "out", order="peple")
    with pytest.raises(InputError, match="codec 'zst' is unknown"):
        compact(people, tmp_path / "out", codec="zst")
    assert (tmp_path / "mine.tmp" / "thesis.txt").exists()
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_written_to_meanwhile(people, tmp_path):
    def write(step):
        if step == "recipe-indexed":
            files.hook = None
            with FeatureStore(people, write=True) as store:
                store.bind(store.binding("faces"))
                store.clear_failures(PLAIN.id)

    files.hook = write
    with pytest.raises(StoreError, match="was written to meanwhile"):
        compact(people, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(
    "step",
    [
        "rows-committed",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("root-written", "group-published", "copy-verified")),
    ],
)
def test_killed_and_called_again(people, tmp_path, upkeep, step):
    out = tmp_path / "out"
    assert upkeep.killed(step, 1, "compact", people, str(out), "people")
    assert not out.exists()
    compact(people, out, order="people")
    check_people(out, set(NAMES))
    assert verify(out).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]
    assert not np.any([path.name == "incomplete" for path in out.iterdir()])
