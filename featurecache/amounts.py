"""Numbers as a person reads them in a line of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = (
    "iou", "dice", "pixel_accuracy", "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "f1_macro",
    "log_loss", "r2", "rmse",
)  # fmt: skip


def counted(n: int, word: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def human_bytes(count: float) -> str:
    """`12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def metric_line(split: str, metrics: Mapping[str, Any]) -> str:
    """`test  n 188 (124 groups): accuracy 0.81 [0.75, 0.86], ...`."""
    intervals = metrics.get("intervals", {})
    parts = []
    for name in SHOWN:
        value = metrics.get(name)
        if isinstance(value, int | float):
            low, high = intervals.get(name) or (None, None)
            parts.append(f"{name} {value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else ""))
    return f"{split:<9} n {metrics['n']} in {counted(metrics['n_groups'], 'group')}: {', '.join(parts[:4])}"
