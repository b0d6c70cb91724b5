"""Forgetting samples: afterwards no file of the store holds a byte of them."""

import pytest
from killed_upkeep import shared
from people_store import (
    AUGMENTED,
    BROKEN,
    NAMES,
    PLAIN,
    TWIN,
    check_people,
    check_sound,
    people,
    secrets,
    traces,
    write_people,
)

from featurecache.errors import InputError, StoreError
from featurecache.store import files
from featurecache.store.settle import finish_scrub
from featurecache.store.store import FeatureStore
from featurecache.store.verify import verify
from featurecache.upkeep.dropping import carry_out
from featurecache.upkeep.forget import plan_forget

ANNA, BRUNO = NAMES[0], NAMES[1]


@pytest.fixture
def store(tmp_path):
    return write_people(tmp_path / "store")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    yield
    files.hook = None


def plan(path, *ids, datasets=()):
    with FeatureStore(path) as store:
        return plan_forget(store, ids, datasets)


def forget(path, *ids, **options):
    return carry_out(plan(path, *ids, **options))


@pytest.mark.parametrize("name", [ANNA, BRUNO, BROKEN, NAMES[-1]], ids=["in both", "in one", "failed", "last"])
def test_no_byte_is_left(store, name):
    before = traces(store, name)
    assert set(before) == {w for w in secrets(name) if name != BROKEN or "features of back" not in w}
    assert forget(store, name).scrubbed
    assert traces(store, name) == {}
    check_people(store, set(NAMES) - {name})
    check_sound(store)
    assert people(store) == set(NAMES) - {name}
    assert people(store, "faces") == set(NAMES[::2]) - {name}
    assert (store / "failures.csv").exists() == (name != BROKEN)


def test_several_at_once_and_what_is_listed(store):
    found = plan(store, ANNA, BRUNO, ANNA)
    assert found.samples == [ANNA, BRUNO]
    assert {part.stored.recipe.id: len(part.rows) for part in found.parts} == {PLAIN.id: 4, AUGMENTED.id: 8}
    assert found.size == 4 * (196 + 516) // 16 + 8 * (196 + 516 + 68) // 16  # of 16 rows and a checksum
    assert sorted(binding.name for binding in found.bindings) == ["faces", "people"]
    assert len(found.files) == 4
    assert any(f"sample {ANNA!r} is in the datasets faces, people" in note for note in found.notes)
    carry_out(found)
    assert traces(store, ANNA) == traces(store, BRUNO) == {}
    check_people(store, set(NAMES) - {ANNA, BRUNO})


def test_bytes_that_another_one_has_too_stay(store):
    found = plan(store, TWIN)
    assert any("1 images stay, since other samples have the very same bytes" in note for note in found.notes)
    carry_out(found)
    assert traces(store, TWIN) == {}
    check_people(store, set(NAMES) - {TWIN})


def test_the_last_sample_takes_its_dataset_along(store):
    forget(store, *NAMES[::2], datasets=["faces"])
    assert FeatureStore(store).bindings() == ["people"]
    check_people(store, set(NAMES))
    check_sound(store)


def test_only_in_one_dataset(store):
    found = plan(store, ANNA, datasets=["faces"])
    assert not found.parts
    carry_out(found)
    assert people(store, "faces") == set(NAMES[::2]) - {ANNA}
    assert people(store) == set(NAMES)
    check_people(store, set(NAMES))


def test_rows_that_no_dataset_names_are_pointed_out(store):
    with FeatureStore(store, write=True) as opened:
        opened.bind(plan(store, ANNA).bindings[-1], replace=True)  # people without Anna, as from a shorter manifest
    found = plan(store, ANNA)
    assert any(note.startswith("3 rows are named by no dataset") for note in found.notes)  # `faces` has her face
    with pytest.raises(InputError, match="`featurecache prune"):
        plan(store, ANNA, datasets=["people"])


def test_a_manifest_that_still_lists_it(store):
    (store.parent / "people.csv").write_text("sample_id\n")
    assert any(
        note.startswith(f"{store.parent}/people.csv may still list {ANNA}: ") for note in plan(store, ANNA).notes
    )


def test_unknown_ids_and_datasets(store):
    with pytest.raises(InputError, match=r"no sample 'ana100' in faces, people\. Did you mean 'anna100'"):
        plan(store, BRUNO, "ana100")
    with pytest.raises(InputError, match=r"no dataset 'peple'\. Did you mean 'people'"):
        plan(store, ANNA, datasets=["peple"])


def test_a_store_that_changed_since(store):
    found = plan(store, ANNA)
    forget(store, BRUNO)
    with pytest.raises(StoreError, match=r"changed while this was planned\. Nothing was dropped"):
        carry_out(found)
    assert ANNA in people(store)


def test_a_reader_in_the_way_is_told_of_and_the_next_writer_ends_it(store, monkeypatch):
    monkeypatch.setattr("featurecache.upkeep.dropping.finish_scrub", lambda index: finish_scrub(index, patience=0.05))
    reader = FeatureStore(store)
    reading = reader.index.reading()

    def begin(step):
        if step == "records-dropped":
            reading.__enter__().execute("SELECT * FROM meta").fetchone()

    files.hook = begin
    assert not forget(store, ANNA).scrubbed
    files.hook = None
    reading.__exit__(None, None, None)
    reader.close()
    assert traces(store, ANNA)
    FeatureStore(store, write=True).close()
    assert traces(store, ANNA) == {}


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def upkeep():
    return shared()


KILLS = [
    (step, count)
    for step in files.MAINTENANCE_STEPS
    for count in ((1, 2) if step in ("binding-rewritten", "rows-dropped") else (1,))
    if step not in ("recipe-dropped", "group-trashed")
]


@pytest.mark.parametrize(
    ("step", "count"),
    [kill if kill == ("rows-dropped", 1) else pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS],
)
def test_killed_and_called_again(store, upkeep, step, count):
    """At any instant the others are whole; afterwards the same call, or where all is done the next writer, ends it."""
    assert upkeep.killed(step, count, "forget", store, BRUNO, ANNA)
    check_people(store, set(NAMES) - {ANNA, BRUNO})
    assert verify(store).ok
    left = [name for name in (ANNA, BRUNO) if name in people(store) | people(store, "faces")]
    if left:
        forget(store, *left)
    else:
        FeatureStore(store, write=True).close()
    assert traces(store, ANNA) == traces(store, BRUNO) == {}
    check_people(store, set(NAMES) - {ANNA, BRUNO})
    check_sound(store)
