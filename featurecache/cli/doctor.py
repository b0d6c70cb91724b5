"""`featurecache doctor`: is everything there, and what to do if not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import FAILED, Debug, Json, Quiet, command

EPILOG = "Example: featurecache doctor; featurecache doctor cache"


def doctor(
    store: Annotated[Path | None, typer.Argument(help="A store to look at, too.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check versions, devices, engines, weights, disk, file system and a store: PASS, WARN or FAIL, each with a fix."""
    with command("doctor", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.doctor import examine

        checks = list(examine(store))
        counts = {word: sum(check.status == word for check in checks) for word in ("PASS", "WARN", "FAIL")}
        output.figures = {
            **{f"n_{word.lower()}": count for word, count in counts.items()},
            "checks": [check.to_json() for check in checks],
        }
        output.outputs = [check.name for check in checks if check.status == "FAIL"]
        width = max(len(check.name) for check in checks)
        for check in checks:
            output.text(f"{check.status}  {check.name:{width}}  {check.found}")
            if check.fix:
                output.text(f"      {'':{width}}  fix: {check.fix}")
        output.text(f"{counts['PASS']} passed, {counts['WARN']} warnings, {counts['FAIL']} failed")
        if counts["FAIL"]:
            output.status = FAILED
