import json
from contextlib import closing

import numpy as np
import pytest
import torch
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file

from featurecache.config import ExtractConfig, JointConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError, RecipeMismatchError
from featurecache.extract import extract
from featurecache.joint import prefix
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.predict import predict_joint
from featurecache.joint.prefix import StoredMaps, cache_lower_part, compare_speed
from featurecache.joint.start import prepare
from featurecache.progress import Silent

TRUST = ("plugin_joint:tiny",)
OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32",
    "device": "cpu", "workers": 1, "batch_size": 16, "lr": 5e-3, "body_lr": 1e-3, "freeze_epochs": 1, "epochs": 1,
    "settings": {"hidden": [16], "dropout": 0.2}, "bootstrap": 0, "augment": (),
}  # fmt: skip
CUT = {"train_from": "features.3", "store_dtype": "float32", "engine": "torch"}


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 samples, some without view `b`, one image broken; a run that trains all, and one above a module."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("prefix")
    manifest = write_samples(folder, 48, seed=1, missing=0.2)
    (folder / "images" / "004-a0.png").write_bytes(b"not an image")
    finetune_joint(config(folder, out=folder / "whole", epochs=0))
    closed, close = [], StoredMaps.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredMaps, "close", lambda maps: close(maps) or closed.append(maps))
        finetune_joint(config(folder, out=folder / "upper", store=folder / "store", **CUT))
    assert len(closed) == 1, "training lets go of the store"
    assert manifest == folder / "samples.csv"
    return folder


def config(folder, **changes):
    return JointConfig.create({**OPTIONS, "manifest": folder / "samples.csv", **changes})


def load(path):
    from featurecache.run import load_run

    return load_run(path)


def test_the_first_losses_are_those_of_the_uncached_run(folder):
    whole, upper = load(folder / "whole").history, load(folder / "upper").history
    for name in ("train_loss", "valid_loss"):
        assert upper[name][0] == pytest.approx(whole[name][0], abs=1e-6)
    assert upper["phase"].to_list() == ["frozen", "unfrozen"]


