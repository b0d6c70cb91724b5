"""Logistic and ridge regression over chunks of rows: the optimum of scikit-learn's objective in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurecache.data.targets import Target
from featurecache.heads.lbfgs import Vector, minimise_together

Matrix = NDArray[np.float64]
Chunks = Callable[[], Iterator[tuple[slice, Matrix]]]
Solution = tuple[dict[str, NDArray[Any]], dict[str, Any]]


@dataclass
class Streamed:
    """Fits of one target by passes over standardised rows; each C starts from the solution of the one before.

    Attributes:
        chunks: gives positions and standardised rows with indicators, (rows, width) float64, from the start each time.
        width: of a row.
        target: of all n rows.
        w: (n,) or (n, n_names) weights, 0 where unknown.
        active: columns of the labels or targets that are trained.
        tol, max_iter: see `LogisticSettings`.
        largest: bytes that ridge's matrix of products may take; above it ridge runs L-BFGS too.
    """

    chunks: Chunks
    width: int
    target: Target
    w: Matrix
    active: NDArray[np.int64]
    tol: float
    max_iter: int
    largest: int = 1 << 30

    def __post_init__(self) -> None:
        values = self.target.values
        if self.target.task in ("binary", "multiclass"):
            self._index = np.unique(values)
            y = np.searchsorted(self._index, values)
            self._softmax = len(self._index) > 2
            self._y: NDArray[Any] = y if self._softmax else y[:, None]
            self._weights = self.w[:, None]
        else:
            self._index, self._softmax = self.active, False
            known = self.w[:, self.active] > 0
            self._y = np.where(known, values[:, self.active], 0.0)
            self._weights = self.w[:, self.active]
        outputs = len(self._index) if self._softmax else self._y.shape[1]
        self._fits = 1 if self._softmax else outputs
        self._points = [np.zeros((outputs // self._fits) * (self.width + 1)) for _ in range(self._fits)]
        self._products: list[tuple[NDArray[np.int64], Matrix, Matrix]] = []

    def solve(self, c: float) -> Solution:
        """Coefficients at one C, and iterations, passes and whether all fits converged."""
        if self.target.task == "regression" and 8 * self.width**2 <= self.largest:
            return self._ridge(c)
        total = self._weights.sum(axis=0)[: self._fits]

        def evaluate(numbers: list[int], points: Matrix) -> tuple[Vector, Matrix]:
            return self._pass(np.array(numbers), points, c, total)

        minima, passes = minimise_together(evaluate, self._points, tol=self.tol, max_iter=self.max_iter)
        self._points = [minimum.x for minimum in minima]
        found = np.concatenate([point.reshape(-1, self.width + 1) for point in self._points])
        arrays = {"coef": found[:, :-1].copy(), "intercept": found[:, -1].copy(), "index": self._index.astype(np.int64)}
        return arrays, {
            "iterations": max(minimum.iterations for minimum in minima),
            "converged": all(minimum.converged for minimum in minima),
            "passes": passes,
        }

    def _pass(self, numbers: NDArray[np.int64], points: Matrix, c: float, total: Vector) -> tuple[Vector, Matrix]:
        """Mean loss plus penalty, and gradients, of some of the fits; as scikit-learn scales them."""
        theta = points.reshape(-1, self.width + 1)
        value, gradient = np.zeros(len(theta)), np.zeros_like(theta)
        for where, z in self.chunks():
            raw = z @ theta[:, :-1].T + theta[:, -1]
            if self._softmax:
                losses, slope = _softmax(raw, self._y[where])
                weight = self._weights[where]
                value[0] += float(losses @ weight[:, 0])
            else:
                y, weight = self._y[where][:, numbers], self._weights[where][:, numbers]
                losses, slope = _squared(raw, y) if self.target.task == "regression" else _logistic(raw, y)
                value += (losses * weight).sum(axis=0)
            slope *= weight
            gradient[:, :-1] += slope.T @ z
            gradient[:, -1] += slope.sum(axis=0)
        scale = total[numbers]
        value = value[: len(numbers)] / scale
        coef = theta[:, :-1].reshape(len(numbers), -1)
        value += (coef**2).sum(axis=1) / (2 * c * scale)
        rows = np.repeat(scale, len(theta) // len(numbers))[:, None]
        gradient /= rows
        gradient[:, :-1] += theta[:, :-1] / (c * rows)
        return value, gradient.reshape(points.shape)

    def _ridge(self, c: float) -> Solution:
        """From products of centred columns, summed in one pass for all targets that are known in the same rows."""
        if not self._products:
            known = self._weights > 0
            _, pattern = np.unique(known, axis=1, return_inverse=True)
            self._products = [
                (columns, *self._sum_products(columns))
                for columns in (np.flatnonzero(pattern.ravel() == kind) for kind in range(int(pattern.max()) + 1))
            ]
        coef, intercept = np.empty((self._fits, self.width)), np.empty(self._fits)
        for columns, products, means in self._products:
            left = products[: self.width, : self.width] + np.eye(self.width) / c
            coef[columns] = np.linalg.solve(left, products[: self.width, self.width :]).T
            intercept[columns] = means[self.width :] - coef[columns] @ means[: self.width]
        arrays = {"coef": coef, "intercept": intercept, "index": self._index.astype(np.int64)}
        return arrays, {"iterations": 0, "converged": True, "passes": len(self._products)}

    def _sum_products(self, columns: NDArray[np.int64]) -> tuple[Matrix, Vector]:
        """(width, width + targets) products of features with features and targets, centred, and the means of both."""
        known = self._weights[:, columns[0]] > 0
        size = self.width + len(columns)
        products, sums, count = np.zeros((self.width, size)), np.zeros(size), max(int(known.sum()), 1)
        shift = self._y[known][:, columns].mean(axis=0)  # or targets far from 0 would lose digits below
        for where, z in self.chunks():
            rows = known[where]
            both = np.hstack([z[rows], self._y[where][rows][:, columns] - shift])
            products += both[:, : self.width].T @ both
            sums += both.sum(axis=0)
        means = sums / count
        products -= count * np.outer(means[: self.width], means)
        means[self.width :] += shift
        return products, means


def _logistic(raw: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Log loss of logits and its slope."""
    small = np.exp(-np.abs(raw))
    p = np.where(raw >= 0, 1.0, small) / (1.0 + small)
    return np.maximum(raw, 0) - raw * y + np.log1p(small), p - y


def _squared(raw: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Half the squared error and its slope."""
    error = raw - y
    return error**2 / 2, error


def _softmax(raw: Matrix, y: NDArray[np.int64]) -> tuple[Vector, Matrix]:
    """Log loss (n,) of class y and its slope (n, classes)."""
    raw = raw - raw.max(axis=1, keepdims=True)
    p = np.exp(raw)
    sums = p.sum(axis=1, keepdims=True)
    p /= sums
    at = np.arange(len(y))
    losses: Vector = np.log(sums[:, 0]) - raw[at, y]
    p[at, y] -= 1
    return losses, p
