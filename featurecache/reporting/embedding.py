"""Features on a map: principal components in one pass after another, t-SNE on request, and who lies next to whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurecache.errors import InputError
from featurecache.features.features import Features, chunk_rows

COMPONENTS = 64  # enough to tell neighbours apart, few enough for 20,000 x 20,000 similarities in seconds
EXTRA = 8  # directions beside those that are kept, which make the subspace iteration settle faster
ROUNDS = 4
FEWEST_FOR_TSNE = 10


@dataclass(frozen=True)
class Components:
    """The directions in which features differ most.

    Attributes:
        mean: (d,) float32, of the samples that have the view.
        scale: (d,) float32: every view and tap is brought to the same total variance, so that none drowns the others.
        axes: (d, k) float32, orthonormal columns.
        explained: (k,) share of the variance along each.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    axes: NDArray[np.float32]
    explained: NDArray[np.float64]

    def project(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, d) features as (n, k) coordinates; a missing view counts as an average one."""
        placed: NDArray[np.float32] = self._even(x) @ self.axes
        return placed

    def _even(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        even: NDArray[np.float32] = np.nan_to_num((x - self.mean) * self.scale, nan=0.0)
        return even


def fit_components(
    features: Features, rows: NDArray[np.int64], *, k: int = COMPONENTS, seed: int = 0
) -> tuple[Components, NDArray[np.float32]]:
    """Principal components of some samples, by subspace iteration: six times through the rows, never all in memory.

    Args:
        features: of n samples, NaN where a view is missing.
        rows: (m,) which samples; at least one.
        k: how many components at most.
        seed: of the directions that the search starts from.

    Returns:
        The components, and the coordinates (m, k) of the samples; k is at least 2, filled up with zeros.
    """
    width = features.shape[1]
    mean, variance = _moments(features, rows)
    scale = np.zeros(width, dtype=np.float64)
    for block in features.blocks:
        total = variance[block.start : block.stop].sum()
        scale[block.start : block.stop] = 1 / np.sqrt(total) if total > 0 else 0.0
    found = min(k + EXTRA, len(rows), width)
    blank = Components(mean.astype(np.float32), scale.astype(np.float32), np.zeros((width, 0), np.float32), np.zeros(0))
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, found)).astype(np.float32))
    for _ in range(ROUNDS):
        gathered = np.zeros((width, found), dtype=np.float64)
        for x in _chunks(features, rows):
            even = blank._even(x)
            gathered += even.T @ (even @ axes)
        axes = np.linalg.qr(gathered)[0].astype(np.float32)
    coordinates = np.concatenate([blank._even(x) @ axes for x in _chunks(features, rows)])
    spread, turn = np.linalg.eigh(coordinates.T.astype(np.float64) @ coordinates)
    order = np.argsort(spread)[::-1][:k]
    axes = (axes @ turn[:, order]).astype(np.float32)
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1, 1)  # else a map may be turned
    whole = float((variance * scale**2).sum()) * len(rows)
    explained = spread[order] / whole if whole > 0 else np.zeros(len(order))
    short = max(2 - axes.shape[1], 0)
    axes = np.pad(axes, ((0, 0), (0, short)))
    components = Components(blank.mean, blank.scale, axes, np.pad(np.clip(explained, 0, 1), (0, short)))
    return components, np.concatenate([components.project(x) for x in _chunks(features, rows)])


def _chunks(features: Features, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    size = chunk_rows(features.shape[1])
    for start in range(0, len(rows), size):
        yield features[rows[start : start + size]]


def _moments(features: Features, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (d,) of each column over the samples that have it; 0 where none has."""
    width = features.shape[1]
    count, total, square = (np.zeros(width, dtype=np.float64) for _ in range(3))
    for x in _chunks(features, rows):
        wide = x.astype(np.float64)
        count += (~np.isnan(wide)).sum(axis=0)
        total += np.nansum(wide, axis=0)
        square += np.nansum(wide**2, axis=0)
    some = np.maximum(count, 1)
    mean = total / some
    return mean, np.maximum(square / some - mean**2, 0) * (count / len(rows))


def tsne(coordinates: NDArray[np.float32], *, seed: int = 0) -> NDArray[np.float32]:
    """(n, k) coordinates as (n, 2) by t-SNE, by scikit-learn.

    Raises:
        InputError: there are too few samples.
    """
    from sklearn.manifold import TSNE

    n = len(coordinates)
    if n < FEWEST_FOR_TSNE:
        raise InputError(f"--method tsne needs {FEWEST_FOR_TSNE} samples or more, found {n}. Use --method pca.")
    made = TSNE(n_components=2, init="pca", perplexity=min(30.0, (n - 1) / 3), random_state=seed, n_jobs=-1)
    return np.asarray(made.fit_transform(coordinates), dtype=np.float32)


def neighbours(coordinates: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest of each sample by the cosine of its coordinates, the nearest first.

    Args:
        coordinates: (n, d).
        k: how many; fewer where there are not that many others.

    Returns:
        (n, k) int64 positions, and their cosines (n, k) float32 in -1..1.
    """
    n = len(coordinates)
    k = max(min(k, n - 1), 0)
    length = np.linalg.norm(coordinates, axis=1, keepdims=True)
    unit = coordinates / np.where(length > 0, length, 1)
    near = np.empty((n, k), dtype=np.int64)
    cosine = np.empty((n, k), dtype=np.float32)
    size = max((64 << 20) // (4 * max(n, 1)), 1)
    for start in range(0, n if k else 0, size):
        part = np.arange(start, min(start + size, n))
        alike = unit[part] @ unit.T
        alike[np.arange(len(part)), part] = -np.inf
        best = np.argpartition(alike, n - k, axis=1)[:, n - k :]
        found = np.take_along_axis(alike, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        near[part] = np.take_along_axis(best, order, axis=1)
        cosine[part] = np.take_along_axis(found, order, axis=1)
    return near, np.clip(cosine, -1, 1)


def alike_pairs(near: NDArray[np.int64], cosine: NDArray[np.float32], least: float) -> list[tuple[int, int, float]]:
    """Pairs among the neighbours with a cosine of at least `least`, each once, the most alike first."""
    rows, places = np.nonzero(cosine >= least)
    found: dict[tuple[int, int], float] = {}
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        other = int(near[row, place])
        found[min(row, other), max(row, other)] = float(cosine[row, place])
    return sorted(((a, b, value) for (a, b), value in found.items()), key=lambda pair: (-pair[2], pair[0], pair[1]))
