import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.heads.losses import (
    HeadLoss,
    class_weights,
    entry_weights,
    n_outputs,
    regression_scale,
    scores_from_outputs,
    target_tensor,
)

BINARY = Target("binary", ("y",), ("0", "1"), np.array([0, 0, 0, 1, -1]))
LABELS = Target("multilabel", ("a", "b"), (), np.array([[0, 1], [1, np.nan], [0, 1], [0, 0]], dtype=np.float32))
NUMBERS = Target("regression", ("u", "v"), (), np.array([[1, 10], [3, np.nan], [5, 30]], dtype=np.float32))


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=BINARY.values[:4])
    np.testing.assert_allclose(class_weights(BINARY, "balanced"), expected)
    np.testing.assert_allclose(class_weights(LABELS, "balanced"), [[4 / 6, 4 / 2], [3 / 2, 3 / 4]])
    assert class_weights(BINARY, None) is None


def test_named_weights():
    assert class_weights(BINARY, {"1": 3.0}).tolist() == [1, 3]
    assert class_weights(LABELS, {"b": 2.0}).tolist() == [[1, 1], [1, 2]]
    with pytest.raises(InputError, match=r"class_weight: no label 'c'\. There are: a, b\."):
        class_weights(LABELS, {"c": 1.0})
    with pytest.raises(InputError, match="class_weight: 'a'=0: must be positive"):
        class_weights(LABELS, {"a": 0})


def test_unknown_entries_weigh_nothing():
    assert entry_weights(BINARY, np.array([1.0, 3.0])).tolist() == [1, 1, 1, 3, 0]
    assert entry_weights(LABELS, np.array([[1.0, 4.0], [2.0, 5.0]])).tolist() == [[1, 5], [4, 0], [1, 5], [1, 2]]
    assert entry_weights(NUMBERS, None).tolist() == [[1, 1], [1, 0], [1, 1]]


def test_cross_entropy_over_known_rows():
    logits = torch.randn(5, 2)
    y = target_tensor(BINARY)
    loss = HeadLoss(BINARY, class_weight={"1": 3.0})
    expected = F.cross_entropy(logits[:4], y[:4], weight=torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(loss(logits, y), expected)
    smooth = HeadLoss(BINARY, label_smoothing=0.2)
    torch.testing.assert_close(smooth(logits, y), F.cross_entropy(logits[:4], y[:4], label_smoothing=0.2))
    torch.testing.assert_close(smooth.eval()(logits, y), F.cross_entropy(logits[:4], y[:4]))


def test_labels_over_known_entries():
    logits = torch.randn(4, 2, requires_grad=True)
    y = target_tensor(LABELS)
    known = ~y.isnan()
    loss = HeadLoss(LABELS)(logits, y)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits[known], y[known]))
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1, 1] == 0


def test_a_label_that_can_not_be_trained_has_no_gradient():
    values = np.array([[0, 1], [1, 1]], dtype=np.float32)
    logits = torch.randn(2, 2, requires_grad=True)
    target = Target("multilabel", ("a", "b"), (), values)
    HeadLoss(target)(logits, target_tensor(target)).backward()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, 0] != 0).all()


def test_squared_error_in_units_of_the_spread():
    outputs = torch.tensor([[1.0, 10.0], [3.0, 0.0], [5.0, 40.0]])
    mean, scale = regression_scale(NUMBERS)
    assert mean.tolist() == [3, 20]
    assert scale[1] == 10
    assert HeadLoss(NUMBERS)(outputs, target_tensor(NUMBERS)).item() == pytest.approx(1 / 5)
    constant = Target("regression", ("u",), (), np.full((3, 1), 7, dtype=np.float32))
    assert regression_scale(constant)[1].tolist() == [1]


@pytest.mark.parametrize("target", [BINARY, LABELS, NUMBERS])
def test_nothing_known_is_a_loss_of_zero(target):
    y = target_tensor(target)
    y = torch.full_like(y, -1 if y.ndim == 1 else torch.nan)
    outputs = torch.randn(len(y), n_outputs(target), requires_grad=True)
    loss = HeadLoss(target)(outputs, y)
    loss.backward()
    assert loss.item() == 0
    assert (outputs.grad == 0).all()


def test_batches_add_up():
    logits = torch.randn(5, 2)
    y = target_tensor(BINARY)
    loss = HeadLoss(BINARY, class_weight="balanced")
    parts = [loss.sums(logits[:2], y[:2]), loss.sums(logits[2:], y[2:])]
    torch.testing.assert_close(sum(p[0] for p in parts) / sum(p[1] for p in parts), loss(logits, y))


def test_scores():
    outputs = torch.randn(3, 2)
    np.testing.assert_allclose(scores_from_outputs("binary", outputs).sum(axis=1), 1, atol=1e-15)
    np.testing.assert_allclose(scores_from_outputs("multilabel", outputs), outputs.double().sigmoid())
    assert scores_from_outputs("regression", outputs).dtype == np.float64
