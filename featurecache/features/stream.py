"""Epochs over a dataset: batches from whole chunks with a shuffle buffer, and rows shared out between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import (
    Features,
    Stored,
    gather,
    group_rows,
    reading_order,
    shuffled_groups,
    spare_threads,
)

Batch = tuple[torch.Tensor, torch.Tensor]
Take = Callable[[int, int], torch.Tensor]
T = TypeVar("T")
R = TypeVar("R")


def read_ahead(read: Callable[[T], R], parts: Sequence[T]) -> Iterator[R]:
    """What `read` gives for each part; the next is read in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="featurecache-read") as pool:
        following = pool.submit(read, parts[0]) if parts else None
        for number in range(len(parts)):
            assert following is not None
            found = following.result()
            if number + 1 < len(parts):
                following = pool.submit(read, parts[number + 1])
            yield found
            del found


def read_groups(features: Features, groups: Sequence[NDArray[np.int64]]) -> Iterator[Take]:
    """For each group of rows a function that gives those from `start` to `stop`, a copy in the dtype as stored.

    It holds until the next is asked for. Where random rows are slow, a group is read in the order of the samples, which
    is mostly that of the chunks, into one of two buffers, the next one while the caller works on this one.
    """
    if not isinstance(features, Stored) or features.buffer_rows is None:
        yield from (partial(_gather_some, features, rows) for rows in groups)
        return
    stored: Stored = features
    shape = (max(map(len, groups), default=0), features.shape[1])
    buffers = [np.empty(shape, stored.dtype) for _ in groups[:2]]

    def read(number: int) -> Take:
        in_order = np.sort(groups[number])
        held = stored.gather(in_order, buffers[number % 2][: len(in_order)])
        return partial(_take_some, torch.from_numpy(held), torch.from_numpy(np.searchsorted(in_order, groups[number])))

    yield from read_ahead(read, range(len(groups)))


def _gather_some(features: Features, rows: NDArray[np.int64], start: int, stop: int) -> torch.Tensor:
    return torch.from_numpy(gather(features, rows[start:stop]))


def _take_some(held: torch.Tensor, order: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return held.index_select(0, order[start:stop])


class FeatureStream(IterableDataset[Batch]):
    """Batches of an epoch, read by whole chunks: for features that are compressed, far away, or larger than memory.

    Every sample comes exactly once an epoch, in an order that follows from seed and epoch alone, however the features
    are read. Give it to a DataLoader with `batch_size=None`; its workers share the groups of chunks, so they bring the
    same batches in another order.

    Args:
        features: what is read.
        target: of all its rows, or None; then batches have an empty target.
        rows: which of them; default all.
        batch_size: rows of a batch; the last one of a group of chunks may be smaller.
        shuffle: whole chunks in random order, and rows among those of a buffer.
        seed: of the order.
        rank, ranks: this process and how many there are. Each takes every `ranks`-th row of a group.
        pad: give all ranks equally many rows by taking some twice, as training with gradients in step needs; without it
            no row comes twice, as evaluation needs.

    Raises:
        InputError: `rank` is not below `ranks`, or the batch size is not positive.
    """

    def __init__(
        self,
        features: Features,
        target: Target | None = None,
        rows: NDArray[np.int64] | None = None,
        *,
        batch_size: int = 256,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pad: bool = False,
    ) -> None:
        check_rank(rank, ranks)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        self._features, self._target = features, target
        self._rows = np.arange(features.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._ranks, self._pad = rank, ranks, pad
        # Shared with the workers of a DataLoader, persistent ones too, which hold a copy of all else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, as for a DistributedSampler."""
        self._epoch.fill_(epoch)

    def groups(self) -> list[NDArray[np.int64]]:
        """The rows of this rank, in groups that are read together, in the order of this epoch."""
        stored = self._features if isinstance(self._features, Stored) else None
        buffer = group_rows(self._features)
        if self._shuffle:
            chunks = stored.chunks(self._rows) if stored is not None else np.arange(len(self._rows)) // 1024
            generator = np.random.default_rng([self._seed, int(self._epoch)])
            found = shuffled_groups(chunks, buffer, generator.permutation)
        else:
            order = reading_order(self._features, self._rows)
            found = [order[start : start + buffer] for start in range(0, len(order), buffer)]
        shares = [share(group, self._rank, self._ranks, pad=self._pad) for group in found]
        return [self._rows[group] for group in shares if len(group)]

    def __iter__(self) -> Iterator[Batch]:
        spare_threads()  # this thread's are not those of the thread that reads ahead
        groups, worker = self.groups(), get_worker_info()
        if worker is not None:
            groups = groups[worker.id :: worker.num_workers]
        for rows, take in zip(groups, read_groups(self._features, groups), strict=True):
            for start in range(0, len(rows), self._batch_size):
                stop = start + self._batch_size
                features = take(start, stop).float()
                target = torch.empty(len(features), 0)
                if self._target is not None:
                    target = torch.as_tensor(self._target.values[rows[start:stop]])
                yield features, target


class RankSampler(Sampler[int]):
    """DistributedSampler's share of the rows, that repeats none unless told to.

    Args:
        n: rows.
        rank, ranks: this process, and how many there are.
        shuffle: by seed and epoch, else in order.
        seed: of the order.
        pad: give all ranks equally many rows by taking some twice (training); without it each comes once (evaluation).

    Raises:
        InputError: `rank` is not below `ranks`.
    """

    def __init__(self, n: int, rank: int, ranks: int, *, shuffle: bool, seed: int = 0, pad: bool = False) -> None:
        check_rank(rank, ranks)
        self._n, self._rank, self._ranks = n, rank, ranks
        self._shuffle, self._seed, self._pad = shuffle, seed, pad
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._epoch = epoch

    def _share(self) -> NDArray[np.int64]:
        order = np.arange(self._n)
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._n)
        return share(order, self._rank, self._ranks, pad=self._pad)

    def __iter__(self) -> Iterator[int]:
        return iter(self._share().tolist())

    def __len__(self) -> int:
        return len(self._share())


def share(rows: NDArray[np.int64], rank: int, ranks: int, *, pad: bool) -> NDArray[np.int64]:
    """Every `ranks`-th row from `rank` on; padded with rows from the start to equal length if asked."""
    if pad and len(rows) % ranks:
        rows = np.resize(rows, -(-len(rows) // ranks) * ranks)
    return rows[rank::ranks]


def check_rank(rank: int, ranks: int) -> None:
    """Refuse a rank that there is not."""
    if not 0 <= rank < ranks:
        raise InputError(f"rank={rank}: must be from 0 to {ranks - 1}, ranks={ranks}")
