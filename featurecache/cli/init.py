"""`featurecache init`: the first files of a project of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import Debug, Json, Quiet, command, pasteable

EPILOG = "Example: featurecache init study, then put your own rows into study/manifest.csv"


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to; is made.")] = Path("."),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a commented pipeline.toml and a manifest of three rows, to be filled in."""
    with command("init", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.pipeline.initial import write_initial

        written = write_initial(folder)
        output.outputs = [str(path) for path in written]
        for path in written:
            output.text(f"written   {path}")
        then = pasteable("pipeline", written[0], "--dry-run")
        output.next = f"put your own rows into {written[1]}, then: {then}"
