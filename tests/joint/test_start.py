import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from extract_kit import main
from PIL import Image
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file

from featurecache.cli.jointoptions import with_value
from featurecache.config import ExtractConfig, JointConfig
from featurecache.data.manifest import read_manifest
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, RecipeMismatchError, RunError
from featurecache.extract import extract
from featurecache.fit import fit_head
from featurecache.heads.losses import scores_from_outputs
from featurecache.joint.build import make_head, make_model
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import SampleImages
from featurecache.joint.predict import predict_joint
from featurecache.joint.start import prepare
from featurecache.reporting.compare import compare_runs

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
    head = make_head(
        start.head, start.blocks, start.target, start.head.settings, missing=False, view_dropout=view_dropout, seed=0
    )
    assert head.indicators == (view_dropout > 0)
    model = make_model(start.setups, start.blocks, head, multi="error")
    images = SampleImages(start.manifest, start.setups)
    batch = images.collate([images.load(i) for i in range(len(images))])
    normalised = {view: start.setups[view].preprocessing.normalise(image) for view, image in batch.images.items()}
    with torch.no_grad():
        found = scores_from_outputs("binary", model(normalised, batch.present, batch.owner))
    data = FeatureDataset(folder / "store", dataset="samples", target="label", tap=["features.5", "penultimate"])
    np.testing.assert_allclose(found, start.head.score_rows(data.features), atol=1e-4)


def test_training_goes_on_from_the_head_and_never_ends_worse(folder, tmp_path):
    run = finetune_joint(config(folder, out=tmp_path / "run", lr=1e-3, body_lr=1e-4, freeze_epochs=1))
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


def test_an_unreadable_image_is_a_missing_view_as_it_is_for_the_head(tmp_path):
    manifest = write_samples(tmp_path, 40, seed=4)
    for number in (4, 7, 11):
        (tmp_path / "images" / f"{number:03d}-a0.png").write_bytes(b"not an image")
    stage = {
        "manifest": manifest, "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "store": tmp_path / "store",
        "precision": "fp32", "store_dtype": "float32", "device": "cpu", "engine": "torch",
    }  # fmt: skip
    assert extract(ExtractConfig.create(stage)).failed == 3
    data = FeatureDataset(tmp_path / "store", dataset="samples", target="label")
    options = {"split": "auto", "seed": 3, "bootstrap": 0, "device": "cpu"}
    head = fit_head(data, head="fc", out=tmp_path / "fc", settings={"hidden": [8], "epochs": 2}, **options)
    ruinous = {"lr": 3.0, "body_lr": 3.0, "epochs": 1, "freeze_epochs": 0}
    joint = finetune_joint(config(tmp_path, out=tmp_path / "joint", **ruinous))
    assert joint.record["best_epoch"] == 0, "what it started from is kept"
    for name in ("sample_id", "views", "split"):
        assert joint.predictions[name].to_list() == head.predictions[name].to_list()
    assert joint.predictions.filter(views="b")["sample_id"].to_list() == ["s004", "s007", "s011"]
    np.testing.assert_allclose(joint.predictions["p:yes"].to_numpy(), head.predictions["p:yes"].to_numpy(), atol=1e-4)
    assert compare_runs([head, joint], n=10).n == len(head.arrays.of("test").sample_ids)


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
    with pytest.raises(InputError, match=r"fit-head --head fc or decoder, this is a head 'logistic'"):
        prepare(config(folder, init=folder / "logistic"))
    with pytest.raises(InputError, match="fitted on the views a, b, not on a"):
        prepare(config(folder, views={"a": "a"}))
    with pytest.raises(InputError, match="the head takes concatenated features, so --fusion mean can't start from it"):
        prepare(config(folder, fusion="mean"))
    with pytest.raises(InputError, match="--tap: the head that training starts from says which taps it takes"):
        prepare(config(folder, tap=("features.1:avg",)))
    with pytest.raises(InputError, match=r"fitted for binary label \(no, yes\); samples.csv holds multiclass kind"):
        prepare(config(folder, target=("kind",)))
    with pytest.raises(RecipeMismatchError, match=r"view 'a' would start from another body .*preprocessing.mean"):
        prepare(config(folder, mean=(0.4, 0.4, 0.4)))
    bare = copied(folder, tmp_path, lambda record: record.pop("body_config"))
    with pytest.raises(RunError, match=r"run.json holds no body_config"):
        prepare(config(folder, init=bare))
    with pytest.raises(InputError, match="don't fit the head that training starts from"):
        finetune_joint(config(folder, out=tmp_path / "run", settings={"hidden": [4]}))


