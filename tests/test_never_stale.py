"""The first promise: a row is found by what it depends on, so that exactly what changed is computed again.

A matrix: each case changes one thing in a copy of a data set and its store, and says which samples must be computed
again. That is counted from the summary, and seen in the features: they equal those of an empty store, and differ from
the earlier ones just where they should. What belongs to identity alone has its cases in bodies/test_identity.py, what
belongs to replicas in test_replicas.py.
"""

import hashlib
import importlib
import json
import linecache
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plugin_extract
import polars as pl
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
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import nn
from zygote import shared

from featurecache.bodies.engines import devices
from featurecache.bodies.registry import body_record, load_body
from featurecache.store.store import FeatureStore

SIDE = 40  # resized to the 32 of the body
IDS = ("s0000", "s0001", "s0002", "s0003")
ALL, NONE = frozenset(IDS), frozenset[str]()
N = len(IDS)
TAP = "conv2:avg"
TURNED = "s0003"  # its EXIF tag says that it lies on its side
PATIENT = "s0000"  # its PNG is not compressed: other pixels, same size
ORIENTATION, ON_ITS_SIDE = 0x0112, 6


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A data set whose files are old enough for their stat to count, and a store made from it."""
    folder = tmp_path_factory.mktemp("extracted")
    manifest = write_images(folder / "data", N, side=SIDE)
    exif = Image.Exif()
    exif[ORIENTATION] = ON_ITS_SIDE
    image(3, SIDE).save(folder / "data" / "image0003.png", exif=exif)
    save_file(load_body("plugin_extract:steady").module.state_dict(), folder / "w.safetensors")
    shutil.copytree(folder / "data", folder / "apart")
    image(77, SIDE).save(folder / "apart" / "image0000.png", compress_level=0)
    settle()
    for data, name in ((manifest, "samples"), (folder / "apart" / "samples.csv", "apart")):
        run(data, folder / "store", **base(folder), name=name)
    return folder


@pytest.fixture
def copy(extracted, tmp_path):
    """A copy of it all in another place, with the times of the originals."""
    return Path(shutil.copytree(extracted, tmp_path / "copy"))


def again(folder: Path, **options):
    manifest = options.pop("manifest", folder / "data" / "samples.csv")
    return run(manifest, folder / options.pop("store", "store"), **{**base(folder), **options})


def base(folder: Path) -> dict:
    """With a tap that leaves the classifier out."""
    return {"weights": folder / "w.safetensors", "replace": True, "tap": TAP}


def differing(before: dict, after: dict) -> set[str]:
    """Samples whose features are others; another batch size alone moves them by less than 1e-6."""

    def same(a: np.ndarray | None, b: np.ndarray) -> bool:
        return a is not None and a.shape == b.shape and a.dtype == b.dtype and np.allclose(a, b, rtol=0, atol=1e-6)

    return {sample for sample in after if not same(before.get(sample), after[sample])}


def check(
    folder: Path, before: dict, options: dict, computed: frozenset[str], differ: frozenset[str], *, fresh: bool = True
) -> None:
    """What is computed after a change, and what is then in the store (`fresh`: compared with an empty one's)."""
    name = options.get("name", "samples")
    summary = again(folder, **options)
    after = features(folder / options.get("store", "store"), name)
    assert counts(summary) == (len(computed), len(after) - len(computed), 0)
    assert differing(before, after) == differ
    assert counts(again(folder, **options)) == (0, len(after), 0), "and it stays so"
    if fresh:
        again(folder, **{**options, "store": "fresh"})
        anew = features(folder / "fresh", name)
        assert anew.keys() == after.keys()
        assert not differing(anew, after), "what an empty store would hold"


class Case(NamedTuple):
    """A change, made in the folder; it gives the options that it takes."""

    name: str
    change: Callable[[Path, pytest.MonkeyPatch], dict | None]
    computed: frozenset[str]
    differ: frozenset[str]
    fresh: bool = True


def case(
    name: str, change: Callable, computed: frozenset[str] = ALL, differ: frozenset[str] | None = None, **more: bool
) -> Case:
    """By default all is computed, and what is computed differs."""
    return Case(name, change, computed, computed if differ is None else differ, **more)


def option(name: str, value: object, **more) -> Case:
    return case(f"{name} {value}", lambda folder, monkeypatch: {name: value}, **more)


# ---- what changes the features is computed again ---------------------------------------------------------------------


def weights(name: str) -> Case:
    """The first number of one tensor."""

    def change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
        return {"weights": reweighed(folder, name)}

    return case(name, change)


def reweighed(folder: Path, name: str) -> Path:
    state = load_file(folder / "w.safetensors")
    state[name].view(-1)[0] += 0.5
    save_file(state, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def program(name: str, edit: Callable[[nn.Module], None]) -> Case:
    """The factory, of the same name and text, gives a network of the same tensors that does something else."""

    def change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
        def steady() -> nn.Module:
            module = original()
            edit(module)
            return module

        original = plugin_extract.steady
        steady.__module__ = original.__module__
        monkeypatch.setattr(plugin_extract, "steady", steady)
        return {}

    return case(name, change)


def one_pixel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = np.array(image(2, SIDE))
    changed[5, 7, 1] ^= 128
    Image.fromarray(changed).save(folder / "data" / "image0002.png")


def one_byte_of_the_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in "ab":
        info = PngInfo()
        info.add_text("comment", text)
        image(1, SIDE).save(folder / "data" / "image0001.png", pnginfo=info)


def set_conv1(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module.conv1, name, value)


MUTATIONS = [
    weights("conv1.weight"),
    weights("conv2.bias"),
    weights("bn1.running_var"),
    weights("bn1.running_mean"),
    case("one pixel", one_pixel, frozenset({"s0002"})),
    case("one byte of the metadata", one_byte_of_the_metadata, frozenset({"s0001"}), NONE),
    option("image_size", 24),
    option("resize", 36),
    option("crop", 28),
    option("resize_mode", "pad", differ=NONE),  # these images are square
    option("interpolation", "bicubic"),
    option("antialias", False),
    option("exif", False, differ=frozenset({TURNED})),
    option("mean", (0.5, 0.5, 0.4)),
    option("std", (0.25, 0.2, 0.25)),
    option("channels", 1),
    option("precision", "bf16"),
    option("store_dtype", "float16"),
    option("tap", "penultimate"),
    option("tap", "conv1:avg"),
    option("tap", "conv2:max"),
    option("tap", ["conv2:avg", "conv1:avg"]),
    program("stride", set_conv1("stride", (1, 1))),
    program("dilation", set_conv1("dilation", (2, 2))),
    program("padding mode", set_conv1("padding_mode", "reflect")),
    program("BN eps", lambda module: setattr(module.bn1, "eps", 1e-2)),
    program("activation", lambda module: setattr(module, "act", nn.GELU())),
]


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case.name)
def test_computed_again(copy, extracted, case, monkeypatch):
    before = features(extracted / "store")
    check(copy, before, case.change(copy, monkeypatch) or {}, case.computed, case.differ)
    monkeypatch.undo()
    assert counts(again(copy)) == (0, N, 0), "what was there before still is"


def test_same_size_and_time_are_seen_through(extracted, tmp_path):
    """Other pixels, then size and mtime put back: the change time gives it away."""
    shutil.copytree(extracted / "store", tmp_path / "store")
    options = {**base(extracted), "name": "apart"}
    manifest, path = extracted / "apart" / "samples.csv", extracted / "apart" / "image0000.png"
    before, stat = features(tmp_path / "store", "apart"), path.stat()
    image(78, SIDE).save(tmp_path / "other.png", compress_level=0)
    with path.open("r+b") as handle:
        handle.write((tmp_path / "other.png").read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert counts(run(manifest, tmp_path / "store", **options)) == (1, N - 1, 0)
    after = features(tmp_path / "store", "apart")
    assert differing(before, after) == {PATIENT}
    run(manifest, tmp_path / "fresh", **options)
    assert not differing(features(tmp_path / "fresh", "apart"), after)


def test_the_source_of_a_plug_in(copy, monkeypatch):
    """Other text, and the same text again, in a module that the body comes from."""
    monkeypatch.syspath_prepend(copy)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(factor: str) -> dict:
        (copy / "plugin_edited.py").write_text(
            "import plugin_extract\nclass Net(plugin_extract.Steady):\n    def forward(self, x):\n"
            f"        return super().forward({factor} * x)\ndef net():\n    return plugin_extract.seeded(Net)\n"
        )
        sys.modules.pop("plugin_edited", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return {"body": "plugin_edited:net"}

    again(copy, **written("1.0"))
    first = features(copy / "store")
    check(copy, first, written("1.5"), ALL, ALL)
    assert counts(again(copy, **written("1.0"))) == (0, N, 0)
    assert not differing(first, features(copy / "store"))
    sys.modules.pop("plugin_edited", None)


def test_one_number_of_a_tuned_body_and_a_moved_run(copy, monkeypatch):
    """A body that comes out of a joint run counts by what it holds, wherever the run lies."""
    body = load_body("plugin_extract:steady", str(copy / "w.safetensors"))

    def written(name: str) -> dict:
        folder = copy / name
        (folder / "bodies").mkdir(parents=True)
        file = folder / "bodies" / "image.safetensors"
        save_file(body.module.state_dict(), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        record = {"bodies": {"image": body_record(body, "bodies/image.safetensors")}}
        record["files"] = {"bodies/image.safetensors": digest}
        (folder / "run.json").write_text(json.dumps(record))
        return {"body": f"run:{folder}", "trust_factory": ["plugin_extract:steady"], "weights": {}}

    before = features(copy / "store")
    check(copy, before, written("run"), NONE, NONE)
    (copy / "run").rename(copy / "moved")
    check(copy, before, {**written("other"), "body": f"run:{copy / 'moved'}"}, NONE, NONE)
    with torch.no_grad():
        body.module.conv2.bias[0] += 1
    check(copy, before, written("tuned"), ALL, ALL)


def test_weights_behind_the_tap_do_not_count(copy):
    assert counts(again(copy, tap="conv1:avg")) == (N, 0, 0)
    assert counts(again(copy, tap="conv1:avg", weights=reweighed(copy, "conv2.weight"))) == (0, N, 0)
    assert counts(again(copy, tap="conv1:avg", weights=reweighed(copy, "conv1.weight"))) == (N, 0, 0)


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


def renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The files lie elsewhere, under other names, and so do manifest, weights and store."""
    data = folder / "data"
    rows = read_rows(data / "samples.csv")
    (data / "sub").mkdir()
    for i, row in enumerate(rows):
        (data / row["image"]).rename(data / "sub" / f"renamed{9 - i}.png")
        row["image"] = f"sub/renamed{9 - i}.png"
    (folder / "w.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "store").rename(folder / "cache")
    moved = write_manifest(data / "other.csv", rows)
    return {"manifest": moved, "weights": folder / "elsewhere.safetensors", "name": "another", "store": "cache"}


def touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder / "data").glob("*.png"):
        os.utime(path)


def rewritten(change: Callable[[list], list]) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """The manifest has its rows changed."""

    def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = folder / "data" / "samples.csv"
        write_manifest(path, change(read_rows(path)))

    return write


def rows_added(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(5, SIDE).save(folder / "data" / "new.png")
    shutil.copy(folder / "data" / "image0001.png", folder / "data" / "twin.png")
    more = [{"sample_id": name, "label": 0, "image": f"{name}.png"} for name in ("new", "twin")]
    rewritten(lambda rows: [*more, *rows])(folder, monkeypatch)


def weights_as_pth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    torch.save(load_file(folder / "w.safetensors"), folder / "w.pth")
    return {"weights": folder / "w.pth"}


def as_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    pl.read_csv(folder / "data" / "samples.csv").write_parquet(folder / "data" / "samples.parquet")
    return {"manifest": folder / "data" / "samples.parquet"}


def swapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, data = "image0000.png", "image0001.png", folder / "data"
    (data / one).rename(data / "aside.png")
    (data / two).rename(data / one)
    (data / "aside.png").rename(data / two)


def same(name: str, change: Callable, *, differ: frozenset[str] = NONE, fresh: bool = False) -> Case:
    return Case(name, change, NONE, differ, fresh)


UNCHANGED = [
    same("everything renamed and moved", renamed),
    same("files touched", touched),
    same("two files swapped", swapped, differ=frozenset({"s0000", "s0001"}), fresh=True),
    same("rows reordered", rewritten(lambda rows: rows[::-1])),
    same("rows removed", rewritten(lambda rows: rows[1:3])),
    same("labels changed", rewritten(lambda rows: [{**row, "label": 7} for row in rows])),
    case("rows added", rows_added, frozenset({"new"}), frozenset({"new", "twin"})),
    same("manifest as Parquet", as_parquet),
    same("weights as .pth", weights_as_pth),
    same("classifier", lambda folder, monkeypatch: {"weights": reweighed(folder, "fc.weight")}, fresh=True),
    *[
        same(f"{name} {value}", lambda folder, monkeypatch, name=name, value=value: {name: value}, fresh=fresh)
        for name, value, fresh in [
            ("batch_size", 1, True),
            ("batch_size", 3, True),
            ("workers", 1, True),
            ("workers", 7, True),
            ("check", "content", False),
            ("name", "other", False),
            ("codec", "zstd", True),
            ("seed", 5, True),
        ]
    ],
]


@pytest.mark.parametrize("case", UNCHANGED, ids=lambda case: case.name)
def test_not_computed_again(copy, extracted, case, monkeypatch):
    before = features(extracted / "store")
    check(copy, before, case.change(copy, monkeypatch) or {}, case.computed, case.differ, fresh=case.fresh)


def test_unchanged_files_are_not_opened(extracted, monkeypatch):
    monkeypatch.setattr(
        "featurecache.stageone.producer.read_payload", lambda cell: pytest.fail(f"opened {cell.location}")
    )
    assert counts(again(extracted)) == (0, N, 0)


@pytest.mark.slow
def test_another_process_with_another_hash_seed(extracted, tmp_path):
    store, weights = extracted / "store", extracted / "w.safetensors"
    done = shared().run(
        tmp_path, "extract", extracted / "data" / "samples.csv", "--store", store, "--view", "image=image",
        "--weights", weights, "--body", "plugin_extract:steady", "--precision", "fp32", "--store-dtype", "float32",
        "--tap", TAP, "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    figures = json_of(done.out)
    assert (figures["computed"], figures["reused"], figures["failed"]) == (0, N, [])


@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True)], ids=["lost", "gained"])
def test_a_cpu_with_and_without_bf16(copy, monkeypatch, then, now):
    """`auto` takes what the store holds: rows made on one machine serve on the other."""
    auto = {"precision": "auto", "engine": "torch", "tap": "conv1:avg"}
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: then)
    assert counts(summary := again(copy, **auto)) == (N, 0, 0)
    assert ("bf16" if then else "fp32") in summary.engines["image"]
    before = features(copy / "store")
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: now)
    assert counts(again(copy, **auto)) == (0, N, 0)
    assert not differing(before, features(copy / "store"))
    assert counts(summary := again(copy, **{**auto, "store": "fresh"})) == (N, 0, 0)
    assert ("bf16" if now else "fp32") in summary.engines["image"], "the two machines do differ"


@pytest.mark.parametrize("first", [True, False], ids=["removed", "installed"])
def test_openvino_installed_or_removed(copy, monkeypatch, first):
    """Hidden from import, which is what a machine without it sees."""
    auto = {"engine": "auto", "tap": "conv1:avg"}
    engines = {True: "openvino fp32", False: "torch fp32"}

    def there(installed: bool) -> None:
        monkeypatch.undo()
        if not installed:
            monkeypatch.setitem(sys.modules, "openvino", None)

    there(first)
    assert counts(summary := again(copy, **auto)) == (N, 0, 0)
    assert summary.engines["image"].startswith(engines[first])
    before = features(copy / "store")
    there(not first)
    assert counts(summary := again(copy, **auto)) == (0, N, 0)
    assert summary.engines["image"] == f"{engines[first]} (the store holds {N} rows made so)"
    assert not differing(before, features(copy / "store"))
    assert again(copy, **{**auto, "store": "fresh"}).engines["image"].startswith(engines[not first])


# ---- more on one store -----------------------------------------------------------------------------------------------


def test_a_tap_added_later_and_fewer_taps(copy):
    """The new tap takes a pass over the images, into a group of its own; nothing that was there is lost or redone."""
    before = features(copy / "store")
    assert counts(again(copy, tap=[TAP, "conv1:avg"])) == (N, 0, 0)
    assert not differing(before, features(copy / "store", tap="conv2@avg"))
    # The earlier tap alone is in both groups now; the group of its own still serves, and each of the new one's taps.
    for tap in (TAP, "conv1:avg"):
        assert counts(again(copy, tap=tap)) == (0, N, 0)
    assert again(copy, tap=TAP).recipes["image"] == recipe_ids(copy / "store")[0]
    assert again(copy, tap="conv1:avg").recipes["image"] == recipe_ids(copy / "store")[1]


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
