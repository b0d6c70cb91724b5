"""Stage one against the live forward, and what it does when something fails."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from extract_kit import (
    config,
    counts,
    features,
    image,
    plain_rows,
    read_rows,
    recipe_ids,
    run,
    states,
    write_images,
    write_manifest,
)
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from featurecache.data.shipped import shipped_path
from featurecache.errors import FeatureCacheError, InputError, StoreError
from featurecache.extract import extract
from featurecache.stageone import extraction
from featurecache.stageone.extraction import Extraction
from featurecache.store.store import FeatureStore

PENULTIMATE = "penultimate@none"


# ---- features equal the live forward ---------------------------------------------------------------------------------


def randomised(module: nn.Module) -> nn.Module:
    """Weights of the seed, and BatchNorm statistics as of a body that has seen data."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.uniform_(-0.2, 0.2)
            child.running_var.uniform_(0.8, 1.6)
            child.weight.data.uniform_(0.5, 1.0)
            child.bias.data.uniform_(-0.2, 0.2)
    return module.eval()


def live(name: str, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if name.startswith("timm/"):
        return module.forward_head(module.forward_features(x), pre_logits=True)
    node = {"torchvision/squeezenet1_1": "features"}.get(name, "flatten")
    found = create_feature_extractor(module, [node])(x)[node]
    return found.mean((2, 3)) if found.ndim == 4 else found


@pytest.mark.parametrize(
    ("name", "width", "side"),
    [
        ("torchvision/squeezenet1_1", 512, 64),
        ("torchvision/resnet18", 512, 64),
        ("timm/test_resnet", None, 64),
        pytest.param("torchvision/densenet121", 1024, 96, marks=pytest.mark.slow),
        pytest.param("timm/resnet26d", 2048, 96, marks=pytest.mark.slow),
        pytest.param("timm/mobilenetv3_small_100", 1024, 96, marks=pytest.mark.slow),
    ],
)
def test_fp32_equals_the_live_forward(tmp_path, name, width, side):
    torch.manual_seed(1)
    library, _, model = name.partition("/")
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    module = randomised(make(model))
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    manifest = write_images(tmp_path / "data", 6, side=side)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    summary = run(
        manifest, tmp_path / "store", body=name, weights=tmp_path / "w.safetensors", image_size=side, engine="torch",
        mean=tuple(mean.tolist()), std=tuple(std.tolist()), batch_size=4,
    )  # fmt: skip
    assert counts(summary) == (6, 0, 0)
    pixels = np.stack([np.asarray(image(i, side)) for i in range(6)])  # no resize: no other decoder or resampler
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = live(name, module, x).numpy()
    found = np.stack(list(features(tmp_path / "store").values()))
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (6, width or expected.shape[1])
    assert np.std(expected) > 1e-3
    assert np.abs(found - expected).max() < 1e-5
    tap = "penultimate@avg" if "squeezenet" in name else PENULTIMATE
    stored = plain_rows(tmp_path / "store", summary.recipes["image"], tap)
    assert sorted(map(bytes, stored.values())) == sorted(map(bytes, found))


def emoji(tmp_path: Path, n: int, **options) -> tuple[np.ndarray, list[str]]:
    """Penultimate features of pretrained SqueezeNet, and the categories, of every k-th emoji."""
    rows = read_rows(shipped_path("emoji/manifest.csv"))
    rows = rows[:: len(rows) // n][:n]
    manifest = write_manifest(tmp_path / "emoji.csv", rows)
    summary = run(
        manifest, tmp_path / "store", views={"google": "google"}, body="torchvision/squeezenet1_1", weights="shipped",
        root=shipped_path("emoji"), **options,
    )  # fmt: skip
    assert summary.failed == 0
    return np.stack(list(features(tmp_path / "store", "emoji", "google").values())), [row["category"] for row in rows]


def centred_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(axis=0)))


def test_bf16_is_near_fp32(tmp_path):
    exact, _ = emoji(tmp_path, 64, image_size=64)
    near, _ = emoji(tmp_path, 64, image_size=64, precision="bf16")
    assert 0 < centred_error(near, exact) <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bf16_predicts_as_fp32(tmp_path):
    exact, labels = emoji(tmp_path, 625, image_size=96)
    near, _ = emoji(tmp_path, 625, image_size=96, precision="bf16", store_dtype="float16")
    near = near.astype(np.float32)
    assert 0 < centred_error(near, exact) <= 0.02
    mean, std = exact.mean(axis=0), exact.std(axis=0) + 1e-6
    head = LogisticRegression(max_iter=2000, C=0.1).fit((exact - mean) / std, labels)
    same = head.predict((exact - mean) / std) == head.predict((near - mean) / std)
    assert same.mean() >= 0.995


