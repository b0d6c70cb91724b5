"""What the heads that are trained in epochs share; each test runs for both."""

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from featurecache.data.dense import DenseTarget
from featurecache.data.targets import Target
from featurecache.errors import FeatureCacheError, InputError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.heads.base import Fold, get_head, load_head
from featurecache.heads.decoder import DenseLoss
from featurecache.heads.epochs import batch_bounds, mean_loss, one_cycle
from featurecache.heads.losses import HeadLoss, target_tensor

SMALL = {"fc": {"hidden": (2,)}, "decoder": {"width": 16, "batch_size": 8, "label_smoothing": 0.2}}

both = pytest.mark.parametrize("name", sorted(SMALL))


def folds(name, n=20, n_valid=6):
    """Training and validation rows; masks of four pixels are what a map of one channel says, and a little noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n + n_valid, 4)).astype(np.float32)
    noisy = x + 0.5 * rng.normal(size=x.shape)
    if name == "fc":
        shape = (4,)
        target = Target("regression", ("y",), (), noisy.sum(axis=1, keepdims=True).astype(np.float32))
    else:
        shape, masks, known = (1, 2, 2), (noisy > 0).astype(np.uint8).reshape(-1, 2, 2), np.ones(len(x), bool)
        target = DenseTarget("dense", ("mask",), ("0", "1"), masks, np.arange(len(x)), known, known)
    features = ArrayFeatures(x, (Block("front", "a", 0, 4, shape),))
    return [Fold(features, rows, target.subset(rows)) for rows in np.split(np.arange(n + n_valid), [n])]


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [(10, 4, [(0, 4), (4, 8), (8, 10)]), (9, 4, [(0, 4), (4, 9)]), (3, 2, [(0, 3)]), (2, 64, [(0, 2)])],
)
def test_no_batch_of_one_row(n, size, expected):
    assert batch_bounds(n, size) == expected


def test_one_cycle():
    rates = [one_cycle(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == rates[25] == pytest.approx(1)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(np.diff(rates[:26]) > 0)
    assert all(np.diff(rates[25:]) < 0)
    assert one_cycle(0, 1, 0.5) > 0


@both
def test_a_single_row_does_not_train(name):
    with pytest.raises(InputError, match=f"head '{name}' needs at least 2 training rows, got 1"):
        get_head(name)().fit(folds(name, n=1)[0])


@both
def test_patience_is_counted_from_the_end_of_the_warm_up(name, monkeypatch):
    def stops(settings, losses):
        rows = iter(losses)
        monkeypatch.setattr("featurecache.heads.epochs.mean_loss", lambda *_: next(rows))
        head = get_head(name)(SMALL[name] | settings).fit(*folds(name, n=8))
        return len(head.history_), head.fitted_["epoch"]

    assert stops({"epochs": 12, "patience": 3}, range(12)) == (3 + 3, 1)
    assert stops({"epochs": 12, "patience": 2}, [5, 6, 6, 6, 4, 7, 7]) == (7, 5)
    assert stops({"epochs": 5, "patience": 2}, range(5)) == (4, 1)


@both
def test_the_weights_are_those_of_the_best_epoch(name):
    train, valid = folds(name)
    head = get_head(name)(SMALL[name] | {"epochs": 16, "lr": 0.3, "patience": 2}).fit(train, valid)
    losses = [row["valid_loss"] for row in head.history_]
    best = int(np.argmin(losses))
    assert best + 1 == head.fitted_["epoch"] < len(losses)
    norm = next(layer for layer in head.module.modules() if isinstance(layer, _BatchNorm))
    batches = len(batch_bounds(len(train), 8 if name == "decoder" else 32))
    assert norm.num_batches_tracked == batches * head.fitted_["epoch"]  # the loss on validation rows changed nothing
    batch = torch.from_numpy(valid.features[valid.rows]), target_tensor(valid.target)
    loss = DenseLoss(valid.target) if name == "decoder" else HeadLoss(train.target)
    assert mean_loss(head.module, loss, [batch], head.summed) == pytest.approx(losses[best], rel=1e-6)


@both
def test_without_validation_the_last_epoch_is_kept(name):
    train, _ = folds(name)
    settings = SMALL[name] | {"epochs": 3, "patience": 1, "batch_size": 8, "lr": 0.01}
    head = get_head(name)(settings).fit(train)
    assert head.fitted_["epoch"] == len(head.history_) == 3
    assert [row["valid_loss"] for row in head.history_] == [None] * 3
    rates = [one_cycle(step, 9, 0.01) for step in (2, 5, 8)]  # the last of the three batches of each epoch
    assert [row["lr"] for row in head.history_] == rates
    assert not head.module.training
    fewer = get_head(name)(settings | {"epochs": 2}).fit(train)
    assert not torch.equal(next(fewer.module.parameters()), next(head.module.parameters()))


@both
def test_a_loss_that_is_not_finite(name):
    with pytest.raises(FeatureCacheError, match=rf"head '{name}': the loss is not finite in epoch \d+. Lower lr"):
        get_head(name)(SMALL[name] | {"lr": 1e30, "weight_decay": 0, "batch_norm": False}).fit(*folds(name))


@both
def test_a_module_trained_elsewhere_is_saved_as_any_other(name, tmp_path):
    train, valid = folds(name)
    head = get_head(name)(SMALL[name] | {"epochs": 1}, seed=3).fit(train)
    adopted = type(head).adopt(head.module, train.target, train.features.blocks, head.settings, seed=3)
    assert adopted.fitted_ == {key: value for key, value in head.fitted_.items() if key != "epoch"}
    adopted.save(tmp_path)
    assert np.array_equal(load_head(tmp_path).scores(valid.features.x), head.scores(valid.features.x))
