"""`featurecache pipeline`: a declared pipeline from end to end, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurecache.cli import options as opt
from featurecache.cli.output import Debug, Json, Output, Quiet, command, planned_command, typed_command
from featurecache.cli.progress import reporter
from featurecache.cli.typed import toml_value

if TYPE_CHECKING:
    from featurecache.pipeline.plan import Step

EPILOG = "Example: featurecache pipeline joint --set joint.epochs=1 --out runs. Again: what is done is not done again."


def pipeline(
    file: Annotated[Path, typer.Argument(help="A TOML file, or the name of a recipe that comes along, such as joint.")],
    out: Annotated[Path, typer.Option(help="Folder; everything goes into OUT/<stem of the file>.")] = Path("runs"),
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change an option: extract.image_size=96, fit.NAME.settings.C=0.1."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="A set of changes that the file names, such as real.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; do nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a declared pipeline: data, features, heads, joint tuning, comparison; goes on where it was stopped."""
    with command("pipeline", as_json=as_json, quiet=quiet, debug=debug) as output:
        from featurecache.pipeline.call import run_pipeline

        changes = {key: toml_value(value) for key, value in opt.pairs("--set", setting).items()}
        with reporter(quiet=quiet) as progress:
            done = run_pipeline(
                file, out, changes=changes, variant=variant, dry_run=dry_run, command=typed_command(), reporter=progress
            )
        steps = done.steps
        output.figures = {"stages": [entry(step, dry_run=dry_run) for step in steps]}
        width = max((len(step.name) for step in steps), default=0)
        for step in steps:
            output.text(f"{step.kind:<9} {step.name:<{width}}  {step.state:<6}  {step.why or told(step)}".rstrip())
        if dry_run:
            output.next = planned_command()
            return
        show_details(output, steps)
        output.failed = done.failures
        output.outputs = [str(done.folder)]
        output.text(f"report    {done.report}")
        output.next = f"open {done.report}"


def entry(step: Step, *, dry_run: bool) -> dict[str, Any]:
    """What --json prints of a step."""
    about = {"kind": step.kind, "name": step.name, "state": step.state}
    return {**about, "why": step.why} if dry_run else {**about, **step.figures}


def told(step: Step) -> str:
    """What came out of a step, in words."""
    figures: dict[str, Any] = step.figures
    if step.kind == "extract":
        failed = f", failed {figures['n_failed']:,}" if figures.get("n_failed") else ""
        return f"computed {figures['computed']:,}, reused {figures['reused']:,}{failed}"
    if figures.get("test") is not None:
        ends = f" [{figures['test_low']:.3f}, {figures['test_high']:.3f}]" if "test_low" in figures else ""
        return f"test {figures['metric']} {figures['test']:.3f}{ends} (n {figures['n_test']:,})"
    if step.kind == "compare":
        first = figures["runs"][0]
        note = f" ({first['note']})" if first.get("note") else ""
        return f"first of {len(figures['runs'])} on validation: {first['run']}{note}"
    return f"{len(figures['images'])} images" if step.kind == "classify" else ""


def show_details(output: Output, steps: list[Step]) -> None:
    """Notes on runs, sentences of ablations, and classes of images."""
    from featurecache.pipeline.report import seen

    for note in dict.fromkeys(note for step in steps for note in step.figures.get("notes", ())):
        output.text(f"note      {note}")
    for step in steps:
        for sentence in step.figures.get("conclusions", ()):
            output.text(sentence)
        for row in step.figures.get("images", ()) if step.kind == "classify" else ():
            output.text(seen(row))
