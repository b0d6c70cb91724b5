"""Train, valid and test: grouped, stratified and seeded, or from a column; saved, read back and checked for leaks.

How `auto` splits: samples of one group, and samples that share an image, are joined and never torn apart. The joined
groups are taken in an order given by a hash of seed and name (so that neither the order of the manifest nor the machine
matters), those that are large for the smallest split first. Each goes where it reduces the chi-square distance between
the counts so far and the wanted ones most, counted per class and, with more weight, over all samples. Fractions are
then met up to about the size of the last groups.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from featurecache.config import SplitConfig
from featurecache.data.dense import DenseTarget
from featurecache.data.targets import Target
from featurecache.errors import InputError, MissingFileError, did_you_mean

SPLITS = ("train", "valid", "test")
_SPELLINGS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_SHOWN = 3
_QUANTILES = 10  # strata of a regression target
_LARGE = 0.1  # a group of more than this share of the smallest split is placed before the others
_TOTAL = 4.0  # weight of the overall counts against those of each class

Content = Sequence[Sequence[str] | None]
"""Per sample the keys (hex) of its images; None where unknown."""


def group_column(table: pl.DataFrame, group: str | None) -> str | None:
    """The column that says what must stay together: `group`, else one named `group`, else None."""
    return group or ("group" if "group" in table.columns else None)


def sample_groups(table: pl.DataFrame, group: str | None) -> np.ndarray:
    """The group of each sample, as text (n,): `group`, else a column named `group`, else the sample's own id.

    A sample whose group cell is empty is a group of its own.

    Raises:
        InputError: no such column.
    """
    if group is not None and group not in table.columns:
        near = did_you_mean(group, table.columns)
        raise InputError(f"no group column {group!r}.{near} Columns: {', '.join(table.columns[:20])}")
    column = group_column(table, group) or "sample_id"
    own = table["sample_id"]
    return np.array(table[column].cast(pl.String).fill_null(own), dtype=object).astype(np.str_)


def make_splits(
    table: pl.DataFrame, target: Target, config: SplitConfig, *, content: Content | None = None, source: str = ""
) -> np.ndarray:
    """Divide samples, or read how a column divides them.

    Args:
        table: one row per sample, with `sample_id`.
        target: their labels; samples without any known label are left out.
        config: `auto` or a column, group, seed, fractions.
        content: per sample the keys of its images: samples that share one stay together.
        source: what messages begin with.

    Returns:
        (n,) of "train", "valid", "test" or "" (not used).

    Raises:
        InputError: too few groups, a split that would be empty, an unknown value in the column, a leak.
    """
    head = f"{source}: " if source else ""
    groups = sample_groups(table, config.group)
    ids = table["sample_id"].to_list()
    if config.split != "auto":
        splits = _from_column(table, config.split, head)
        splits[~target.known] = ""
        if not (splits == "train").any():
            raise InputError(f"{head}column {config.split!r}: no sample with a known target is marked train")
        check_leaks(ids, splits, groups, content, source=source)
        return splits
    joined = _joined(groups, content)
    splits = np.full(len(ids), "", dtype="<U5")
    rows = np.flatnonzero(target.known)
    fractions = {"train": 1 - config.valid - config.test, "valid": config.valid, "test": config.test}
    splits[rows] = _divide(joined[rows], _strata(target)[rows], fractions, config.seed, head)
    return splits


def fold_splits(
    table: pl.DataFrame,
    target: Target,
    config: SplitConfig,
    folds: int,
    *,
    content: Content | None = None,
    source: str = "",
) -> list[np.ndarray]:
    """Grouped, stratified folds for cross-validation: every sample with a known label is tested exactly once.

    What is not tested in a fold is divided again: a share of `config.valid` for validation, the rest for training.

    Args:
        table: as for `make_splits`.
        target: as for `make_splits`.
        config: group, seed and share of validation; its `split` must be `auto`, its `test` is not used.
        folds: how many, 2 or more.
        content: as for `make_splits`.
        source: as for `make_splits`.

    Returns:
        Per fold (n,) of "train", "valid", "test" or "" (not used).

    Raises:
        InputError: fewer than 2 folds, fewer groups than a division needs, a split column beside it.
    """
    head = f"{source}: " if source else ""
    if folds < 2:
        raise InputError(f"{head}{folds} folds: at least 2 are needed")
    if config.split != "auto":
        raise InputError(f"{head}folds and a split column ({config.split!r}) contradict each other: give either")
    joined = _joined(sample_groups(table, config.group), content)
    rows = np.flatnonzero(target.known)
    joined, strata = joined[rows], _strata(target)[rows]
    fold_of = _divide(joined, strata, {f"{fold:04}": 1 / folds for fold in range(folds)}, config.seed, head)
    found = []
    for fold in range(folds):
        splits = np.full(table.height, "", dtype="<U5")
        tested = fold_of == f"{fold:04}"
        splits[rows[tested]] = "test"
        rest = ~tested
        shares = {"train": 1 - config.valid, "valid": config.valid}
        splits[rows[rest]] = _divide(joined[rest], strata[rest], shares, config.seed, head)
        found.append(splits)
    return found


def _from_column(table: pl.DataFrame, column: str, head: str) -> np.ndarray:
    if column not in table.columns:
        near = did_you_mean(column, [*table.columns, "auto"])
        raise InputError(
            f"{head}no split column {column!r}.{near} Give --split auto or one of: {', '.join(table.columns[:20])}"
        )
    text = table[column].cast(pl.String).str.strip_chars().str.to_lowercase().fill_null("")
    known = text.replace_strict({**_SPELLINGS, "": ""}, default=None, return_dtype=pl.String)
    wrong = known.is_null()
    if wrong.any():
        ids, written = table["sample_id"].filter(wrong), table[column].filter(wrong)
        problems = [f"sample {name!r}: {value!r}" for name, value in zip(ids, written, strict=True)]
        raise InputError.from_problems(f"{head}column {column!r}: a split is train, valid or test", problems)
    return np.array(known.to_list(), dtype="<U5")


def _joined(groups: np.ndarray, content: Content | None) -> np.ndarray:
    """Names of the joined groups: groups that share content become one, named like its first in the alphabet."""
    if content is None:
        return groups
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent[above]
            name = parent[name]
        return name

    owner: dict[str, str] = {}
    for name, keys in zip(groups.tolist(), content, strict=True):
        for key in keys or ():
            first, second = sorted((root(owner.setdefault(key, name)), root(name)))
            parent[second] = first
    return np.array([root(name) for name in groups.tolist()], dtype=np.str_)


def _strata(target: Target) -> np.ndarray:
    """The stratum of each sample (n,): its class, its rarest label (0 = none), or the quantile of the first target."""
    values = target.values
    if isinstance(target, DenseTarget):
        return target.strata()
    if values.ndim == 1:
        return np.asarray(values, dtype=np.int64)
    if target.task == "multilabel":
        positive = values == 1
        order = np.argsort(positive.sum(axis=0), kind="stable")
        first = positive[:, order].argmax(axis=1)
        return np.where(positive.any(axis=1), order[first] + 1, 0).astype(np.int64)
    first_target = values[:, 0].astype(np.float64)
    known = ~np.isnan(first_target)
    if not known.any():
        return np.zeros(len(values), dtype=np.int64)
    edges = np.quantile(first_target[known], np.linspace(0, 1, _QUANTILES + 1)[1:-1])
    return np.where(known, np.searchsorted(edges, np.nan_to_num(first_target), side="right"), _QUANTILES).astype(
        np.int64
    )


def _divide(groups: np.ndarray, strata: np.ndarray, fractions: Mapping[str, float], seed: int, head: str) -> np.ndarray:
    """The side of each row (n,): a name of `fractions`."""
    names = [name for name in fractions if fractions[name] > 0]
    units, unit_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(unit_of, minlength=len(units))
    facts = f"{len(groups)} samples with a known target are in {len(units)} group{'s' * (len(units) != 1)}"
    if len(units):
        facts += f", the largest of which ({str(units[sizes.argmax()])!r}) holds {sizes.max()}"
    if len(units) < len(names):
        raise InputError(f"{head}{len(names)} splits need at least as many groups, but {facts}")
    wanted = np.array([fractions[name] for name in names])
    large = sizes > _LARGE * wanted.min() * len(groups)
    hashes = np.array([_hash(seed, name) for name in units.tolist()], dtype=np.uint64)
    order = np.lexsort((hashes, np.where(large, -sizes, 0)))
    side_of = _place(order.tolist(), large.tolist(), sizes.tolist(), _members(unit_of, strata), wanted)
    side_of = _none_empty(np.asarray(side_of), sizes, hashes, len(names))
    return np.asarray(np.array(names)[side_of][unit_of])


def _none_empty(side_of: np.ndarray, sizes: np.ndarray, hashes: np.ndarray, n_sides: int) -> np.ndarray:
    """Give a side that got nothing, since groups are few and large, the smallest group of a side that has several."""
    for side in range(n_sides):
        if not (side_of == side).any():
            counts = np.bincount(side_of, minlength=n_sides)
            spare = np.flatnonzero(counts[side_of] > 1)  # there are at least as many groups as sides
            side_of[spare[np.lexsort((hashes[spare], sizes[spare]))[0]]] = side
    return side_of


def _members(unit_of: np.ndarray, strata: np.ndarray) -> list[list[tuple[int, int]]]:
    """Per unit its (stratum, count) pairs, with strata numbered from 0."""
    _, stratum_of = np.unique(strata, return_inverse=True)
    width = int(stratum_of.max()) + 1
    pairs, counts = np.unique(unit_of.astype(np.int64) * width + stratum_of, return_counts=True)
    members: list[list[tuple[int, int]]] = [[] for _ in range(int(unit_of.max()) + 1)]
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        members[pair // width].append((pair % width, count))
    return members


def _place(
    order: Sequence[int],
    large: Sequence[bool],
    sizes: Sequence[int],
    members: Sequence[Sequence[tuple[int, int]]],
    wanted: np.ndarray,
) -> np.ndarray:
    """The side of each unit: where it reduces the chi-square distance to the wanted counts most.

    The change for `count` samples more on a side is count * (2 * (have - goal) + count) / goal. Its last term is taken
    in full for large units only: else small sides would get fewer large groups than their share.
    """
    strata = max(stratum for pairs in members for stratum, _ in pairs) + 1
    totals = np.zeros(strata)
    for pairs in members:
        for stratum, count in pairs:
            totals[stratum] += count
    sides = range(len(wanted))
    goals, have = (totals[:, None] * wanted).tolist(), [[0.0] * len(wanted) for _ in range(strata)]
    overall, filled = (totals.sum() * wanted).tolist(), [0.0] * len(wanted)
    side_of = np.zeros(len(members), dtype=np.int64)
    for unit in order:
        size, big = sizes[unit], large[unit]
        step = size if big else 1
        costs = [_TOTAL * size * (2 * (filled[side] - overall[side]) + step) / overall[side] for side in sides]
        for stratum, count in members[unit]:
            now, goal, step = have[stratum], goals[stratum], count if big else 1
            for side in sides:
                costs[side] += count * (2 * (now[side] - goal[side]) + step) / goal[side]
        best = costs.index(min(costs))
        side_of[unit] = best
        filled[best] += size
        for stratum, count in members[unit]:
            have[stratum][best] += count
    return side_of


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def check_leaks(
    sample_ids: Sequence[str],
    splits: np.ndarray,
    groups: np.ndarray | None,
    content: Content | None,
    *,
    source: str = "",
) -> None:
    """Refuse splits where a group, or the same image, is on two sides. Samples that are not used ("") don't count.

    Raises:
        InputError: names the groups or images and their samples.
    """
    used = [index for index, split in enumerate(splits.tolist()) if split]
    problems: list[str] = []
    if groups is not None:
        problems += _torn(((str(groups[index]), index) for index in used), sample_ids, splits, "group {!r}")
    if content is not None:
        pairs = ((key, index) for index in used for key in content[index] or ())
        problems += _torn(pairs, sample_ids, splits, "the same image ({:.12})")
    if problems:
        head = f"{source}: " if source else ""
        raise InputError.from_problems(f"{head}the splits leak: what is on one side must not be on another", problems)


def _torn(pairs: Iterable[tuple[str, int]], sample_ids: Sequence[str], splits: np.ndarray, what: str) -> Iterator[str]:
    """One line per name whose samples are on more than one side."""
    held: dict[str, list[int]] = {}
    for name, index in pairs:
        held.setdefault(name, []).append(index)
    sides = splits.tolist()
    for name, members in held.items():
        if len({sides[index] for index in members}) > 1:
            yield f"{what.format(str(name))} is on several sides: " + _sides(members, sample_ids, sides)


def _sides(members: Sequence[int], sample_ids: Sequence[str], sides: Sequence[str]) -> str:
    parts = []
    for side in SPLITS:
        ids = [repr(sample_ids[index]) for index in members if sides[index] == side]
        if ids:
            more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            parts.append(f"{side} ({', '.join(ids[:_SHOWN])}{more})")
    return ", ".join(parts)


def write_splits(path: Path, sample_ids: Sequence[str], groups: Sequence[str] | np.ndarray, splits: np.ndarray) -> None:
    """Write splits.csv: sample_id, group, split."""
    columns = {"sample_id": list(sample_ids), "group": [str(group) for group in groups], "split": splits.tolist()}
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_csv(path)


def read_splits(path: Path, sample_ids: Sequence[str]) -> np.ndarray:
    """Read splits.csv back, in the order of `sample_ids`.

    Raises:
        MissingFileError: there is no such file.
        InputError: not such a file, an unknown split, or samples that are unknown, missing or there twice.
    """
    path = Path(path)
    try:
        table = pl.read_csv(io.BytesIO(path.read_bytes()), infer_schema=False).fill_null("")
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a splits.csv: {' '.join(str(error).split())[:200]}") from None
    absent = [name for name in ("sample_id", "split") if name not in table.columns]
    if absent:
        raise InputError(f"{path}: not a splits.csv: no column {absent[0]!r}")
    ids, found = table["sample_id"].to_list(), table["split"].to_list()
    held = dict(zip(ids, found, strict=True))
    wanted = set(sample_ids)
    problems = [f"sample {name!r} is there twice" for name, count in Counter(ids).items() if count > 1]
    problems += [
        f"sample {name!r}: unknown split {split!r}" for name, split in held.items() if split not in ("", *SPLITS)
    ]
    problems += [f"sample {name!r} is not in the data" for name in held if name not in wanted]
    problems += [f"sample {name!r} of the data is missing" for name in sample_ids if name not in held]
    if problems:
        raise InputError.from_problems(f"{path}: the splits don't belong to these samples", problems)
    return np.array([held[name] for name in sample_ids], dtype="<U5")
