"""Options of the schedule and the engine, by whole trainings of a tiny network."""

import shutil

import numpy as np
import pytest
import torch
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file

from featurecache.config import JointConfig
from featurecache.errors import InputError
from featurecache.joint.finetune import finetune_joint
from featurecache.progress import Silent
from featurecache.run import load_run

OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32",
    "device": "cpu", "workers": 1, "batch_size": 8, "lr": 5e-3, "body_lr": 1e-3, "freeze_epochs": 0, "epochs": 1,
    "settings": {"hidden": [8], "dropout": 0.2}, "bootstrap": 0, "augment": ("flip",),
}  # fmt: skip
FILES = ("head.safetensors", "bodies/a.safetensors", "bodies/b.safetensors", "predictions.csv")


def config(manifest, out, **changes):
    return JointConfig.create({**OPTIONS, "manifest": manifest, "out": out, **changes})


def weights(run):
    """All tensors of a run by file and name."""
    names = ("head.safetensors", "bodies/a.safetensors", "bodies/b.safetensors")
    return {f"{file}:{name}": t for file in names for name, t in load_file(run.path / file).items()}


def largest_difference(one, other):
    pairs = [(t, other[name]) for name, t in one.items() if t.is_floating_point()]
    return max(float((a - b).abs().max()) for a, b in pairs)


class Killed(Exception):
    pass


class KillAfter(Silent):
    """Ends the training after so many steps of an epoch."""

    def __init__(self, task, steps):
        self.task, self.left = task, steps

    def advance(self, task, n=1, *, status=""):
        if task.startswith(self.task):
            self.left -= 1
            if not self.left:
                raise Killed


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("training"), 48, seed=1)


@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory):
    """Never killed: two epochs with an average, mixing, two batches per step, a head and bodies that learn."""
    torch.set_num_threads(1)
    return finetune_joint(config(manifest, tmp_path_factory.mktemp("whole") / "run", **RICH))


RICH = {"epochs": 2, "ema": 0.9, "accumulate": 2, "augment": ("flip", "mixup", "cutmix")}


@pytest.mark.parametrize(
    ("task", "steps"),
    [("epoch 2/", 2), *(pytest.param(*at, marks=pytest.mark.slow) for at in (("epoch 1/", 1), ("epoch 2/", 1)))],
)
def test_killed_within_an_epoch_and_resumed_is_bitwise_the_uninterrupted_run(manifest, tmp_path, whole, task, steps):
    out = tmp_path / "run"
    options = {**RICH, "checkpoint_every": "1"}
    with pytest.raises(Killed):
        finetune_joint(config(manifest, out, **options), reporter=KillAfter(task, steps))
    torch.randn(17)
    told = Notes()
    resumed = finetune_joint(config(manifest, out, resume=True, **RICH), reporter=told)
    assert told.notes[0] == f"resumed after epoch {int(task[6]) - 1} and {steps} steps"
    for name in FILES:
        assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert resumed.history.drop("seconds").equals(whole.history.drop("seconds"))


@pytest.mark.slow
def test_two_batches_per_step_are_one_batch_of_twice_the_size(manifest, tmp_path):
    plain = {"settings": {"hidden": [8], "dropout": 0.0, "batch_norm": False}, "view_dropout": 0.0}
    one = finetune_joint(config(manifest, tmp_path / "one", batch_size=8, **plain))
    two = finetune_joint(config(manifest, tmp_path / "two", batch_size=4, accumulate=2, **plain))
    assert largest_difference(weights(one), weights(two)) < 1e-5
    before = {f"bodies/{view}.safetensors:{name}": t for view in "ab" for name, t in tiny().state_dict().items()}
    assert largest_difference(before, weights(one)) > 1e-3


def test_layers_that_gradual_unfreezing_has_not_come_to_do_not_move(manifest, tmp_path):
    from featurecache.joint.schedule import make_phases

    phase = make_phases(0, 2, gradual=True)[0]
    assert [phase.depth(epoch, 3) for epoch in (1, 2)] == [2, 3]
    run = finetune_joint(
        config(manifest, tmp_path / "run", epochs=2, unfreeze="gradual", weight_decay=0.5, ema=0.9),
        reporter=KillAfterEpoch(manifest, tmp_path),
    )
    before, after = tiny().state_dict(), weights(run)
    moved = {name for name, t in before.items() if not torch.equal(t, after[f"bodies/a.safetensors:{name}"])}
    assert "features.0.weight" in moved


