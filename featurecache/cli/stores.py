"""`featurecache info` and `verify`: what a store holds, whether it is sound, and whether its numbers still hold."""

from __future__ import annotations

from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import DONE, FAILED, Debug, Json, Quiet, command

INFO_EPILOG = "Example: featurecache info cache"
VERIFY_EPILOG = "Example: featurecache verify cache --repair; featurecache verify cache --recompute 100"


def info(store: opt.Store, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show the recipes, taps, rows, datasets and failures of a store."""
    with command("info", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.upkeep.holdings import holdings

        found = holdings(store)
        output.outputs = [recipe.id for recipe in found.recipes]
        output.figures = found.to_json()
        output.lines += found.lines()


def verify(
    store: opt.Store,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop rows of damaged chunks, so that extract computes them again.")
    ] = False,
    rebuild_index: Annotated[
        bool, typer.Option("--rebuild-index", help="Make the index anew from the features.")
    ] = False,
    recompute: Annotated[
        int | None,
        typer.Option(metavar="N", help="Extract N random rows once more; how far have the numbers drifted?"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of --recompute.")] = 0,
    device: opt.DeviceOption = "auto",
    trust_factory: opt.TrustFactory = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every byte of a store against what was committed; exit status 1 where something is wrong."""
    with command("verify", as_json=as_json, quiet=quiet, debug=debug, journals=(store,)) as output:
        from featurecache.upkeep.checking import check

        found = check(
            store,
            repair=repair,
            rebuild=rebuild_index,
            recompute=recompute,
            seed=seed,
            device=device,
            trust=trust_factory or (),
        )
        output.outputs = [str(store)]
        output.figures = found.to_json()
        output.lines += found.lines()
        output.status = DONE if found.ok else FAILED
        output.next = found.remedy
