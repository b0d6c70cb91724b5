import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import JointConfig, ManifestConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.predict import load_joint, predict_joint
from featurecache.run import Run, load_run

TRUST = ("plugin_joint:tiny",)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("predict")
    manifest = write_samples(folder / "data", 40, missing=0.3, seed=5)
    options = {
        "manifest": manifest, "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("kind",),
        "precision": "fp32", "device": "cpu", "workers": 1, "batch_size": 8, "epochs": 1, "freeze_epochs": 0,
        "settings": {"hidden": [8]}, "bootstrap": 0, "out": folder / "run",
    }  # fmt: skip
    return finetune_joint(JointConfig.create(options))


def manifest_of(folder, views=("a", "b"), **options):
    path = write_samples(folder, 10, seed=6, **options)
    return read_manifest(ManifestConfig(manifest=path, views={view: view for view in views}))


def test_new_samples_with_missing_views_and_a_broken_image(run, tmp_path):
    manifest = manifest_of(tmp_path, missing=0.5)
    has_b = manifest.cells.filter(view="b")["value"].is_not_null().to_list()
    kept, lost = has_b.index(True), has_b.index(False)
    for number in (kept, lost):
        (tmp_path / "images" / f"{number:03d}-a0.png").write_bytes(b"GIF89a")
    found = predict_joint(run, manifest, device="cpu", trust=TRUST, batch_size=4)
    assert found.sample_ids.tolist() == [f"s{i:03d}" for i in range(10) if i != lost]
    assert found.scores.shape == (9, 3)
    np.testing.assert_allclose(found.scores.sum(axis=1), 1)
    assert found.present.shape == (9, 2)
    assert not found.present[:, 1].all()
    row = found.sample_ids.tolist().index(f"s{kept:03d}")
    assert found.present[row].tolist() == [False, True], "what can't be read counts as missing"
    without = manifest.cells.filter((pl.col("view") == "b") | (pl.col("sample") != kept))
    same = predict_joint(run, replace(manifest, cells=without), device="cpu", trust=TRUST)
    np.testing.assert_allclose(found.scores, same.scores, atol=1e-6)
    assert sorted((row["sample_id"], row["view"], row["path"]) for row in found.failed) == sorted(
        (f"s{i:03d}", "a", f"images/{i:03d}-a0.png") for i in (kept, lost)
    )
    alone = predict_joint(run, manifest, device="cpu", trust=TRUST, batch_size=1)
    np.testing.assert_allclose(alone.scores, found.scores, atol=1e-6)


def test_a_view_that_the_manifest_lacks_counts_as_missing(run, tmp_path):
    found = predict_joint(run, manifest_of(tmp_path, views=("b",)), device="cpu", trust=TRUST)
    assert found.present.tolist() == [[False, True]] * 10
    folder = tmp_path / "x"
    path = write_samples(folder, 3)
    other = read_manifest(ManifestConfig(manifest=path, views={"c": "a"}))
    with pytest.raises(InputError, match=r"has the views c, but the run reads a, b"):
        predict_joint(run, other, device="cpu", trust=TRUST)


def test_a_factory_that_the_run_names_needs_trust(run, tmp_path):
    with pytest.raises(InputError, match=r"--trust-factory plugin_joint:tiny"):
        load_joint(run)


def changed(run, tmp_path, change):
    record = json.loads((run.path / "run.json").read_text())
    change(record)
    path = tmp_path / "copy"
    shutil.copytree(run.path, path)
    (path / "run.json").write_text(json.dumps(record))
    return load_run(path)


def test_bodies_and_readers_that_work_in_another_way_are_refused(run, tmp_path):
    program = changed(run, tmp_path / "1", lambda r: r["recipes"]["b"]["recipe"]["taps"][0].update(program="0" * 64))
    with pytest.raises(RecipeMismatchError, match=r"the body of view 'b' is not what it was .* its program differ"):
        load_joint(program, trust=TRUST)
    reader = changed(run, tmp_path / "2", lambda r: r["recipes"]["a"]["recipe"]["reader"].update(version=99))
    with pytest.raises(RecipeMismatchError, match=r"reader image version 99, this is version \d"):
        load_joint(reader, trust=TRUST)
    lacking = changed(run, tmp_path / "3", lambda r: r.pop("blocks"))
    with pytest.raises(RunError, match=r"run.json is incomplete \(KeyError: 'blocks'\)"):
        load_joint(lacking, trust=TRUST)
    with pytest.raises(InputError, match=r"a head run, not one of finetune-joint"):
        load_joint(Run(run.path, {**run.record, "kind": "head"}))


def test_test_time_augmentation_is_the_mean_over_plain_images_and_drawn_versions(run, tmp_path):
    from featurecache.data.transforms import Augmentation
    from featurecache.joint.images import SampleImages
    from featurecache.joint.predict import joint_scores
    from featurecache.joint.runner import Runner, make_fabric

    manifest = manifest_of(tmp_path)
    plain = predict_joint(run, manifest, device="cpu", trust=TRUST)
    found = predict_joint(run, manifest, device="cpu", trust=TRUST, tta=2)
    model, head, setups = load_joint(run, trust=TRUST)
    fabric = make_fabric(torch.device("cpu"), "fp32")
    runner = Runner(fabric, fabric.setup_module(model), {view: setup.preprocessing for view, setup in setups.items()})
    drawn = SampleImages(manifest, setups, seed=0, augmentation=Augmentation(("crop", "flip")), alike=True)
    versions = [
        joint_scores(head, runner.predict(drawn, np.arange(10), batch_size=32, workers=1, epoch=k)[1]) for k in (1, 2)
    ]
    np.testing.assert_allclose(found.scores, (plain.scores + sum(versions)) / 3, atol=1e-6)
    assert np.abs(found.scores - plain.scores).max() > 1e-4
    with pytest.raises(InputError, match=r"--tta -1: 0 for none"):
        predict_joint(run, manifest, device="cpu", trust=TRUST, tta=-1)
    bare = changed(run, tmp_path / "bare", lambda r: r["config"].update(augment={"*": ["mixup"]}))
    with pytest.raises(InputError, match=r"trained without augmentation of its images, so --tta has nothing"):
        predict_joint(bare, manifest, device="cpu", trust=TRUST, tta=2)
