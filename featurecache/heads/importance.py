"""What a fitted head's predictions hang on: per view, per tap and per feature, as data for reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.features.features import feature_names, views_of
from featurecache.heads.base import Head

FILE = "importance.json"
SHOWN = 100  # features that are listed


def importance_record(head: Head) -> dict[str, Any] | None:
    """Shares of views and taps, which sum to 1, and the features that count most; None if the head can't tell.

    `kind` says what is counted; `features` are in that unit, `views` and `taps` are shares of its sum.
    """
    values = head.importance()
    if values is None:
        return None
    total = float(values.sum()) or 1.0
    taps: list[dict[str, Any]] = [
        {"view": block.view, "tap": block.tap, "share": float(values[block.start : block.stop].sum()) / total}
        for block in head.blocks_
    ]
    names, order = feature_names(head.blocks_), np.argsort(-values, kind="stable")[:SHOWN]
    return {
        "kind": head.importance_kind,
        "views": {view: sum(tap["share"] for tap in taps if tap["view"] == view) for view in views_of(head.blocks_)},
        "taps": taps,
        "features": [{"name": names[i], "value": float(values[i])} for i in order if values[i] > 0],
    }


def write_importance(directory: Path, head: Head) -> None:
    """Write importance.json beside a head that can tell."""
    record = importance_record(head)
    if record is not None:
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (directory / FILE).write_text(text + "\n", encoding="utf-8")
