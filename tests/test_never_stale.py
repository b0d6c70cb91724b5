"""The first promise: a row is found by what it depends on, so that exactly what changed is computed again."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from extract_kit import (
    counts,
    features,
    image,
    json_of,
    read_rows,
    recipe_ids,
    run,
    settle,
    states,
    write_images,
    write_manifest,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from zygote import shared

from featurecache.bodies.registry import load_body
from featurecache.store.store import FeatureStore

N = 5


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A data set whose files are old enough for their stat to count, and a store made from it."""
    folder = tmp_path_factory.mktemp("extracted")
    manifest = write_images(folder / "data", N)
    save_file(load_body("plugin_extract:steady").module.state_dict(), folder / "w.safetensors")
    settle()
    run(manifest, folder / "store", weights=folder / "w.safetensors")
    return folder


@pytest.fixture
def copy(extracted, tmp_path):
    """A copy of it all in another place, with the times of the originals."""
    return Path(shutil.copytree(extracted, tmp_path / "copy"))


def again(folder: Path, **options):
    manifest = options.pop("manifest", folder / "data" / "samples.csv")
    defaults = {"weights": folder / "w.safetensors", "replace": True}
    return run(manifest, folder / "store", **{**defaults, **options})


def same(folder: Path, other: Path, name: str = "samples") -> None:
    mine, theirs = features(folder / "store", name), features(other / "store")
    assert mine.keys() == theirs.keys()
    for sample, row in mine.items():
        np.testing.assert_array_equal(row, theirs[sample])


# ---- what changes the features is computed again ---------------------------------------------------------------------


def test_one_pixel_is_one_row(copy, extracted):
    changed = np.array(image(2))
    changed[5, 7, 1] ^= 1
    Image.fromarray(changed).save(copy / "data" / "image0002.png")
    assert counts(again(copy)) == (1, N - 1, 0)
    before, after = features(extracted / "store"), features(copy / "store")
    differ = {sample for sample in before if not np.array_equal(before[sample], after[sample])}
    assert differ == {"s0002"}


def test_same_size_and_time_are_seen_through(copy):
    """Bytes changed, then size and mtime put back: the change time gives it away."""
    path = copy / "data" / "image0001.png"
    assert counts(again(copy)) == (0, N, 0)
    settle()
    again(copy)
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[: len(data)] = (copy / "data" / "image0003.png").read_bytes()[: len(data)].ljust(len(data), b"\0")
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    summary = again(copy)
    assert summary.computed + summary.failed <= 1
    ids = {tuple(row) for row in features(copy / "store").values()}
    assert "s0001" not in features(copy / "store") or len(ids) == N - 1  # not the old row


