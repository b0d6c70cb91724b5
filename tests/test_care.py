"""The care of a store from Python: what `info`, `verify`, `prune`, `rm`, `forget` and `compact` give."""

import json

import pytest
from people_store import NAMES, PLAIN, traces, write_people
from stage_two import command, hashes

import featurecache as fc
from featurecache import journal
from featurecache.errors import InputError, MissingFileError


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A store that no test changes."""
    return write_people(tmp_path_factory.mktemp("care") / "store")


@pytest.fixture
def store(tmp_path):
    return write_people(tmp_path / "store")


def entries(path):
    return [journal.read(path, name) for name in journal.listed(path)]


def test_info_has_all_that_the_command_prints(looked_at):
    found = fc.info(str(looked_at))
    assert [dataset.name for dataset in found.datasets] == ["faces", "people"]
    recipe = next(recipe for recipe in found.recipes if recipe.id == PLAIN.id)
    assert recipe.body == (PLAIN.fields.get("body") or {}).get("architecture")
    assert all(tap.dims and len(tap.shape) == len(tap.dims) for tap in recipe.taps.values())
    people = next(dataset for dataset in found.datasets if dataset.name == "people")
    counts = people.views["face"]
    assert counts.done + counts.absent + counts.failed + counts.pending == people.samples == 24
    assert found.rows == sum(recipe.rows for recipe in found.recipes) > 0
    assert found.bytes == sum(recipe.bytes for recipe in found.recipes) > 0
    assert f"{found}\n" == command("info", looked_at).out
    printed = command("info", looked_at, "--json").json
    assert json.loads(json.dumps(found.to_json())).items() <= printed.items()
    with pytest.raises(MissingFileError, match="no such store"):
        fc.info(looked_at / "none")


def test_verify_finds_and_mends_damage(store):
    assert fc.verify(store).ok
    chunk = next(path for path in sorted(store.glob(f"features.zarr/{PLAIN.id}/*/c.*")) if path.stat().st_size > 100)
    content = bytearray(chunk.read_bytes())
    content[20] ^= 1
    chunk.write_bytes(content)
    found = fc.verify(store)
    assert not found.ok
    assert found.report.problems[0].kind == "chunk"
    assert found.remedy == f"featurecache verify {store} --repair"
    assert str(found).endswith("1 problem")
    assert found.to_json()["ok"] is False
    mended = fc.verify(store, repair=True)
    assert mended.ok
    assert mended.dropped == mended.mended["repaired"].dropped > 0
    assert "computes the dropped rows again" in mended.remedy
    assert [entry["command"] for entry in entries(store)] == ["verify"] * 3
    assert entries(store)[-1]["figures"]["rows_dropped"] == mended.dropped


def test_rm_and_prune_say_what_they_drop(store):
    before = hashes(store)
    plan = fc.rm(store, "people", dry_run=True)
    assert (plan.done, plan.plan.datasets, hashes(store)) == (False, ["people"], before)
    assert str(plan).endswith("dry run: nothing was changed")
    assert not fc.prune(store).done
    assert hashes(store) == before, "nothing to drop, so nothing is written, nor told"
    assert fc.rm(store, ["people"]).done
    planned = fc.prune(store, dry_run=True)
    dropped = fc.prune(store)
    assert dropped.rows == planned.rows > 0
    assert dropped.bytes_freed > 0
    assert dropped.to_json()["bytes"] == planned.to_json()["bytes"]
    assert f"dropped   {dropped.rows:,} rows" in str(dropped)
    assert [entry["line"] for entry in entries(store)] == [
        "featurecache.rm(store='store', names=['people'])",
        "featurecache.prune(store='store')",
    ]
    assert entries(store)[-1]["figures"]["bytes_freed"] == dropped.bytes_freed
    assert fc.verify(store).ok
    with pytest.raises(InputError, match=r"no recipe or dataset 'face'. Did you mean 'faces'"):
        fc.rm(store, "face")


def test_forget_names_nobody_in_the_journal(store):
    fc.verify(store)
    forgotten = fc.forget(store, NAMES[0])
    assert forgotten.done
    assert traces(store, NAMES[0]) == {}
    assert entries(store)[-1]["line"] == "(withheld)"
    with pytest.raises(InputError, match="which samples"):
        fc.forget(store, [])


def test_compact_and_doctor(looked_at, tmp_path):
    made = fc.compact(looked_at, tmp_path / "copy", order="people")
    assert made.rows == fc.info(made.path).rows == fc.info(looked_at).rows
    assert entries(tmp_path / "copy")[0]["figures"]["rows"] == made.rows
    checks = {check.name: check for check in fc.doctor(looked_at)}
    assert checks["python"].status in ("PASS", "WARN")
    assert checks["store"].status == "PASS"


def test_bodies_are_listed_and_shown():
    assert "torchvision/resnet18" in fc.list_bodies("resnet18")
    found = fc.show_body("torchvision/squeezenet1_1", image_size=64)
    assert (found.image_size, found.channels) == ((64, 64), 3)
    assert found.modules[0].name == "penultimate"
    assert found.modules[0].shape == (512,)
    assert str(found).splitlines()[0] == "torchvision/squeezenet1_1 at 64 x 64, 3 channels"
