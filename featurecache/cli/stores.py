"""`featurecache info` and `verify`: what a store holds, and whether it is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import Debug, Json, Quiet, command, human_bytes

STORE = Annotated[Path, typer.Argument(help="A store.")]
INFO_EPILOG = "Example: featurecache info cache"
VERIFY_EPILOG = "Example: featurecache verify cache --repair"


def info(store: STORE, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
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
            made = f"{recipe['body']}, {recipe['engine']} {recipe['precision']}"
            failed = f", {recipe['failures']:,} failed" if recipe["failures"] else ""
            output.text(f"recipe    {recipe['id']}: {recipe['rows']:,} rows{failed}, {made}, {taps}")
        for dataset in found["datasets"]:
            output.text(f"dataset   {dataset['name']}: {dataset['samples']:,} samples of {dataset['manifest']}")
            for view, counts in dataset["views"].items():
                states = ", ".join(
                    f"{count:,} {state}" for state, count in counts.items() if state != "recipe" and count
                )
                output.text(f"            {view}: {states}, recipe {counts['recipe']}")
