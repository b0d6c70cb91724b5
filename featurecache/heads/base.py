"""The contract that every head keeps, the registry, and what is saved beside a head's own file."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from featurecache import config
from featurecache.errors import InputError, RunError, did_you_mean
from featurecache.features.features import Block, Features, chunk_rows, reading_order
from featurecache.heads.fold import Fold, untrainable, with_target
from featurecache.heads.record import (
    PICKLE,
    RECORD,
    HeadRecord,
    check_file,
    first_line,
    is_pickle,
    read_record,
    write_record,
)
from featurecache.heads.space import Space

__all__ = ["Fold", "Head", "Progress", "get_head", "head_names", "load_head", "read_record", "untrainable"]

GROUP = "featurecache.heads"

# Ours are named like entry points, so that a head from elsewhere is found by the same route.
_BUILTIN = {
    name: EntryPoint(name, value, GROUP)
    for name, value in {
        "fc": "featurecache.heads.fc:FCHead",
        "logistic": "featurecache.heads.logistic:LogisticHead",
        "xgboost": "featurecache.heads.xgboost:XGBoostHead",
        "decoder": "featurecache.heads.decoder:DecoderHead",
    }.items()
}

Progress = Callable[[dict[str, Any]], None]


class Head(ABC):
    """An estimator on feature rows.

    A subclass sets `name`, `Settings`, `file` and writes `_fit`, `_scores`, `_write`, `_read`; it may put plain values
    that it needs again into `fitted_`. It never prints.

    Args:
        settings: the head's own settings; unknown keys are refused with the near name.
        seed: everything random follows from it.
        device: where the head computes, as in `cpu`, `cuda:0`.
        memory: bytes that the features may take in RAM; None decides by what is free.

    Attributes:
        task_, classes_, names_: those of the training target.
        blocks_: the columns that the head expects.
        skipped_: labels (multilabel) or targets (regression) that could not be trained and get NaN; for `multiclass`
            the classes without a training row, whose probability is 0.
        history_: a dict per epoch, round or fit.
        fitted_: plain values that are saved with the head.
    """

    name: ClassVar[str]
    input: ClassVar[Literal["vector", "maps"]] = "vector"
    Settings: ClassVar[type[config.Settings]]
    file: ClassVar[str]
    importance_kind: ClassVar[str] = ""
    search_space: ClassVar[Space] = {}
    tasks: ClassVar[tuple[str, ...]] = ("binary", "multiclass", "multilabel", "regression")

    task_: str
    classes_: tuple[str, ...]
    names_: tuple[str, ...]
    blocks_: tuple[Block, ...]
    skipped_: tuple[str, ...]
    history_: list[dict[str, Any]]
    fitted_: dict[str, Any]

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
        memory: int | None = None,
    ) -> None:
        self.settings = self.Settings.create(settings or {}, source=f"head {self.name!r}")
        self.seed = seed
        self.device = device
        self.memory = memory
        self._is_fitted = False

    @property
    def n_features(self) -> int:
        """Columns that the head expects."""
        return self.blocks_[-1].stop

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the columns of the scores stand for: classes, labels or targets."""
        return self.classes_ if self.task_ in ("binary", "multiclass") else self.names_

    @property
    def active(self) -> NDArray[np.int64]:
        """Columns of the labels or targets that were trained."""
        return np.array([i for i, name in enumerate(self.names_) if name not in self.skipped_], dtype=np.int64)

    @classmethod
    def check_task(cls, task: str) -> None:
        """Refuse what the head can't predict.

        Raises:
            InputError: says which head can.
        """
        if task not in cls.tasks:
            masks = "its target is a column of mask images" if "dense" in cls.tasks else f"only {', '.join(cls.tasks)}"
            other = "--head decoder predicts masks" if task == "dense" else masks
            raise InputError(f"head {cls.name!r} does not predict a {task} target; {other}")

    def fit(self, train: Fold, valid: Fold | None = None, *, progress: Progress | None = None) -> Self:
        """Train; rows without a known target are left out.

        Args:
            train: what to learn from.
            valid: for early stopping and for settings chosen by validation; never learned from.
            progress: called with a row of `history_` as soon as it is there.

        Raises:
            InputError: the rows do not allow training (one class only, no known target, other columns in `valid`).
        """
        self.check_task(train.target.task)
        train = with_target(train, "training").to_read()
        valid = with_target(valid, "validation").to_read() if valid is not None else None
        if valid is not None and valid.features.blocks != train.features.blocks:
            raise InputError("training and validation features have different columns")
        target = train.target
        self.task_, self.classes_, self.names_ = target.task, tuple(target.classes), tuple(target.names)
        self.blocks_ = tuple(train.features.blocks)
        self.skipped_ = untrainable(target)
        if valid is not None and target.task in ("multilabel", "regression"):
            if np.isnan(valid.target.values[:, self.active]).all():
                raise InputError("validation: no label that can be trained has a known value")
        self.history_, self.fitted_ = [], {}
        self._progress = progress
        try:
            self._fit(train, valid)
        finally:
            self._progress = None
        self._is_fitted = True
        return self

    def scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """What the metrics take: probabilities, for regression the predicted values.

        Args:
            x: (n, n_features), NaN in the block of a missing view.

        Returns:
            (n, n_classes), rows summing to 1; multilabel (n, n_labels), each on its own; regression (n, n_targets).
            NaN in the columns of `skipped_` labels and targets.

        Raises:
            InputError: the head is not fitted, or `x` has another number of columns.
        """
        self._check_rows(x)
        size = chunk_rows(self.n_features)
        parts = [self._scores(np.asarray(x[i : i + size], dtype=np.float32)) for i in range(0, len(x), size)]
        found = np.concatenate(parts) if parts else np.empty((0, self._width), dtype=np.float64)
        if self.task_ in ("binary", "multiclass"):
            if self.skipped_:
                found[:, [self.classes_.index(name) for name in self.skipped_]] = 0
                found /= found.sum(axis=1, keepdims=True)
            return found
        full = np.full((len(x), len(self.names_)), np.nan)
        full[:, self.active] = found
        return full

    def score_rows(self, features: Features, rows: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """`scores` of rows that need not fit into RAM; all rows by default."""
        rows = np.arange(features.shape[0]) if rows is None else np.asarray(rows, dtype=np.int64)
        found = self.scores(np.empty((0, features.shape[1]), dtype=np.float32))
        order, size = reading_order(features, rows), chunk_rows(features.shape[1])
        found = np.empty((len(rows), found.shape[1]))
        for start in range(0, len(rows), size):
            part = order[start : start + size]
            found[part] = self.scores(features[rows[part]])
        return found

    def importance(self) -> NDArray[np.float64] | None:
        """(n_features,) what each column adds to the predictions, in a unit of the head's own; None if it can't tell.

        The unit is `importance_kind`.
        """
        return None

    def predict_proba(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities, as in `scores`.

        Raises:
            InputError: also for a regression, which has none.
        """
        found = self.scores(x)
        if self.task_ == "regression":
            raise InputError("a regression has no probabilities: call predict()")
        return found

    def predict(self, x: NDArray[np.float32]) -> NDArray[Any]:
        """Decisions at threshold 0.5: class indices (n,), multilabel 0/1 and regression values (n, n_names)."""
        found = self.scores(x)
        if self.task_ == "regression":
            return found
        if self.task_ == "multilabel":
            return np.where(np.isnan(found), np.nan, found >= 0.5)
        return (found[:, 1] >= 0.5).astype(np.int64) if self.task_ == "binary" else found.argmax(axis=1)

    def save(self, directory: str | Path) -> None:
        """Write the head's file and head.json into `directory`, which is made if need be. No pickle."""
        if not self._is_fitted:
            raise InputError(f"head {self.name!r} is not fitted: there is nothing to save")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / self.file
        self._write(path)
        record = HeadRecord(
            head=self.name,
            settings=self.settings.model_dump(mode="json"),
            task=self.task_,  # type: ignore[arg-type]
            classes=self.classes_,
            names=self.names_,
            skipped=self.skipped_,
            blocks=tuple(block.to_json() for block in self.blocks_),
            seed=self.seed,
            file=self.file,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            fitted=self.fitted_,
        )
        write_record(directory, record)

    @classmethod
    def load(cls, directory: str | Path, *, device: str = "cpu") -> Self:
        """Read what `save` wrote.

        Raises:
            RunError: a file is missing, damaged, changed, of another head, or holds what does not fit.
        """
        directory = Path(directory)
        record = read_record(directory)
        if record.head != cls.name or record.file != cls.file:
            raise RunError(
                f"{directory / RECORD}: is of head {record.head!r} ({record.file}), not {cls.name!r} ({cls.file})"
            )
        try:
            head = cls(record.settings, seed=record.seed, device=device)
        except InputError as error:
            raise RunError(f"{directory / RECORD}: {error}") from None
        head._restore(record, directory / RECORD)
        path = directory / cls.file
        check_file(path, record.sha256)
        try:
            head._read(path)
        except Exception as error:
            if isinstance(error, RunError) and not is_pickle(path):
                raise
            why = PICKLE if is_pickle(path) else first_line(error)
            raise RunError(f"{path}: can't be read as a head of kind {cls.name!r}: {why}") from None
        head._is_fitted = True
        return head

    def _check_rows(self, x: NDArray[np.float32]) -> None:
        if not self._is_fitted:
            raise InputError(f"head {self.name!r} is not fitted: call fit() or load_head() first")
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise InputError(
                f"head {self.name!r} was fitted on {self.n_features} features, got an array of shape {x.shape}"
            )

    def _restore(self, record: HeadRecord, source: Path) -> None:
        self.task_, self.classes_, self.names_ = record.task, record.classes, record.names
        self.skipped_, self.history_, self.fitted_ = record.skipped, [], dict(record.fitted)
        try:
            self.blocks_ = tuple(Block.from_json(block) for block in record.blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{source}: blocks: not valid ({type(error).__name__}: {error})") from None
        stops = [0, *(block.stop for block in self.blocks_)]
        gaps = any(block.start != stop for block, stop in zip(self.blocks_, stops, strict=False))
        widths = any(block.stop - block.start != int(np.prod(block.shape)) for block in self.blocks_)
        if not self.blocks_ or gaps or widths:
            raise RunError(f"{source}: blocks: the columns of the views don't fit together")
        if not self.outputs or (self.task_ in ("binary", "multiclass") and len(self.classes_) < 2):
            raise RunError(f"{source}: task {self.task_!r} without its classes or names")

    @property
    def _width(self) -> int:
        """Columns that `_scores` gives: the classes, or the trained labels or targets."""
        return len(self.classes_) if self.task_ in ("binary", "multiclass") else len(self.active)

    def _report(self, **row: Any) -> None:
        """Add a row to the history and tell whoever watches."""
        self.history_.append(row)
        if self._progress is not None:
            self._progress(dict(row))

    _progress: Progress | None = None

    @abstractmethod
    def _fit(self, train: Fold, valid: Fold | None) -> None:
        """Train on rows that all have a target."""

    @abstractmethod
    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, n_features) -> (n, `_width`)."""

    @abstractmethod
    def _write(self, path: Path) -> None:
        """Write the head's file."""

    @abstractmethod
    def _read(self, path: Path) -> None:
        """Read it; the record is restored already. Anything raised here becomes a RunError."""


def head_names() -> tuple[str, ...]:
    """Names of all heads: ours and those registered under the entry point group `featurecache.heads`."""
    return tuple(_registered())


def get_head(name: str) -> type[Head]:
    """The head of that name.

    Raises:
        InputError: there is none; names the nearest.
    """
    known = _registered()
    if name not in known:
        raise InputError(f"unknown head {name!r}.{did_you_mean(name, known)} Known: {', '.join(head_names())}.")
    found = known[name].load()
    if not (isinstance(found, type) and issubclass(found, Head)) or found.name != name:
        raise InputError(f"head {name!r}: {known[name].value} is not a Head of that name")
    return found


def load_head(directory: str | Path, *, device: str = "cpu") -> Head:
    """The head that was saved in `directory`; only a registered one is ever imported.

    Raises:
        RunError: as in `Head.load`, or the head is not installed.
    """
    record = read_record(Path(directory))
    try:
        kind = get_head(record.head)
    except InputError as error:
        raise RunError(f"{Path(directory) / RECORD}: {error}") from None
    return kind.load(directory, device=device)


def _registered() -> dict[str, EntryPoint]:
    """Name -> entry point; a name that two packages claim is refused."""
    known = dict(_BUILTIN)
    for point in entry_points(group=GROUP):
        if point.name in known and point.value != known[point.name].value:
            raise InputError(f"head {point.name!r} is registered twice: {known[point.name].value} and {point.value}")
        known[point.name] = point
    return known
