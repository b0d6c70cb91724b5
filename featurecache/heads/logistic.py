"""The logistic head: standardised features, scikit-learn's objective; ridge where the target is a number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurecache import config
from featurecache.errors import InputError, RunError
from featurecache.features.features import Block, present, views_of
from featurecache.heads.base import Fold, Head
from featurecache.heads.blas import one_thread
from featurecache.heads.linear_stream import Chunks, Solution, Streamed
from featurecache.heads.losses import ClassWeight, class_weights, entry_weights
from featurecache.heads.space import Space, Span
from featurecache.machine.memory import free_memory

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

GRID = tuple(10.0**power for power in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 2))  # tried for C = "auto"

Matrix = NDArray[np.float64]


class LogisticSettings(config.Settings):
    """Settings of the logistic head.

    `C` is scikit-learn's inverse strength of the L2 penalty (for a regression, ridge's alpha is 1/C); `auto` takes the
    value with the lowest loss on validation, one for all labels. `tol` bounds the gradient at the end.
    """

    C: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    tol: Annotated[float, Field(gt=0)] = 1e-9
    max_iter: Annotated[int, Field(ge=1)] = 2000
    class_weight: ClassWeight = None


class LogisticHead(Head):
    """See the module.

    The fitted model is six arrays: `mean`, `scale` of each feature over the training rows that have it; `coef`
    (fits, n_features + indicators), `intercept` (fits,); `index`, which column of the scores a fit belongs to; and
    `indicators` (0 or n_views,). A missing view is 0 after standardisation, plus an indicator if training rows had any.
    """

    name: ClassVar[str] = "logistic"
    Settings: ClassVar[type[config.Settings]] = LogisticSettings
    file: ClassVar[str] = "head.npz"
    search_space: ClassVar[Space] = {"C": Span(1e-5, 1e2, log=True)}
    importance_kind: ClassVar[str] = "absolute coefficient of the standardised feature"
    settings: LogisticSettings
    arrays: dict[str, NDArray[Any]]

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        if self.settings.C == "auto" and valid is None:
            raise InputError("head 'logistic': C=auto is chosen on validation rows, and there are none")
        if self.task_ == "regression" and self.settings.class_weight is not None:
            class_weights(train.target, self.settings.class_weight)  # says that a regression has no classes
        mean, scale, missing = standardiser(train)
        self.arrays = {
            "mean": mean,
            "scale": scale,
            "indicators": np.arange(len(views_of(self.blocks_)) if missing else 0),
        }
        train_chunks, valid_chunks, streamed = self._chunks(train, valid)
        weights = class_weights(train.target, self.settings.class_weight)
        w, w_valid = (
            entry_weights(train.target, weights),
            None if valid is None else entry_weights(valid.target, weights),
        )
        solver: Callable[[float], Solution]
        if streamed:
            solver = Streamed(
                train_chunks, self._columns, train.target, w, self.active, self.settings.tol, self.settings.max_iter
            ).solve
        else:
            starts: dict[int, LogisticRegression] = {}  # by fit; each C starts from the solution of the one before
            solver = partial(self._solve, next(train_chunks())[1], train, w, starts)
        best = np.inf
        grid = GRID if self.settings.C == "auto" else (self.settings.C,)
        for c in grid:
            with one_thread(8 * self._columns * len(train)):
                arrays, facts = solver(c)
            loss = self._loss(train_chunks(), train, w, arrays)
            valid_loss = None
            if valid is not None and w_valid is not None:
                valid_loss = self._loss(valid_chunks(), valid, w_valid, arrays)
            self._report(C=c, train_loss=loss, valid_loss=valid_loss, **facts)
            if len(grid) == 1 or (valid_loss is not None and valid_loss < best):
                best, chosen = valid_loss if valid_loss is not None else best, arrays
                self.fitted_ = {"C": c, **facts, "streamed": streamed}
        self.arrays |= chosen

    @property
    def _columns(self) -> int:
        """Columns of a standardised matrix."""
        return self.n_features + len(self.arrays["indicators"])

    def _chunks(self, train: Fold, valid: Fold | None) -> tuple[Chunks, Chunks, bool]:
        """Standardised rows of both folds: each one matrix that is made once, or chunks where there is no room."""
        folds = [train, *([valid] if valid is not None else [])]
        budget = free_memory() // 2 if self.memory is None else self.memory
        copies = 2 if train.target.values.ndim == 2 and np.isnan(train.target.values).any() else 1  # of known rows
        needed = 8 * self._columns * (copies * len(train) + (0 if valid is None else len(valid)))
        if needed > budget:
            return partial(self._stream, train), partial(self._stream, folds[-1]), True
        found = [self._matrix(fold) for fold in folds]
        return *(partial(_whole, x) for x in (found[0], found[-1])), False  # type: ignore[return-value]

    def _stream(self, fold: Fold) -> Iterator[tuple[slice, Matrix]]:
        return ((where, self._standardised(x)) for where, x in fold.chunks())

    def _solve(
        self, x: Matrix, train: Fold, w: Matrix, starts: dict[int, LogisticRegression], c: float
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Coefficients at one C: one fit, or one per label or target on its known rows."""
        from sklearn.linear_model import Ridge  # late: a saved head needs no scikit-learn

        values = train.target.values
        if self.task_ in ("binary", "multiclass"):
            model, converged = self._logistic(x, values, w, c, starts, 0)
            arrays = {"coef": model.coef_, "intercept": model.intercept_, "index": model.classes_.astype(np.int64)}
            return arrays, {"iterations": int(model.n_iter_.max()), "converged": converged}
        coefs, intercepts, iterations, all_converged = [], [], 0, True
        for column in self.active:
            known = ~np.isnan(values[:, column])
            part, y = (x, values[:, column]) if known.all() else (x[known], values[known, column])
            if self.task_ == "regression":
                ridge = Ridge(alpha=1 / c).fit(part, y.astype(np.float64))
                coefs.append(ridge.coef_)
                intercepts.append(float(ridge.intercept_))
                continue
            model, converged = self._logistic(part, y.astype(np.int64), w[known, column], c, starts, int(column))
            coefs.append(model.coef_[0])
            intercepts.append(float(model.intercept_[0]))
            iterations, all_converged = max(iterations, int(model.n_iter_[0])), all_converged and converged
        arrays = {"coef": np.stack(coefs), "intercept": np.array(intercepts), "index": self.active}
        return arrays, {"iterations": iterations, "converged": all_converged}

    def _logistic(
        self, x: Matrix, y: NDArray[Any], w: Matrix, c: float, starts: dict[int, LogisticRegression], key: int
    ) -> tuple[LogisticRegression, bool]:
        """One scikit-learn fit; not to have converged is a fact for the history, not a warning on the terminal."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        model = starts.setdefault(
            key, LogisticRegression(tol=self.settings.tol, max_iter=self.settings.max_iter, warm_start=True)
        )
        model.set_params(C=c)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "The number of unique classes")  # `read_target` asked already
            model.fit(x, y, sample_weight=w)
        converged = True
        for item in caught:
            if issubclass(item.category, ConvergenceWarning):
                converged = False
            else:
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
        return model, converged

    def _matrix(self, fold: Fold) -> Matrix:
        """Standardised features of a fold with indicators, (n, n_features + indicators) float64."""
        x = np.empty((len(fold), self.n_features + len(self.arrays["indicators"])))
        for where, chunk in fold.chunks():
            x[where] = self._standardised(chunk)
        return x

    def _standardised(self, x: NDArray[np.float32]) -> Matrix:
        z: Matrix = (x - self.arrays["mean"]) / self.arrays["scale"]
        if not len(self.arrays["indicators"]):
            return np.asarray(np.nan_to_num(z, copy=False, nan=0.0))
        missing = ~present(x, self.blocks_)
        return np.hstack([np.nan_to_num(z, copy=False, nan=0.0), missing.astype(np.float64)])

    def _outputs(self, z: Matrix, arrays: dict[str, NDArray[Any]]) -> Matrix:
        """Scores (n, `_width`) from a standardised matrix."""
        raw: Matrix = z @ arrays["coef"].T + arrays["intercept"]
        if self.task_ == "regression":
            return raw
        if self.task_ == "multilabel":
            return sigmoid(raw)
        found = np.zeros((len(z), len(self.classes_)))  # a class without a training row keeps probability 0
        if raw.shape[1] == 1:
            found[:, arrays["index"]] = np.hstack([sigmoid(-raw), sigmoid(raw)])
        else:
            raw = np.exp(raw - raw.max(axis=1, keepdims=True))
            found[:, arrays["index"]] = raw / raw.sum(axis=1, keepdims=True)
        return found

    def _loss(
        self, chunks: Iterator[tuple[slice, Matrix]], fold: Fold, w: Matrix, arrays: dict[str, NDArray[Any]]
    ) -> float:
        """Weighted mean log loss, or squared error in units of the variance in `fold`, over known targets."""
        values, total, weight = fold.target.values, 0.0, 0.0
        spread = np.ones(len(self.active))
        if self.task_ in ("multilabel", "regression"):
            values, w = values[:, self.active], w[:, self.active]
            if not w.any():
                return float("nan")
        if self.task_ == "regression":
            spread = np.nanvar(values, axis=0)
            spread[~(spread > 0)] = 1
        for where, z in chunks:
            found, y = self._outputs(z, arrays), values[where]
            if self.task_ in ("binary", "multiclass"):
                losses = -np.log(np.clip(found[np.arange(len(found)), y], 1e-15, 1))
            else:
                y = np.where(w[where] > 0, y, 0)
                right = np.where(y > 0.5, found, 1 - found)
                multilabel = self.task_ == "multilabel"
                losses = -np.log(np.clip(right, 1e-15, 1)) if multilabel else (found - y) ** 2 / spread
            total += float((losses * w[where]).sum())
            weight += float(w[where].sum())
        return total / weight

    def importance(self) -> NDArray[np.float64]:
        """(n_features,) mean absolute coefficient of the standardised column over the fits."""
        return np.asarray(np.abs(self.arrays["coef"][:, : self.n_features]).mean(axis=0))

    def _scores(self, x: NDArray[np.float32]) -> Matrix:
        return self._outputs(self._standardised(x), self.arrays)

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **self.arrays)

    def _read(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise RunError(f"{path}: not an npz archive")
            arrays = {name: archive[name] for name in archive.files}
        d, views = self.n_features, len(views_of(self.blocks_))
        extra = len(arrays["indicators"]) if "indicators" in arrays else 0
        fits = len(arrays["index"]) if "index" in arrays and arrays["index"].ndim == 1 else 0
        rows = 1 if self.task_ in ("binary", "multiclass") and fits == 2 else fits
        expected = {
            "mean": ((d,), "f"),
            "scale": ((d,), "f"),
            "indicators": ((views if extra else 0,), "i"),
            "coef": ((rows, d + extra), "f"),
            "intercept": ((rows,), "f"),
            "index": ((fits,), "i"),
        }
        for name in sorted(expected.keys() | arrays.keys()):
            if name not in expected or name not in arrays:
                raise RunError(f"{path}: array {name!r} is {'unknown' if name in arrays else 'missing'}")
            shape, kind = expected[name]
            found = arrays[name]
            if found.shape != shape or found.dtype.kind != kind:
                raise RunError(
                    f"{path}: array {name!r} is {found.shape} {found.dtype}, expected {shape} of kind {kind!r}"
                )
        trained = [i for i, name in enumerate(self.outputs) if name not in self.skipped_]
        if not np.array_equal(arrays["index"], trained):
            raise RunError(f"{path}: array 'index' does not fit the classes or labels of head.json")
        self.arrays = arrays


def _whole(x: Matrix) -> Iterator[tuple[slice, Matrix]]:
    yield slice(0, len(x)), x


def standardiser(fold: Fold) -> tuple[Matrix, Matrix, bool]:
    """Mean and scale of each feature over the rows that have it, as scikit-learn's StandardScaler finds them.

    Returns:
        mean (d,), scale (d,) with 1 for constant features and those that no row has, and whether a row lacks a view.
    """
    blocks: tuple[Block, ...] = fold.features.blocks
    d = fold.features.shape[1]
    count, mean, squares = np.zeros(d), np.zeros(d), np.zeros(d)
    missing = False
    for _, chunk in fold.chunks():
        x = chunk.astype(np.float64)
        there = ~np.isnan(x)
        missing = missing or not present(chunk, blocks).all()
        n = there.sum(axis=0)
        x[~there] = 0.0
        here = x.sum(axis=0) / np.maximum(n, 1)
        spread = (np.where(there, x - here, 0.0) ** 2).sum(axis=0)
        # Chan, Golub, LeVeque (1979): moments of two parts from those of each.
        total = np.maximum(count + n, 1)
        squares += spread + (here - mean) ** 2 * count * n / total
        mean += (here - mean) * n / total
        count += n
    n = np.maximum(count, 1)
    var = squares / n
    eps = np.finfo(np.float64).eps
    constant = var <= n * eps * var + (n * mean * eps) ** 2  # what StandardScaler takes for rounding
    return mean, np.where(constant, 1.0, np.sqrt(var)), missing


def sigmoid(x: Matrix) -> Matrix:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)
