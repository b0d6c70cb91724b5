import csv
import json

import numpy as np
import polars as pl
import pytest
import torch
from joint_kill import kill_at
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file

from featurecache.bodies.registry import load_run_body
from featurecache.config import JointConfig
from featurecache.errors import FeatureCacheError, InputError
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.step import draw_seed
from featurecache.progress import Silent
from featurecache.run import load_run

OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32",
    "device": "cpu", "workers": 1, "batch_size": 16, "lr": 5e-3, "body_lr": 1e-3, "freeze_epochs": 1, "epochs": 5,
    "settings": {"hidden": [16], "dropout": 0.2}, "bootstrap": 20,
}  # fmt: skip


def config(manifest, out, **changes):
    return JointConfig.create({**OPTIONS, "manifest": manifest, "out": out, **changes})


class Killed(Exception):
    pass


class KillAt(Silent):
    """Ends the training when a task begins whose name starts so."""

    def __init__(self, task, error=Killed):
        self.task, self.error = task, error

    def begin(self, task, total, unit="images"):
        if task.startswith(self.task):
            raise self.error


class Told(Silent):
    """Remembers the notes."""

    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("joint"), 72, seed=1)


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory):
    torch.set_num_threads(1)
    return finetune_joint(config(manifest, tmp_path_factory.mktemp("run") / "run"))


def test_the_loss_falls_and_the_run_is_complete(run):
    history = run.history
    assert history["phase"].to_list() == ["frozen", *["unfrozen"] * 5]
    assert history["epoch"].to_list() == list(range(1, 7))
    assert history["valid_loss"][-1] < 0.8 * history["valid_loss"][0]
    assert history["train_loss"][-1] < 0.75 * history["train_loss"][0]
    assert run.metrics["test"]["accuracy"] >= 0.8
    assert run.kind == "joint"
    assert run.views == ("a", "b")
    names = {path.name for path in run.path.iterdir()}
    assert names == {
        "run.json", "head.json", "head.safetensors", "bodies", "splits.csv", "metrics.json", "predictions.csv",
        "history.csv", "README.md", "report.html", "curves.json", "mistakes.json", "pictures",
    }  # fmt: skip
    assert run.record["failed"] == []
    assert run.record["best_epoch"] == history["epoch"][int(np.argmin(history["valid_loss"].to_numpy()))]


def test_what_the_bodies_learnt_is_in_the_run_and_batchnorm_statistics_never_moved(run):
    before = tiny().state_dict()
    for view in ("a", "b"):
        after = load_file(run.path / "bodies" / f"{view}.safetensors")
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert tensor.is_contiguous()
            fixed = "running" in name or "num_batches" in name or name.startswith("spare")
            assert torch.equal(tensor, before[name]) == fixed, name


