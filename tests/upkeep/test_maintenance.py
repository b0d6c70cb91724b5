"""`rm` and `prune`: what they would drop, that only that is dropped, and kills in between."""

from dataclasses import replace

import polars as pl
import pytest
from killed_upkeep import shared
from people_store import AUGMENTED, BROKEN, NAMES, PLAIN, TAPS, check_people, check_sound, key, recipe, write_people

from featurecache.errors import CorruptionError, InputError, LockedError
from featurecache.store import files
from featurecache.store.store import FeatureStore
from featurecache.upkeep.dropping import carry_out
from featurecache.upkeep.forget import plan_forget
from featurecache.upkeep.maintenance import plan_prune, plan_rm

OTHER = recipe(channels=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path):
    return write_people(tmp_path / "store")


@pytest.fixture
def upkeep():
    return shared()


def rm_plan(path, *names):
    with FeatureStore(path) as store:
        return plan_rm(store, names)


def prune_plan(path):
    with FeatureStore(path) as store:
        return plan_prune(store)


def states(path, dataset, view):
    with FeatureStore(path) as store:
        counts = store.resolve(store.binding(dataset), view).counts()
    return {state: count for state, count in counts.items() if count}


def rows(path):
    with FeatureStore(path) as store:
        return {info.id: info.rows for info in store.recipes()}


# ---- rm --------------------------------------------------------------------------------------------------------------


def test_rm_a_recipe_that_a_dataset_names_leaves_its_images_pending(store):
    found = rm_plan(store, PLAIN.digest[:5])
    assert [(part.stored.recipe.id, part.whole) for part in found.parts] == [(PLAIN.id, False)]
    assert any(
        "dataset 'people' names recipe" in n and "24 images of view 'face' would be pending" in n for n in found.notes
    )
    carry_out(found)
    assert rows(store) == {PLAIN.id: 0, AUGMENTED.id: 92}
    assert states(store, "people", "face") == {"pending": 24}
    assert states(store, "people", "back") == {"pending": 23, "failed": 1}  # as bound; the next extract tries it again
    assert states(store, "faces", "face") == {"done": 12}
    check_sound(store)
    assert rm_plan(store, PLAIN.id).empty


def test_rm_a_dataset_keeps_its_rows_and_with_its_recipe_nothing(store):
    before = rows(store)
    carry_out(rm_plan(store, "faces"))
    assert rows(store) == before
    assert FeatureStore(store).bindings() == ["people"]
    found = rm_plan(store, f"recipe:{AUGMENTED.id}")
    assert [part.whole for part in found.parts] == [True]
    carry_out(found)
    assert rows(store) == {PLAIN.id: before[PLAIN.id]}
    assert not (store / "features.zarr" / AUGMENTED.id).exists()
    check_sound(store)
    found = rm_plan(store, "people", PLAIN.id)
    assert ([part.whole for part in found.parts], found.notes) == ([True], [])
    carry_out(found)
    assert rows(store) == {}
    check_sound(store)


def test_rm_names(store):
    with FeatureStore(store, write=True) as opened:
        digits = PLAIN.id[:4]
        opened.bind(replace(opened.binding("faces"), name=digits))
    for name, message in {
        "peple": r"no recipe or dataset 'peple'\. Did you mean 'people'",
        "dataset:peple": r"no dataset 'peple'\. Did you mean 'people'",
        PLAIN.id[:3]: "is too short for a recipe: give 4 digits or more",
        digits: f"give dataset:{digits} or recipe:{digits}",
    }.items():
        with pytest.raises(InputError, match=message):
            rm_plan(store, name)
    assert rm_plan(store, f"dataset:{digits}").datasets == [digits]
    assert [part.stored.recipe.id for part in rm_plan(store, f"recipe:{digits}").parts] == [PLAIN.id]


# ---- prune -----------------------------------------------------------------------------------------------------------


