"""`featurecache rm`, `prune`, `forget` and `compact`: what takes things out of a store, or puts it in order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurecache.amounts import counted, human_bytes
from featurecache.cli import options as opt
from featurecache.cli.output import FAILED, Debug, Json, Output, Quiet, command, pasteable, planned_command
from featurecache.cli.progress import reporter
from featurecache.errors import InputError

if TYPE_CHECKING:
    from featurecache.upkeep.dropping import Removal

RM_EPILOG = "Example: featurecache rm cache 3f1c --dry-run"
PRUNE_EPILOG = "Example: featurecache prune cache --dry-run"
FORGET_EPILOG = "Example: featurecache forget cache --id patient-17 --id patient-23"
COMPACT_EPILOG = "Example: featurecache compact cache --out cache2 --order manifest"

DryRun = Annotated[bool, typer.Option("--dry-run", help="List what would be dropped; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask. Needed where there is no terminal.")]


def rm(
    store: opt.Store,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|DATASET...",
            help="Recipes by four or more digits of their digest, datasets by their name; where that may be both, "
            "recipe:DIGITS or dataset:NAME.",
        ),
    ],
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Drop recipes with their features, or datasets. Lists rows and bytes first.

    A recipe loses all its rows and failures. Where a dataset still names it, that dataset's images become pending: the
    next extract computes them again. A dataset loses its table and labels; its rows stay until prune finds that no
    other dataset names them.
    """
    with command("rm", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.store.store import FeatureStore
        from featurecache.upkeep.maintenance import plan_rm

        with FeatureStore.create_or_open(store, write=False) as opened:
            plan = plan_rm(opened, names)
        _go(plan, output, dry_run=dry_run, yes=yes)


def prune(
    store: opt.Store,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Drop what no dataset names any more. Lists rows and bytes first.

    That is: rows and failures of images that are in no dataset, recipes without rows that no dataset names, records of
    files that no dataset has, and leftovers of processes that were killed. A row stays, whatever its recipe, as long as
    any dataset has its image. Chunks that hold dropped rows are written anew, so the bytes are free afterwards.
    """
    with command("prune", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.store.store import FeatureStore
        from featurecache.upkeep.maintenance import plan_prune

        with FeatureStore.create_or_open(store, write=False) as opened:
            plan = plan_prune(opened)
        _go(plan, output, dry_run=dry_run, yes=yes)


def forget(
    store: opt.Store,
    more: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="More ids: --id A B C.")] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID...", help="Id of a sample; several may follow.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only in this dataset: elsewhere the id means another sample; repeatable."),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Remove samples from a store, bytes included (privacy). Lists rows and bytes first.

    Features and keys in all recipes, rows and labels in all datasets, failures, file paths and ids go; the chunks and
    the index are written anew, so that none of these bytes is left in the store's files. An image that another sample
    has as well, byte for byte, stays for that one, and is reported.

    Not touched: the manifest, which would bring a sample back if it still lists it; runs that were fitted before, whose
    predictions.csv and splits.csv hold ids; copies of the store, of which compact makes one; the disk's free blocks.
    """
    with command("forget", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.store.store import FeatureStore
        from featurecache.upkeep.forget import plan_forget

        wanted = [*(ids or []), *(more or [])]
        if not wanted:
            raise InputError("which samples? Give --id ID, once or more.")
        output.withheld = wanted
        with FeatureStore.create_or_open(store, write=False) as opened:
            plan = plan_forget(opened, wanted, dataset or ())
        _go(plan, output, dry_run=dry_run, yes=yes)


def compact(
    store: opt.Store,
    out: Annotated[Path, typer.Option(metavar="STORE2", help="The new store; must not exist.")],
    order: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Lay rows in the order of this dataset's manifest.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(metavar="none|zstd|blosc|gzip", help="Default: each recipe's own.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Copy a store into a new one, in full chunks without gaps, in the order in which a dataset reads it.

    Recipes, features bit by bit, datasets, failures and records of files are the same; the new store has an identity of
    its own, and runs fitted on the old one serve with it. The old one is only read. The copy grows in STORE2.tmp, every
    byte of it is verified, then it is renamed; after a kill, the same command starts anew.
    """
    with command("compact", as_json=as_json, quiet=quiet, debug=debug, journals=(store,)) as output:
        from featurecache.store.compact import compact as copy

        with reporter(quiet=quiet) as progress:
            made = copy(store, out, order=order, codec=codec, reporter=progress)
        output.outputs = [str(made.path)]
        output.journals.append(made.path)
        output.figures = {
            "recipes": made.recipes,
            "rows": made.rows,
            "datasets": made.datasets,
            "bytes_before": made.bytes_before,
            "bytes": made.bytes,
        }
        parts = ((made.recipes, "recipe"), (made.rows, "row"), (made.datasets, "dataset"))
        output.text(f"made      {made.path}: {', '.join(counted(*part) for part in parts)}")
        output.text(f"          {human_bytes(made.bytes_before)} -> {human_bytes(made.bytes)}, verified")
        output.next = pasteable("info", made.path)


def _go(plan: Removal, output: Output, *, dry_run: bool, yes: bool) -> None:
    """List a plan, ask where that is possible, carry it out, say what was done."""
    output.figures = {"dry_run": dry_run, **plan.to_json()}
    output.outputs = [*(part.stored.recipe.id for part in plan.parts), *plan.datasets, *plan.samples]
    if plan.empty or dry_run or yes:
        output.lines += plan.lines()
    elif not _agreed(plan):
        output.outputs, output.status = [], FAILED
        output.text("nothing was changed")
        return
    from featurecache.upkeep.dropping import remove

    with reporter(quiet=output.quiet) as progress:
        removed = remove(plan, dry_run=dry_run, reporter=progress)
    output.figures |= removed.to_json()
    output.lines += removed.lines()
    if dry_run and not plan.empty:
        output.next = planned_command()
    elif removed.done:
        output.next = pasteable("verify", plan.path)


def _agreed(plan: Removal) -> bool:
    """List it and ask.

    Raises:
        InputError: there is no terminal to ask on.
    """
    print("\n".join(plan.lines()), file=sys.stderr)
    if not _terminal():
        raise InputError("Nothing was changed. There is no terminal to ask on: give --yes to drop this.")
    return typer.confirm("Drop this for good?", err=True)


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()