def test_the_tuned_bodies_can_be_loaded_and_are_those_that_made_the_predictions(run, manifest):
    from featurecache.data.manifest import read_manifest
    from featurecache.joint.predict import predict_joint

    body = load_run_body(run.path, "a", trust=("plugin_joint:tiny",))
    state = load_file(run.path / "bodies" / "a.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.module.state_dict().items())
    found = predict_joint(run, read_manifest(config(manifest, None)), device="cpu", trust=("plugin_joint:tiny",))
    assert found.sample_ids.tolist() == run.predictions["sample_id"].to_list()
    assert found.failed == []
    expected = run.predictions.select(["p:no", "p:yes"]).to_numpy()
    np.testing.assert_allclose(found.scores, expected, atol=1e-6)


def test_nothing_of_the_bodies_moves_while_they_are_frozen(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run", epochs=0, freeze_epochs=2))
    before = tiny().state_dict()
    after = load_file(run.path / "bodies" / "a.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(run.history["phase"]) == {"frozen"}
    assert run.history["train_loss"][1] < run.history["train_loss"][0]


@pytest.mark.parametrize(
    "at", ["validation 4/", *(pytest.param(at, marks=pytest.mark.slow) for at in ("epoch 2/", "predict"))]
)
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(manifest, tmp_path, run, at):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        finetune_joint(config(manifest, out), reporter=KillAt(at))
    assert not out.exists()
    torch.randn(17)  # the global generator does not matter
    resumed = finetune_joint(config(manifest, out, resume=True))
    assert not (tmp_path / "run.tmp").exists()
    for name in ("head.safetensors", "bodies/a.safetensors", "bodies/b.safetensors", "predictions.csv", "metrics.json"):
        assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes(), name
    assert resumed.history.drop("seconds").equals(run.history.drop("seconds"))


def test_torchs_own_generator_is_left_alone(manifest, tmp_path):
    torch.manual_seed(3)
    expected = torch.random.get_rng_state()
    finetune_joint(config(manifest, tmp_path / "run", epochs=1, freeze_epochs=0))
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert draw_seed(1, 2) != draw_seed(2, 1)


def test_resume_with_other_options_is_refused(manifest, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as interrupt:
        finetune_joint(config(manifest, out), reporter=KillAt("epoch 2/", KeyboardInterrupt))
    assert "the same command with --resume goes on from there" in interrupt.value.__notes__[0]
    with pytest.raises(InputError, match=r"not the training that was interrupted: lr: 0.005 then, 0.01 now"):
        finetune_joint(config(manifest, out, lr=1e-2, resume=True))
    with pytest.raises(InputError, match=r"run: an unfinished training is in run\.tmp.* --resume .* --overwrite "):
        finetune_joint(config(manifest, out))
    assert (tmp_path / "run.tmp" / "checkpoint" / "state.safetensors").is_file(), "not discarded"
    manifest.with_name("more.csv").write_text(manifest.read_text().replace("s003", "s999"))
    with pytest.raises(InputError, match=r"manifest: .* samples and splits: "):
        finetune_joint(config(manifest.with_name("more.csv"), out, resume=True))


def test_a_finished_run_is_returned_by_resume_and_not_replaced(run, manifest):
    before = (run.path / "run.json").read_bytes()
    assert finetune_joint(config(manifest, run.path, resume=True)).record == run.record
    assert (run.path / "run.json").read_bytes() == before
    with pytest.raises(InputError, match="already exists"):
        finetune_joint(config(manifest, run.path))


def test_missing_views_and_failed_images(tmp_path):
    manifest = write_samples(tmp_path / "data", 60, missing=0.4, seed=2)
    alone = pl.read_csv(manifest).filter(pl.col("b").is_null())["sample_id"][0]
    for number in ("004", alone[1:]):
        (tmp_path / "data" / "images" / f"{number}-a0.png").write_bytes(b"not an image")
    told = Told()
    run = finetune_joint(config(manifest, tmp_path / "run", epochs=1, view_dropout=0.3), reporter=told)
    table = run.predictions
    assert set(table["views"]) == {"a", "b", "a+b"}
    assert table.filter(views="b")["sample_id"].to_list() == ["s004"], "what can't be read counts as missing"
    assert table.height == 59
    assert alone not in table["sample_id"], "it has no other view"
    failed = sorted((row["sample_id"], row["view"], row["path"]) for row in run.record["failed"])
    assert failed == sorted((name, "a", f"images/{name[1:]}-a0.png") for name in ("s004", alone))
    [note] = [note for note in told.notes if "can't be read" in note]
    first = min("s004", alone)
    assert note.startswith(f"2 images can't be read, taken as missing (first: {first}, a images/{first[1:]}-a0.png:")
    assert note.endswith(f"), which leaves out 1 sample (first: {alone})")
    flow = run.record["flow"]
    assert flow["incomplete"] == 1
    assert {"why": "unreadable image", "samples": 1, "groups": 1} in flow["left_out"]
    with (run.path / "failures.csv").open() as handle:
        assert next(csv.reader(handle)) == ["sample_id", "view", "path", "error"]
    head = json.loads((run.path / "head.json").read_text())
    assert head["fitted"]["indicators"] is True
    state = load_file(run.path / "head.safetensors")
    assert state["layers.0.weight"].shape == (16, 12 + 12 + 2)
    with pytest.raises(InputError, match=r"samples lack one of a, b \(first: s\d+\), and --missing error"):
        finetune_joint(config(manifest, tmp_path / "other", missing="error"))
    dropped = finetune_joint(config(manifest, tmp_path / "drop", missing="drop", epochs=1, freeze_epochs=0))
    assert set(dropped.predictions["views"]) == {"a+b"}
    assert "s004" not in dropped.predictions["sample_id"]
    sides = dict(table.select("sample_id", "split").iter_rows())
    own = dict(dropped.predictions.select("sample_id", "split").iter_rows())
    assert own == {name: sides[name] for name in own}, "who is left out moves nobody to another side"


def test_missing_error_refuses_what_can_not_be_read_too(tmp_path):
    manifest = write_samples(tmp_path / "data", 6)
    (tmp_path / "data" / "images" / "004-a0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"1 samples lack one of a, b \(first: s004\), and --missing error"):
        finetune_joint(config(manifest, tmp_path / "run", missing="error"))


def test_multilabel_with_unknown_labels(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run", target=("first", "second", "third"), task="multilabel"))
    assert run.task == "multilabel"
    table = run.predictions
    assert table["target:first"].null_count() > 0
    assert table["p:first"].null_count() == 0
    assert table["p:third"].null_count() == table.height  # no label is known, so nothing was learnt
    assert run.record["skipped"] == ["third"]
    assert run.history["valid_loss"][-1] < run.history["valid_loss"][0]


def test_regression_in_the_targets_unit(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run", target=("size",), task="regression", epochs=5))
    assert run.metrics["valid"]["r2"] > 0
    assert 9 < run.predictions["prediction"].mean() < 14


def test_one_body_for_all_views(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run", share_bodies=True, epochs=1, freeze_epochs=0))
    assert [run.bodies[view]["file"] for view in ("a", "b")] == ["bodies/a.safetensors"] * 2
    assert [path.name for path in (run.path / "bodies").iterdir()] == ["a.safetensors"]
    other = {"a": "plugin_joint:tiny", "b": "torchvision/squeezenet1_1"}
    with pytest.raises(InputError, match="view 'b' has another body, weights or tap than view 'a'"):
        finetune_joint(config(manifest, tmp_path / "x", share_bodies=True, body=other, weights={"b": "none"}, crop=32))


def test_other_fusions_train_and_predict(manifest, tmp_path):
    from featurecache.data.manifest import read_manifest
    from featurecache.joint.predict import predict_joint

    run = finetune_joint(config(manifest, tmp_path / "run", fusion="mean", epochs=1, freeze_epochs=0))
    found = predict_joint(run, read_manifest(config(manifest, None)), device="cpu", trust=("plugin_joint:tiny",))
    np.testing.assert_allclose(found.scores[:, 1], run.predictions["p:yes"].to_numpy(), atol=1e-6)


def test_several_images_of_a_view(tmp_path):
    write_samples(tmp_path, 40, extra=1)
    run = finetune_joint(
        config(
            tmp_path / "long.csv", tmp_path / "run", layout="long", view_column="view", path_column="path",
            multi="mean", epochs=1, freeze_epochs=0,
        )
    )  # fmt: skip
    assert run.predictions.height == 40


def test_bf16_trains_too(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run", precision="bf16", epochs=2))
    assert run.record["precision"] == "bf16"
    assert np.isfinite(run.history["train_loss"].to_numpy()).all()
    state = load_file(run.path / "bodies" / "a.safetensors")
    assert state["features.0.weight"].dtype == torch.float32


def test_a_loss_that_is_not_finite_ends_the_training(manifest, tmp_path):
    with pytest.raises(FeatureCacheError, match=r"the loss is not finite in epoch \d+. Lower lr and body_lr"):
        finetune_joint(config(manifest, tmp_path / "run", lr=1e30, body_lr=1e30, freeze_epochs=0, clip=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0, "freeze_epochs": 0}, "nothing would be trained"),
        ({"lr": 0.0, "body_lr": -1.0}, r"lr=0.0: must be above 0, or 'find'\n.*body_lr=-1.0"),
        ({"view_dropout": 1.0}, r"view_dropout=1.0: must be in \[0, 1\)"),
        ({"batch_size": 1}, "batch_size=1: must be at least 2"),
        ({"out": None, "resume": True}, "--resume needs --out"),
        ({"target": ()}, "no target: give --target COLUMN, or --init RUN"),
        ({"fusion": "concatenate"}, "unknown fusion 'concatenate'. Did you mean 'concat'"),
        ({"augment": ("flop",)}, "unknown augmentation 'flop'. Did you mean 'flip'"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"settings": {"droput": 0.1}}, "unknown key 'droput'. Did you mean 'dropout'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(manifest, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        finetune_joint(
            config(manifest, tmp_path / "run", **changes) if "out" not in changes else config(manifest, **changes)
        )
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run.tmp").exists()


def test_a_run_of_python_says_so_and_holds_no_path_of_this_machine(run, manifest):
    assert load_run(run.path).command == ""
    assert str(manifest.parent) not in (run.path / "report.html").read_text(encoding="utf-8")
    assert pl.read_csv(run.path / "splits.csv").columns == ["sample_id", "group", "split"]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["epoch 3/", "validation 4/", "predict"])
def test_sigkill_and_resume_give_the_weights_of_the_uninterrupted_run(manifest, tmp_path, run, at):
    out = tmp_path / "run"
    kill_at(config(manifest, out), tmp_path / "joint.toml", at)
    assert (tmp_path / "run.tmp" / "checkpoint" / "state.safetensors").is_file()
    resumed = finetune_joint(config(manifest, out, resume=True))
    for name in ("head.safetensors", "bodies/a.safetensors", "bodies/b.safetensors", "predictions.csv"):
        assert (resumed.path / name).read_bytes() == (run.path / name).read_bytes(), name
