"""The decision threshold as it is handed about: one for all rows or one per row, for all labels or for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Cut = float | NDArray[np.float64] | None
"""From which probability on a row counts as positive: for all rows, or (n,) for each; None means 0.5."""

Threshold = Cut | Mapping[str, Cut]
"""One for every label, or one per label."""


def threshold_of(threshold: Threshold, name: str, rows: NDArray[Any] | None = None) -> float | NDArray[np.float64]:
    """The threshold of one label; 0.5 where none is given.

    Args:
        threshold: as above.
        name: of the label.
        rows: positions or a mask: which rows are asked for, where there is a threshold per row.
    """
    found = threshold.get(name) if isinstance(threshold, Mapping) else threshold
    if isinstance(found, np.ndarray):
        return found if rows is None else found[rows]
    return 0.5 if found is None else float(found)


def at_rows(threshold: Threshold, rows: NDArray[Any]) -> Threshold:
    """The threshold of some rows only."""
    if isinstance(threshold, Mapping):
        return {name: threshold_of(threshold, name, rows) for name in threshold}
    return threshold[rows] if isinstance(threshold, np.ndarray) else threshold


def recorded_threshold(record: Mapping[str, Any] | None, folds: NDArray[np.int64] | None = None) -> Threshold:
    """The threshold that a run records; in a cross-validation each row is decided by that of the fold that tested it.

    Args:
        record: `threshold` of run.json: `value`, and `folds`, a value per fold, where there are any.
        folds: (n,) which fold tested each row, -1 for none: `value` decides it.
    """
    if not record:
        return None
    value, of_folds = record["value"], record.get("folds")
    if of_folds is None or folds is None:
        return value  # type: ignore[no-any-return]
    if isinstance(value, Mapping):
        return {name: _of_rows([fold[name] for fold in of_folds], value[name], folds) for name in value}
    return _of_rows(of_folds, value, folds)


def _of_rows(values: Sequence[float], otherwise: float, folds: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([*values, otherwise], dtype=np.float64)[folds]  # -1 is the last one
