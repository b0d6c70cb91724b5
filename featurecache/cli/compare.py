"""`featurecache compare`: runs of the same samples beside each other, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import Debug, Json, Quiet, command
from featurecache.cli.stagetwo import Metric

EPILOG = "Example: featurecache compare runs/fc runs/logistic runs/xgb --metric balanced_accuracy"


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more, fitted with the same split.")],
    metric: Metric = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, too, as JSON.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the groups per interval.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rank runs on their validation samples, and tell by paired resamples of the test groups what differs for sure."""
    with command("compare", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.reporting.compare import compare_runs
        from featurecache.run import load_run

        found = compare_runs(
            [load_run(run) for run in runs], names=[str(run) for run in runs], metric=metric, n=bootstrap, seed=seed
        )
        output.outputs = [row.run for row in found.runs]
        output.figures = found.to_json()
        if out is not None:
            found.write(out)
            output.outputs = [str(out)]
        for line in found.lines():
            output.text(line)
        output.next = f"open {found.runs[0].run}/report.html"
