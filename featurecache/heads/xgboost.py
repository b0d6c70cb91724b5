"""The XGBoost head: gradient-boosted trees from chunks of feature rows; a missing view is NaN; masked multilabel."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray
from pydantic import Field

from featurecache import config
from featurecache.errors import InputError, RunError
from featurecache.features.features import Block, chunk_rows, complete, feature_names
from featurecache.heads.base import Fold, Head
from featurecache.heads.bins import with_bins
from featurecache.heads.losses import ClassWeight, class_weights, entry_weights, regression_scale
from featurecache.heads.scratch import scratch_folder
from featurecache.heads.space import Space, Span
from featurecache.machine.interrupts import Held, held_back
from featurecache.machine.memory import free_memory, give_back

SCRATCH = "featurecache-xgboost-"
PAGE_SHARE = 0.125  # of the budget, for a page of external memory while it is float32
HISTOGRAMS = 64  # of all columns, that a tree of the default depth keeps


class XGBoostSettings(config.Settings):
    """Settings of the XGBoost head, under the names of XGBoost's scikit-learn interface; `nthread` 0 is all cores."""

    n_estimators: Annotated[int, Field(ge=1)] = 300
    early_stopping_rounds: Annotated[int, Field(ge=1)] | None = 20
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    max_depth: Annotated[int, Field(ge=0)] = 6
    max_bin: Annotated[int, Field(ge=2)] = 256
    min_child_weight: Annotated[float, Field(ge=0)] = 1.0
    gamma: Annotated[float, Field(ge=0)] = 0.0
    subsample: Annotated[float, Field(gt=0, le=1)] = 1.0
    colsample_bytree: Annotated[float, Field(gt=0, le=1)] = 1.0
    colsample_bynode: Annotated[float, Field(gt=0, le=1)] = 1.0
    reg_lambda: Annotated[float, Field(ge=0)] = 1.0
    reg_alpha: Annotated[float, Field(ge=0)] = 0.0
    class_weight: ClassWeight = None
    nthread: Annotated[int, Field(ge=0)] = 0

    def parameters(self, seed: int, device: str) -> dict[str, Any]:
        """As `xgboost.train` takes them."""
        ours = {"n_estimators", "early_stopping_rounds", "class_weight", "nthread"}
        found = self.model_dump(exclude=ours)
        return found | {"tree_method": "hist", "seed": seed, "device": device, "nthread": self.nthread, "verbosity": 0}


class _Chunks(xgb.DataIter):
    """Hands XGBoost the rows of a fold a chunk at a time; it goes through them several times."""

    def __init__(
        self,
        fold: Fold,
        labels: NDArray[np.float32],
        *,
        page: int,
        prefix: Path | None,
        held: Held,
    ) -> None:
        """Prepare.

        Args:
            fold: the rows.
            labels: (n,) or (n, outputs).
            page: rows at a time.
            prefix: how the files of external memory begin; None keeps all in RAM.
            held: whether to stop. An exception that XGBoost passes on must be raised here: it loses a
                KeyboardInterrupt, takes the data to end there, and writes beyond its arrays.
        """
        self._held = held
        self._fold, self._labels = fold, labels
        self._size = page
        self._next = iter(fold.chunks(self._size))
        super().__init__(cache_prefix=None if prefix is None else str(prefix), release_data=True)

    def next(self, input_data: Callable[..., Any]) -> bool:
        """One chunk; False after the last."""
        self._held.check()
        found = next(self._next, None)
        if found is None:
            return False
        where, x = found
        input_data(data=x, label=self._labels[where])
        return True

    def reset(self) -> None:
        """Start again."""
        self._next = iter(self._fold.chunks(self._size))


