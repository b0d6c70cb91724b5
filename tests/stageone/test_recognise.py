"""Files recognised in bulk, by their stat or their bytes, before anything goes through the pipeline."""

from __future__ import annotations

import os
import sqlite3

import numpy as np
import pytest
from extract_kit import config, counts, features, image, run, settle, write_images
from PIL import Image

from featurecache.data.manifest import read_manifest
from featurecache.errors import CorruptionError, InputError
from featurecache.machine import scouts
from featurecache.stageone import extraction, recognise
from featurecache.stageone import survey as survey_module
from featurecache.stageone.dryrun import plan_extract
from featurecache.stageone.jobs import plan_jobs, set_up_views
from featurecache.stageone.keys import present_cells, unchanged
from featurecache.stageone.survey import Survey
from featurecache.store.store import FeatureStore

N = 12


@pytest.fixture(autouse=True)
def bulk(monkeypatch):
    """As with many files."""
    monkeypatch.setattr(scouts, "WORTH_IT", 1)
    monkeypatch.setattr(scouts, "BLOCK", {"look": 4, "read": 4})


@pytest.fixture
def data(tmp_path):
    manifest = write_images(tmp_path / "data", N)
    run(manifest, tmp_path / "store")
    return manifest


def piped(monkeypatch) -> list[str]:
    """Names of the files that go through the pipeline from now on."""
    seen: list[str] = []
    real = extraction.produce

    def produce(cells, *args, **options):
        seen.extend(cell.value for cell in cells)
        return real(cells, *args, **options)

    monkeypatch.setattr(extraction, "produce", produce)
    return seen


def again(data, **options):
    return run(data, data.parent.parent / "store", **options)


def replace_image(path, seed: int) -> None:
    image(seed).save(path)


def test_only_what_is_new_goes_through_the_pipeline(data, monkeypatch):
    before, seen = features(data.parent.parent / "store"), piped(monkeypatch)
    replace_image(data.parent / "image0003.png", 99)
    (data.parent / "image0005.png").write_bytes(b"broken")
    summary = again(data, check="content")
    assert counts(summary) == (1, N - 2, 1)
    assert seen == ["image0003.png", "image0005.png"]
    after = features(data.parent.parent / "store")
    assert {name for name in before if name not in after or (before[name] != after[name]).any()} == {"s0003", "s0005"}
    assert np.allclose(after["s0003"], features(fresh(data, "f"))["s0003"])


def fresh(data, name: str):
    run(data, data.parent.parent / name)
    return data.parent.parent / name


def test_touched_files_are_remembered_as_they_are_now(data, monkeypatch):
    for path in data.parent.glob("*.png"):
        os.utime(path)
    settle()
    seen = piped(monkeypatch)
    assert counts(again(data)) == (0, N, 0)
    assert seen == []
    store = FeatureStore(data.parent.parent / "store")
    cells = present_cells(read_manifest(config(data, store.path)).cells)
    assert unchanged(cells, store).known.all(), "the next run reads nothing"


def test_records_that_say_the_same_are_not_written_again(data, monkeypatch):
    settle()
    again(data, check="content")  # the first records were too young to be trusted
    written = []
    monkeypatch.setattr(FeatureStore, "remember_payloads", lambda self, records: written.extend(records))
    assert counts(again(data, check="content")) == (0, N, 0)
    assert written == []
    replace_image(data.parent / "image0003.png", 99)
    again(data, check="content")
    assert [os.path.basename(record.path) for record in written] == ["image0003.png"]


def test_new_files_are_not_read_twice(data, monkeypatch):
    """Fewer than half are known, so that the rest is left to the pipeline."""
    monkeypatch.setattr(recognise, "TRIAL", 1)
    monkeypatch.setattr(scouts, "cores", lambda: 1)
    rows = data.read_text().splitlines()
    for i in range(N, 6 * N):
        replace_image(data.parent / f"new{i}.png", i)
        rows.append(f"s{i:04d},0,new{i}.png")
    data.write_text("\n".join(rows) + "\n")
    asked, real = [], recognise.read_keys

    def read_keys(cells, places):
        for answer in real(cells, places):
            asked.append(answer[0])
            yield answer

    monkeypatch.setattr(recognise, "read_keys", read_keys)
    seen = piped(monkeypatch)
    assert counts(again(data, check="content")) == (5 * N, N, 0)
    assert sum(asked) == N + 4, "the files of before, and one block of new ones"
    assert len(seen) == 5 * N


def test_the_bytes_that_are_decoded_decide(data, monkeypatch):
    """They change between the two readings."""
    path, real = data.parent / "image0003.png", extraction.recognise
    replace_image(path, 99)

    def change(*args):
        real(*args)
        replace_image(path, 123)

    monkeypatch.setattr(extraction, "recognise", change)
    assert counts(again(data, check="content")) == (1, N - 1, 0)
    monkeypatch.undo()
    assert np.allclose(features(data.parent.parent / "store")["s0003"], features(fresh(data, "f"))["s0003"])