def reweighed(folder: Path, name: str) -> Path:
    state = load_file(folder / "w.safetensors")
    state[name].view(-1)[0] += 0.5
    save_file(state, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_var", "bn1.running_mean", "bn1.bias"])
def test_one_weight_is_every_row(copy, extracted, name):
    assert counts(again(copy, weights=reweighed(copy, name))) == (N, 0, 0)
    before, after = features(extracted / "store"), features(copy / "store")
    assert all(not np.array_equal(before[sample], after[sample]) for sample in before)
    assert counts(again(copy)) == (0, N, 0), "the first recipe's rows are still there"


def test_weights_behind_the_tap_do_not_count(copy):
    assert counts(again(copy, tap="conv2:avg")) == (N, 0, 0)
    assert counts(again(copy, tap="conv2:avg", weights=reweighed(copy, "fc.weight"))) == (0, N, 0)
    assert counts(again(copy, tap="conv2:avg", weights=reweighed(copy, "conv2.weight"))) == (N, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"body": "plugin_extract:strided"},
        {"image_size": 24},
        {"resize": 36},
        {"resize_mode": "squash", "resize": "none"},
        {"interpolation": "bicubic"},
        {"antialias": False},
        {"exif": False},
        {"mean": (0.5, 0.5, 0.4)},
        {"std": (0.25, 0.2, 0.25)},
        {"precision": "bf16"},
        {"store_dtype": "float16"},
        {"tap": ["penultimate", "conv2:avg"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_one_flag_is_every_row(copy, options):
    assert counts(again(copy, **options)) == (N, 0, 0)
    assert counts(again(copy, **options)) == (0, N, 0)
    assert len(recipe_ids(copy / "store")) == 2


def test_a_part_of_an_image_is_other_content(copy):
    rows = read_rows(copy / "data" / "samples.csv")
    for row in rows:
        row |= {"x0": 0, "y0": 0, "x1": 32, "y1": 20 if row["sample_id"] == "s0000" else 32}
    boxed = write_manifest(copy / "data" / "boxed.csv", rows)
    box = {"box": {"image": ("x0", "y0", "x1", "y1")}}
    assert counts(again(copy, manifest=boxed, **box)) == (N, 0, 0)
    rows[1]["y1"] = 20
    write_manifest(boxed, rows)
    assert counts(again(copy, manifest=boxed, **box)) == (1, N - 1, 0)


# ---- what does not, is not -------------------------------------------------------------------------------------------


def test_a_moved_store_and_moved_files_compute_nothing(copy, extracted):
    """Store, manifest, images and weights lie elsewhere, under other names."""
    data = copy / "data"
    rows = read_rows(data / "samples.csv")
    for i, row in enumerate(rows):
        (data / "sub").mkdir(exist_ok=True)
        (data / row["image"]).rename(data / "sub" / f"renamed{9 - i}.png")
        row["image"] = f"sub/renamed{9 - i}.png"
    moved = write_manifest(data / "other.csv", rows[::-1])
    (copy / "w.safetensors").rename(copy / "weights-elsewhere.safetensors")
    summary = again(copy, manifest=moved, weights=copy / "weights-elsewhere.safetensors", name="another")
    assert counts(summary) == (0, N, 0)
    same(copy, extracted, "another")


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"batch_size": 3}, {"workers": 1}, {"workers": 7}, {"check": "content"}, {"name": "other"}],
    ids=lambda options: "-".join(map(str, options.items())),
)
def test_how_it_is_run_does_not_matter(copy, extracted, options):
    assert counts(again(copy, **options)) == (0, N, 0)
    fresh = copy / "fresh"
    (fresh / "data").mkdir(parents=True)
    assert counts(run(copy / "data" / "samples.csv", fresh / "store", **options)) == (N, 0, 0)
    mine, theirs = features(fresh / "store", options.get("name", "samples")), features(extracted / "store")
    for sample, row in mine.items():
        np.testing.assert_allclose(row, theirs[sample], atol=1e-6)


def test_unchanged_files_are_not_opened(copy, extracted, monkeypatch):
    monkeypatch.setattr("featurecache.producer.read_payload", lambda cell: pytest.fail(f"opened {cell.location}"))
    assert counts(again(extracted)) == (0, N, 0)


