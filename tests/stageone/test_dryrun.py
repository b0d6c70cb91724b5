"""`--dry-run` says what would be done and why, and touches nothing."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from extract_kit import config, counts, image, read_rows, run, tree, write_images, write_manifest
from PIL import Image

from featurecache.errors import InputError
from featurecache.stageone.dryrun import plan_extract
from featurecache.store.store import FeatureStore


def plan(manifest, store, **options):
    """The plan, and proof that nothing was touched."""
    before = tree(store.parent)
    found = plan_extract(config(manifest, store, **options))
    assert tree(store.parent) == before
    return found


def reasons(found) -> dict[str, int]:
    (view,) = found.views
    assert view.images == view.reused + view.to_compute + view.failed
    assert sum(view.reasons.values()) == view.images - view.reused
    return dict(view.reasons)


def held_bytes(path) -> int:
    with FeatureStore(path) as store:
        return sum(info.bytes for info in store.recipes())


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 6)


def test_a_store_that_does_not_exist(data, tmp_path):
    shutil.copy(data.parent / "image0000.png", data.parent / "image0001.png")
    found = plan(data, tmp_path / "store")
    assert reasons(found) == {"new": 5}
    assert not (tmp_path / "store").exists()
    size = found.bytes_to_write
    counted = "view      image: reused 1 (1 equal to another of this table), to compute 5; torch fp32 (as given)"
    assert counted in found.lines()
    assert f"write     about {size / 1e6:.1f} MB of features, in whole chunks" in found.lines()
    assert found.to_json() == {
        "dataset": "samples", "samples": 6, "images": 6, "reused": 1, "to_compute": 5, "known_failures": 0,
        "replicas": 0, "replicas_to_compute": 0, "bytes_to_write": size, "reasons": {"image": {"new": 5}},
        "engines": {"image": "torch fp32 (as given)"}, "duplicates_across_splits": [],
    }  # fmt: skip
    done = run(data, tmp_path / "store")
    assert counts(done) == (5, 1, 0), "what was said is what is done"
    assert held_bytes(tmp_path / "store") == size > 0, "the one chunk is written whole"
    again = plan(data, tmp_path / "store")
    assert again.bytes_to_write == 0
    assert "view      image: reused 6, to compute 0; torch fp32 (as given)" in again.lines()


def test_bytes_to_write_are_those_of_whole_chunks(data, tmp_path):
    store, options = tmp_path / "store", {"rows_per_chunk": 4}
    size = plan(data, store, **options).bytes_to_write  # 4 + 2 rows
    run(data, store, **options)
    assert held_bytes(store) == size
    for number in range(3):
        image(60 + number).save(data.parent / f"more{number}.png")
    more = [{"sample_id": f"m{n}", "label": 0, "image": f"more{n}.png"} for n in range(3)]
    write_manifest(data, [*read_rows(data), *more])
    more_size = plan(data, store, **options).bytes_to_write  # 2 + 3 rows: those of the partial chunk are written anew
    run(data, store, **options)
    assert more_size == 2 * (held_bytes(store) - size)


def test_what_changed_and_why(data, tmp_path):
    store = tmp_path / "store"
    run(data, store)
    assert reasons(plan(data, store)) == {}
    assert reasons(plan(data, store, check="content")) == {}
    Image.fromarray(255 - np.asarray(image(1))).save(data.parent / "image0001.png")
    image(50).save(data.parent / "extra.png")
    write_manifest(data, [*read_rows(data), {"sample_id": "extra", "label": 0, "image": "extra.png"}])
    assert reasons(plan(data, store)) == {"bytes changed": 1, "new": 1}
    found = reasons(plan(data, store, image_size=24))
    assert found.pop("bytes changed") == found.pop("new") == 1
    assert found == {"recipe changed: preprocessing.crop 32 -> 24, preprocessing.resize 40 -> 24": 5} or found == {
        "recipe changed: preprocessing.crop 32 -> 24, preprocessing.resize 32 -> 24": 5
    }
    (reason,) = [one for one in reasons(plan(data, store, body="plugin_extract:strided")) if "recipe" in one]
    assert "body.architecture 'plugin_extract:steady' -> 'plugin_extract:strided'" in reason
    assert "taps.penultimate@none.program " in reason
    assert "..." in reason
    assert counts(run(data, store, image_size=24)) == (7, 0, 0)


def test_failures_are_neither_reused_nor_computed(data, tmp_path):
    store = tmp_path / "store"
    (data.parent / "image0002.png").write_bytes(b"broken")
    run(data, store)
    found = plan(data, store)
    assert reasons(found) == {"failed before (--retry-failed tries again)": 1}
    assert (found.views[0].reused, found.views[0].to_compute, found.views[0].failed) == (5, 0, 1)
    again = plan(data, store, retry_failed=True)
    assert reasons(again) == {"failed before": 1}
    assert again.views[0].to_compute == 1
    assert any("failing 1" in line for line in found.lines())


def test_a_file_that_can_not_be_read(data, tmp_path, monkeypatch):
    from featurecache.stageone import keys

    def refuse(path, *args, **kwargs):
        if str(path).endswith("image0004.png"):
            raise OSError(5, "Input/output error")
        return open(path, *args, **kwargs)

    monkeypatch.setattr(keys, "open", refuse, raising=False)
    assert reasons(plan(data, tmp_path / "store")) == {"new": 5, "can't be read: Input/output error": 1}


def test_equal_content_on_two_sides_of_the_split(data, tmp_path):
    shutil.copy(data.parent / "image0000.png", data.parent / "image0005.png")
    rows = read_rows(data)
    for i, row in enumerate(rows):
        row["split"] = "train" if i < 4 else "test"
    write_manifest(data, rows)
    found = plan(data, tmp_path / "store")
    assert found.duplicates == ["s0000 (train) and s0005 (test)"]
    assert found.lines()[-2:] == [
        "warning   1 contents stand on two sides of the split:",
        "            s0000 (train) and s0005 (test)",
    ]


def test_errors_are_those_of_the_run(data, tmp_path):
    run(data, tmp_path / "store")
    other = tmp_path / "elsewhere" / "samples.csv"
    shutil.copytree(data.parent, other.parent)
    write_manifest(other, read_rows(other)[:5])
    with pytest.raises(InputError, match="in this store was made from"):
        plan(other, tmp_path / "store")
    with pytest.raises(InputError, match="no module 'conv9'"):
        plan(data, tmp_path / "nothing", tap="conv9")
