import csv

import numpy as np
import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import JointConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import Failure
from featurecache.joint.pairing import PairImages, paired
from featurecache.joint.predict import predict_joint
from featurecache.joint.start import prepare
from featurecache.progress import Silent
from featurecache.run import load_run

TRUST = ("plugin_joint:tiny",)
OPTIONS = {
    "views": {"image": "a"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32", "device": "cpu",
    "workers": 1, "batch_size": 16, "lr": 5e-3, "body_lr": 1e-3, "freeze_epochs": 1, "epochs": 5, "augment": (),
    "settings": {"hidden": [16], "dropout": 0.1}, "bootstrap": 0, "pairs": True,
}  # fmt: skip


def config(manifest, **changes):
    return JointConfig.create({**OPTIONS, "manifest": manifest, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 samples of two classes, one of them broken, and as many listed in pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_samples(folder, 60, seed=3)
    (folder / "images" / "007-a0.png").write_bytes(b"not an image")
    with (folder / "pairs.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["sample_id", "left", "right", "same"])
        for i in range(0, 60, 4):
            for first, second in ((i, i + 2), (i + 1, i + 2)):
                same = "same" if first % 2 == second % 2 else "different"
                if (7 not in (first, second) and (first, second) != (i, i + 2)) or i % 8:
                    writer.writerow([f"{first}-{second}", *(f"images/{k:03d}-a0.png" for k in (first, second)), same])
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    start = paired(prepare(config(folder / "samples.csv")))
    images = PairImages(start, {})
    samples = images.choose(start, workers=1, reporter=Silent())
    return start, images, samples, images.pair(samples)


@pytest.fixture(scope="module")
def run(folder):
    torch.set_num_threads(1)
    return finetune_joint(config(folder / "samples.csv", out=folder / "run"))


def test_each_image_comes_with_one_of_its_class_and_one_of_another(pairs):
    start, images, samples, ids = pairs
    classes, partners = np.arange(60) % 2, images.partners(None)
    side = dict(zip(samples.rows.tolist(), samples.splits.tolist(), strict=True))
    assert len(samples.rows) == 2 * 59
    for row in samples.rows.tolist():
        first, second = row // 2, int(partners[row // 2, row % 2])
        assert first != second
        assert (classes[first] == classes[second]) == (row % 2 == 0) == bool(start.target.values[row])
        assert side[2 * second] == side[row]
        assert ids[row] == f"s{first:03d}+s{second:03d}"
    assert [(failure.sample // 2, failure.view) for failure in samples.failed] == [(7, "image")]
    assert 7 not in partners[np.arange(60) != 7]


def test_partners_are_drawn_anew_in_each_epoch_and_fixed_otherwise(pairs):
    _, images, samples, _ = pairs
    fixed = images.partners(None).copy()
    first, second = images.partners(1).copy(), images.partners(2).copy()
    used = np.unique(samples.of("train") // 2)
    assert (first[used] != second[used]).mean() > 0.8
    assert np.array_equal(images.partners(1), first)
    assert np.array_equal(images.partners(None), fixed)
    loaded = images.load(int(samples.rows[0]))
    assert torch.equal(loaded.images["first"][0], images.singles.load(0).images["image"][0])
    assert torch.equal(loaded.images["second"][0], images.singles.load(int(fixed[0, 0])).images["image"][0])
    broken = images.load(2 * 7)
    assert isinstance(broken, Failure)
    assert (broken.sample, broken.view) == (14, "first")


def test_it_learns_whether_two_images_are_of_one_class(run, folder):
    assert run.history["valid_loss"][-1] < 0.9 * run.history["valid_loss"][0]
    assert (run.views, run.classes, run.targets) == (("first", "second"), ("different", "same"), ("same",))
    assert run.metrics["test"]["accuracy"] > 0.6
    assert run.bodies["first"]["file"] == run.bodies["second"]["file"] == "bodies/first.safetensors"
    assert run.record["fusion"] == "difference-product"
    assert load_run(run.path).record["config"]["view_dropout"] == 0


def test_the_run_predicts_pairs_that_a_manifest_lists(run, folder):
    manifest = read_manifest(
        config(folder / "pairs.csv", views={"first": "left", "second": "right"}, target=("same",), pairs=False)
    )
    found = predict_joint(run, manifest, device="cpu", trust=TRUST)
    right = (found.scores[:, 1] > 0.5) == (manifest.table["same"].to_numpy() == "same")
    assert found.present.all()
    assert len(right) == manifest.table.height
    turned = read_manifest(config(folder / "pairs.csv", views={"first": "right", "second": "left"}))
    np.testing.assert_allclose(predict_joint(run, turned, device="cpu", trust=TRUST).scores, found.scores, atol=1e-6)


def test_pairs_of_a_manifest_train_through_one_body(folder):
    run = finetune_joint(
        config(
            folder / "pairs.csv", out=folder / "listed", pairs=False, views={"left": "left", "right": "right"},
            target=("same",), share_bodies="all", fusion="difference-product", epochs=1,
        )
    )  # fmt: skip
    assert run.bodies["left"]["file"] == run.bodies["right"]["file"]
    assert run.record["config"]["view_dropout"] == 0  # half a pair says nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": {"a": "a", "b": "b"}}, "--pairs draws pairs of the images of one view, found a, b"),
        ({"target": ("size",), "task": "regression"}, "--pairs needs a target with classes, size is regression"),
        ({"train_from": "features.3", "store": "store"}, "leave out --init and --train-from"),
    ],
)
def test_what_can_not_be_paired(folder, changes, message):
    with pytest.raises(InputError, match=message):
        paired(prepare(config(folder / "samples.csv", **changes)))
