"""`featurecache demo`: the embedded example from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import Debug, Json, Quiet, command
from featurecache.cli.progress import reporter

EPILOG = "Example: featurecache demo --out demo"


def demo(
    out: Annotated[Path, typer.Option(help="Where store, runs and report go.")] = Path("featurecache-demo"),
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Extract two views of the embedded emoji, fit three heads, fine-tune jointly, compare, write a report. Offline."""
    with command("demo", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.demo import run_demo

        with reporter(quiet=quiet) as progress:
            result = run_demo(out, progress)
        summary = result.extraction
        share = 100 * summary.reused // max(summary.images, 1)
        output.outputs = [str(result.report)]
        output.failed = summary.failures
        output.figures = result.to_json()
        output.text(f"images    {summary.images:,}: computed {summary.computed:,}, {share} % reused")
        output.text(f"runs      {len(result.rows)}: {result.runs_reused} reused")
        output.text()
        width = max(len(row.title) for row in result.rows)
        output.text(
            f"{'test accuracy':<{width}}  value  95 % interval   difference to the better single view (by validation)"
        )
        for row in result.rows:
            output.text(
                f"{row.title:<{width}}  {row.value:.3f}  [{row.low:.3f}, {row.high:.3f}]  {row.verdict()}".rstrip()
            )
        output.text()
        output.text(f"report    {result.report}  ({result.seconds:.0f} s)")
        output.next = "featurecache init study, and put your own images into study/manifest.csv"