def test_several_taps_in_one_pass_equal_each_alone(tmp_path):
    manifest = write_images(tmp_path / "data", 3)
    taps = ["penultimate", "bn1:none", "conv2:max"]
    summary = run(manifest, tmp_path / "all", tap=taps)
    for tap in taps:
        name = tap.replace(":", "@") if ":" in tap else PENULTIMATE
        alone = run(manifest, tmp_path / tap.replace(":", "-"), tap=tap)
        one = plain_rows(tmp_path / tap.replace(":", "-"), alone.recipes["image"], name)
        both = plain_rows(tmp_path / "all", summary.recipes["image"], name)
        assert one.keys() == both.keys()
        assert all(np.allclose(one[key], both[key], atol=1e-6) for key in one)
    before = plain_rows(tmp_path / "all", summary.recipes["image"], "bn1@none")
    assert min(value.min() for value in before.values()) < 0, "the in-place ReLU behind it did not reach it"


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 6)


def decodes(monkeypatch) -> list[str]:
    """The kinds of what is decoded from now on."""
    from featurecache.stageone import producer

    seen: list[str] = []
    real = producer.decode
    monkeypatch.setattr(producer, "decode", lambda *args: (seen.append("decoded"), real(*args))[1])
    return seen


def test_an_undecodable_image_is_listed_and_remembered(data, tmp_path, monkeypatch):
    bad, store = data.parent / "image0002.png", tmp_path / "store"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    shutil.copy(bad, data.parent / "image0004.png")  # equal content: decoded once, failed twice
    summary = run(data, store)
    assert counts(summary) == (4, 0, 2)
    assert [(entry["sample_id"], entry["view"], entry["path"]) for entry in summary.failures] == [
        ("s0002", "image", "image0002.png"),
        ("s0004", "image", "image0004.png"),
    ]
    with (store / "failures.csv").open(newline="", encoding="utf-8") as handle:
        assert list(csv.DictReader(handle)) == summary.failures
    assert states(store) == {f"s{i:04d}": "failed" if i in (2, 4) else "done" for i in range(6)}

    seen = decodes(monkeypatch)
    assert counts(run(data, store)) == (0, 4, 2)
    assert counts(run(data, store, check="content")) == (0, 4, 2)
    assert run(data, store).failures == summary.failures
    assert seen == []
    assert counts(run(data, store, retry_failed=True)) == (0, 4, 2)
    assert len(seen) == 1
    image(77).save(bad)
    assert counts(run(data, store)) == (1, 4, 1)
    image(78).save(data.parent / "image0004.png")
    assert counts(run(data, store)) == (1, 5, 0)
    assert not (store / "failures.csv").exists()