def test_what_the_head_kept_together_stays_together(folder, tmp_path):
    data = FeatureDataset(folder / "store", dataset="samples", target="label", tap=["features.5", "penultimate"])
    options = {"seed": 3, "bootstrap": 0, "device": "cpu", "group": "size"}
    fit_head(data, head="fc", out=tmp_path / "grouped", settings={"hidden": [8], "epochs": 1}, **options)
    assert prepare(config(folder, init=tmp_path / "grouped")).config.group == "size"
    assert prepare(config(folder, init=tmp_path / "grouped", group="sample_id")).config.group == "sample_id"


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


def test_a_head_with_a_fusion_of_its_own_is_a_start_too(folder, tmp_path):
    data = FeatureDataset(folder / "store", dataset="samples", target="label", tap=["features.5", "penultimate"])
    settings = {"hidden": [8], "epochs": 2, "fusion": "gated"}
    fit_head(data, head="fc", out=tmp_path / "gated", settings=settings, split="auto", seed=3, bootstrap=0)
    run = finetune_joint(config(folder, init=tmp_path / "gated", out=tmp_path / "run", lr=9.0, body_lr=9.0, epochs=1))
    assert run.record["best_epoch"] == 0  # a ruinous rate: what it started from is kept
    assert run.record["fusion"] == "gated"
    assert run.record["split"]["seed"] == 3  # of the head's split, which this one has taken over
    table = run.predictions.join(pl_predictions(tmp_path / "gated"), on="sample_id")
    np.testing.assert_allclose(table["p:yes"].to_numpy(), table["p:yes_right"].to_numpy(), atol=1e-4)


def plain(folder, **changes):
    """Without a head to start from."""
    options = {"init": None, "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",)}
    return config(folder, **{**options, "settings": {"hidden": [8]}, **changes})


def test_a_shared_stem_learns_as_one_and_every_view_has_its_whole_body(folder, tmp_path):
    run = finetune_joint(
        plain(folder, out=tmp_path / "run", share_bodies="stem", stem="features.3", epochs=1, freeze_epochs=0)
    )
    assert [run.bodies[view]["file"] for view in ("a", "b")] == ["bodies/a.safetensors", "bodies/b.safetensors"]
    a, b = (load_file(run.path / "bodies" / f"{view}.safetensors") for view in ("a", "b"))
    before = tiny().state_dict()
    trained = [name for name in before if not torch.equal(a[name], before[name])]
    assert {name for name in trained if torch.equal(a[name], b[name])} == {
        "features.0.weight", "features.1.bias", "features.1.weight", "features.3.weight",
    }  # fmt: skip
    assert {"features.4.weight", "features.6.weight"} <= set(trained)
    found = predict_joint(run, read_manifest(plain(folder)), device="cpu", trust=TRUST)
    np.testing.assert_allclose(found.scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-5)


@pytest.mark.parametrize("changes", [{"share_bodies": "stem"}, {"stem": "features.3"}])
def test_a_stem_and_its_last_module_go_together(folder, changes):
    with pytest.raises(InputError, match=r"--share-bodies stem and --stem MODULE, .* go together"):
        prepare(plain(folder, **changes))


def test_spatial_takes_the_last_map_and_wants_rows_that_correspond(folder, tmp_path):
    start = prepare(plain(folder, fusion="spatial", resize_mode="squash"))
    assert [(block.tap, block.shape) for block in start.blocks] == [("features@rows", (12, 8))] * 2
    named = prepare(plain(folder, fusion="spatial", resize_mode="pad", tap=("features.3:rows",)))
    assert named.tap == {"a": ["features.3@rows"], "b": ["features.3@rows"]}
    with pytest.raises(InputError, match=r"compares the views row by row.* found a: resize 32, crop 32, resize_mode"):
        prepare(plain(folder, fusion="spatial"))
    with pytest.raises(InputError, match="fusion 'spatial' needs one map per view"):
        prepare(plain(folder, fusion="spatial", resize_mode="squash", tap=("penultimate",)))
    run = finetune_joint(
        plain(folder, out=tmp_path / "run", fusion="spatial", resize_mode="squash", epochs=1, freeze_epochs=0)
    )
    found = predict_joint(run, read_manifest(plain(folder)), device="cpu", trust=TRUST)
    np.testing.assert_allclose(found.scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-5)


