"""What there is to do, and the join of manifest and store."""

from __future__ import annotations

import hashlib
import shutil
import tracemalloc

import pytest
from extract_kit import config, counts, features, read_rows, run, states, write_images, write_manifest

from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError
from featurecache.stageone.jobs import plan_jobs, set_up_views
from featurecache.stageone.producer import Claims
from featurecache.store.store import FeatureStore


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 4, views=("a", "b", "c"))


def jobs(manifest, store, **options):
    stage = config(manifest, store, **options)
    read = read_manifest(stage)
    opened = FeatureStore(store) if store.exists() else None
    return plan_jobs(stage, read, set_up_views(stage, read.views), opened)


def test_views_of_one_recipe_are_one_job(data, tmp_path):
    views = {"a": "a", "b": "b", "c": "c"}
    found = jobs(data, tmp_path / "none", views=views, image_size={"c": 24})
    assert [job.views for job in found] == [["a", "b"], ["c"]]
    assert [len(job.todo) for job in found] == [8, 4]
    assert all(job.info is None and job.row_bytes == 3 * 4 for job in found)


def test_what_is_held_of_a_cell_takes_few_bytes(tmp_path):
    n = 4000
    names = [f"images/{i // 100:05d}/image{i:07d}.png" for i in range(n)]
    table = write_manifest(tmp_path / "m.csv", [{"sample_id": f"s{i}", "image": name} for i, name in enumerate(names)])
    stage = config(table, tmp_path / "none")
    read = read_manifest(stage, images=False)
    setups = set_up_views(stage, read.views)
    tracemalloc.start()
    (job,) = plan_jobs(stage, read, setups, None)
    claims = Claims(lambda key: False)
    for number, cell in enumerate(job.todo):
        key = hashlib.sha256(number.to_bytes(4, "little")).digest()
        assert claims.take(key)
        job.learn(cell, key)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert job.keys.known.all()
    assert (held + read.cells.estimated_size() + read.table.estimated_size()) / n < 300


def test_a_binding_that_says_the_same_is_not_written_again(data, tmp_path):
    store = tmp_path / "store"
    rows = read_rows(data)
    rows[1]["b"] = ""
    write_manifest(data, rows)
    (data.parent / "b0002.png").write_bytes(b"broken")
    views = {"a": "a", "b": "b"}
    run(data, store, views=views)
    generation = FeatureStore(store).generation
    assert counts(run(data, store, views=views)) == (0, 6, 1)
    assert FeatureStore(store).generation == generation
    rows[0]["label"] = "7"
    write_manifest(data, rows)
    assert counts(run(data, store, views=views)) == (0, 6, 1)
    opened = FeatureStore(store)
    assert opened.generation == generation + 1
    assert opened.binding("samples").table["label"].to_list() == [7, 1, 0, 1]


def test_a_view_in_another_order_of_samples(data, tmp_path):
    store = tmp_path / "store"
    run(data, store, views={"a": "a"})
    before = features(store, view="a")
    write_manifest(data, read_rows(data)[::-1])
    assert counts(run(data, store, views={"b": "b"})) == (4, 0, 0)
    assert set(states(store, view="a").values()) <= {"done", "pending"}
    assert counts(run(data, store, views={"a": "a", "b": "b"})) == (0, 8, 0)
    after = features(store, view="a")
    assert all((before[sample] == after[sample]).all() for sample in before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"views": {"b": "b"}, "multi": "first"}, "read with another multi"),
        ({"views": {"b": "b"}, "root": "."}, "read with another root"),
    ],
)
def test_views_read_in_another_way_can_not_join(data, tmp_path, options, told):
    run(data, tmp_path / "store", views={"a": "a"})
    if "root" in options:
        options = {**options, "root": str(shutil.copytree(data.parent, tmp_path / "copy"))}
    with pytest.raises(InputError) as caught:
        run(data, tmp_path / "store", **options)
    assert "dataset 'samples' holds the views a of this manifest" in str(caught.value)
    assert told in str(caught.value)
    assert "--replace to keep only the views of this run" in str(caught.value)
    run(data, tmp_path / "store", replace=True, **options)
    assert list(FeatureStore(tmp_path / "store").binding("samples").recipes) == ["b"]


def test_a_default_view_beside_a_named_one(data, tmp_path):
    rows = [{**row, "image": row["a"]} for row in read_rows(data)]
    write_manifest(data, rows)
    run(data, tmp_path / "store", views={})
    assert list(FeatureStore(tmp_path / "store").binding("samples").recipes) == ["image"]
    with pytest.raises(InputError, match="without --view for all of them"):
        run(data, tmp_path / "store", views={"b": "b"})
    run(data, tmp_path / "store", views={"b": "b", "image": "image"})
    assert set(FeatureStore(tmp_path / "store").binding("samples").recipes) == {"b", "image"}


def test_earlier_views_keep_their_reader(data, tmp_path):
    import numpy as np

    rows = read_rows(data)
    for i, row in enumerate(rows):
        np.save(data.parent / f"{i}.npy", np.full((32, 32, 3), i, np.uint8))
        row["array"] = f"{i}.npy"
    write_manifest(data, rows)
    run(data, tmp_path / "store", views={"array": "array"}, reader={"array": "array"})
    run(data, tmp_path / "store", views={"a": "a"})
    binding = FeatureStore(tmp_path / "store").binding("samples")
    assert binding.config["manifest"]["reader"] == {"*": "image", "array": "array"}
    assert set(states(tmp_path / "store", view="array").values()) == {"done"}


def test_an_absent_view_is_not_pending(data, tmp_path):
    rows = read_rows(data)
    rows[1]["b"] = ""
    write_manifest(data, rows)
    assert counts(run(data, tmp_path / "store", views={"a": "a", "b": "b"})) == (7, 0, 0)
    assert states(tmp_path / "store", view="b") == {
        "s0000": "done", "s0001": "absent", "s0002": "done", "s0003": "done"
    }  # fmt: skip


def test_several_images_of_a_view(data, tmp_path):
    assert counts(run(data, tmp_path / "store", views={"all": "a,b,c"}, multi="mean")) == (12, 0, 0)
    binding = FeatureStore(tmp_path / "store").binding("samples")
    assert binding.multi == "mean"
    assert binding.cells["ordinal"].to_list() == [0, 1, 2] * 4
