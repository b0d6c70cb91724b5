"""Probabilities put right on validation samples: temperature scaling and isotonic regression, kept as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.evaluation.metrics import checked_scores

Method = Literal["temperature", "isotonic"]
METHODS = ("temperature", "isotonic")
# Probabilities are kept this far from 0 and 1 before their logarithm is taken: as near as float64 comes to 1.
EPS = float(np.finfo(np.float64).epsneg)
RANGE = (-4.0, 4.0)  # log of the temperature
ENDS = (float(np.exp(RANGE[0])), float(np.exp(RANGE[1])))
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A map from a head's probabilities to calibrated ones, the same for every sample.

    Attributes:
        method: `temperature`: logits are divided by one number (Guo et al. 2017), which keeps the order of samples for
            two classes or a label (as far as logits of +-36.7, where float64 reaches 1) and the order of the classes
            in a sample; `isotonic`: a rising step function per class or label (Zadrozny and Elkan 2002), then rows sum
            to 1 again.
        parameters: per column of the scores (`temperature` of classes: one for all): the temperature, or the knots
            (x, y); None where validation says nothing and probabilities stay.
    """

    method: Method
    parameters: tuple[Any, ...]

    def apply(self, scores: NDArray[Any], *, exclusive: bool) -> Array:
        """Calibrated probabilities (n, columns).

        Args:
            scores: (n, columns) probabilities, NaN for what was not trained.
            exclusive: whether the columns are classes, whose probabilities sum to 1, or labels of their own.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if self.method == "temperature" and exclusive:
            return _cooled(scores, self.parameters[0] or 1.0)
        found = scores.copy()
        for column, parameter in enumerate(self.parameters):
            if parameter is None:
                continue
            p = scores[:, column]
            if self.method == "temperature":
                found[:, column] = _cooled(np.stack([1 - p, p], axis=1), parameter)[:, 1]
            else:
                found[:, column] = np.where(np.isnan(p), np.nan, np.interp(p, *parameter))
        if exclusive:
            total = found.sum(axis=1, keepdims=True)
            found = np.where(total > 0, found / np.where(total > 0, total, 1), scores)
        return found

    @property
    def bound_reached(self) -> bool:
        """Whether a temperature stopped at an end of the range that is searched, as where nothing is mistaken."""
        return any(value in ENDS for value in self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as kept in run.json."""
        return {
            "method": self.method,
            "fitted_on": "valid",
            "parameters": list(self.parameters),
            "bound_reached": self.bound_reached,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Read `to_json` back.

        Raises:
            RunError: not such values.
        """
        try:
            if values["method"] not in METHODS:
                raise ValueError(values["method"])
            return cls(values["method"], tuple(_parameter(item) for item in values["parameters"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"run.json: calibration: not valid ({type(error).__name__}: {error})") from None


def fit_calibration(target: Target, scores: NDArray[Any], method: Method) -> Calibration:
    """Fit on validation samples, so that the probabilities mean what they say.

    Args:
        target: of the validation samples, aligned with `scores`; unknown ones are left out.
        scores: probabilities (n, n_classes) or (n, n_labels).
        method: see `Calibration`.

    Raises:
        InputError: a regression, which has no probabilities; an unknown method; no validation sample with a target.
    """
    check_method(method, target.task)
    scores = checked_scores(target, scores)
    known = np.asarray(target.known)
    if not known.any():
        raise InputError(f"--calibrate {method}: no validation sample has a known target; give --valid a larger share")
    scores, values = scores[known], target.values[known]
    if target.classes:
        outcomes = values[:, None] == np.arange(len(target.classes))
        if method == "temperature":
            return Calibration(method, (_temperature(scores, values),))
        if len(target.classes) == 2:  # one curve for both, so that they sum to 1 without another step
            knots = _knots(scores[:, 1], outcomes[:, 1])
            mirrored = None if knots is None else ([1 - x for x in knots[0][::-1]], [1 - y for y in knots[1][::-1]])
            return Calibration(method, (mirrored, knots))
        return Calibration(method, tuple(_knots(scores[:, c], outcomes[:, c]) for c in range(len(target.classes))))
    parameters: list[Any] = []
    for label in range(len(target.names)):
        there = ~np.isnan(values[:, label]) & ~np.isnan(scores[:, label])
        p, y = scores[there, label], values[there, label]
        if not len(y) or method == "isotonic":
            parameters.append(_knots(p, y == 1) if len(y) else None)
        else:
            parameters.append(_temperature(np.stack([1 - p, p], axis=1), y.astype(np.int64)))
    return Calibration(method, tuple(parameters))


def check_method(method: str, task: str) -> None:
    """Refuse a calibration that is unknown, or that a task has no use for.

    Raises:
        InputError: which of them.
    """
    if method not in METHODS:
        raise InputError(f"--calibrate {method}: use {' or '.join(METHODS)}")
    if task == "regression":
        raise InputError(f"--calibrate {method}: a regression predicts values, not probabilities")
    if task == "dense":
        raise InputError(f"--calibrate {method}: probabilities of pixels are not calibrated. Leave it out.")


def _temperature(p: Array, y: NDArray[Any]) -> float | None:
    """The temperature with the lowest log loss of `p` (n, classes) on class indices `y`; None where there is none."""
    if len(np.unique(y)) < 2:
        return None

    def loss(log_temperature: float) -> float:
        cooled = _cooled(p, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(cooled[np.arange(len(y)), y], EPS)).mean())

    within = float(minimize_scalar(loss, bounds=RANGE, method="bounded").x)
    cold, hot, best = loss(RANGE[0]), loss(RANGE[1]), loss(within)
    if cold == hot:  # probabilities that are all alike
        return None
    return ENDS[0] if cold <= best else ENDS[1] if hot <= best else float(np.exp(within))


def _cooled(p: Array, temperature: float) -> Array:
    """softmax(log p / T)."""
    logits = np.log(np.clip(p, EPS, 1 - EPS)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _knots(p: Array, y: NDArray[np.bool_]) -> tuple[list[float], list[float]] | None:
    """Knots of the isotonic regression of outcomes on `p`; None where all outcomes are the same."""
    if y.all() or not y.any():
        return None
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(p, y)
    return [float(x) for x in fitted.X_thresholds_], [float(value) for value in fitted.y_thresholds_]


def _parameter(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, int | float):
        if not value > 0:
            raise ValueError(value)
        return float(value)
    x, y = ([float(number) for number in part] for part in value)
    if len(x) != len(y) or not x or sorted(x) != x:
        raise ValueError("knots")
    return x, y
