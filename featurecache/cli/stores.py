"""`featurecache info` and `verify`: what a store holds, whether it is sound, and whether its numbers still hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import FAILED, Debug, Json, Output, Quiet, command, counted, human_bytes

INFO_EPILOG = "Example: featurecache info cache"
VERIFY_EPILOG = "Example: featurecache verify cache --repair; featurecache verify cache --recompute 100"


def info(store: opt.Store, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Show the recipes, taps, rows, datasets and failures of a store."""
    with command("info", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.store.store import FeatureStore

        with FeatureStore.create_or_open(store, write=False) as opened:
            found = opened.info()
        size = sum(recipe["bytes"] for recipe in found["recipes"])
        output.outputs = [recipe["id"] for recipe in found["recipes"]]
        output.figures = {**found, "bytes": size}
        output.text(f"store     {store}: {human_bytes(size)}, format {found['format']}")
        for recipe in found["recipes"]:
            taps = ", ".join(f"{name} {tuple(tap['shape'])} {tap['dtype']}" for name, tap in recipe["taps"].items())
            rows = f"{recipe['rows']:,} rows" + (" of replicas" if recipe["replicas"] else "")
            made = f"{recipe['body']}, {recipe['engine']} {recipe['precision']}"
            failed = f", {recipe['failures']:,} failed" if recipe["failures"] else ""
            output.text(f"recipe    {recipe['id']}: {rows}{failed}, {made}, {taps}")
        for dataset in found["datasets"]:
            output.text(f"dataset   {dataset['name']}: {dataset['samples']:,} samples of {dataset['manifest']}")
            for view, counts in dataset["views"].items():
                states = ", ".join(
                    f"{count:,} {state}" for state, count in counts.items() if state != "recipe" and count
                )
                output.text(f"            {view}: {states}, recipe {counts['recipe']}")
                if drawn := dataset["replicas"].get(view):
                    output.text(f"            {view}: {drawn['count']} replicas of each, recipe {drawn['recipe']}")


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
        from featurecache.store import rebuild, verify
        from featurecache.store import repair as repairs

        done = []
        if rebuild_index:
            done.append(("rebuilt", rebuild.rebuild_index(store)))
        if repair:
            done.append(("repaired", repairs.repair(store)))
        for what, report in done:
            output.text(
                f"{what:<9} {counted(report.kept, 'row')} kept, {report.dropped:,} dropped, "
                f"{counted(len(report.trashed), 'file')} to the trash"
            )
            for note in report.notes:
                output.text(f"note      {note}")
        found = verify.verify(store)
        output.outputs = [str(store)]
        output.figures = {
            "rows_dropped": sum(report.dropped for _, report in done),
            "files_trashed": sum(len(report.trashed) for _, report in done),
            "files_rewritten": sum(len(report.rewritten) for _, report in done),
            **found.to_json(),
        }
        output.text(
            f"checked   {counted(found.recipes, 'recipe')}, {counted(found.chunks, 'chunk')}, "
            f"{counted(found.rows, 'row')}"
        )
        output.text(f"          {human_bytes(found.bytes)} read")
        for problem in found.problems:
            output.text(f"wrong     {problem}")
        for note in found.notes:
            output.text(f"note      {note}")
        output.text("sound" if found.ok else counted(len(found.problems), "problem"))
        if not found.ok:
            output.status = FAILED
            broken = any(problem.kind in ("index", "unknown", "keys", "rows") for problem in found.problems)
            output.next = f"featurecache verify {store} {'--rebuild-index' if broken else '--repair'}"
        elif any(report.dropped for _, report in done):
            output.next = "featurecache extract ... with the same manifest computes the dropped rows again"
        if recompute is not None and found.ok:
            measure_drift(output, store, recompute, seed=seed, device=device, trust=trust_factory or [])


def measure_drift(output: Output, store: Path, rows: int, *, seed: int, device: str, trust: list[str]) -> None:
    """Add what became of rows that were extracted once more; too much drift is a failure."""
    from featurecache.upkeep.recompute import recompute

    drift = recompute(store, rows, seed=seed, device=device, trust=trust)
    output.figures |= drift.to_json()
    for recipe in drift.recipes:
        for line in recipe.lines():
            output.text(line)
    if drift.ok:
        return
    output.status = FAILED
    output.text("drifted" if drift.recomputed else "no row could be recomputed")