def test_only_what_lies_above_has_learnt_and_the_bodies_are_whole(folder):
    before = tiny().state_dict()
    after = load_file(folder / "upper" / "bodies" / "a.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"features.4.weight", "features.4.bias", "features.6.weight", "features.6.bias"}


def test_the_run_predicts_from_images_what_it_said_from_the_cache(folder):
    run = load(folder / "upper")
    found = predict_joint(run, read_manifest(config(folder)), device="cpu", trust=TRUST)
    assert found.sample_ids.tolist() == run.predictions["sample_id"].to_list()
    np.testing.assert_allclose(found.scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-5)
    assert [(row["sample_id"], row["view"]) for row in run.record["failed"]] == [("s004", "a")]
    place = found.sample_ids.tolist().index("s004")
    assert found.present[place].tolist() == [False, True], "what can't be read counts as missing, cached or not"


def test_its_bodies_go_back_into_stage_one(folder):
    run = load(folder / "upper")
    options = {
        "manifest": folder / "samples.csv", "views": {"a": "a", "b": "b"}, "body": f"run:{run.path}",
        "store": folder / "store", "name": "tuned", "engine": "torch", "precision": "fp32", "store_dtype": "float32",
        "device": "cpu", "trust_factory": TRUST,
    }  # fmt: skip
    summary = extract(ExtractConfig.create(options))
    assert {view: run.recipes[view]["digest"][: len(found)] for view, found in summary.recipes.items()} == (
        summary.recipes
    )


def test_the_cache_is_computed_once_and_never_of_other_weights(folder, tmp_path):
    start = prepare(config(folder, store=folder / "store", **CUT))
    assert cache_lower_part(start, Silent()).computed == 0
    with torch.no_grad():
        start.setups["b"].body.module.features[0].weight.add_(0.1)
    with pytest.raises(RecipeMismatchError, match=r"view 'b' at features\.3 are of other weights .* would be stale"):
        prefix.check_weights(start, prefix.lower_identities(start))
    other = prepare(config(folder, store=folder / "store", **{**CUT, "train_from": "features.2"}))
    assert cache_lower_part(other, Silent()).computed > 0


def test_replicas_stand_for_augmentation_alike_in_all_views(folder):
    drawing = {"store": folder / "store", "replicas": 2, "view_dropout": 0.0, **CUT}
    start = prepare(config(folder, augment=("flip", "crop"), **drawing))
    assert cache_lower_part(start, Silent()).replicas_computed > 80
    maps = StoredMaps(start)
    samples = np.flatnonzero(maps.present.all(axis=1) & (np.arange(len(maps)) != 4)).astype(np.int64)
    plain, drawn = maps.batch(samples), maps.batch(samples, 1)
    same = [(drawn.images[view] == plain.images[view]).flatten(1).all(dim=1).tolist() for view in ("a", "b")]
    assert same[0] == same[1]
    assert 0 < sum(same[0]) < 0.6 * len(samples)
    assert torch.equal(maps.batch(samples[::-1].copy(), 1).images["b"], drawn.images["b"].flip(0))
    assert not torch.equal(maps.batch(samples, 2).images["a"], drawn.images["a"])
    maps.close()
    with pytest.raises(InputError, match="--replicas: without --augment they would all be the plain image"):
        cache_lower_part(prepare(config(folder, **drawing)), Silent())
    with pytest.raises(InputError, match="--replicas: they are augmented alike in all views"):
        cache_lower_part(prepare(config(folder, augment={"a": ("flip",)}, **drawing)), Silent())


@pytest.mark.slow
def test_training_on_replicas(folder):
    drawing = {"store": folder / "store", "replicas": 1, "augment": ("flip",), **CUT}
    run = finetune_joint(config(folder, out=folder / "drawn", epochs=3, **drawing))
    assert run.history["train_loss"][-1] < run.history["train_loss"][0]


@pytest.mark.slow
def test_one_body_for_all_views_above_a_module(folder):
    run = finetune_joint(config(folder, out=folder / "one", store=folder / "store", share_bodies="all", **CUT))
    assert run.bodies["a"]["file"] == run.bodies["b"]["file"]
    found = predict_joint(run, read_manifest(config(folder)), device="cpu", trust=TRUST)
    np.testing.assert_allclose(found.scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-5)


def test_it_says_where_reading_is_slower_than_computing_and_what_learns(folder, monkeypatch):
    start = prepare(config(folder, store=folder / "store", **CUT))
    cache_lower_part(start, Silent())
    monkeypatch.setattr(prefix, "free_memory", lambda: 0)  # so that the maps come from the disk,
    monkeypatch.setattr(prefix, "READ_RATE", 1e3)  # a slow one
    said = Notes()
    with closing(StoredMaps(start)) as maps:
        compare_speed(start, maps, said)
    assert [note.split(":")[0] for note in said.notes] == ["a", "b"]
    assert "takes longer" in said.notes[0]
    assert "than computing it" in said.notes[0]
    monkeypatch.setattr(prefix, "READ_RATE", 1e15)
    times = iter((1.0, 2.0, 1.0, 2.0))  # reading, computing
    monkeypatch.setattr(prefix, "_seconds", lambda work: next(times))
    said = Notes()
    with closing(StoredMaps(start)) as maps:
        compare_speed(start, maps, said)
    assert said.notes == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": None}, "--train-from needs --store STORE"),
        ({"train_from": {"a": "features.3"}}, "--train-from: no module for view 'b'"),
        ({"train_from": "flatten"}, "can't be cut there: the tap penultimate does not lie above it"),
        ({"train_from": "features.33"}, r"has no module 'features\.33'"),
        ({"tap": {"*": "features.1:avg"}}, r"the tap features\.1 does not lie above it"),
    ],
)
def test_what_can_not_be_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        prepare(config(folder, **{**CUT, "store": folder / "store", **changes}))


def test_the_record_says_where_training_began(folder):
    record = json.loads((folder / "upper" / "run.json").read_text())
    assert record["config"]["train_from"] == {"*": "features.3"}


class Killed(Exception):
    pass


class KillAt(Silent):
    """Ends the training when a task begins whose name starts so."""

    def begin(self, task, total, unit="images", *, done=0):
        if task.startswith("validation 2/"):
            raise Killed


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(folder):
    options = {"store": folder / "store", "freeze_epochs": 1, "epochs": 2, **CUT}
    whole = finetune_joint(config(folder, out=folder / "uninterrupted", **options))
    with pytest.raises(Killed):
        finetune_joint(config(folder, out=folder / "resumed", **options), reporter=KillAt())
    (folder / "store").rename(folder / "moved")  # a store may lie elsewhere by then
    options["store"] = folder / "moved"
    resumed = finetune_joint(config(folder, out=folder / "resumed", resume=True, **options))
    (folder / "moved").rename(folder / "store")
    for name in ("head.safetensors", "bodies/a.safetensors", "predictions.csv"):
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
