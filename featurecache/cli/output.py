"""What every command shares: --json, --quiet, --debug, exit statuses, signals, and where each kind of text goes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from featurecache.calls import record
from featurecache.errors import FeatureCacheError
from featurecache.machine.interrupts import interrupt_once

SCHEMA = 1
DONE, FAILED, WRONG, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130
STATUSES = (
    "Exit status: 0 done; 1 failed; 2 wrong use or bad input; 3 done, but some samples failed, which are listed; "
    "130 interrupted."
)
STATES = {DONE: "done", FAILED: "failed", WRONG: "failed", PARTLY: "partly failed", INTERRUPTED: "interrupted"}
# Interrupted, these go on from what is complete when they are given again.
GOING_ON = ("extract", "tune", "pipeline", "demo", "rm", "prune", "forget")
KEPT = "What was complete is kept; run the same command again to go on."
AFRESH = "What was not finished is not kept; the same command begins afresh."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel="Output")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the path or ids made, one per line.", rich_help_panel="Output")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]


@dataclass
class Output:
    """What a command has to say; printed when it ends, as text, JSON or bare paths.

    Attributes:
        journals: stores and runs that keep a record of the command; those that are there when it ends do.
        withheld: text that the record must not hold.
        goes_on: interrupted, the same command goes on from what is complete.
    """

    command: str
    as_json: bool
    quiet: bool
    debug: bool
    outputs: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    next: str = ""
    status: int = DONE
    message: str = ""
    journals: list[Path] = field(default_factory=list)
    withheld: Sequence[str] = ()
    goes_on: bool = False

    def text(self, line: str = "") -> None:
        """A line for people; goes to stdout unless --json or --quiet."""
        self.lines.append(line)

    def finish(self) -> int:
        """Print what was gathered; returns the exit status."""
        status = self.status or (PARTLY if self.failed else DONE)
        if self.as_json:
            print_json(self.command, STATES[status], self.figures, self.outputs, self.failed)
        elif self.quiet:
            for path in self.outputs:
                print(path)
        else:
            for line in self.lines:
                print(line)
            self._print_failed()
            if self.next:
                sys.stdout.flush()
                print(f"Next: {self.next}", file=sys.stderr)
        return status

    def error(self, message: str, status: int) -> int:
        """Print what went wrong; returns the exit status."""
        self.message = message
        if self.as_json:
            figures = {**self.figures, "error": message}
            print_json(self.command, STATES[status], figures, self.outputs, self.failed)
        print(message if status == INTERRUPTED else f"Error: {message}", file=sys.stderr)
        return status

    def _print_failed(self, shown: int = 10) -> None:
        for entry in self.failed[:shown]:
            print(f"failed: {entry['sample_id']} {entry['view']} {entry['path']}: {entry['error']}", file=sys.stderr)
        if len(self.failed) > shown:
            print(f"... and {len(self.failed) - shown} more", file=sys.stderr)


@contextmanager
def command(
    name: str, *, as_json: bool, quiet: bool, debug: bool, journals: Sequence[Path | None] = ()
) -> Iterator[Output]:
    """Run a command's body: its errors become one message and an exit status, its results are printed at the end.

    SIGTERM ends it like Ctrl-C: what is complete gets committed on the way out. Stores and runs among `journals` keep
    a record of it, however it ends; a body may add some.
    """
    places = [path for path in journals if path is not None]
    output = Output(name, as_json, quiet, debug, journals=places, goes_on=name in GOING_ON)
    set_up_process()
    with record(name, typed_command(), output.journals) as kept:
        try:
            yield output
            status = output.finish()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # nor complain when Python flushes at its end
            status = FAILED
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            status = output.error(*describe(error, goes_on=output.goes_on))
        kept.status, kept.error, kept.withheld = STATES[status], output.message, output.withheld
        kept.figures, kept.failed = output.figures, len(output.failed)
    if status == INTERRUPTED:
        end_silently()
    if status:
        raise typer.Exit(status)


def describe(error: BaseException, *, goes_on: bool = False) -> tuple[str, int]:
    """What to tell the user of an error, and the exit status.

    Args:
        error: that ended a command; a note on an interrupt says how to go on.
        goes_on: interrupted, the same command takes up what is complete.
    """
    if isinstance(error, FeatureCacheError):
        return str(error), error.exit_status
    if isinstance(error, KeyboardInterrupt | typer.Abort):  # the latter at a question
        told = KEPT if goes_on else " ".join(getattr(error, "__notes__", ())) or AFRESH
        return f"Interrupted. {told}", INTERRUPTED
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, OSError | MemoryError):  # the machine's: a full disk, no permission
        return what, FAILED
    return (
        f"unexpected {what}\nThis is a bug in featurecache. Run the command again with --debug and report it.",
        FAILED,
    )


def end_silently() -> None:
    """All that was complete is kept and that is said: another Ctrl-C, while Python ends, ends it without a word."""
    with suppress(OSError):
        sys.stdout.flush()
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            with suppress(ValueError):  # not the main thread
                signal.signal(number, lambda *_: os._exit(INTERRUPTED))


def set_up_process() -> None:
    """SIGTERM as Ctrl-C, of which the first counts, and warnings as one line without the place in our code."""

    def one_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"Warning: {message}\n"

    try:
        handler = interrupt_once()
        signal.signal(signal.SIGTERM, handler)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as that of a job in the background of a script
            signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread: a caller that embeds the app keeps its own handlers
        return
    warnings.formatwarning = one_line


def print_json(
    command: str,
    status: str,
    figures: Mapping[str, Any],
    outputs: Sequence[str] = (),
    failed: Sequence[Mapping[str, str]] = (),
) -> None:
    """The one object that --json prints."""
    head = {"schema": SCHEMA, "command": command, "status": status, "outputs": outputs, "failed": failed}
    print(json.dumps({**head, **figures}, ensure_ascii=False, default=str))


def pasteable(*words: object) -> str:
    """A command of ours as one can paste it into a shell."""
    return shlex.join(["featurecache", *map(str, words)])


def typed_command() -> str:
    """The command line as it was typed, for the record of a run."""
    return shlex.join(["featurecache", *sys.argv[1:]])


def planned_command() -> str:
    """The command line as it was typed, but for `--dry-run`: what carries out what was planned."""
    return shlex.join(["featurecache", *(word for word in sys.argv[1:] if word != "--dry-run")])
