"""README.md of a run: a model card, honest about what only a person can fill in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featurecache.reporting.material import about_of
from featurecache.reporting.wording import (
    STATED,
    chosen_on,
    how_measured,
    interval,
    metric_name,
    number,
    sentence,
    split_name,
    tap_text,
)

MISSING = "More information needed"
_BESIDE = ("n", "n_groups", "events", "labels", "classes", "class_counts", "intervals")


def write_card(directory: str | Path, record: Mapping[str, Any]) -> Path:
    """Write README.md into a run directory from its metrics.json and record (run.json)."""
    directory = Path(directory)
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    path = directory / "README.md"
    path.write_text(_card(directory, record, metrics), encoding="utf-8")
    return path


def escape(text: Any) -> str:
    """Text that Markdown shows as it is: names come from the user's table."""
    flat = re.sub(r"\s+", " ", str(text))
    return re.sub(r"([\\`*_{}\[\]<>#|&~])", r"\\\1", flat)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *[list(map(str, r)) for r in rows]]]
    return "\n".join(lines)


def _figures(record: Mapping[str, Any], metrics: Mapping[str, Any], splits: list[str]) -> str:
    """A table with a row per metric and a column per split."""
    names = dict.fromkeys(
        name
        for split in splits
        for name, value in metrics[split].items()
        if name not in _BESIDE and isinstance(value, int | float | None)
    )
    rows = [["samples", *[number(metrics[split]["n"]) for split in splits]]]
    rows.append(["groups", *[number(metrics[split]["n_groups"]) for split in splits]])
    for name in names:
        cells = []
        for split in splits:
            bounds = interval((metrics[split].get("intervals") or {}).get(name))
            cells.append(number(metrics[split].get(name)) + (f" ({bounds})" if bounds else ""))
        rows.append([metric_name(name), *cells])
    return _table(["", *(split_name(record, split) for split in splits)], rows)


def _decided(record: Mapping[str, Any]) -> str:
    """The decision threshold."""
    threshold = record.get("threshold") or {}
    if (value := threshold.get("value")) is None:
        return "none (not a yes-or-no question)"
    shown = "one per label, see run.json" if isinstance(value, Mapping) else number(value)
    return f"{shown} (rule {escape(threshold['rule'])}, chosen on {escape(chosen_on(record))} samples)"


def _views(record: Mapping[str, Any]) -> str:
    """A table with a row per view."""
    rows = []
    for view, recipe in record["recipes"].items():
        body = str(recipe["recipe"]["body"]["architecture"])
        taps = ", ".join(tap_text(tap) for tap in recipe["recipe"]["taps"])
        rows.append([escape(view), escape(body), escape(taps), f"`{recipe['digest'][:16]}`"])
    return _table(["view", "body", "tap", "recipe"], rows)


def _card(directory: Path, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    title = directory.name.removesuffix(".tmp")
    splits = [name for name in ("test", "valid", "train") if name in metrics]
    split = splits[0] if splits else ""
    bootstrap = metrics["bootstrap"]
    known = about_of(directory)
    about = "\n".join(f"- **{title}**: {escape(getattr(known, name)) or MISSING}" for name, title in STATED.items())
    classes = ", ".join(map(escape, record["classes"])) or "none"
    language = "python" if str(record.get("command")).startswith("featurecache.") else "sh"
    command = (f"```{language}\n{record['command']}\n```" if record.get("command") else "Made from Python.") + "\n"
    unit = (
        f"95 % intervals: bootstrap over {bootstrap['unit']}s, {bootstrap['n']:,} resamples, seed {bootstrap['seed']}."
    )
    return f"""---
library_name: featurecache
tags: [image-features, {record["task"]}]
---

# {escape(title)}

{" ".join(map(escape, [sentence(record, metrics, split), *how_measured(record)]))}

## Figures

{_figures(record, metrics, splits)}

{unit if bootstrap["n"] else "No intervals were computed."}

- Targets: {", ".join(map(escape, record["targets"]))}
- Classes: {classes}
- Decision threshold: {_decided(record)}

Per-sample predictions are in `predictions.csv`, the split in `splits.csv`, curves in `report.html`.

## Views

{_views(record)}

## Made with

featurecache {escape(record.get("featurecache", ""))}, {escape(record.get("created", ""))}

{command}
## What only a person can state

{about}
"""
