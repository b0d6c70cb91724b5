import pytest
import torch

from featurecache.errors import RunError
from featurecache.joint.checkpoint import FOLDER, STATE, Progress, State, load_best, load_state, save_best, save_state


def test_what_was_saved_is_loaded(tmp_path):
    progress = Progress(
        {"seed": 3}, epoch=2, best_epoch=1, best_loss=0.1 + 0.2, history=[{"epoch": 1, "x": None}], lr=1e-3, averaged=7,
        within={"step": 4, "loss": float(torch.tensor(1 / 3)), "failed": []},
    )  # fmt: skip
    conv = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    save_state(tmp_path, State(progress, {"conv": conv, "n": torch.tensor(5)}, {"conv/exp_avg": conv}, {"conv": -conv}))
    found = load_state(tmp_path)
    assert found.progress == progress
    assert torch.equal(found.model["conv"], conv)
    assert int(found.model["n"]) == 5
    assert list(found.optimizer) == ["conv/exp_avg"]
    assert torch.equal(found.average["conv"], -conv)
    assert not list(tmp_path.rglob("*.tmp"))


def test_shared_tensors_can_be_saved(tmp_path):
    shared = torch.arange(3.0)
    save_state(tmp_path, State(Progress({}), {"x": shared, "y": shared}))
    model = load_state(tmp_path).model
    assert torch.equal(model["x"], model["y"])


def test_best_weights_that_no_state_names_are_dropped(tmp_path):
    save_best(tmp_path, 1, {"x": torch.ones(1)})
    save_best(tmp_path, 2, {"x": torch.full((1,), 2.0)})  # killed before the state was committed
    save_state(tmp_path, State(Progress({}, epoch=1, best_epoch=1)))
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["best-1.safetensors", STATE]
    assert float(load_best(tmp_path, 1)["x"]) == 1.0


def test_nothing_saved_is_none_and_a_damaged_file_says_what_to_do(tmp_path):
    assert load_state(tmp_path) is None
    save_state(tmp_path, State(Progress({}), {"x": torch.ones(4)}))
    path = tmp_path / FOLDER / STATE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunError, match=r"not a checkpoint that can be read .* with --overwrite"):
        load_state(tmp_path)


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_state(tmp_path, State(Progress({}, epoch=1), {"x": torch.ones(4)}))
    monkeypatch.setattr("featurecache.joint.checkpoint.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path, State(Progress({}, epoch=2), {"x": torch.zeros(4)}))
    monkeypatch.undo()
    found = load_state(tmp_path)
    assert found.progress.epoch == 1
    assert torch.equal(found.model["x"], torch.ones(4))
