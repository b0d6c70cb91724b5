import numpy as np
import pytest
import torch
from plugin_joint import write_samples

from featurecache.cli.jointoptions import network_options
from featurecache.config import JointConfig
from featurecache.errors import InputError
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.predict import predict_joint
from featurecache.joint.sources import open_images
from featurecache.joint.start import prepare
from featurecache.progress import Silent

OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32",
    "device": "cpu", "workers": 1, "batch_size": 8, "settings": {"hidden": [4]}, "bootstrap": 0, "images": "none",
    "epochs": 0, "freeze_epochs": 1,
}  # fmt: skip


def config(manifest, **changes):
    return JointConfig.create({**OPTIONS, "manifest": manifest, **changes})


class Alone:
    rank = 0

    def wait(self):
        """Nothing: there is one process."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """24 samples; column `change` is empty for even ones, `none` for s001, `vflip` for s003, `flip+colour:0.3` else."""
    path = write_samples(tmp_path_factory.mktemp("own"), 24)
    header, *rows = path.read_text().splitlines()
    said = {1: "none", 3: " vflip "}
    rows = [f"{row},{said.get(i, 'flip+colour:0.3') if i % 2 else ''}" for i, row in enumerate(rows)]
    path.write_text("\n".join([f"{header},change", *rows]) + "\n")
    return path


def images_of(manifest, **changes):
    return open_images(prepare(config(manifest, **changes)), Alone(), Silent())


def changed(images, sample, view="a"):
    """Whether an image is another one in any of some epochs, and in which ways."""
    plain = images.load(sample).images[view][0]
    found = [images.load(sample, epoch).images[view][0] for epoch in range(1, 9)]
    return {("same" if torch.equal(x, plain) else "vflip" if torch.equal(x, plain.flip(-2)) else "else") for x in found}


def test_a_column_names_the_augmentation_of_a_sample_or_exempts_it(manifest):
    images = images_of(manifest, augment=("crop",), augment_column="change")
    assert changed(images, 0) == {"else"}
    assert changed(images, 1) == changed(images, 1, "b") == {"same"}
    assert changed(images, 3) == {"same", "vflip"}
    assert changed(images, 5) == {"else"}
    usual = images_of(manifest, augment=("crop",))
    assert torch.equal(usual.load(0, 3).images["b"][0], images.load(0, 3).images["b"][0])


def test_it_may_be_for_one_view_and_stand_without_any_usual_one(manifest):
    images = images_of(manifest, augment=(), augment_column={"b": "change"})
    assert changed(images, 3, "a") == changed(images, 2, "b") == {"same"}
    assert changed(images, 3, "b") == {"same", "vflip"}


def test_bad_cells_are_all_told_with_row_and_column(manifest, tmp_path):
    text = manifest.read_text().replace("flip+colour:0.3", "flop").replace(" vflip ", "mixup")
    path = manifest.with_name("bad.csv")
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        images_of(path, augment_column="change")
    said = str(caught.value)
    assert "bad.csv, line 5, column 'change': 'mixup' mixes two samples, so it is for all of them" in said
    assert "bad.csv, line 7, column 'change': unknown augmentation 'flop'. Did you mean 'flip'? Known: crop," in said
    assert len(caught.value.problems) == 11
    for columns, message in (
        ("chang", "no column 'chang'. Did you mean 'change'"),
        ({"c": "change"}, "--augment-column c=...: no view 'c'"),
    ):
        with pytest.raises(InputError, match=message):
            images_of(manifest, augment_column=columns)
    with pytest.raises(InputError, match="--replicas: all samples have as many of them"):
        images_of(manifest, augment_column="change", train_from="features.3", store=tmp_path / "s", replicas=1)


def test_a_training_uses_it_and_so_does_test_time_augmentation(manifest, tmp_path):
    torch.set_num_threads(1)
    options = {"augment": (), "view_dropout": 0.0, "augment_column": "change"}
    run = finetune_joint(config(manifest, out=tmp_path / "run", **options))
    plain = finetune_joint(config(manifest, out=tmp_path / "plain", **{**options, "augment_column": {}}))
    assert run.history["train_loss"][0] != plain.history["train_loss"][0]
    assert run.config["augment_column"] == {"*": "change"}
    there = prepare(config(manifest)).manifest
    found = [predict_joint(run, there, device="cpu", trust=("plugin_joint:tiny",), tta=tta).scores for tta in (0, 4)]
    same = np.isclose(*found, atol=1e-6).all(axis=1)
    assert same[[0, 1, 2, 4]].all()
    assert not same[5]


def test_pairs_have_it_too(manifest):
    from featurecache.joint.pairing import paired

    start = paired(prepare(config(manifest, views={"image": "a"}, pairs=True, augment={"image": ("vflip",)})))
    assert start.config.augment == {"*": ("vflip",)}
    own = paired(prepare(config(manifest, views={"image": "a"}, pairs=True, augment=(), augment_column="change")))
    images = open_images(own, Alone(), Silent())
    assert changed(images.singles, 3, "image") == {"same", "vflip"}
    assert changed(images.singles, 2, "image") == {"same"}


def test_the_command_takes_it_for_all_views_or_one():
    params = dict.fromkeys(("view", "tap", "train_from", "stem", "fusion", "detach", "pairs", "store", "replicas"))
    params |= {"share_bodies": "none", "store_dtype": "float16", "engine": "auto", "view": ["a=a", "b=b"]}
    for given, expected in ((None, {}), (["c"], {"*": "c"}), (["c", "b=d"], {"*": "c", "b": "d"})):
        assert network_options({**params, "augment_column": given})["augment_column"] == expected
