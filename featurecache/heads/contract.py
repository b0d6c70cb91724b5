"""The contract of a head as tests, for the package that brings one: subclass `HeadContract` and run pytest.

from featurecache.heads.contract import HeadContract

class TestMine(HeadContract):
    head = "mine"                    # as registered under the entry point `featurecache.heads`
    settings = {"epochs": 3}         # whatever makes it quick on 140 rows of 14 features
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from featurecache.data.targets import Target, TaskName
from featurecache.errors import InputError
from featurecache.features.features import ArrayFeatures, Block, Features, as_float32
from featurecache.heads.base import Fold, Head, get_head, load_head

BLOCKS = (
    Block("front", "deep", 0, 6, (6,)),
    Block("front", "shallow", 6, 9, (3,)),
    Block("side", "deep", 9, 14, (5,)),
)
TASKS: tuple[TaskName, ...] = ("binary", "multiclass", "multilabel", "regression")


@dataclass(frozen=True)
class Problem:
    """Made-up samples, of which the first 140 train and the next 50 validate."""

    features: ArrayFeatures
    target: Target

    def fold(self, start: int, stop: int, features: Features | None = None) -> Fold:
        """Some rows, read from other features if given."""
        rows = np.arange(start, stop)
        return Fold(features or self.features, rows, self.target.subset(rows))

    @property
    def x(self) -> NDArray[Any]:
        """(n, 14) features."""
        return self.features.x

    @property
    def train(self) -> Fold:
        """Rows to learn from."""
        return self.fold(0, 140)

    @property
    def valid(self) -> Fold:
        """Rows for early stopping."""
        return self.fold(140, 190)

    @property
    def test(self) -> Fold:
        """Rows for neither."""
        return self.fold(190, len(self.x))

    def with_values(self, values: NDArray[Any]) -> Problem:
        """The same with other targets."""
        return replace(self, target=replace(self.target, values=values))


def make_problem(
    task: TaskName, *, n: int = 240, missing: float = 0.0, unknown: float = 0.0, labels: int = 3, seed: int = 0
) -> Problem:
    """Two views, the first with two taps, and a target that follows from them but for a little noise.

    Args:
        task: of the target.
        n: samples.
        missing: share of the samples that lack one of the views.
        unknown: share of the target's values that are.
        labels: or targets of a regression.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    width = BLOCKS[-1].stop
    x = rng.normal(size=(n, width)).astype(np.float32)
    z = x @ rng.normal(size=(width, max(labels, 4))) + 0.1 * rng.normal(size=(n, max(labels, 4)))
    hidden = rng.random(n) < missing
    x[np.ix_(hidden & (rng.random(n) < 0.5), np.arange(9, 14))] = np.nan
    x[np.ix_(hidden & ~np.isnan(x[:, 13]), np.arange(9))] = np.nan
    lost = rng.random((n, labels)) < unknown
    if task == "binary":
        target = Target(task, ("y",), ("no", "yes"), np.where(lost[:, 0], -1, z[:, 0] > 0).astype(np.int64))
    elif task == "multiclass":
        best = np.where(lost[:, 0], -1, z[:, :3].argmax(axis=1)).astype(np.int64)
        target = Target(task, ("y",), ("a", "b", "c"), best)
    else:
        names = tuple(f"y{i}" for i in range(labels))
        values = z[:, :labels] > 0 if task == "multilabel" else 100 + 7 * z[:, :labels]
        target = Target(task, names, (), np.where(lost, np.nan, values).astype(np.float32))
    return Problem(ArrayFeatures(x, BLOCKS), target)