class KillAfterEpoch(Silent):
    """Looks into the checkpoint of the first epoch, where the lowest layers have not learnt yet."""

    def __init__(self, manifest, folder):
        self.path = folder / "run.tmp" / "checkpoint" / "state.safetensors"

    def begin(self, task, total, unit="images"):
        if task.startswith("epoch 2/"):
            held, before = load_file(self.path), tiny().state_dict()
            same = {
                name: torch.equal(held[f"model/bodies.0.module.{name}"], t)
                and torch.equal(held[f"average/bodies.0.module.{name}"], t)
                for name, t in before.items()
                if t.is_floating_point()
            }
            assert same["features.0.weight"]
            assert same["features.1.weight"]
            assert same["features.1.running_mean"]
            assert not same["features.6.weight"]


def test_the_average_of_the_weights_is_what_is_judged_and_kept(manifest, tmp_path, monkeypatch):
    from featurecache.joint import loop

    seen = {}

    def look(directory, state):
        name = "head.layers.0.weight"
        seen.update(average=state.average[name].clone(), live=state.model[name].clone(), steps=state.progress.averaged)

    monkeypatch.setattr(loop, "save_state", look)
    finetune_joint(config(manifest, tmp_path / "run", ema=0.95))
    kept = load_file(tmp_path / "run" / "head.safetensors")["layers.0.weight"]
    assert torch.equal(kept, seen["average"])
    assert not torch.equal(kept, seen["live"])
    assert seen["steps"] > 3


@pytest.mark.slow
def test_early_stopping_ends_a_phase_once_the_loss_no_longer_falls(manifest, tmp_path):
    told = Notes()
    run = finetune_joint(
        config(manifest, tmp_path / "run", epochs=8, lr=1e-9, body_lr=1e-9, patience=1, view_dropout=0.0), reporter=told
    )
    assert 2 < len(run.history) < 8
    assert any("the unfrozen phase ends here" in note for note in told.notes)


@pytest.mark.slow
def test_the_finder_writes_its_curve_and_its_suggestion_is_used(manifest, tmp_path):
    told = Notes()
    options = {"lr": "find", "freeze_epochs": 1, "epochs": 0}
    run = finetune_joint(config(manifest, tmp_path / "run", **options), reporter=told)
    curve = np.genfromtxt(run.path / "lr_find.csv", delimiter=",", names=True)
    assert curve.dtype.names == ("lr", "loss", "smoothed_loss")
    assert (np.diff(curve["lr"]) > 0).all()
    assert (run.path / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    suggested = float(told.notes[0].split()[2].rstrip(","))
    assert run.history["lr"][0] == pytest.approx(suggested, rel=0.06)
    assert 1e-6 < suggested < 0.1
    before = tiny().state_dict()
    after = load_file(run.path / "bodies" / "a.safetensors")
    assert all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_bodies_learn_the_same_weights(manifest, tmp_path):
    plain = finetune_joint(config(manifest, tmp_path / "plain"))
    compiled = finetune_joint(config(manifest, tmp_path / "compiled", compile=True))
    assert compiled.config["compile"]
    assert largest_difference(weights(plain), weights(compiled)) < 1e-4


@pytest.mark.slow
def test_recomputed_activations_change_no_weight(manifest, tmp_path):
    plain = finetune_joint(config(manifest, tmp_path / "plain"))
    less = finetune_joint(config(manifest, tmp_path / "less", checkpoint_activations=True))
    assert largest_difference(weights(plain), weights(less)) == 0
    assert load_run(less.path).config["checkpoint_activations"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "fnd"}, r"lr: Input should be a valid number.* or 'find'"),
        ({"body_lr": "1e-3:1e-5"}, r"body_lr=0.001:1e-05: must be above 0, the lowest layers' first"),
        ({"warm_up": 1.0, "ema": -0.1}, r"warm_up=1.0: must be in \[0, 1\)\n.*ema=-0.1"),
        ({"accumulate": 0, "patience": 0}, r"accumulate=0: must be at least 1\n.*patience=0"),
        ({"checkpoint_every": "10x"}, r"checkpoint_every='10x': give steps \(200\), a time"),
        ({"settings": {"epochs": 3, "mixup": 0.1}}, r"epochs is of fit-head. Give --epochs.\n.*Give --augment mixup"),
        ({"augment": {"c": ["flip"]}}, r"--augment c=...: no view 'c'"),
        ({"augment": {"a": ["mixup"]}}, "--augment a=mixup: samples are mixed with all their views"),
        ({"augment": {"a": ["flop"]}}, "unknown augmentation 'flop'. Did you mean 'flip'"),
    ],
)
def test_bad_options_are_refused(manifest, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        finetune_joint(config(manifest, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
