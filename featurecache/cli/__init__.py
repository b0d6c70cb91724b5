"""The command line: every command parses and calls, nothing more. Heavy imports happen inside the commands."""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

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
from featurecache.cli.flags import Command, Group
from featurecache.cli.output import DONE, INTERRUPTED, STATUSES, WRONG, print_json
from featurecache.errors import did_you_mean

app = typer.Typer(
    name="featurecache",
    cls=Group,
    help="Run CNN bodies over every view once, cache what they see, train heads in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=f"Start with: featurecache demo\n\n{STATUSES}",
)
# The commands in the order in which they are used, by panels of the help.
COMMANDS: dict[str, list[tuple[str, Callable[..., None], str]]] = {
    "Start": [
        ("demo", demo.demo, demo.EPILOG),
        ("init", init.init, init.EPILOG),
        ("doctor", doctor.doctor, doctor.EPILOG),
        ("pipeline", pipeline.pipeline, pipeline.EPILOG),
    ],
    "Extract features": [
        ("extract", extract.extract, extract.EPILOG),
        ("show-features", explain.show_features, explain.SHOW_EPILOG),
    ],
    "Fit models": [
        ("fit-head", heads.fit_head, heads.EPILOG),
        ("finetune-joint", joint.finetune_joint, joint.EPILOG),
        ("tune", tune.tune, tune.EPILOG),
    ],
    "Predict, measure, look": [
        ("predict", predict.predict, predict.PREDICT_EPILOG),
        ("evaluate", predict.evaluate, predict.EVALUATE_EPILOG),
        ("compare", compare.compare, compare.EPILOG),
        ("ablate", ablate.ablate, ablate.EPILOG),
        ("report", report.report, report.EPILOG),
        ("explain", explain.explain, explain.EXPLAIN_EPILOG),
        ("explore", explore.explore, explore.EPILOG),
    ],
    "Look after a store": [
        ("info", stores.info, stores.INFO_EPILOG),
        ("verify", stores.verify, stores.VERIFY_EPILOG),
        ("export", export.export, export.EPILOG),
        ("rm", maintenance.rm, maintenance.RM_EPILOG),
        ("prune", maintenance.prune, maintenance.PRUNE_EPILOG),
        ("forget", maintenance.forget, maintenance.FORGET_EPILOG),
        ("compact", maintenance.compact, maintenance.COMPACT_EPILOG),
    ],
}
OWN_CLASSES = {"finetune-joint": jointoptions.JointCommand}


def prose(function: Callable[..., None]) -> str:
    """A docstring with a line a paragraph, for a terminal of any width to wrap."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (inspect.getdoc(function) or "").split("\n\n"))


for panel, entries in COMMANDS.items():
    for name, function, epilog in entries:
        app.command(
            name, cls=OWN_CLASSES.get(name, Command), help=prose(function), epilog=f"{epilog}\n\n{STATUSES}",
            rich_help_panel=panel,
        )(function)  # fmt: skip
app.add_typer(bodies.app, name="bodies", rich_help_panel="Extract features")


@app.callback(invoke_without_command=True)
def version(
    show: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True),
) -> None:
    """Run CNN bodies over every view once, cache what they see, train heads in seconds."""
    if show:
        from featurecache.rundir.record import package_version

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
    except KeyboardInterrupt:  # before a command began
        print("Interrupted before it began; run the same command again.", file=sys.stderr)
        status = INTERRUPTED
    except Exception as error:
        status = wrong_use(error)
    # At its end Python looks once more for garbage among all that was imported: 1.1 of 4.5 s of processor time where
    # torch was (3 runs each). What is frozen is left out of that, and the system takes it back with the process.
    gc.freeze()
    sys.exit(status or DONE)


def owners(context: Any, option: str, shown: int = 3) -> str:
    """' It belongs to ...' where other commands have an option of that name, else ''."""
    commands = getattr(context.find_root().command, "commands", {}) if context is not None else {}
    having = [name for name, each in commands.items() if any(option in param.opts for param in each.params)]
    more = " and others" if len(having) > shown else ""
    return f" {option} belongs to {', '.join(having[:shown])}{more}." if having else ""


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
    if type(error).__name__ == "NoSuchOption":
        option = error.option_name  # type: ignore[attr-defined]
        near = getattr(error, "possibilities", None) or ()  # that of Typer are in the order of the alphabet
        text = f"No such option: {option}.{owners(context, option) or did_you_mean(option, near)}"
    if "--json" in sys.argv:
        print_json(path.partition(" ")[2], "failed", {"error": text})
    print(f"Error: {text}\nSee: {path} --help", file=sys.stderr)
    return WRONG
