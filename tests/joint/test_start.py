import json
import shutil

import numpy as np
import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import ExtractConfig, JointConfig
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.extract import extract
from featurecache.fit import fit_head
from featurecache.heads.losses import scores_from_outputs
from featurecache.joint.build import make_fusion, make_head, make_model
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import SampleImages
from featurecache.joint.start import prepare

TRUST = ("plugin_joint:tiny",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples, their features in a store, and heads fitted on them."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    manifest = write_samples(folder, 60, seed=4)
    stage = {
        "manifest": manifest, "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "store": folder / "store",
        "precision": "fp32", "store_dtype": "float32", "device": "cpu", "tap": ["features.5:avg", "penultimate"],
    }  # fmt: skip
    extract(ExtractConfig.create(stage))
    data = FeatureDataset(folder / "store", dataset="samples", target="label", tap=["features.5", "penultimate"])
    options = {"split": "auto", "seed": 3, "bootstrap": 0, "device": "cpu"}
    fit_head(data, head="fc", out=folder / "fc", settings={"hidden": [8], "epochs": 6}, **options)
    fit_head(data, head="logistic", out=folder / "logistic", **options)
    return folder


def config(folder, **changes):
    options = {
        "manifest": folder / "samples.csv", "init": folder / "fc", "trust_factory": TRUST, "precision": "fp32",
        "device": "cpu", "workers": 1, "batch_size": 16, "epochs": 2, "bootstrap": 0,
    }  # fmt: skip
    return JointConfig.create({**options, **changes})


@pytest.mark.parametrize("view_dropout", [0.0, 0.2])
def test_before_the_first_step_the_model_predicts_what_the_head_does(folder, view_dropout):
    start = prepare(config(folder, view_dropout=view_dropout))
    assert list(start.setups) == ["a", "b"]
    assert [block.tap for block in start.blocks] == ["features.5@avg", "penultimate@none"] * 2
    assert start.target.names == ("label",)
    fusion = make_fusion("concat", start.blocks)
    head = make_head(
        start.head, fusion, start.target, start.head.settings, missing=False, view_dropout=view_dropout, seed=0
    )
    assert head.indicators == (view_dropout > 0)
    model = make_model(start.setups, fusion, head, multi="error")
    images = SampleImages(start.manifest, start.setups)
    batch = images.collate([images.load(i) for i in range(len(images))])
    normalised = {view: start.setups[view].preprocessing.normalise(image) for view, image in batch.images.items()}
    with torch.no_grad():
        found = scores_from_outputs("binary", model(normalised, batch.present, batch.owner))
    data = FeatureDataset(folder / "store", dataset="samples", target="label", tap=["features.5", "penultimate"])
    np.testing.assert_allclose(found, start.head.score_rows(data.features), atol=1e-4)


def test_training_goes_on_from_the_head_and_never_ends_worse(folder, tmp_path):
    run = finetune_joint(config(folder, out=tmp_path / "run", lr=1e-3, body_lr=1e-4))
    history = run.history
    assert history["phase"].to_list() == ["start", "frozen", "unfrozen", "unfrozen"]
    assert min(history["valid_loss"]) <= history["valid_loss"][0]
    before = (folder / "fc" / "splits.csv").read_text()
    assert (run.path / "splits.csv").read_text() == before
    assert run.targets == ("label",)
    assert run.record["tap"] == {view: ["features.5@avg", "penultimate@none"] for view in ("a", "b")}
    bad = finetune_joint(config(folder, out=tmp_path / "bad", lr=3.0, body_lr=3.0, epochs=1, freeze_epochs=0))
    assert bad.record["best_epoch"] == 0  # a ruinous rate: what it started from is kept
    table = bad.predictions.join(pl_predictions(folder / "fc"), on="sample_id")
    np.testing.assert_allclose(table["p:yes"].to_numpy(), table["p:yes_right"].to_numpy(), atol=1e-4)


def pl_predictions(path):
    from featurecache.run import load_run

    return load_run(path).predictions


def test_tuned_bodies_go_back_into_stage_one(folder, tmp_path):
    run = finetune_joint(config(folder, out=tmp_path / "run", lr=5e-3, body_lr=1e-3, view_dropout=0.0))
    summary = extract(
        ExtractConfig.create(
            {
                "manifest": folder / "samples.csv", "views": {"a": "a", "b": "b"}, "body": f"run:{run.path}",
                "store": folder / "store", "name": "tuned", "engine": "torch", "precision": "fp32",
                "store_dtype": "float32", "device": "cpu", "tap": ["features.5:avg", "penultimate"],
                "trust_factory": TRUST,
            }
        )
    )  # fmt: skip
    assert summary.computed == 120
    data = FeatureDataset(folder / "store", dataset="tuned", target="label", tap=["features.5", "penultimate"])
    assert {view: recipe.digest for view, recipe in data.recipes.items()} == {
        view: recipe["digest"] for view, recipe in run.recipes.items()
    }
    from featurecache.heads.base import load_head

    scores = load_head(run.path).score_rows(data.features)
    np.testing.assert_allclose(scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-4)


def copied(folder, tmp_path, change):
    """The fc run with another record."""
    path = tmp_path / "changed"
    shutil.copytree(folder / "fc", path)
    record = json.loads((path / "run.json").read_text())
    change(record)
    (path / "run.json").write_text(json.dumps(record))
    return path


def test_a_factory_that_only_the_run_names_is_not_imported(folder, tmp_path):
    with pytest.raises(InputError, match=r"names the factory 'plugin_joint:tiny' as its body. Nothing was imported"):
        prepare(config(folder, trust_factory=()))
    evil = copied(folder, tmp_path, lambda record: record["body_config"].update(body={"*": "os:system"}))
    with pytest.raises(InputError, match=r"names the factory 'os:system' as its body. Nothing was imported"):
        prepare(config(folder, init=evil))


def test_starts_that_cannot_be_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"--init needs a run of fit-head --head fc, this is a head 'logistic'"):
        prepare(config(folder, init=folder / "logistic"))
    with pytest.raises(InputError, match="fitted on the views a, b, not on a"):
        prepare(config(folder, views={"a": "a"}))
    with pytest.raises(InputError, match="the head takes concatenated features, so --fusion mean can't start from it"):
        prepare(config(folder, fusion="mean"))
    with pytest.raises(InputError, match=r"fitted for binary label \(no, yes\); samples.csv holds multiclass kind"):
        prepare(config(folder, target=("kind",)))
    with pytest.raises(RecipeMismatchError, match=r"view 'a' would start from another body .*preprocessing.mean"):
        prepare(config(folder, mean=(0.4, 0.4, 0.4)))
    bare = copied(folder, tmp_path, lambda record: record.pop("body_config"))
    with pytest.raises(RunError, match=r"run.json holds no body_config"):
        prepare(config(folder, init=bare))
    with pytest.raises(InputError, match="don't fit the head that training starts from"):
        finetune_joint(config(folder, out=tmp_path / "run", settings={"hidden": [4]}))


def test_samples_that_the_split_does_not_know_are_only_predicted(folder, tmp_path):
    lines = (folder / "samples.csv").read_text().splitlines()
    more = folder / "more.csv"
    more.write_text("\n".join([*lines, lines[1].replace("s000", "new")]) + "\n")
    run = finetune_joint(config(folder, manifest=more, out=tmp_path / "run", epochs=1, freeze_epochs=0))
    assert run.predictions.filter(sample_id="new")["split"].to_list() in ([""], [None])
    other = folder / "other.csv"
    other.write_text("\n".join([lines[0], *(f"x{line}" for line in lines[1:])]) + "\n")
    with pytest.raises(InputError, match=r"none of its samples \('s000', ...\) is in .*other.csv \('xs000', ...\)"):
        prepare(config(folder, manifest=other))
