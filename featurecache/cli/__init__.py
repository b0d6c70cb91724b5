"""The command line: every command parses and calls, nothing more. Heavy imports happen inside the commands."""

from __future__ import annotations

import gc
import os
import sys

import typer

from featurecache.cli import (
    ablate,
    bodies,
    compare,
    demo,
    doctor,
    explain,
    explore,
    export,
    extract,
    heads,
    init,
    joint,
    jointoptions,
    maintenance,
    pipeline,
    predict,
    report,
    stores,
    tune,
)
from featurecache.cli.output import DONE, INTERRUPTED, WRONG, print_json

app = typer.Typer(
    name="featurecache",
    help="Run CNN bodies over every view once, cache what they see, train heads in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with: featurecache demo",
)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("extract", epilog=extract.EPILOG)(extract.extract)
app.command("fit-head", epilog=heads.EPILOG)(heads.fit_head)
app.command("finetune-joint", cls=jointoptions.JointCommand, epilog=joint.EPILOG)(joint.finetune_joint)
app.command("predict", epilog=predict.PREDICT_EPILOG)(predict.predict)
app.command("evaluate", epilog=predict.EVALUATE_EPILOG)(predict.evaluate)
app.command("report", epilog=report.EPILOG)(report.report)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("ablate", epilog=ablate.EPILOG)(ablate.ablate)
app.command("tune", epilog=tune.EPILOG)(tune.tune)
app.command("explain", epilog=explain.EXPLAIN_EPILOG)(explain.explain)
app.command("show-features", epilog=explain.SHOW_EPILOG)(explain.show_features)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("explore", epilog=explore.EPILOG)(explore.explore)
app.command("init", epilog=init.EPILOG)(init.init)
app.command("pipeline", epilog=pipeline.EPILOG)(pipeline.pipeline)
app.command("export", epilog=export.EPILOG)(export.export)
app.command("info", epilog=stores.INFO_EPILOG)(stores.info)
app.command("verify", epilog=stores.VERIFY_EPILOG)(stores.verify)
app.command("rm", epilog=maintenance.RM_EPILOG)(maintenance.rm)
app.command("prune", epilog=maintenance.PRUNE_EPILOG)(maintenance.prune)
app.command("forget", epilog=maintenance.FORGET_EPILOG)(maintenance.forget)
app.command("compact", epilog=maintenance.COMPACT_EPILOG)(maintenance.compact)
app.add_typer(bodies.app, name="bodies")


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True),
) -> None:
    """Run CNN bodies over every view once, cache what they see, train heads in seconds."""
    if show:
        from featurecache.record import package_version

        typer.echo(package_version())
        raise typer.Exit


def main() -> None:
    """Entry point of the `featurecache` command: as Typer would run it, but wrong use is told like any other error."""
    # Threads of OpenMP spin while they wait. Beside decoding threads, or another process, that takes the cores away
    # from those who work: measured on 2 busy cores, 2.5 to 16 times slower. Read when torch is loaded, so set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Importing torch makes hundreds of thousands of objects that stay: looking through them for garbage every 700
    # took 10 to 19 % of the processor time of the imports (8 runs each).
    gc.set_threshold(50_000, 20, 20)
    try:
        status = app(prog_name="featurecache", standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = wrong_use(error)
    sys.exit(status or DONE)


def wrong_use(error: Exception) -> int:
    """Print what is wrong with the command line; returns the exit status.

    Typer's exceptions are told by their methods: where it keeps their classes differs between versions.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":  # nothing was asked, so the help is shown, by rich at once
        print(message(), end="")
        return WRONG
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "featurecache"
    text = " ".join(str(message()).replace("Value error, ", "").split())
    if "--json" in sys.argv:
        print_json(path.partition(" ")[2], "failed", {"error": text})
    print(f"Error: {text}\nSee: {path} --help", file=sys.stderr)
    return WRONG