def test_prune_drops_what_no_dataset_names(store):
    assert prune_plan(store).empty
    before = rows(store)
    carry_out(rm_plan(store, "people"))
    found = prune_plan(store)  # `faces` has the faces of every other one
    assert {part.stored.recipe.id: len(part.rows) for part in found.parts} == {
        PLAIN.id: before[PLAIN.id] - 12, AUGMENTED.id: before[AUGMENTED.id] - 24,
    }  # fmt: skip
    assert all(part.failures == (key(BROKEN, "back"),) for part in found.parts)
    assert len(found.files) == 48 - 12 - 1  # the face of NAMES[5] is that of NAMES[6]
    carry_out(found)
    assert rows(store) == {PLAIN.id: 12, AUGMENTED.id: 24}
    assert states(store, "faces", "face") == {"done": 12}
    check_sound(store)
    assert prune_plan(store).empty
    assert any(f"recipe {PLAIN.id} stays" in note for note in prune_plan(store).notes)


def test_prune_drops_recipes_without_rows_and_leftovers(store):
    with FeatureStore(store, write=True) as opened:
        opened.add_recipe(OTHER, TAPS)
    leftover = store / "features.zarr" / PLAIN.id / "key" / "c.77.0"
    leftover.write_bytes(b"x" * 1000)
    (store / "trash").mkdir(exist_ok=True)
    (store / "trash" / "old").write_bytes(b"y")
    found = prune_plan(store)
    assert [(part.stored.recipe.id, part.whole) for part in found.parts] == [(OTHER.id, True)]
    assert sorted(path.name for path in found.leftovers) == ["c.77.0", "old"]
    assert found.size == 1001
    carry_out(found)
    assert set(rows(store)) == {PLAIN.id, AUGMENTED.id}
    assert not leftover.exists()
    check_people(store, set(NAMES))
    check_sound(store)


def test_prune_stops_at_a_dataset_that_can_not_be_read(store):
    with FeatureStore(store, write=True) as opened, opened.index.writing() as connection:
        connection.execute("UPDATE bindings SET keys = zeroblob(length(keys)) WHERE name = 'faces'")
    with pytest.raises(CorruptionError, match="dataset 'faces' is damaged"):
        prune_plan(store)


def test_prune_warns_of_an_extraction_that_did_not_end(store):
    with FeatureStore(store, write=True) as opened:
        bound = opened.binding("faces")
        unread = bound.cells.with_columns(pl.lit(None, pl.Binary).alias("key"), pl.lit("pending").alias("state"))
        opened.bind(replace(bound, cells=unread))
    carry_out(rm_plan(store, "people"))
    assert any("dataset 'faces' has 12 images that were not extracted to the end" in n for n in prune_plan(store).notes)


# ---- both ------------------------------------------------------------------------------------------------------------


def test_a_plan_changes_no_byte(store):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*") if path.is_file()}
    rm_plan(store, "faces", PLAIN.id)
    prune_plan(store)
    with FeatureStore(store) as opened:
        plan_forget(opened, [NAMES[0]])
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in store.rglob("*") if path.is_file()}


def test_a_second_writer_is_refused(store):
    found = rm_plan(store, "faces")
    with FeatureStore(store, write=True), pytest.raises(LockedError, match="this process is writing"):
        carry_out(found)


RM_KILLS = ["rows-dropped", "records-dropped", "binding-rewritten", "recipe-dropped", "group-trashed", "index-scrubbed"]


@pytest.mark.parametrize(
    "step", [step if step == "rows-dropped" else pytest.param(step, marks=pytest.mark.slow) for step in RM_KILLS]
)
def test_rm_killed(store, upkeep, step):
    words = ["faces", AUGMENTED.id] if step != "rows-dropped" else [PLAIN.id]
    assert upkeep.killed(step, 1, "rm", store, *words)
    FeatureStore(store).info()
    left = [word for word in words if word in [*FeatureStore(store).bindings(), *rows(store)]]
    if left:
        carry_out(rm_plan(store, *left))
    else:
        FeatureStore(store, write=True).close()
    assert rows(store) == ({PLAIN.id: 46} if step != "rows-dropped" else {PLAIN.id: 0, AUGMENTED.id: 92})
    check_sound(store)


@pytest.mark.parametrize("step", ["chunk-written", "rows-dropped", "dropped-chunks-deleted", "records-dropped"])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prune_killed(store, upkeep, step, count):
    carry_out(rm_plan(store, "people"))
    assert upkeep.killed(step, count, "prune", store) or step == "records-dropped"
    assert states(store, "faces", "face") == {"done": 12}
    carry_out(prune_plan(store))
    assert rows(store) == {PLAIN.id: 12, AUGMENTED.id: 24}
    check_sound(store)