def test_another_process_with_another_hash_seed(extracted, tmp_path):
    store, weights = extracted / "store", extracted / "w.safetensors"
    done = shared().run(
        tmp_path, "extract", extracted / "data" / "samples.csv", "--store", store, "--view", "image=image",
        "--weights", weights, "--body", "plugin_extract:steady", "--precision", "fp32", "--store-dtype", "float32",
        "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    figures = json_of(done.out)
    assert (figures["computed"], figures["reused"], figures["failed"]) == (0, N, [])


# ---- more on one store -----------------------------------------------------------------------------------------------


def test_a_tap_added_later_and_fewer_taps(copy):
    assert counts(again(copy, tap=["penultimate", "conv1:avg"])) == (N, 0, 0)
    # The earlier tap alone is in both groups now; the group of its own still serves.
    assert counts(again(copy, tap="penultimate")) == (0, N, 0)
    assert again(copy, tap="penultimate").recipes["image"] == recipe_ids(copy / "store")[0]


def test_a_group_with_more_taps_serves_fewer(tmp_path):
    manifest = write_images(tmp_path / "data", 3)
    first = run(manifest, tmp_path / "store", tap=["penultimate", "conv1:avg"])
    summary = run(manifest, tmp_path / "store", tap="penultimate")
    assert counts(summary) == (0, 3, 0)
    assert summary.recipes == first.recipes
    Image.fromarray(255 - np.array(image(0))).save(tmp_path / "data" / "image0000.png")
    assert counts(run(manifest, tmp_path / "store", tap="penultimate")) == (1, 2, 0)
    assert len(features(tmp_path / "store", tap="conv1@avg")) == 3, "the group stays complete in all its taps"


def test_the_group_that_holds_the_images_is_taken(tmp_path):
    """Another group with more rows, of other images, must not make these be computed again."""
    mine, theirs = write_images(tmp_path / "mine", 3), write_images(tmp_path / "theirs", 6, side=40)
    run(mine, tmp_path / "store", name="mine", tap="penultimate")
    run(theirs, tmp_path / "store", name="theirs", tap=["penultimate", "conv1:avg"])
    for check in ("stat", "content"):
        summary = run(mine, tmp_path / "store", name="mine", tap="penultimate", check=check)
        assert counts(summary) == (0, 3, 0)


def test_a_third_view_added_later(tmp_path):
    manifest = write_images(tmp_path / "data", 4, views=("a", "b", "c"))
    rows = read_rows(manifest)
    for row in rows:
        row |= {"flip": "yes" if row["sample_id"] == "s0001" else "no"}
    write_manifest(manifest, rows)
    store = tmp_path / "store"
    run(manifest, store, views={"a": "a", "b": "b"}, flip_if={"a": "flip=yes"}, image_size={"b": 24})
    before = {view: features(store, view=view) for view in "ab"}
    summary = run(manifest, store, views={"c": "c"})
    assert counts(summary) == (4, 0, 0)
    for view in "ab":
        assert set(states(store, view=view).values()) == {"done"}
        after = features(store, view=view)
        assert all(np.array_equal(before[view][sample], after[sample]) for sample in before[view])
    binding = FeatureStore(store).binding("samples")
    assert set(binding.recipes) == {"a", "b", "c"}
    assert binding.config["manifest"]["flip_if"] == {"a": "flip=yes"}
    assert binding.config["body"]["image_size"] == {"b": 24}
    summary = run(manifest, store, views={"c": "c"}, replace=True)
    assert counts(summary) == (0, 4, 0)
    assert set(FeatureStore(store).binding("samples").recipes) == {"c"}, "--replace keeps only this run's views"


def test_a_second_manifest_and_equal_content(tmp_path):
    manifest = write_images(tmp_path / "data", 4)
    store = tmp_path / "store"
    shutil.copy(tmp_path / "data" / "image0000.png", tmp_path / "data" / "twin.png")
    rows = [*read_rows(manifest), {"sample_id": "twin", "label": 1, "image": "twin.png"}]
    more = write_manifest(tmp_path / "data" / "more.csv", rows)
    assert counts(run(more, store)) == (4, 1, 0)
    found = features(store, "more")
    np.testing.assert_array_equal(found["twin"], found["s0000"])
    assert counts(run(manifest, store)) == (0, 4, 0)
    assert FeatureStore(store).bindings() == ["more", "samples"]


def test_two_views_with_one_body_share_rows(tmp_path):
    """The same image as two views of a sample is computed once."""
    manifest = write_images(tmp_path / "data", 3)
    summary = run(manifest, tmp_path / "store", views={"left": "image", "right": "image"})
    assert counts(summary) == (3, 3, 0)
    assert summary.recipes["left"] == summary.recipes["right"]
    left, right = (features(tmp_path / "store", view=view) for view in ("left", "right"))
    assert all(np.array_equal(left[sample], right[sample]) for sample in left)


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    manifest = write_images(tmp_path / "data", 2)
    options = {"body": "torchvision/squeezenet1_1", "weights": "none", "image_size": 32}
    assert counts(run(manifest, tmp_path / "store", seed=1, **options)) == (2, 0, 0)
    torch.rand(5)
    assert counts(run(manifest, tmp_path / "store", seed=1, **options)) == (0, 2, 0)
    assert counts(run(manifest, tmp_path / "store", seed=2, **options)) == (2, 0, 0)