class _Masked:
    """Objective and metric of one booster with an output per label or target, of which some values are unknown.

    A masked value has gradient and hessian 0, so that the trees of a label are those of a booster of its own on its
    known rows. The trees add to `base`, the labels' log odds (targets' means) among known rows.
    """

    def __init__(self, train: Fold, active: NDArray[np.int64], class_weight: ClassWeight) -> None:
        self.multilabel = train.target.task == "multilabel"
        self._active = active
        self._weights = class_weights(train.target, class_weight)
        self._train = self.prepared(train)
        y, w, _ = self._train
        mean = (y * w).sum(axis=0) / w.sum(axis=0)
        self.base = np.log(mean / (1 - mean)) if self.multilabel else mean

    def prepared(self, fold: Fold) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Values with 0 where unknown, weights with 0 where unknown, and the scale of each column's loss."""
        w = entry_weights(fold.target, self._weights)[:, self._active]
        y = np.where(np.isnan(fold.target.values), 0.0, fold.target.values)[:, self._active].astype(np.float64)
        scale = np.ones(len(self._active)) if self.multilabel else regression_scale(fold.target)[1][self._active] ** 2
        return y, w, scale

    def objective(self, raw: NDArray[np.float32], _: xgb.DMatrix) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Gradient and hessian (n, n_outputs) of log loss or half the squared error."""
        y, w, _scale = self._train
        value = self.values(raw.reshape(y.shape))
        hessian = np.maximum(value * (1 - value), 1e-16) if self.multilabel else 1.0
        return ((value - y) * w).astype(np.float32), (hessian * w).astype(np.float32)

    def values(self, raw: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities or predicted values from what the trees add up to."""
        return outputs(raw, self.base, sigmoid=self.multilabel)

    def metric(self, matrices: list[xgb.DMatrix], folds: list[Fold]) -> Callable[[Any, xgb.DMatrix], tuple[str, float]]:
        """Mean loss over the known values of the fold that a matrix was made from."""
        prepared = [self._train, *(self.prepared(fold) for fold in folds[1:])]

        def mean_loss(raw: NDArray[np.float32], matrix: xgb.DMatrix) -> tuple[str, float]:
            y, w, scale = next(found for known, found in zip(matrices, prepared, strict=True) if known is matrix)
            value = self.values(raw.reshape(y.shape))
            if self.multilabel:
                losses = -np.log(np.clip(np.where(y > 0.5, value, 1 - value), 1e-15, 1))
            else:
                losses = (value - y) ** 2 / scale
            total = w.sum()
            return "loss", float((losses * w).sum() / total) if total else float("nan")

        return mean_loss


class _Watch(xgb.callback.TrainingCallback):
    """Passes each round's losses on."""

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report

    def after_iteration(self, model: xgb.Booster, epoch: int, evals_log: dict[str, dict[str, Any]]) -> bool:
        """Report; never stops."""
        last = {name: next(iter(metrics.values()))[-1] for name, metrics in evals_log.items()}
        self._report(round=epoch + 1, train_loss=float(last["train"]), valid_loss=last.get("valid"))
        return False


