"""Cases 4 and 7 through the command: damage is named, and only what was damaged is computed again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from extract_kit import counts, features, json_of, main, run, states, write_images

from featurecache.dataset import FeatureDataset
from featurecache.errors import CorruptionError

ARRAY = "penultimate@none"


@pytest.fixture
def extracted(ram):
    manifest = write_images(ram / "data", 20, side=8)
    assert counts(run(manifest, ram / "store", rows_per_chunk=8, batch_size=4)) == (20, 0, 0)
    return manifest, ram / "store"


def test_a_deleted_chunk(extracted, capsys):
    manifest, store = extracted
    before, words = features(store), ("verify", store)
    (chunk,) = store.glob(f"features.zarr/*/{ARRAY}/c.1.0")
    chunk.unlink()
    lost = [f"s{n:04d}" for n in range(8, 16)]
    with pytest.raises(
        CorruptionError, match=r"the file is missing\. Array penultimate@none, chunk 1 .* samples s0008"
    ):
        FeatureDataset(store, dataset="samples", target="label").numpy()
    status, out, err = main(*words, "--json", capsys=capsys)
    (problem,) = json_of(out)["problems"]
    assert (status, problem["kind"], problem["array"], problem["chunk"]) == (1, "chunk", ARRAY, 1)
    assert problem["samples"] == lost
    status, out, err = main(*words, capsys=capsys)
    assert f"wrong     {chunk}: missing; samples s0008, s0009," in out
    assert err.endswith(f"Next: featurecache verify {store} --repair\n")
    status, out, err = main(*words, "--repair", capsys=capsys)
    assert (status, out.splitlines()[0]) == (0, "repaired  12 rows kept, 8 dropped, 1 file to the trash")
    assert states(store)["s0008"] == "done", "as bound"
    assert list(features(store)) == [sample for sample in before if sample not in lost]
    assert counts(run(manifest, store)) == (8, 12, 0)
    after = features(store)
    assert after.keys() == before.keys()
    for sample, row in before.items():
        np.testing.assert_allclose(after[sample], row, atol=1e-6, rtol=0)
    assert main(*words, capsys=capsys)[0] == 0


def test_a_store_that_can_not_be_written(extracted, capsys):
    manifest, store = extracted
    (store / "lock").unlink()
    (store / "lock").mkdir()  # what stops root, too
    words = ("extract", manifest, "--store", store, "--view", "image=image", "--body", "plugin_extract:steady")
    status, _, err = main(*words, capsys=capsys)
    assert status == 1
    assert err.startswith(f"Error: {store}: this store can't be written: ")
    assert "Commands that only read it work as before. To add to it, " in err
    assert main("verify", store, capsys=capsys)[0] == 0
    assert len(features(store)) == 20


@pytest.mark.parametrize("state", ["lost", "old", "damaged"])
def test_an_index_that_is_lost_old_or_damaged(extracted, capsys, state):
    manifest, store = extracted
    index, old = store / "index.sqlite", store / "index.sqlite"
    saved = old.read_bytes()
    write_images(manifest.parent, 30, side=8)
    assert counts(run(manifest, store)) == (10, 20, 0)
    before = features(store)
    chunks = {path: path.read_bytes() for path in store.glob("features.zarr/*/*/c.*")}
    if state == "lost":
        index.unlink()
    else:
        index.write_bytes(saved if state == "old" else b"not a database" * 500)
    arguments = ("extract", manifest, "--store", store, "--view", "image=image", "--body", "plugin_extract:steady")
    more = ("--precision", "fp32", "--store-dtype", "float32", "--engine", "torch")
    status, out, err = main(*arguments, *more, capsys=capsys)
    assert status == 1
    assert f"featurecache verify {store} --rebuild-index" in err
    assert {path: path.read_bytes() for path in store.glob("features.zarr/*/*/c.*")} == chunks
    status, out, err = main("verify", store, "--rebuild-index", capsys=capsys)
    assert (status, out.splitlines()[0]) == (0, "rebuilt   30 rows kept, 0 dropped, 0 files to the trash"), out + err
    status, out, err = main(*arguments, *more, "--json", capsys=capsys)
    assert status == 0, err
    assert (json_of(out)["computed"], json_of(out)["reused"]) == (0, 30)
    after = features(store)
    assert all(np.array_equal(after[sample], row) for sample, row in before.items())
    assert after.keys() == before.keys()
    shutil.rmtree(store)
