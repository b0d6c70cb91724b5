"""What a head learns from where there are replicas: the rows of the plain images, then those of each replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.errors import InputError
from featurecache.features.features import Features, as_float32
from featurecache.features.stored import Memory, StoreFeatures, ViewRows
from featurecache.store.binding import Binding
from featurecache.store.store import FeatureStore
from featurecache.upkeep.rebinding import short_list


class StackedFeatures:
    """Features of the same columns one below the other; see `featurecache.features.features.Stored`."""

    def __init__(self, parts: Sequence[StoreFeatures]) -> None:
        self._parts = tuple(parts)
        self.blocks = parts[0].blocks
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape: tuple[int, int] = (int(self._starts[-1]), parts[0].shape[1])
        self.dtype: np.dtype[Any] = np.result_type(*(part.dtype for part in parts))

    @property
    def buffer_rows(self) -> int | None:
        """See `Stored`."""
        found = [part.buffer_rows for part in self._parts if part.buffer_rows is not None]
        return min(found) if found else None

    @property
    def in_ram(self) -> bool:
        """See `Stored`."""
        return all(part.in_ram for part in self._parts)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(rows), n_features) float32; all of a block is NaN where the sample lacks that view."""
        return as_float32(self.gather(rows))

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """See `Stored`."""
        out = np.empty((len(rows), self.shape[1]), self.dtype) if out is None else out
        for part, here, own in self._split(rows):
            if len(own) == len(rows) and part.dtype == self.dtype:
                return part.gather(own, out)
            if len(own):
                out[here] = part[own] if self.dtype == np.float32 else part.gather(own)
        return out

    def chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Stored`; those of a later part have higher numbers."""
        found = np.empty(len(rows), dtype=np.int64)
        base = 0
        for part, here, own in self._split(rows):
            found[here] = base + part.chunks(own)
            base = int(found[here].max(initial=base)) + 1
        return found

    def complete(self, rows: NDArray[np.int64]) -> bool:
        """See `Stored`."""
        return all(part.complete(own) for part, _, own in self._split(rows))

    def _split(self, rows: NDArray[np.int64]) -> list[tuple[StoreFeatures, NDArray[np.int64], NDArray[np.int64]]]:
        """Per part: which of `rows` are its, and their numbers there."""
        rows = np.asarray(rows, dtype=np.int64)
        of = np.searchsorted(self._starts, rows, side="right") - 1
        found = []
        for number, part in enumerate(self._parts):
            here = np.flatnonzero(of == number)
            found.append((part, here, rows[here] - self._starts[number]))
        return found


@dataclass(frozen=True)
class Replicas:
    """The replicas of a dataset's images.

    Attributes:
        count: how many there are of each image.
        recipes: view -> id of the recipe of its replicas.
        features: plain rows first, then `count` times as many.
        held: (count, n_samples) bool: which samples have a replica of every view that they have.
    """

    count: int
    recipes: dict[str, str]
    features: Features
    held: NDArray[np.bool_]

    def to_json(self) -> dict[str, Any]:
        """As a run records it."""
        return {"count": self.count, "recipes": self.recipes}

    def rows_of(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of `features` that stand for some samples, the plain ones first, and the sample of each."""
        plain = self.held.shape[1]
        rows, owners = [samples], [samples]
        for number in range(self.count):
            some = samples[self.held[number, samples]]
            rows.append(some + (number + 1) * plain)
            owners.append(some)
        return np.concatenate(rows), np.concatenate(owners)


def find_replicas(
    store: FeatureStore,
    binding: Binding,
    plain: StoreFeatures,
    *,
    parts: Sequence[ViewRows],
    kept: NDArray[np.int64],
    memory: Memory,
    allow_partial: bool,
) -> Replicas | None:
    """The replicas that a dataset was extracted with; None where a view has none, or is read from another recipe.

    Args:
        store: of the dataset.
        binding: of the dataset.
        plain: its features.
        parts: its views, as `plain` has them.
        kept: rows of the binding's table that the dataset consists of.
        memory: as in FeatureDataset.
        allow_partial: leave out what is not there although extraction has not ended.

    Raises:
        InputError: replicas are not yet extracted.
    """
    named = binding.config.get("replicas") or {}
    if any(part.view not in named or part.info.id != binding.recipes[part.view] for part in parts):
        return None
    count = min(int(named[part.view]["count"]) for part in parts)
    known = {info.id for info in store.recipes()}
    drawn: list[ViewRows] = []
    held = np.ones((count, len(kept)), dtype=np.bool_)
    for part in parts:
        if named[part.view]["recipe"] not in known:
            raise not_extracted(binding, part.view, np.arange(binding.table.height))
        info = store.recipe(named[part.view]["recipe"])
        if not set(part.taps) <= set(info.taps):
            return None
        grids = []
        for number in range(count):
            cells = store.resolve(binding, part.view, recipe_id=info.id, replica=number)
            lacking = (cells.state == "pending") & (store.resolve(binding, part.view).rows >= 0)
            if not allow_partial and lacking.any():
                raise not_extracted(binding, part.view, cells.sample[lacking])
            grid = cells.grid(binding.table.height)[kept]
            held[number] &= ((grid >= 0) == (part.rows >= 0)).all(axis=1)
            grids.append(grid)
        drawn.append(replace(part, info=info, rows=np.concatenate(grids)))
    if memory != "auto":
        memory = max(0, memory - plain.nbytes)
    features = StackedFeatures([plain, StoreFeatures(store, drawn, binding.multi, memory)])
    return Replicas(count, {part.view: part.info.id for part in drawn}, features, held)


def not_extracted(binding: Binding, view: str, samples: NDArray[np.int64]) -> InputError:
    """An error that says of which samples."""
    ids = [str(name) for name in binding.sample_ids[np.unique(samples)]]
    return InputError(
        f"dataset {binding.name!r}: replicas of view {view!r} are not yet extracted (samples {short_list(ids)}). "
        "Run `featurecache extract` with --replicas again to complete them, or use --replicas none here, or take what "
        "is there with --allow-partial."
    )