def test_what_can_not_be_read_is_tried_again(data, tmp_path, monkeypatch):
    """I/O errors are not remembered; permission can't be taken from root, so the error is made."""
    from featurecache.stageone import keys

    def refuse(path, *args, **kwargs):
        if str(path).endswith("image0001.png"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    monkeypatch.setattr(keys, "open", refuse, raising=False)
    summary = run(data, tmp_path / "store")
    assert counts(summary) == (5, 0, 1)
    assert summary.failures[0]["error"] == "Permission denied"
    assert states(tmp_path / "store")["s0001"] == "pending", "what may yet be read must not pass for a missing view"
    monkeypatch.undo()
    assert counts(run(data, tmp_path / "store")) == (1, 5, 0)


def test_what_a_reading_thread_raises_is_that_cells_failure(data, tmp_path, monkeypatch):
    from featurecache.data.preprocessing import Preprocessing

    real = Preprocessing.apply

    def apply(self, decoded):
        if int(decoded.array.astype(int).sum()) == int(np.asarray(image(3)).astype(int).sum()):
            raise ZeroDivisionError
        return real(self, decoded)

    monkeypatch.setattr(Preprocessing, "apply", apply)
    shutil.copy(data.parent / "image0003.png", data.parent / "image0005.png")
    summary = run(data, tmp_path / "store")
    assert counts(summary) == (4, 0, 2), "equal content fails alike"
    assert summary.failures[0]["error"] == "can't be preprocessed: ZeroDivisionError"
    assert len(recipe_ids(tmp_path / "store")) == 1
    monkeypatch.undo()
    assert counts(run(data, tmp_path / "store")) == (1, 5, 0), "not remembered: it may be a defect of ours"


def test_on_error_stop(data, tmp_path):
    (data.parent / "image0003.png").write_bytes(b"no image")
    message = r"^image0003\.png: .* \(stopped, as --on-error stop asks\)$"
    with pytest.raises(FeatureCacheError, match=message):
        run(data, tmp_path / "store", on_error="stop", batch_size=1)
    found = list(states(tmp_path / "store").values())
    assert found.count("failed") == 1
    assert found.count("done") >= 1
    with pytest.raises(FeatureCacheError, match=message):  # remembered, and still a reason to stop
        run(data, tmp_path / "store", on_error="stop")
    assert counts(run(data, tmp_path / "store"))[2] == 1


def test_features_that_are_not_finite_are_refused(data, tmp_path):
    white = Image.new("RGB", (32, 32), "white")
    white.save(data.parent / "image0001.png")
    white.save(data.parent / "image0005.png", compress_level=1)  # other bytes, the same pixels
    options = {"body": "plugin_extract:no_white"}
    summary = run(data, tmp_path / "store", **options)
    assert counts(summary) == (4, 0, 2)
    assert {entry["error"] for entry in summary.failures} == {"penultimate@none: features are not finite in float32"}
    assert counts(run(data, tmp_path / "store", **options)) == (0, 4, 2)
    for value in plain_rows(tmp_path / "store", summary.recipes["image"], PENULTIMATE).values():
        assert np.isfinite(value).all()
    with pytest.raises(FeatureCacheError, match=r"not finite in float32 \(stopped"):
        run(data, tmp_path / "other", on_error="stop", **options)


def test_every_image_of_a_view_failing_and_a_view_without_images(data, tmp_path):
    rows = read_rows(data)
    for row in rows:
        (data.parent / f"broken-{row['image']}").write_bytes(b"GIF89a" + row["image"].encode())
        row |= {"broken": f"broken-{row['image']}", "none": ""}
    write_manifest(data, rows)
    views = {"image": "image", "broken": "broken", "none": "none"}
    summary = run(data, tmp_path / "store", views=views)
    assert counts(summary) == (6, 0, 6)
    store = tmp_path / "store"
    assert set(states(store, view="broken").values()) == {"failed"}
    assert set(states(store, view="none").values()) == {"absent"}
    assert counts(run(data, store, views=views)) == (0, 6, 6)
    alone = run(data, tmp_path / "alone", views={"none": "none"})
    assert counts(alone) == (0, 0, 0)
    assert set(states(tmp_path / "alone", view="none").values()) == {"absent"}


def test_an_image_with_other_channels_than_the_body(data, tmp_path):
    rows = read_rows(data)[:2]
    for row, channels in zip(rows, (3, 2), strict=True):
        np.save(data.parent / f"{channels}.npy", np.zeros((32, 32, channels), np.uint8))
        row["image"] = f"{channels}.npy"
    write_manifest(data, rows)
    summary = run(data, tmp_path / "store", reader="array")
    assert counts(summary) == (1, 0, 1)
    assert "channels" in summary.failures[0]["error"]
    assert counts(run(data, tmp_path / "store", reader="array")) == (0, 1, 1)


def test_a_body_that_breaks_is_told_in_words(data, tmp_path):
    with pytest.raises(FeatureCacheError) as caught:
        run(data, tmp_path / "store", body="plugin_extract:breaks", batch_size=3)
    assert str(caught.value) == (
        "image: plugin_extract:breaks failed on a batch of 3 images: RuntimeError: three is a crowd"
    )
    assert counts(run(data, tmp_path / "store", body="plugin_extract:breaks", batch_size=2)) == (6, 0, 0)


def test_out_of_memory_names_the_batch_size(data, tmp_path, monkeypatch):
    from featurecache.bodies.engines.torch import TorchEngine

    real = TorchEngine.submit

    def submit(self, batch):
        if len(batch) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, batch)

    monkeypatch.setattr(TorchEngine, "submit", submit)
    with pytest.raises(FeatureCacheError, match=r"out of memory.* Give a --batch-size below 5\.$"):
        run(data, tmp_path / "store", batch_size=5)


# ---- space, speed, numbers -------------------------------------------------------------------------------------------


def free(monkeypatch, size: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))


def test_a_full_disk_is_refused_before_it_is_full(data, tmp_path, monkeypatch):
    needed = 4096 * (12 + 32) + 2 * 4  # six images of three float32 are a chunk, as are their keys
    free(monkeypatch, needed - 1)
    with pytest.raises(StoreError, match=r"6 images at 12 bytes need 0\.00 GB in whole chunks, but .* GB are free wh"):
        run(data, tmp_path / "store")
    assert recipe_ids(tmp_path / "store") == []
    free(monkeypatch, needed)
    run(data, tmp_path / "store")
    free(monkeypatch, 0)  # nothing is new, though everything is read
    assert counts(run(data, tmp_path / "store", check="content")) == (0, 6, 0)


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    def begin(self, task, total, unit="images", *, done=0):
        self.totals[task], self.done[task] = total, 0

    def advance(self, task, n=1, *, status=""):
        self.done[task] += n

    def end(self, task):
        pass

    def note(self, message):
        self.notes.append(message)


