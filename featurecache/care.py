"""The Python API, continued: the care of a store, and of the installation that it is used with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featurecache.calls import journaled, withhold
from featurecache.doctor import Check, examine
from featurecache.errors import InputError
from featurecache.progress import Reporter
from featurecache.store.compact import CompactReport
from featurecache.store.compact import compact as copy_store
from featurecache.store.store import FeatureStore
from featurecache.upkeep.checking import Verification, check
from featurecache.upkeep.dropping import Removed, remove
from featurecache.upkeep.forget import plan_forget
from featurecache.upkeep.holdings import Holdings, holdings
from featurecache.upkeep.maintenance import plan_prune, plan_rm

__all__ = ["compact", "doctor", "forget", "info", "prune", "rm", "verify"]


def info(store: str | Path) -> Holdings:
    """What a store holds: recipes with taps, rows and bytes, datasets with their views. `print` it, or ask its parts.

    Raises:
        MissingFileError: there is no store.
        StoreError: a part of it is missing or damaged; says what to do.
    """
    return holdings(Path(store))


@journaled("store")
def verify(
    store: str | Path,
    *,
    repair: bool = False,
    rebuild_index: bool = False,
    recompute: int | None = None,
    seed: int = 0,
    device: str = "auto",
    trust_factory: Sequence[str] = (),
) -> Verification:
    """Check every byte of a store against what was committed.

    Args:
        store: its path; only read, but for `repair` and `rebuild_index`.
        repair: drop rows of damaged chunks before, so that `extract` computes them again.
        rebuild_index: make the index anew from the features before.
        recompute: extract so many random rows once more, if the store is sound: how far have the numbers drifted?
        seed: of their draw.
        device: where bodies run for that.
        trust_factory: plug-in bodies that may be imported for that.

    Returns:
        `ok`, the `report` with its `problems`, and `remedy`: the command that comes next. `print` shows all.

    Raises:
        MissingFileError: there is no store.
        StoreError: a part of it is missing altogether, or can't be written; says what to do.
        LockedError: another process is writing, and something is to be mended.
    """
    return check(
        Path(store), repair=repair, rebuild=rebuild_index, recompute=recompute, seed=seed, device=device,
        trust=trust_factory,
    )  # fmt: skip


@journaled()
def prune(store: str | Path, *, dry_run: bool = False, reporter: Reporter | None = None) -> Removed:
    """Drop what no dataset names any more: rows and failures by their content, recipes without rows, leftovers.

    There is no question: look at `dry_run=True` first.

    Args:
        store: its path.
        dry_run: only say what would go.
        reporter: told of progress.

    Raises:
        MissingFileError: there is no store.
        LockedError: another process is writing.
        StoreError: it changed meanwhile, or can't be written.
        CorruptionError: a dataset can't be read, so that nobody knows what it names.
    """
    with _opened(store) as opened:
        plan = plan_prune(opened)
    return remove(plan, dry_run=dry_run, reporter=reporter)


@journaled()
def rm(
    store: str | Path, names: str | Sequence[str], *, dry_run: bool = False, reporter: Reporter | None = None
) -> Removed:
    """Drop recipes with their features, or datasets, whose rows stay until `prune`.

    There is no question: look at `dry_run=True` first.

    Args:
        store: its path.
        names: recipes by four or more digits, datasets by name; where that may be both, `recipe:DIGITS` or
            `dataset:NAME`.
        dry_run: only say what would go.
        reporter: told of progress.

    Raises:
        InputError: a name is unknown, or may be both; lists what there is.
        LockedError: another process is writing.
        StoreError: it changed meanwhile, or can't be written.
    """
    with _opened(store) as opened:
        plan = plan_rm(opened, _listed(names))
    return remove(plan, dry_run=dry_run, reporter=reporter)


@journaled()
def forget(
    store: str | Path,
    ids: str | Sequence[str],
    *,
    datasets: str | Sequence[str] = (),
    dry_run: bool = False,
    reporter: Reporter | None = None,
) -> Removed:
    """Remove samples from a store, bytes included (privacy): features, keys, labels, failures, paths and ids.

    There is no question: look at `dry_run=True` first. The manifest, runs fitted before and copies of the store are
    not touched; images that other samples have as well stay for these, as `plan.notes` say.

    Args:
        store: its path.
        ids: of the samples.
        datasets: only in these: elsewhere the ids mean other samples.
        dry_run: only say what would go.
        reporter: told of progress.

    Raises:
        InputError: no ids, or a sample or dataset that is unknown; names the nearest.
        LockedError: another process is writing.
        StoreError: it changed meanwhile, or can't be written.
    """
    wanted = _listed(ids)
    if not wanted:
        raise InputError("which samples? Give an id, or several.")
    withhold(wanted)
    with _opened(store) as opened:
        plan = plan_forget(opened, wanted, _listed(datasets))
    return remove(plan, dry_run=dry_run, reporter=reporter)


@journaled("store")
def compact(
    store: str | Path,
    out: str | Path,
    *,
    order: str | None = None,
    codec: str | None = None,
    reporter: Reporter | None = None,
) -> CompactReport:
    """Copy a store into a new one: full chunks without gaps, in the order in which a dataset reads them; verified.

    Args:
        store: its path; only read.
        out: of the new one; must not exist.
        order: the dataset in whose order rows are laid.
        codec: `none`, `zstd`, `blosc` or `gzip`; default each recipe's own.
        reporter: told of progress.

    Raises:
        InputError: there is something at `out`, or no such dataset or codec.
        StoreError: it does not fit on the disk, or the store changed meanwhile.
        CorruptionError: a chunk is damaged.
    """
    return copy_store(store, out, order=order, codec=codec, reporter=reporter)


def doctor(store: str | Path | None = None) -> list[Check]:
    """Look at versions, devices, engines, weights, disk, file system, and a store if one is given. Never raises.

    Returns:
        One `Check` each: `name`, `status` (PASS, WARN or FAIL), what was `found`, and the `fix`.
    """
    return list(examine(None if store is None else Path(store)))


def _opened(store: str | Path) -> FeatureStore:
    return FeatureStore.create_or_open(store, write=False)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
