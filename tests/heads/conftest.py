"""Small problems of every task with two views, and settings that fit each head to one in a blink."""

from collections.abc import Callable

import pytest
import torch
from threadpoolctl import threadpool_limits

from featurecache.heads.contract import Problem, make_problem

FAST = {
    "fc": {"epochs": 8, "hidden": (16,), "lr": 0.02},
    "logistic": {},
    "xgboost": {"n_estimators": 12, "max_depth": 3, "max_bin": 32, "nthread": 1, "learning_rate": 0.3},
}


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
