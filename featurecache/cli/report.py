"""`featurecache report`: the page of a run once more, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featurecache.cli.output import Debug, Json, Quiet, command
from featurecache.errors import InputError

EPILOG = "Example: featurecache report runs/xgb --about about.toml. Without pictures: --images none"


def report(
    run: Annotated[Path, typer.Argument(help="A run of fit-head, tune or finetune-joint.")],
    about: Annotated[
        Path | None, typer.Option(help="TOML that says what only a person can state; kept in the run.")
    ] = None,
    images: Annotated[str, typer.Option(metavar="all|none", help="Whether the page shows pictures.")] = "all",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a run's report.html again: with what came since (evaluations, ablation, heat maps), or with no pictures."""
    with command("report", as_json=as_json, quiet=quiet, debug=debug, journals=(run,)) as output:
        if images not in ("all", "none"):
            raise InputError(f"--images {images}: all or none")
        from featurecache.reporting.report import write_report
        from featurecache.run import load_run
        from featurecache.rundir.files import ABOUT
        from featurecache.rundir.fitrecord import read_about

        loaded = load_run(run)
        if about is not None:
            (loaded.path / ABOUT).write_text(read_about(about), encoding="utf-8")
        path = write_report(loaded.path, loaded.record, images=images == "all")
        output.outputs = [str(path)]
        output.figures = {"run": str(run), "images": images, "bytes": path.stat().st_size}
        output.text(f"written   {path}")
        if images == "none" and (loaded.path / "pictures").is_dir():
            output.text(f"note      the pictures themselves stay in {run}/pictures; fit-head --images none keeps none")
        output.next = f"open {path}"