def test_progress_counts_what_is_to_do(data, tmp_path):
    reporter = Notes()
    extract(config(data, tmp_path / "store"), reporter)
    assert reporter.totals == reporter.done == {"image": 6}
    assert reporter.notes == ["image: 6 images to do, at most 72 B of features"]
    reporter = Notes()  # not recognised by their stat, so young they are; no row will be new
    assert extract(config(data, tmp_path / "store"), reporter).bytes_written == 0
    assert reporter.notes == ["image: 6 images to do, at most 72 B of features"]


def test_rows_that_fill_up_a_chunk_count_as_written(data, tmp_path):
    """The chunk was there, at its full size, when the run before ended."""
    rows = read_rows(data)
    first = run(write_manifest(data, rows[:2]), tmp_path / "store")
    second = run(write_manifest(data, rows), tmp_path / "store")
    assert (first.bytes_written, second.bytes_written) == (24, 48)


def test_a_tap_that_is_dearer_to_read_than_to_compute(data, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "READ_RATE", 1e3)
    reporter = Notes()
    extract(config(data, tmp_path / "store", tap="bn1", batch_size=1), reporter)
    assert any("takes longer than computing it" in note and "Pool the taps" in note for note in reporter.notes)


@pytest.mark.parametrize("name", ["batch_size", "workers", "rows_per_chunk"])
def test_counts_that_can_not_be(data, tmp_path, name):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} 0: at least 1 is needed"):
        run(data, tmp_path / "store", **{name: 0})
    assert not (tmp_path / "store").exists()


def test_another_manifest_needs_replace(data, tmp_path):
    run(data, tmp_path / "store")
    other = tmp_path / "elsewhere" / "samples.csv"
    shutil.copytree(data.parent, other.parent)
    write_manifest(other, read_rows(other)[:5])
    with pytest.raises(InputError, match=r"dataset 'samples' in this store was made from .*--replace"):
        run(other, tmp_path / "store")
    assert counts(run(other, tmp_path / "store", replace=True)) == (0, 5, 0)


def test_a_dataset_that_takes_other_features_says_so(data, tmp_path):
    first = run(data, tmp_path / "store").recipes["image"]
    reporter = Notes()
    found = extract(config(data, tmp_path / "store", body="plugin_extract:strided"), reporter).recipes["image"]
    assert reporter.notes[-1] == (
        f"dataset samples: view image now takes recipe {found} (before: {first}, whose rows stay; "
        f"fit-head --recipe image={first} takes them)"
    )
    reporter = Notes()
    extract(config(data, tmp_path / "store", body="plugin_extract:strided"), reporter)
    assert not any("recipe" in note for note in reporter.notes), "said once"


@pytest.mark.parametrize(("gone", "why"), [(True, "which is gone"), (False, "a file of the same content")])
def test_a_manifest_that_was_moved_is_followed(data, tmp_path, gone, why):
    """A folder that is renamed, and one that is copied; in the first the table may have grown since."""
    first, other = tmp_path / "first" / data.name, tmp_path / "elsewhere" / data.name
    shutil.copytree(data.parent, first.parent)
    run(first, tmp_path / "store")
    shutil.copytree(first.parent, other.parent)
    if gone:
        shutil.rmtree(first.parent)
        write_manifest(other, read_rows(other)[:5])
    reporter = Notes()
    summary = extract(config(other, tmp_path / "store"), reporter)
    assert (summary.computed, summary.failed) == (0, 0)
    assert f"dataset 'samples' was made from {first}, {why}; {other} takes its place" in reporter.notes
    assert FeatureStore(tmp_path / "store").binding("samples").manifest_path == str(other)


def test_keyboard_interrupt_keeps_what_is_complete(data, tmp_path, monkeypatch):
    real = Extraction.collect
    batches = []

    def collect(self, batch, handle):
        batches.append(len(batch))
        if len(batches) == 3:
            raise KeyboardInterrupt
        real(self, batch, handle)

    monkeypatch.setattr(Extraction, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "store", batch_size=1)
    found = list(states(tmp_path / "store").values())
    assert (found.count("done"), found.count("pending")) == (2, 4)
    monkeypatch.undo()
    assert counts(run(data, tmp_path / "store")) == (4, 2, 0)


def test_root_and_manifest_are_kept_absolute(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent.parent)
    run(Path("data") / data.name, tmp_path / "store", root="data")
    recorded = FeatureStore(tmp_path / "store").binding("samples").config["manifest"]
    assert recorded["manifest"] == os.path.realpath(data)
    assert recorded["root"] == os.path.realpath(data.parent)
