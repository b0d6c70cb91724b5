"""From the manifest to the split: how many samples and groups are left at each step, and whether any leak across."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurecache.data.likely import likely_group
from featurecache.data.splits import SPLITS, Content, group_column, sample_groups

UNREADABLE, NO_LABEL, NO_VIEW, NO_SPLIT = "unreadable image", "no known label", "missing view", "in no split"


def flow_record(
    table: pl.DataFrame,
    group: str | None,
    *,
    ids: Sequence[str],
    groups: NDArray[Any],
    known: NDArray[np.bool_],
    splits: NDArray[Any],
    sides: NDArray[Any],
    content: Content,
    unreadable: Collection[str],
    targets: Collection[str] = (),
) -> dict[str, Any]:
    """What run.json says of how many samples there are at each step, and of leaks between the sides.

    Args:
        table: all samples of the manifest.
        group: column of what a split keeps together; None for the default.
        ids: (n,) of those that have the views that are needed.
        groups: (n,) what was kept together.
        known: (n,) whether their target is known.
        splits: (n,) train, valid, test, or '' for samples that are not used.
        sides: (n,) the same; in a cross-validation the number of the fold that tested each.
        content: per sample the keys of its images.
        unreadable: ids of samples of the manifest that have an image that can't be read.
        targets: columns that are predicted.
    """
    flow = sample_flow(
        table["sample_id"].to_list(),
        sample_groups(table, group),
        kept=ids,
        unreadable=unreadable,
        known=[name for name, told in zip(ids, known.tolist(), strict=True) if told],
        split=dict(zip(ids, splits.tolist(), strict=True)),
    )
    level = group_column(table, group)
    check = leak_check(sides, groups, content, level=level)
    column = likely_group(table, ("sample_id", *targets)) if level is None else None
    check["likely"] = torn_values(table, column, ids, sides) if column is not None else None
    return {"flow": flow, "leak_check": check}


def sample_flow(
    sample_ids: Sequence[str],
    groups: NDArray[Any],
    *,
    kept: Collection[str],
    unreadable: Collection[str],
    known: Collection[str],
    split: dict[str, str],
) -> dict[str, Any]:
    """What became of every sample of a manifest; each is counted once, where it left.

    Args:
        sample_ids: of all samples of the manifest.
        groups: (n,) what a split keeps together.
        kept: ids of those that have the views that are needed.
        unreadable: ids of those that have an image that can't be read.
        known: ids of those with a known target.
        split: id -> train, valid or test.

    Returns:
        `samples`, `groups` of the manifest; `left_out`, a list of `why`, `samples`, `groups`; `used`: split -> the
        same; `incomplete`: samples that are used though an image of theirs could not be read.
    """
    kept, unreadable, known = set(kept), set(unreadable), set(known)
    fate = []
    for name in sample_ids:
        if name not in kept:
            fate.append(UNREADABLE if name in unreadable else NO_VIEW)
        elif name not in known:
            fate.append(NO_LABEL)
        else:
            fate.append(split.get(name) or NO_SPLIT)
    ends = np.array(fate, dtype=object)

    def count(where: NDArray[np.bool_]) -> dict[str, int]:
        return {"samples": int(where.sum()), "groups": len(np.unique(groups[where]))}

    return {
        **count(np.ones(len(ends), bool)),
        "left_out": [
            {"why": why, **count(ends == why)}
            for why in (UNREADABLE, NO_LABEL, NO_VIEW, NO_SPLIT)
            if (ends == why).any()
        ],
        "used": {side: count(ends == side) for side in SPLITS if (ends == side).any()},
        "incomplete": len(unreadable & kept),
    }


def leak_check(sides: NDArray[Any], groups: NDArray[Any], content: Content, *, level: str | None) -> dict[str, Any]:
    """Whether any group, or any image (told by its key, a hash of its content), is on two sides.

    Args:
        sides: (n,) the side of each sample, '' where it is not used: train, valid, test, or the number of a fold.
        groups: (n,) what was to be kept together.
        content: per sample the keys of its images.
        level: the column that says what is kept together; None where each sample stands alone.

    Returns:
        `level`; `images`, distinct ones that were compared; `shared`, those of several samples, which must lie on one
        side; `torn_groups` and `torn_images`, which should be 0; `without_hash`, used samples with no image known.
    """
    images: dict[str, set[str]] = {}
    owners: dict[str, int] = {}
    of_group: dict[str, set[str]] = {}
    unknown = 0
    for side, group, keys in zip(sides.tolist(), groups.tolist(), content, strict=True):
        if side == "":
            continue
        of_group.setdefault(str(group), set()).add(str(side))
        unknown += not keys
        for key in set(keys or ()):
            images.setdefault(key, set()).add(str(side))
            owners[key] = owners.get(key, 0) + 1
    return {
        "level": level,
        "images": len(images),
        "shared": sum(count > 1 for count in owners.values()),
        "torn_groups": sum(len(held) > 1 for held in of_group.values()),
        "torn_images": sum(len(held) > 1 for held in images.values()),
        "without_hash": unknown,
    }


def torn_values(table: pl.DataFrame, column: str, ids: Sequence[str], sides: NDArray[Any]) -> dict[str, Any]:
    """How many values of a column are on more than one side, where a split was not told to keep them together.

    Args:
        table: all samples of the manifest.
        column: of the table.
        ids: (n,) of samples.
        sides: (n,) as for `leak_check`.

    Returns:
        `column`; `values`, distinct ones of the samples that are used; `torn`, those on more than one side.
    """
    used = pl.DataFrame({"sample_id": list(ids), "side": [str(side) for side in sides.tolist()]})
    values = used.filter(pl.col("side") != "").join(table.select("sample_id", of=column), on="sample_id")
    spread = values.drop_nulls("of").group_by("of").agg(pl.col("side").n_unique())["side"]
    return {"column": column, "values": len(spread), "torn": int((spread > 1).sum())}
