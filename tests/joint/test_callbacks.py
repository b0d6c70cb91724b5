import sys

import polars as pl
import pytest
import torch

from featurecache.errors import DependencyError
from featurecache.joint.callbacks import Callbacks, HistoryFile, TensorBoard


class Listener:
    def __init__(self):
        self.told = []

    def on_step(self, step, loss, rate):
        self.told.append(("step", step, float(loss), rate))

    def on_epoch(self, history):
        self.told.append(("epoch", history[-1]["epoch"]))

    def close(self):
        self.told.append("closed")


def test_history_is_written_while_training_and_replaced_whole(tmp_path):
    listener = Listener()
    both = Callbacks([HistoryFile(tmp_path), listener])
    start = {"epoch": 0, "phase": "start", "train_loss": None, "valid_loss": 1.5}
    both.on_epoch([start])
    both.on_step(3, torch.tensor(0.5), 1e-3)
    both.on_epoch([start, {"epoch": 1, "phase": "unfrozen", "train_loss": 0.25, "valid_loss": 1.0}])
    both.close()
    table = pl.read_csv(tmp_path / "history.csv")
    assert table["train_loss"].to_list() == [None, 0.25]
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]
    assert listener.told == [("epoch", 0), ("step", 3, 0.5, 1e-3), ("epoch", 1), "closed"]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DependencyError, match=r"pip install 'featurecache\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_steps_and_epochs(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, every=2)
    for step in range(1, 5):
        board.on_step(step, torch.tensor(1.0 / step), 1e-3)
    board.on_epoch([{"epoch": 1, "phase": "unfrozen", "train_loss": 0.25, "valid_loss": None}])
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(2, 0.5), (4, 0.25)]
    assert events.Scalars("epoch/train_loss")[0].value == 0.25