class XGBoostHead(Head):
    """See the module.

    `fitted_` holds `rounds` (the trees used), `base` (per output, for masked tasks), `device`, where it was trained,
    and `external_memory`: whether binned rows were kept on disk, in a temporary directory that is gone afterwards.
    """

    name: ClassVar[str] = "xgboost"
    Settings: ClassVar[type[config.Settings]] = XGBoostSettings
    file: ClassVar[str] = "head.ubj"
    search_space: ClassVar[Space] = {
        "learning_rate": Span(0.02, 0.3, log=True),
        "max_depth": Span(2, 8, whole=True),
        "min_child_weight": Span(0.5, 16, log=True),
        "subsample": Span(0.5, 1.0),
        "colsample_bytree": Span(0.05, 1.0, log=True),
        "reg_lambda": Span(0.1, 30, log=True),
        "gamma": Span(0.0, 2.0),
    }
    importance_kind: ClassVar[str] = "total gain of the splits on the feature"
    settings: XGBoostSettings
    booster: xgb.Booster

    def _fit(self, train: Fold, valid: Fold | None) -> None:
        with ExitStack() as stack:
            self._boost(train, valid, stack)

    def _boost(self, train: Fold, valid: Fold | None, stack: ExitStack) -> None:
        settings, device = self.settings, xgboost_device(self.device)
        parameters = settings.parameters(self.seed, device)
        masked = None
        if self.task_ in ("multilabel", "regression"):
            masked = _Masked(train, self.active, settings.class_weight)
            parameters |= {
                "base_score": 0.0,
                "disable_default_eval_metric": True,
                "multi_strategy": "one_output_per_tree",
            }
        elif self.task_ == "binary":
            parameters |= {"objective": "binary:logistic", "eval_metric": "logloss"}
        else:
            parameters |= {"objective": "multi:softprob", "eval_metric": "mlogloss", "num_class": len(self.classes_)}
        folds = [train] if valid is None else [train, valid]
        budget = free_memory() // 2 if self.memory is None else self.memory
        binned = binned_bytes(folds, settings.max_bin)
        external = binned > budget
        page = chunk_rows(self.n_features)
        if external:  # what is handed over at a time becomes a page of its own
            page = max(page, int(PAGE_SHARE * budget) // (4 * self.n_features))
        scratch = stack.enter_context(scratch_folder(SCRATCH)) if external else None
        with held_back() as held:
            # What training will take can be taken for the search before.
            allowed = min(binned, budget) + HISTOGRAMS * 16 * settings.max_bin * self.n_features
            reference = with_bins(train, settings.max_bin, nthread=settings.nthread, allowed=allowed, held=held)
            evals = self._matrices(folds, masked, page, scratch, held, reference)
        give_back()
        callbacks: list[xgb.callback.TrainingCallback] = [_Watch(self._report)]
        if valid is not None and settings.early_stopping_rounds is not None:
            callbacks.append(xgb.callback.EarlyStopping(rounds=settings.early_stopping_rounds, data_name="valid"))
        self.booster = xgb.train(
            parameters,
            evals[0][0],
            settings.n_estimators,
            evals=evals,
            obj=masked.objective if masked else None,
            custom_metric=masked.metric([matrix for matrix, _ in evals], folds) if masked else None,
            callbacks=callbacks,
            verbose_eval=False,
        )
        stopped = valid is not None and settings.early_stopping_rounds is not None
        rounds = self.booster.best_iteration + 1 if stopped else self.booster.num_boosted_rounds()
        effective = json.loads(self.booster.save_config())["learner"]["generic_param"]["device"]
        if effective.split(":")[0] != device.split(":")[0]:
            raise InputError(f"device {self.device!r}: XGBoost finds no CUDA device here. Use device 'cpu'.")
        self.fitted_ = {"rounds": rounds, "device": effective, "external_memory": external}
        if masked:
            self.fitted_["base"] = masked.base.tolist()

    def _matrices(
        self,
        folds: list[Fold],
        masked: _Masked | None,
        page: int,
        scratch: Path | None,
        held: Held,
        reference: xgb.DMatrix | None,
    ) -> list[tuple[xgb.DMatrix, str]]:
        """Training and validation matrix; their pages go to `scratch`, or stay in RAM.

        Both have the bins of `reference`, or else of the training rows.
        """
        weights = None if masked else class_weights(folds[0].target, self.settings.class_weight)
        found: list[tuple[xgb.DMatrix, str]] = []
        for fold, name in zip(folds, ("train", "valid"), strict=False):
            labels = masked.prepared(fold)[0] if masked else fold.target.values
            chunks = _Chunks(
                fold,
                np.asarray(labels, dtype=np.float32),
                page=page,
                prefix=None if scratch is None else scratch / name,
                held=held,
            )
            matrix = (xgb.QuantileDMatrix if scratch is None else xgb.ExtMemQuantileDMatrix)(
                chunks,
                max_bin=self.settings.max_bin,
                nthread=self.settings.nthread or None,
                ref=reference,
            )
            matrix.feature_names = column_names(self.blocks_)  # once: checking thousands with each chunk takes long
            if weights is not None:
                matrix.set_weight(
                    entry_weights(fold.target, weights)
                )  # after the bins, so that these don't depend on it
            found.append((matrix, name))
            reference = found[0][0]
        return found

    def _scores(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        masked = self.task_ in ("multilabel", "regression")
        found = self.booster.inplace_predict(
            x,
            iteration_range=(0, self.fitted_["rounds"]),
            predict_type="margin",
            validate_features=False,  # the names are ours; the width was checked
            strict_shape=True,
        )
        raw = np.asarray(found, dtype=np.float64).reshape(len(x), -1)
        if masked:
            return outputs(raw, np.asarray(self.fitted_["base"]), sigmoid=self.task_ == "multilabel")
        if self.task_ == "binary":
            p = outputs(raw, np.zeros(1), sigmoid=True)
            return np.hstack([1 - p, p])
        raw = np.exp(raw - raw.max(axis=1, keepdims=True))
        return np.asarray(raw / raw.sum(axis=1, keepdims=True))

    def importance(self) -> NDArray[np.float64]:
        """(n_features,) total gain of the splits on each column."""
        found = self.booster.get_score(importance_type="total_gain")
        return np.array([found.get(name, 0.0) for name in column_names(self.blocks_)], dtype=np.float64)

    def _write(self, path: Path) -> None:
        self.booster.save_model(path)

    def _read(self, path: Path) -> None:
        booster = xgb.Booster()
        booster.load_model(path)
        booster.set_param({"nthread": self.settings.nthread, "device": xgboost_device(self.device), "verbosity": 0})
        outputs_ = 1 if self.task_ == "binary" else self._width
        facts = json.loads(booster.save_config())["learner"]["learner_model_param"]
        trained = max(int(facts["num_class"]), int(facts["num_target"]))
        if booster.num_features() != self.n_features or trained != outputs_:
            found = f"{booster.num_features()} features and {trained} outputs"
            raise RunError(f"{path}: has {found}, head.json {self.n_features} and {outputs_}")
        rounds, base = self.fitted_.get("rounds"), self.fitted_.get("base", [])
        if not isinstance(rounds, int) or not 1 <= rounds <= booster.num_boosted_rounds():
            raise RunError(f"{path}: has {booster.num_boosted_rounds()} rounds, head.json says {rounds!r}")
        masked = self.task_ in ("multilabel", "regression")
        numbers = isinstance(base, list) and all(isinstance(value, float) for value in base)
        if masked and not (numbers and len(base) == outputs_):
            raise RunError(f"{path}: 'base' of head.json does not hold {outputs_} numbers")
        self.booster = booster


def outputs(raw: NDArray[Any], base: NDArray[np.float64], *, sigmoid: bool) -> NDArray[np.float64]:
    """What the trees add up to, on top of `base`, as probabilities or as it is; double."""
    margin = raw.astype(np.float64) + base
    if not sigmoid:
        return margin
    small = np.exp(-np.abs(margin))
    found: NDArray[np.float64] = np.where(margin >= 0, 1.0, small) / (1.0 + small)
    return found


def binned_bytes(folds: list[Fold], max_bin: int) -> int:
    """Bytes that XGBoost takes for binned rows: by row (in full width where views are missing) and by column."""
    width = folds[0].features.shape[1]
    narrow = 1 if max_bin <= 256 else 2
    return sum(len(fold) * width * (narrow + (narrow if complete(fold.features, fold.rows) else 4)) for fold in folds)


def column_names(blocks: tuple[Block, ...]) -> list[str]:
    """`feature_names`, with the three characters that XGBoost refuses replaced."""
    return [name.translate(str.maketrans("[]<", "(){")) for name in feature_names(blocks)]


def xgboost_device(name: str) -> str:
    """The device as XGBoost names it: the CPU for whatever is no CUDA device."""
    if name == "auto":
        return "cuda" if xgb.build_info().get("USE_CUDA") and _cuda() else "cpu"
    return name if name.startswith("cuda") else "cpu"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
