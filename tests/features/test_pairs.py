import numpy as np
import pytest
from torch.utils.data import DataLoader

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.features.pairs import PairDataset

N = 400
ROWS = np.arange(50, 50 + N)
CLASSES = np.random.default_rng(0).choice(3, N, p=[0.7, 0.2, 0.1])
FEATURES = ArrayFeatures(np.arange(500, dtype=np.float32)[:, None], (Block("a", "t", 0, 1, (1,)),))


def make(classes=CLASSES, **options):
    target = Target("multiclass", ("y",), ("p", "q", "r"), classes)
    return PairDataset(FEATURES, ROWS[: len(classes)], target, **options)


def unpack(pairs, workers=0):
    first, second, same = (
        np.concatenate([batch[i].numpy().ravel() for batch in DataLoader(pairs, batch_size=32, num_workers=workers)])
        for i in range(3)
    )
    return first.astype(int) - 50, second.astype(int) - 50, same


def test_each_row_with_a_partner_of_its_own_side():
    pairs = make()
    first, second, same = unpack(pairs)
    assert np.array_equal(first, np.arange(N))
    assert ((second >= 0) & (second < N)).all()
    assert np.array_equal(same, CLASSES[first] == CLASSES[second])
    assert (first != second).all()
    assert abs(same.mean() - 0.5) < 0.08
    assert pairs[3][1].shape == (1,)


@pytest.mark.parametrize("share", [0, 1, 0.2])
def test_share_of_the_same_class(share):
    assert abs(unpack(make(same=share))[2].mean() - share) < 0.06 * (0 < share < 1) + 1e-9


def test_partners_are_drawn_alike():
    """A partner of the same class is any other of it, of another class any of those."""
    classes = np.array([0, 1, 0, 1, 1, 0, 1, 2])
    counts = np.zeros((8, 8))
    pairs = make(classes)
    for epoch in range(2000):
        pairs.set_epoch(epoch)
        counts[np.arange(8), pairs.partners()] += 1
    alike = classes[:, None] == classes
    np.fill_diagonal(alike, False)
    np.testing.assert_allclose(counts[0, alike[0]], 1000 / 2, rtol=0.2)
    np.testing.assert_allclose(counts[1, alike[1]], 1000 / 3, rtol=0.2)
    np.testing.assert_allclose(counts[1, classes != 1], 1000 / 4, rtol=0.2)
    np.testing.assert_allclose(counts[7, :7], 2000 / 7, rtol=0.2)


def test_anew_each_epoch_or_fixed_and_the_same_in_workers():
    pairs, fixed = make(), make(fixed=True)
    first, kept = unpack(pairs)[1], unpack(fixed)[1]
    for some in (pairs, fixed):
        some.set_epoch(1)
    second = unpack(pairs)[1]
    assert (first != second).mean() > 0.9
    assert np.array_equal(unpack(pairs, workers=1)[1], second)
    assert np.array_equal(unpack(fixed)[1], kept)
    pairs.set_epoch(0)
    assert np.array_equal(unpack(pairs)[1], first)
    assert not np.array_equal(unpack(make(seed=1))[1], first)


def test_rows_of_unknown_class_are_left_out_and_a_lonely_row_is_paired_with_another_class():
    classes = np.array([0, 0, 0, -1, 1, 2, 2])
    pairs = make(classes)
    assert len(pairs) == 6
    for epoch in range(20):
        pairs.set_epoch(epoch)
        first, second, same = unpack(pairs)
        assert 3 not in second
        assert same[list(first).index(4)] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"same": 1.5}, "same=1.5: must be a share from 0 to 1"),
        ({"classes": np.zeros(5, np.int64)}, "pairs need rows of two classes; y has one here"),
    ],
)
def test_what_can_not_be_paired(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_regression_has_no_classes():
    target = Target("regression", ("size",), (), np.zeros((5, 1), np.float32))
    with pytest.raises(InputError, match="pairs need a binary or multiclass target; size is regression"):
        PairDataset(FEATURES, ROWS[:5], target)
