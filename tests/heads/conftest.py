"""Small problems of every task with two views, and settings that fit each head to one in a blink."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from featurecache.data.targets import Target
from featurecache.features import ArrayFeatures, Block
from featurecache.heads.base import Fold

FAST = {
    "fc": {"epochs": 8, "hidden": (16,), "lr": 0.02},
    "logistic": {},
    "xgboost": {"n_estimators": 12, "max_depth": 3, "max_bin": 32, "nthread": 1, "learning_rate": 0.3},
}
WIDTHS = (6, 3, 5)


@dataclass(frozen=True)
class Problem:
    features: ArrayFeatures
    target: Target

    def fold(self, start: int, stop: int) -> Fold:
        rows = np.arange(start, stop)
        return Fold(self.features, rows, self.target.subset(rows))

    @property
    def x(self) -> np.ndarray:
        return self.features.x

    @property
    def train(self) -> Fold:
        return self.fold(0, 140)

    @property
    def valid(self) -> Fold:
        return self.fold(140, 190)

    @property
    def test(self) -> Fold:
        return self.fold(190, len(self.x))

    def with_values(self, values: np.ndarray) -> "Problem":
        return replace(self, target=replace(self.target, values=values))


def make_problem(
    task: str, *, n: int = 240, missing: float = 0.0, unknown: float = 0.0, labels: int = 3, seed: int = 0
) -> Problem:
    rng = np.random.default_rng(seed)
    ends = np.cumsum(WIDTHS)
    views = (("front", "deep"), ("front", "shallow"), ("side", "deep"))
    blocks = tuple(
        Block(view, tap, int(end) - width, int(end), (width,))
        for (view, tap), width, end in zip(views, WIDTHS, ends, strict=True)
    )
    x = rng.normal(size=(n, ends[-1])).astype(np.float32)
    z = x @ rng.normal(size=(ends[-1], max(labels, 4))) + 0.1 * rng.normal(size=(n, max(labels, 4)))
    hidden = rng.random(n) < missing
    x[np.ix_(hidden & (rng.random(n) < 0.5), range(9, 14))] = np.nan
    x[np.ix_(hidden & ~np.isnan(x[:, 13]), range(9))] = np.nan
    lost = rng.random((n, labels)) < unknown
    if task == "binary":
        target = Target(task, ("y",), ("no", "yes"), np.where(lost[:, 0], -1, z[:, 0] > 0).astype(np.int64))
    elif task == "multiclass":
        values = np.where(lost[:, 0], -1, z[:, :3].argmax(axis=1)).astype(np.int64)
        target = Target(task, ("y",), ("a", "b", "c"), values)
    else:
        names = tuple(f"y{i}" for i in range(labels))
        values = z[:, :labels] > 0 if task == "multilabel" else 100 + 7 * z[:, :labels]
        target = Target(task, names, (), np.where(lost, np.nan, values).astype(np.float32))
    return Problem(ArrayFeatures(x, blocks), target)


@pytest.fixture
def problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture
def fast() -> dict[str, dict]:
    return FAST


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices on many threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)