def test_a_dry_run_hashes_in_bulk_too(data):
    replace_image(data.parent / "image0003.png", 99)
    (data.parent / "image0005.png").unlink()
    store = data.parent.parent / "store"
    with pytest.raises(InputError, match=r"image0005\.png is missing"):
        plan_extract(config(data, store, check="content"))
    Image.new("RGB", (32, 32)).save(data.parent / "image0005.png")
    found = plan_extract(config(data, store, check="content"))
    assert found.to_json()["reasons"] == {"image": {"bytes changed": 2}}
    assert found.to_json()["reused"] == N - 2


# ---- while torch is imported -----------------------------------------------------------------------------------------


def test_a_survey_finds_what_the_store_would(data, monkeypatch):
    settle()
    again(data, check="content")
    replace_image(data.parent / "image0003.png", 99)
    os.utime(data.parent / "image0004.png")
    stage = config(data, data.parent.parent / "store")
    with Survey(stage) as survey, FeatureStore(stage.store) as store:
        cells = present_cells(survey.manifest().cells)
        files = survey.unchanged()
        assert files is not None
        assert unchanged(cells, store, files).to_list() == unchanged(cells, store).to_list()
        assert unchanged(cells, store, files).known.tolist() == [i not in (3, 4) for i in range(N)]
    with Survey(stage.model_copy(update={"check": "content"})) as survey:
        assert survey.unchanged() is None
    with Survey(stage.model_copy(update={"store": data.parent / "none"})) as survey:
        assert survey.unchanged() is None


def test_a_survey_finds_what_lies_behind_links(data, monkeypatch):
    """They are looked at early where they are written to be, and once more where they are."""
    folder = data.parent
    (folder / "real").mkdir()
    for i in range(5):
        (folder / f"image{i:04d}.png").rename(folder / "real" / f"{i}.png")
        (folder / f"image{i:04d}.png").symlink_to(folder / "real" / f"{i}.png")
    settle()
    again(data, check="content")
    replace_image(folder / "real" / "3.png", 99)
    stage = config(data, folder.parent / "store")
    with Survey(stage) as survey, FeatureStore(stage.store) as store:
        files = survey.unchanged()
        assert unchanged(present_cells(survey.manifest().cells), store, files).known.tolist() == [
            i != 3 for i in range(N)
        ]


def test_a_table_of_the_rows_says_what_the_store_would(data, monkeypatch):
    """Read while the keys are made. What changed is to do, also where another recipe has the new content."""
    settle()
    again(data, check="content")
    replace_image(data.parent / "image0003.png", 99)
    replace_image(data.parent / "image0004.png", 100)
    again(data, image_size={"image": 24}, check="content")  # another recipe: it alone knows the new content
    settle()
    again(data, image_size={"image": 24}, check="content")
    stage = config(data, data.parent.parent / "store")
    asked, real = [], FeatureStore.rows
    monkeypatch.setattr(FeatureStore, "rows", lambda *given: asked.append(given) or real(*given))
    with Survey(stage) as survey, FeatureStore(stage.store) as store:
        manifest, setups = survey.manifest(), set_up_views(stage, ("image",))
        (read,) = plan_jobs(stage, manifest, setups, store, survey.unchanged())
        assert not asked
        (looked_up,) = plan_jobs(stage, manifest, setups, store)
        assert asked
    assert read.keys.known.all()
    assert read.done.tolist() == looked_up.done.tolist() == [i not in (3, 4) for i in range(N)]


def test_files_are_looked_at_before_the_manifest_is_read(data, monkeypatch):
    asked, read = [], []
    real_ask, real_read = scouts.ask, survey_module.read_manifest
    monkeypatch.setattr(scouts, "ask", lambda *given: asked.append(len(read)) or real_ask(*given))

    def read_manifest(*given, **named):
        found = real_read(*given, **named)
        read.append(found)
        return found

    monkeypatch.setattr(survey_module, "read_manifest", read_manifest)
    with Survey(config(data, data.parent.parent / "store")) as survey:
        assert survey.unchanged() is not None
    assert (asked, len(read)) == ([0], 1)


def test_what_is_wrong_is_told_by_whom_it_concerns(data):
    stage = config(data, data.parent.parent / "store")
    with (
        pytest.raises(InputError, match="no column 'none'"),
        Survey(stage.model_copy(update={"views": {"image": "none"}})) as survey,
    ):
        survey.manifest()
    with sqlite3.connect(stage.store / "index.sqlite") as connection:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("DELETE FROM sqlite_master WHERE name = 'payloads'")
    connection.close()
    with Survey(stage) as survey:
        assert survey.unchanged() is None
    with pytest.raises(CorruptionError, match="--rebuild-index"):
        again(data)