@dataclass(frozen=True)
class ChunkedFeatures:
    """Features that pretend to lie in compressed chunks of 32 rows, of which a head must not hold all at a time.

    Attributes:
        x: (n, d).
        blocks: of the columns.
        most: rows that may be asked for at a time; more is an error.
        buffer_rows: see `featurecache.features.features.Stored`.
        sizes: how many rows were asked for, each time.
    """

    x: NDArray[Any]
    blocks: tuple[Block, ...]
    most: int = 10**9
    buffer_rows: int | None = 10**9
    sizes: list[int] = field(default_factory=list)
    in_ram = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of `x`."""
        return np.dtype(self.x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_samples, n_features)."""
        return (self.x.shape[0], self.x.shape[1])

    def chunks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chunk of each row."""
        return rows // 32

    def complete(self, rows: NDArray[np.int64]) -> bool:
        """Whether none of these lacks a view."""
        return not np.isnan(self.x[rows]).any()

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows, if they are not too many."""
        if len(rows) > self.most:
            raise MemoryError(f"{len(rows)} rows were asked for at a time; there is room for {self.most}")
        self.sizes.append(len(rows))
        if out is None:
            return self.x[rows]
        out[:] = self.x[rows]
        return out

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same as float32."""
        return as_float32(self.gather(rows))


class HeadContract:
    """What every head must do.

    Attributes:
        head: its registered name.
        settings: of the head, to make it quick.
        tasks: which it is for.
        tolerance: of scores that should be equal but for rounding.
        better_than: share of right decisions on test rows (for a regression of the variance explained) that it must
            exceed.
    """

    head: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    tasks: ClassVar[tuple[TaskName, ...]] = TASKS
    tolerance: ClassVar[float] = 1e-5
    better_than: ClassVar[float] = 0.35

    def make(self, **options: Any) -> Head:
        """A new head."""
        return get_head(self.head)(self.settings, **options)

    def test_is_registered(self) -> None:
        """It is found by its name, and its settings refuse what they don't know."""
        kind = get_head(self.head)
        assert kind.name == self.head
        said = ""
        try:
            kind({"no such setting": 1})
        except InputError as error:
            said = str(error)
        assert "no such setting" in said, "an unknown setting was accepted"

    def test_learns(self) -> None:
        """It predicts test rows better than chance, and says how training went."""
        for task in self.tasks:
            data = make_problem(task)
            head = self.make().fit(data.train, data.valid)
            found, values = head.predict(data.x[data.test.rows]), data.test.target.values
            right = float(np.mean(found == values))
            if task == "regression":
                right = 1 - float(np.mean((found - values) ** 2) / np.var(values))
            assert right > self.better_than, f"{task}: {right:.2f}"
            assert head.history_, f"{task}: no history"
            assert all("train_loss" in row and "valid_loss" in row for row in head.history_)
            assert self.make().fit(data.train).history_[-1]["valid_loss"] is None, "valid_loss without validation rows"

    def test_scores_have_the_shape_of_the_task(self) -> None:
        """Float64 (n, outputs); probabilities in [0, 1], of classes summing to 1; no rows are no error."""
        for task in self.tasks:
            data = make_problem(task)
            head = self.make().fit(data.train, data.valid)
            scores = head.scores(data.x)
            assert scores.shape == (len(data.x), len(head.outputs)), task
            assert scores.dtype == np.float64
            assert head.scores(data.x[:0]).shape == (0, len(head.outputs))
            if task != "regression":
                assert np.array_equal(head.predict_proba(data.x), scores)
                assert ((scores >= 0) & (scores <= 1)).all()
            if task in ("binary", "multiclass"):
                np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)

    def test_saved_and_loaded_predicts_the_same_bits(self, tmp_path: Path) -> None:
        """Without pickle, and saving again gives the same bytes."""
        for task in self.tasks:
            data = make_problem(task, missing=0.3, unknown=0.1)
            head = self.make().fit(data.train, data.valid)
            head.save(tmp_path / task)
            loaded = load_head(tmp_path / task)
            assert np.array_equal(loaded.scores(data.x), head.scores(data.x))
            assert loaded.fitted_ == head.fitted_
            loaded.save(tmp_path / f"{task}-again")
            for name in ("head.json", head.file):
                first, second = (tmp_path / folder / name for folder in (task, f"{task}-again"))
                assert first.read_bytes() == second.read_bytes(), name

    def test_the_same_seed_gives_the_same_head(self) -> None:
        """Whatever else has drawn random numbers meanwhile."""
        data = make_problem(self.tasks[0], missing=0.2)
        fitted = []
        for state in (5, 6):
            random.seed(state)
            np.random.seed(state)
            torch.manual_seed(state)
            fitted.append(self.make(seed=3).fit(data.train, data.valid))
        first, second = fitted
        assert np.array_equal(first.scores(data.x), second.scores(data.x))
        assert first.history_ == second.history_

    def test_missing_views(self) -> None:
        """In training, and only afterwards; a row's scores don't depend on what its neighbours lack."""
        for task in self.tasks:
            data = make_problem(task, missing=0.5)
            head = self.make().fit(data.train, data.valid)
            together = head.scores(data.x)
            assert np.isfinite(together).all(), task
            alone = np.concatenate([head.scores(data.x[i : i + 1]) for i in range(0, len(data.x), 8)])
            np.testing.assert_allclose(alone, together[::8], rtol=self.tolerance, atol=self.tolerance)
        complete = make_problem(self.tasks[0])
        head = self.make().fit(complete.train, complete.valid)
        x = complete.x.copy()
        x[:, 9:] = np.nan
        assert np.isfinite(head.scores(x)).all()

    def test_unknown_targets_are_left_out(self) -> None:
        """Rows without a target change nothing."""
        for task in self.tasks:
            data = make_problem(task)
            values = data.target.values.copy()
            lost = np.arange(len(values)) % 5 == 0
            values[lost] = -1 if values.dtype == np.int64 else np.nan
            unknown = data.with_values(values)
            first = self.make().fit(unknown.train, unknown.valid)
            kept = [np.setdiff1d(fold.rows, np.flatnonzero(lost)) for fold in (data.train, data.valid)]
            folds = [Fold(data.features, rows, data.target.subset(rows)) for rows in kept]
            second = self.make().fit(*folds)
            assert np.array_equal(first.scores(data.x), second.scores(data.x)), task

    def test_validation_rows_teach_nothing(self) -> None:
        """The first row of the history, before validation can have stopped anything, is the same whatever they hold."""
        data, poisoned = make_problem(self.tasks[0]), make_problem(self.tasks[0])
        poisoned.x[140:] = 1e4
        first, second = (self.make().fit(some.train, some.valid).history_[0] for some in (data, poisoned))
        assert first["train_loss"] == second["train_loss"]

    def test_streaming_equals_in_ram(self) -> None:
        """From chunks, with no memory given; where there are more than 4,096 rows, never more than these at a time."""
        for task in self.tasks:
            data = make_problem(task, missing=0.2, unknown=0.1)
            in_ram = self.make().fit(data.train, data.valid)
            streamed = ChunkedFeatures(data.x, data.features.blocks)
            head = self.make(memory=0).fit(data.fold(0, 140, streamed), data.fold(140, 190, streamed))
            scores = head.score_rows(streamed)
            np.testing.assert_allclose(scores, in_ram.scores(data.x), rtol=1e-4, atol=self.tolerance, err_msg=task)
        data = make_problem(self.tasks[0], n=6000)
        small = ChunkedFeatures(data.x, data.features.blocks, most=4096, buffer_rows=1000)
        head = self.make(memory=0).fit(data.fold(0, 5000, small), data.fold(5000, 5500, small))
        assert np.isfinite(head.score_rows(small)).all()