def test_spatial_on_cached_rows(folder, tmp_path):
    stage = {
        "manifest": folder / "samples.csv", "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny",
        "store": folder / "store", "precision": "fp32", "device": "cpu", "tap": "features:rows", "engine": "torch",
    }  # fmt: skip
    settings = {"hidden": [8], "epochs": 2, "fusion": "spatial"}
    for mode in ("squash", "crop"):
        extract(ExtractConfig.create({**stage, "resize_mode": mode, "name": mode}))
    squash, crop = (FeatureDataset(folder / "store", dataset=mode, target="label") for mode in ("squash", "crop"))
    fit_head(squash, head="fc", out=tmp_path / "run", settings=settings, bootstrap=0)
    with pytest.raises(InputError, match=r"compares the views row by row.* resize_mode crop"):
        fit_head(crop, head="fc", out=tmp_path / "other", settings=settings, bootstrap=0)


def test_pairs_never_lack_half_of_what_they_compare(folder):
    start = prepare(plain(folder, fusion="difference-product", view_dropout=0.3))
    assert start.config.view_dropout == 0


def test_share_bodies_alone_is_still_all():
    assert with_value(["m.csv", "--share-bodies", "--epochs", "2"]) == [
        "m.csv",
        "--share-bodies",
        "all",
        "--epochs",
        "2",
    ]
    assert with_value(["--share-bodies", "stem", "m.csv"]) == ["--share-bodies", "stem", "m.csv"]
    assert with_value(["--share-bodies"]) == ["--share-bodies", "all"]
    assert JointConfig.create({"manifest": "m.csv", "share_bodies": True}).share_bodies == "all"
    assert JointConfig.create({"manifest": "m.csv"}).share_bodies == "none"
    with pytest.raises(InputError, match="share_bodies: Input should be 'all', 'stem' or 'none'"):
        JointConfig.create({"manifest": "m.csv", "share_bodies": "some"})


def test_each_view_tuned_alone_then_stacked_under_xgboost_by_commands(folder, tmp_path, capsys):
    body = ("--body", "plugin_joint:tiny", "--trust-factory", "plugin_joint:tiny", "--device", "cpu")
    fit = ("--target", "label", "--bootstrap", 0, "--quiet")
    for view in ("a", "b"):
        tuning = ("--epochs", 1, "--freeze-epochs", 0, "--precision", "fp32", "--set", "hidden=8", "--batch-size", 16)
        done = main(
            "finetune-joint", folder / "samples.csv", "--view", f"{view}={view}", *body, *fit, *tuning,
            "--out", tmp_path / view, capsys=capsys,
        )  # fmt: skip
        assert done[0] == 0, done[2]
    tuned = [word for view in ("a", "b") for word in ("--body", f"{view}=run:{tmp_path / view}")]
    views = ("--view", "a=a", "--view", "b=b")
    done = main(
        "extract", folder / "samples.csv", *views, *tuned, *body[2:], "--engine", "torch", "--precision", "fp32",
        "--store-dtype", "float32", "--store", tmp_path / "store", "--json", capsys=capsys,
    )  # fmt: skip
    assert done[0] == 0, done[2]
    recipes = json.loads(done[1])["recipes"]
    for view in ("a", "b"):
        record = json.loads((tmp_path / view / "run.json").read_text())
        assert record["recipes"][view]["digest"].startswith(recipes[view])
    done = main(
        "fit-head", tmp_path / "store", "--dataset", "samples", "--head", "xgboost", *fit, "--set", "n_estimators=5",
        "--out", tmp_path / "xgb", capsys=capsys,
    )  # fmt: skip
    assert done[0] == 0, done[2]
    done = main(
        "predict", tmp_path / "xgb", folder / "samples.csv", *body[2:], "--out", tmp_path / "p.csv", "--quiet",
        capsys=capsys,
    )  # fmt: skip
    assert done[0] == 0, done[2]


def test_the_files_decide_on_the_reader_of_each_view(tmp_path):
    manifest = write_samples(tmp_path, 12, seed=4)
    table = pl.read_csv(manifest)
    for name in table["b"]:
        np.save((tmp_path / name).with_suffix(".npy"), np.asarray(Image.open(tmp_path / name)))
    table.with_columns(pl.col("b").str.replace("png", "npy", literal=True)).write_csv(manifest)
    start = prepare(config(tmp_path, init=None, views={"a": "a", "b": "b"}, target=("label",), body=TRUST[0]))
    assert {view: setup.reader.name for view, setup in start.setups.items()} == {"a": "image", "b": "array"}
    assert start.config.reader == {"a": "image", "b": "array"}  # what the run records
