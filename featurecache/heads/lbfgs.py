"""L-BFGS for several independent smooth problems whose values and gradients come from one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Answer = tuple[float, Vector]
Evaluate = Callable[[list[int], Vector], tuple[Vector, Vector]]

PAIRS = 10  # of steps and gradient changes that are kept
ARMIJO, WOLFE = 1e-4, 0.9
TRIALS = 30  # in one line search
ROUNDING = 1e-14  # relative: the value can't be told more exactly than that


@dataclass(frozen=True)
class Minimum:
    """Where a search ended, after how many steps, and whether no component of the gradient is above the tolerance."""

    x: Vector
    iterations: int
    converged: bool


def minimise_together(
    evaluate: Evaluate, starts: list[Vector], *, tol: float, max_iter: int
) -> tuple[list[Minimum], int]:
    """Minimise several problems side by side; those that are done drop out.

    Args:
        evaluate: `(numbers, points)` -> values (k,) and gradients (k, p) of those problems at those points (k, p), by
            one pass over the data.
        starts: where each search begins, (p,) each.
        tol: bound on the largest component of the gradient at the end.
        max_iter: steps.

    Returns:
        The minima, and how many passes it took.
    """
    searches = [_search(start, tol, max_iter) for start in starts]
    points = {number: next(search) for number, search in enumerate(searches)}
    found: dict[int, Minimum] = {}
    passes = 0
    while points:
        numbers = list(points)
        values, gradients = evaluate(numbers, np.stack([points[number] for number in numbers]))
        passes += 1
        for number, value, gradient in zip(numbers, values, gradients, strict=True):
            try:
                points[number] = searches[number].send((float(value), gradient))
            except StopIteration as end:
                found[number] = end.value
                del points[number]
    return [found[number] for number in range(len(starts))], passes


def _search(x: Vector, tol: float, max_iter: int) -> Generator[Vector, Answer, Minimum]:
    """One search, as a coroutine: yields points, is sent values and gradients (Nocedal and Wright, algorithm 7.5)."""
    value, gradient = yield x
    steps: list[Vector] = []
    changes: list[Vector] = []
    for iteration in range(max_iter):
        if np.abs(gradient).max() <= tol:
            return Minimum(x, iteration, True)
        direction = _direction(gradient, steps, changes)
        length = 1.0 if steps else min(1.0, 1.0 / float(np.abs(gradient).sum()))
        found = yield from _line(x, value, gradient, direction, length)
        if found is None:  # rounding hides any further descent
            return Minimum(x, iteration, False)
        new, value, new_gradient = found
        steps.append(new - x)
        changes.append(new_gradient - gradient)
        if float(steps[-1] @ changes[-1]) <= 0:  # no curvature seen: not a pair to learn from
            steps.pop()
            changes.pop()
        del steps[:-PAIRS], changes[:-PAIRS]
        x, gradient = new, new_gradient
    return Minimum(x, max_iter, bool(np.abs(gradient).max() <= tol))


def _direction(gradient: Vector, steps: list[Vector], changes: list[Vector]) -> Vector:
    """Minus the gradient times the inverse Hessian that the last steps suggest."""
    q = -gradient
    parts = []
    for step, change in zip(reversed(steps), reversed(changes), strict=True):
        rho = 1.0 / float(step @ change)
        part = rho * float(step @ q)
        q = q - part * change
        parts.append((step, change, rho, part))
    if steps:
        q = q * (float(steps[-1] @ changes[-1]) / float(changes[-1] @ changes[-1]))
    for step, change, rho, part in reversed(parts):
        q = q + (part - rho * float(change @ q)) * step
    return q


def _line(
    x: Vector, value: float, gradient: Vector, direction: Vector, length: float
) -> Generator[Vector, Answer, tuple[Vector, float, Vector] | None]:
    """A step that fulfils the weak Wolfe conditions, by doubling and halving; None if there is none."""
    slope = float(gradient @ direction)
    if slope >= 0:
        return None
    low, high = 0.0, np.inf
    slack = ROUNDING * abs(value)
    for _ in range(TRIALS):
        point = x + length * direction
        new, new_gradient = yield point
        if not new <= value + ARMIJO * length * slope + slack:
            high = length
        elif float(new_gradient @ direction) < WOLFE * slope:
            low = length
        else:
            return point, new, new_gradient
        length = 2 * length if np.isinf(high) else (low + high) / 2
    return None
