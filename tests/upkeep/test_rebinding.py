import csv
import shutil

import pytest
from extract_kit import run as extract_images
from extract_kit import write_images
from stage_two import WIDTH, read_table, samples, write_store, write_table

from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.store.store import FeatureStore
from featurecache.upkeep.rebinding import rebind


def relabel(path, name="s003", **values):
    rows = read_table(path)
    for row in rows:
        if row["sample_id"] == name:
            row.update(values)
    return write_table(path, rows)


def labels(store, **options):
    dataset = FeatureDataset(store, dataset="m", target="label", **options)
    return dict(zip(dataset.sample_ids.tolist(), dataset.target.values.tolist(), strict=True))


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path, 20)


def test_a_corrected_label_is_noticed_and_rebound(tmp_path, store):
    before = labels(store)
    relabel(tmp_path / "m.csv", label="no")
    with pytest.raises(InputError, match=r"m.csv has changed since dataset 'm' was made.*--manifest .*m.csv"):
        labels(store)
    assert labels(store, manifest=tmp_path / "m.csv") == {**before, "s003": 0}
    assert labels(store) == {**before, "s003": 0}, "from now on, without being told again"


def test_a_manifest_that_is_gone_is_no_change(tmp_path, store):
    before = labels(store)
    (tmp_path / "m.csv").unlink()
    assert labels(store) == before


def test_samples_fewer_and_in_another_order_keep_their_features(tmp_path, store):
    x = FeatureDataset(store, dataset="m").numpy()[0]
    rows = read_table(tmp_path / "m.csv")[::-2]
    write_table(tmp_path / "m.csv", rows)
    dataset = FeatureDataset(store, dataset="m", manifest=tmp_path / "m.csv")
    assert dataset.sample_ids.tolist() == [row["sample_id"] for row in rows]
    number = [int(name[1:]) for name in dataset.sample_ids]
    assert [a.tobytes() for a in dataset.numpy()[0]] == [x[i].tobytes() for i in number]


def test_another_path_where_relative_images_start_from_the_old_folder(tmp_path, store):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "corrected.csv"
    shutil.copy(tmp_path / "m.csv", path)
    relabel(path, label="no")
    before = labels(store)
    assert labels(store, manifest=path) == {**before, "s003": 0}
    with FeatureStore(store) as opened:
        bound = opened.binding("m")
    assert bound.manifest_path == str(path)
    assert bound.config["manifest"]["root"] == str(tmp_path)
    relabel(tmp_path / "m.csv", label="no")  # the old file no longer counts
    assert labels(store) == {**before, "s003": 0}


def test_other_images_and_new_samples_are_refused_with_row_and_view(tmp_path, store):
    rows = read_table(tmp_path / "m.csv")
    rows[3]["a"] = "unseen.png"
    rows.append({**rows[0], "sample_id": "new", "a": "fresh.png"})
    write_table(tmp_path / "m.csv", rows)
    with pytest.raises(InputError) as caught:
        labels(store, manifest=tmp_path / "m.csv")
    assert [line.partition(" is ")[0] for line in caught.value.problems] == [
        "row 5, view 'a': unseen.png",
        "row 22, view 'a': fresh.png",
    ]
    assert "run `featurecache extract` on it" in str(caught.value)
    write_table(tmp_path / "m.csv", samples(20))
    assert len(labels(store)) == 20, "the refused manifest was not bound"


def test_known_images_may_change_places(tmp_path, store):
    x = FeatureDataset(store, dataset="m").numpy()[0]
    rows = read_table(tmp_path / "m.csv")
    rows[0]["a"], rows[1]["a"] = rows[1]["a"], rows[0]["a"]
    write_table(tmp_path / "m.csv", rows)
    swapped = FeatureDataset(store, dataset="m", manifest=tmp_path / "m.csv").numpy()[0]
    assert swapped[0, :WIDTH].tolist() == x[1, :WIDTH].tolist()
    assert swapped[1, :WIDTH].tolist() == x[0, :WIDTH].tolist()


