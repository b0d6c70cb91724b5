"""What to look at again in a run's data: a column that looks like a group, a class that looks like no class."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from featurecache.data.targets import Target

UNSURE = frozenset(
    (
        "?", "-", "equivocal", "inconclusive", "indeterminate", "maybe", "missing", "n/a", "na", "nd", "not assessed",
        "not available", "not done", "not reported", "null", "pending", "possible", "possibly", "tbd", "uncertain",
        "unclear", "undetermined", "unk", "unknown", "unspecified", "unsure",
    )
)  # fmt: skip
"""Values, in lower case, that say that nobody knows."""
FEW = 20  # a class of fewer samples, and of less than a fifth of the average, is rare
_SHOWN = 8


def run_notes(found: Mapping[str, Any], target: Target, task: str) -> list[str]:
    """What to look at again, a line each; mostly nothing.

    Args:
        found: what `flow_record` says.
        target: of all samples that take part.
        task: as it was given; where it was, nothing is said of the values.
    """
    notes = (group_note(found["leak_check"]), target_note(target) if task == "auto" else "")
    return [note for note in notes if note]


def group_note(check: Mapping[str, Any]) -> str:
    """That a column which looks like a group is torn by the split, or ''."""
    likely = check.get("likely")
    if not likely or not likely["torn"]:
        return ""
    column, of = likely["column"], f"{likely['torn']:,} of its {likely['values']:,} values"
    return (
        f"no group was given, though column {column!r} looks like one: {of} are on more than one side of the split; "
        f"--group {shlex.quote(column)} keeps each on one"
    )


def target_note(target: Target) -> str:
    """That a class looks like an unknown value, since it is called so or rare, or ''."""
    if target.task not in ("binary", "multiclass"):
        return ""
    counts = np.bincount(target.values[target.values >= 0], minlength=len(target.classes))
    classes = dict(zip(target.classes, counts.tolist(), strict=True))
    odd = [name for name in classes if name.strip().lower() in UNSURE]
    if set(classes) == {"-1", "0", "1"}:
        odd = ["-1"]
    if not odd and len(classes) > 2:
        odd = [name for name, n in classes.items() if n < FEW and 5 * n * len(classes) < counts.sum()]
    if not odd:
        return ""
    some = classes if len(classes) <= _SHOWN else {name: classes[name] for name in odd[:_SHOWN]}
    among = "" if len(classes) <= _SHOWN else ", among them"
    held = ", ".join(f"{name} {n:,}" for name, n in some.items())
    return (
        f"{target.names[0]} has {len(classes)} values{among}: {held}; "
        f"--uncertain {shlex.quote(f'{odd[0]}=ignore')} would count {odd[0]!r} as unknown"
    )
