import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import ArrayFeatures, Block, reading_order, shuffled_groups
from featurecache.features.stream import FeatureStream, RankSampler, share
from featurecache.heads.contract import ChunkedFeatures

N = 300
BLOCKS = (Block("a", "t", 0, 2, (2,)),)
X = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
TARGET = Target("binary", ("y",), ("no", "yes"), np.arange(N) % 2)


def chunked(buffer=100):
    return ChunkedFeatures(X, BLOCKS, most=buffer + 32, buffer_rows=buffer)


def rows_of(batches):
    """Which rows the batches hold; their targets are checked against them."""
    rows = torch.cat([x for x, _ in batches])[:, 0].long().numpy() // 2
    np.testing.assert_array_equal(torch.cat([y for _, y in batches]).numpy(), rows % 2)
    return rows


def test_groups_hold_whole_chunks_each_row_once():
    chunks = np.arange(N) // 32
    groups = shuffled_groups(chunks, 100, np.random.default_rng(0).permutation)
    assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(N))
    for group in groups[:-1]:
        assert 100 <= len(group) < 132
    for chunk in range(10):
        assert sum((chunks[group] == chunk).any() for group in groups) == 1
    plain = shuffled_groups(chunks, N, np.random.default_rng(0).permutation)
    assert np.array_equal(plain[0], np.random.default_rng(0).permutation(N))
    assert shuffled_groups(chunks[:0], 10, np.random.default_rng(0).permutation) == []


def test_rows_are_reordered_only_where_chunks_would_be_read_over_and_over():
    features, shuffled = chunked(), np.random.default_rng(0).permutation(N)
    in_place = np.arange(5, N)
    assert np.array_equal(reading_order(features, in_place), np.arange(N - 5))
    assert (np.diff(shuffled[reading_order(features, shuffled)] // 32) >= 0).all()
    for random_access in (ArrayFeatures(X, BLOCKS), ChunkedFeatures(X, BLOCKS, buffer_rows=None)):
        assert np.array_equal(reading_order(random_access, shuffled), np.arange(N))


@pytest.mark.parametrize("features", [chunked(), ArrayFeatures(X, BLOCKS)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_once_an_epoch(features, shuffle):
    rows = np.arange(7, N)[::-1].copy()
    found = rows_of(list(FeatureStream(features, TARGET, rows, batch_size=16, shuffle=shuffle)))
    assert np.array_equal(np.sort(found), np.sort(rows))
    assert np.array_equal(found, rows) != shuffle


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        stream = FeatureStream(chunked(), TARGET, batch_size=16, seed=seed)
        stream.set_epoch(epoch)
        return rows_of(list(stream)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_persistent_workers_bring_the_same_batches_and_hear_of_the_epoch():
    stream = FeatureStream(chunked(), TARGET, batch_size=16)
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        by_worker = {tuple(x[:, 0].tolist()) for x, _ in loader}
        assert by_worker == {tuple(x[:, 0].tolist()) for x, _ in stream}
        seen.append(by_worker)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_rows(ranks):
    def parts(pad):
        return [
            rows_of(list(FeatureStream(chunked(), TARGET, np.arange(N - 1), rank=rank, ranks=ranks, pad=pad)))
            for rank in range(ranks)
        ]

    assert np.array_equal(np.sort(np.concatenate(parts(False))), np.arange(N - 1))
    padded = parts(True)
    assert len({len(part) for part in padded}) == 1
    assert set(np.concatenate(padded)) == set(range(N - 1))


def test_sampler_shares_as_torch_does_but_repeats_nothing():
    for n, ranks in ((10, 2), (11, 2), (3, 4)):
        whole = [list(RankSampler(n, rank, ranks, shuffle=True, seed=1)) for rank in range(ranks)]
        assert sorted(row for part in whole for row in part) == list(range(n))
        for rank in range(ranks):
            torchs = torch.utils.data.DistributedSampler(range(n), ranks, rank, shuffle=False)
            assert list(RankSampler(n, rank, ranks, shuffle=False, pad=True)) == list(torchs)
            assert len(RankSampler(n, rank, ranks, shuffle=False, pad=True)) == len(torchs)
    sampler = RankSampler(50, 0, 2, shuffle=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert share(np.arange(3), 3, 4, pad=False).tolist() == []


def test_what_is_wrong_is_said():
    with pytest.raises(InputError, match="rank=2: must be from 0 to 1, ranks=2"):
        FeatureStream(chunked(), rank=2, ranks=2)
    with pytest.raises(InputError, match="batch_size=0: must be at least 1"):
        FeatureStream(chunked(), batch_size=0)


def test_an_error_of_the_reading_thread_reaches_the_caller():
    with pytest.raises(MemoryError, match="there is room for 10"):
        list(FeatureStream(ChunkedFeatures(X, BLOCKS, most=10, buffer_rows=100), TARGET))