def test_states_are_kept(tmp_path):
    store = write_store(tmp_path, 12, missing=0.3, state={"a3.png": "pending", "a4.png": "failed"})
    relabel(tmp_path / "m.csv", label="no")
    dataset = FeatureDataset(store, dataset="m", target="label", manifest=tmp_path / "m.csv", allow_partial=True)
    assert dataset.failed["a"] == ["s004"]
    with pytest.raises(InputError, match=r"not yet extracted \(1 of view 'a'; samples s003\)"):
        labels(store)


def test_long_layout_is_compared_by_cell(tmp_path):
    rows = [
        {"sample_id": f"s{i}", "view": view, "path": f"{view}{10 * i + k}.png", "label": "ny"[i % 2]}
        for i in range(6)
        for view, count in (("a", 1 + i % 3), ("b", 1))
        for k in range(count)
    ]
    long = {"layout": "long", "view_column": "view", "path_column": "path", "multi": "mean"}
    store = write_store(tmp_path, rows=rows, replace=long)
    x = FeatureDataset(store, dataset="m").numpy()[0]
    for row in rows:
        row["label"] = "n" if row["sample_id"] == "s1" else row["label"]
    write_table(tmp_path / "m.csv", rows[::-1])
    dataset = FeatureDataset(store, dataset="m", target="label", manifest=tmp_path / "m.csv")
    assert dataset.sample_ids.tolist() == [f"s{i}" for i in range(6)][::-1]
    assert abs(dataset.numpy()[0] - x[::-1]).max() < 1e-6
    assert dataset.target.values.tolist() == [1, 0, 1, 0, 0, 0]
    rows[0]["path"] = "unseen.png"
    write_table(tmp_path / "m.csv", rows)
    with pytest.raises(InputError, match=r"row 2, view 'a': unseen\.png"):
        labels(store, manifest=tmp_path / "m.csv")


def test_with_images_bytes_count_and_files_may_be_gone(tmp_path):
    manifest = write_images(tmp_path, 6)
    extract_images(manifest, tmp_path / "store")
    relabel(manifest, "s0002", label="1")
    store = tmp_path / "store"

    def bind():
        with FeatureStore(store, write=True) as opened:
            return rebind(opened, opened.binding("samples"), manifest)

    assert bind().table["label"].to_list() == [0, 1, 1, 1, 0, 1]
    (tmp_path / "image0001.png").rename(tmp_path / "renamed.png")
    relabel(manifest, "s0001", image="renamed.png")
    assert bind().cells["state"].to_list() == ["done"] * 6
    (tmp_path / "image0003.png").unlink()
    assert bind().cells["state"].to_list() == ["done"] * 6
    (tmp_path / "image0004.png").write_bytes((tmp_path / "image0004.png").read_bytes() + b"more")
    with pytest.raises(InputError, match=r"view 'image': image0004\.png was not extracted"):
        bind()


def test_selectors_count(tmp_path):
    manifest = write_images(tmp_path, 4)
    with manifest.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    for i, row in enumerate(rows):
        row["side"] = "LR"[i % 2]
    write_table(manifest, rows)
    extract_images(manifest, tmp_path / "store", flip_if={"image": "side=R"})
    rows[0]["side"] = "R"
    write_table(manifest, rows)
    with FeatureStore(tmp_path / "store", write=True) as opened, pytest.raises(InputError, match="row 2, view 'image'"):
        rebind(opened, opened.binding("samples"), manifest)


def test_folders(tmp_path):
    source = write_images(tmp_path / "flat", 6).parent
    for i, path in enumerate(sorted(source.glob("*.png"))):
        (tmp_path / "classes" / "xy"[i % 2]).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "classes" / "xy"[i % 2] / path.name)
    extract_images(tmp_path / "classes", tmp_path / "store")
    (tmp_path / "classes/x/image0000.png").rename(tmp_path / "classes/y/image0000.png")
    with pytest.raises(InputError, match="has changed since"):
        FeatureDataset(tmp_path / "store", dataset="classes", target="class")
    dataset = FeatureDataset(tmp_path / "store", dataset="classes", target="class", manifest=tmp_path / "classes")
    assert sum(dataset.target.values.tolist()) == 4
