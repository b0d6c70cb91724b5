from pathlib import Path

import numpy as np
import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import JointConfig
from featurecache.data.manifest import read_manifest
from featurecache.data.transforms import Augmentation
from featurecache.joint.images import Failure, SampleImages, plan_batches, shuffled
from featurecache.joint.start import set_up


def setups_of(config, manifest):
    return set_up(config, manifest.views, taps={}, seed=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_samples(tmp_path_factory.mktemp("images"), 12, missing=0.5, seed=3)
    return JointConfig(manifest=path, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")


@pytest.fixture(scope="module")
def manifest(config):
    return read_manifest(config)


@pytest.fixture(scope="module")
def setups(config, manifest):
    return setups_of(config, manifest)


def test_plain_images_are_those_of_the_preprocessing_and_missing_views_are_told(manifest, setups):
    images = SampleImages(manifest, setups, augmentation=Augmentation(), view_dropout=0.5)
    has_b = manifest.table["b"].is_not_null().to_numpy()
    assert 0 < has_b.sum() < 12
    assert images.present.tolist() == [[True, bool(held)] for held in has_b]
    batch = next(images.batches([np.arange(12)], workers=2))
    assert batch.present.numpy().tolist() == images.present.tolist()
    assert batch.images["a"].shape == (12, 3, 32, 32)
    assert batch.images["a"].dtype == torch.uint8
    assert batch.owner["b"].tolist() == np.flatnonzero(has_b).tolist()
    assert batch.failures == ()


def test_all_views_of_a_sample_get_the_same_geometric_draw(tmp_path):
    folder = tmp_path / "same"
    path = write_samples(folder, 6)
    table = path.read_text().replace("-b0.png", "-a0.png")  # both views show the same picture
    path.write_text(table)
    config = JointConfig(manifest=path, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")
    manifest = read_manifest(config)
    augmentation = Augmentation(("crop", "flip", "vflip", "rotate"))
    images = SampleImages(manifest, setups_of(config, manifest), seed=5, augmentation=augmentation)
    plain, first = images.load(0), images.load(0, epoch=1)
    assert torch.equal(first.images["a"][0], first.images["b"][0])
    assert not torch.equal(first.images["a"][0], plain.images["a"][0])
    assert torch.equal(first.images["a"][0], images.load(0, epoch=1).images["a"][0])
    assert not torch.equal(first.images["a"][0], images.load(0, epoch=2).images["a"][0])
    coloured = SampleImages(manifest, setups_of(config, manifest), seed=5, augmentation=Augmentation(("colour",)))
    changed = coloured.load(0, epoch=1)
    assert not torch.equal(changed.images["a"][0], changed.images["b"][0])  # photometric draws are each view's own


def test_view_dropout_hides_views_by_seed_epoch_and_sample_but_never_all(manifest, setups):
    images = SampleImages(manifest, setups, seed=1, view_dropout=0.6)
    shown = np.array([[images.shown(i, epoch).tolist() for i in range(12)] for epoch in range(40)])
    assert shown.any(axis=2).all()
    assert not (shown & ~images.present).any()
    both = images.present.all(axis=1)
    assert 0.4 < shown[:, both].all(axis=2).mean() + 0.3 < 0.7
    again = SampleImages(manifest, setups, seed=1, view_dropout=0.6)
    assert shown[7].tolist() == [again.shown(i, 7).tolist() for i in range(12)]
    assert all(images.shown(i, None).tolist() == images.present[i].tolist() for i in range(12))


def test_a_damaged_or_missing_file_is_a_failure_and_the_batch_goes_on_without_the_sample(tmp_path):
    path = write_samples(tmp_path, 5)
    config = JointConfig(manifest=path, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")
    manifest = read_manifest(config)
    images = SampleImages(manifest, setups_of(config, manifest))
    damaged = tmp_path / "images" / "001-b0.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (tmp_path / "images" / "003-a0.png").unlink()
    batch = next(images.batches([np.arange(5)], workers=2))
    assert batch.samples.tolist() == [0, 2, 4]
    assert [(f.sample, f.view, Path(f.path).name) for f in batch.failures] == [
        (1, "b", "001-b0.png"),
        (3, "a", "003-a0.png"),
    ]
    assert all(f.error for f in batch.failures)
    empty = images.collate([Failure(1, "b", "x.png", "broken")])
    assert len(empty.samples) == 0
    assert empty.present.shape == (0, 2)


def test_several_images_of_a_view_know_their_sample(tmp_path):
    write_samples(tmp_path, 4, extra=1)
    config = JointConfig(
        manifest=tmp_path / "long.csv", layout="long", view_column="view", path_column="path", multi="mean",
        views={"a": "a", "b": "b"}, body="plugin_joint:tiny",
    )  # fmt: skip
    manifest = read_manifest(config)
    batch = SampleImages(manifest, setups_of(config, manifest)).collate(
        [SampleImages(manifest, setups_of(config, manifest)).load(i) for i in range(4)]
    )
    assert batch.owner["a"].tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.owner["b"].tolist() == [0, 1, 2, 3]
    first = read_manifest(config.model_copy(update={"multi": "first"}))
    assert [len(SampleImages(first, setups_of(config, first)).load(i).images["a"]) for i in range(4)] == [1] * 4


def test_16_bit_and_8_bit_files_share_a_batch(tmp_path):
    from PIL import Image

    path = write_samples(tmp_path, 2)
    grey = Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16))
    grey.save(tmp_path / "images" / "001-a0.png")
    config = JointConfig(manifest=path, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")
    manifest = read_manifest(config)
    images = SampleImages(manifest, setups_of(config, manifest))
    batch = images.collate([images.load(0), images.load(1)])
    assert batch.images["a"].dtype == torch.float32
    assert float(batch.images["a"][1].max()) == pytest.approx(40_000 / 65_535, abs=1e-4)
    assert float(batch.images["a"][0].max()) <= 1


def test_order_depends_on_seed_and_epoch_alone_and_no_batch_holds_one():
    samples = np.arange(100, 133)
    assert shuffled(samples, 3, 5).tolist() == shuffled(samples, 3, 5).tolist()
    assert shuffled(samples, 3, 5).tolist() != shuffled(samples, 3, 6).tolist()
    assert sorted(shuffled(samples, 3, 5)) == samples.tolist()
    assert [len(part) for part in plan_batches(samples, 16)] == [16, 17]
    assert [len(part) for part in plan_batches(samples, 10)] == [10, 10, 10, 3]


def test_views_may_be_augmented_differently_but_share_the_geometric_draw(tmp_path):
    path = write_samples(tmp_path, 4)
    path.write_text(path.read_text().replace("-b0.png", "-a0.png"))  # both views show the same picture
    config = JointConfig(manifest=path, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")
    manifest = read_manifest(config)
    setups = setups_of(config, manifest)
    both = {"a": Augmentation(("flip",)), "b": Augmentation(("flip", "vflip"))}
    images = SampleImages(manifest, setups, seed=5, augmentation=both)
    only = SampleImages(manifest, setups, seed=5, augmentation={"a": Augmentation(("flip",))})
    seen = set()
    for epoch in range(12):
        found, plain = images.load(0, epoch), images.load(0)
        a, b = found.images["a"][0], found.images["b"][0]
        draw = both["a"].draw(5, epoch, 0)
        assert torch.equal(a, plain.images["a"][0].flip(-1) if draw.flip else plain.images["a"][0])
        assert torch.equal(b, a.flip(-2) if draw.vflip else a)
        assert torch.equal(only.load(0, epoch).images["b"][0], plain.images["b"][0])
        seen.add((draw.flip, draw.vflip))
    assert len(seen) == 4


def test_alike_draws_do_not_depend_on_the_place_in_the_manifest(tmp_path):
    path = write_samples(tmp_path, 3)
    lines = path.read_text().splitlines()
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    options = {"seed": 2, "augmentation": Augmentation(("crop", "flip", "colour")), "alike": True}
    found = []
    for manifest in (path, turned):
        config = JointConfig(manifest=manifest, views={"a": "a", "b": "b"}, body="plugin_joint:tiny")
        read = read_manifest(config)
        found.append(SampleImages(read, setups_of(config, read), **options))
    assert torch.equal(found[0].load(0, 1).images["a"][0], found[1].load(2, 1).images["a"][0])
    assert not torch.equal(found[0].load(0, 1).images["a"][0], found[0].load(0, 2).images["a"][0])
