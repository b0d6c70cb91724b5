"""The journal of a store or run: a small `runs/<time>-<pid>.json` a command or call, and their `summary.md`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from featurecache.rundir.record import LIBRARIES, dump_json, package_version, plain, portable_command, portable_path

FOLDER, SUMMARY = "runs", "summary.md"
SCHEMA = 1
KEPT = 1000  # files in `runs/`; the oldest beyond go
SHOWN = 200  # rows of summary.md
WITHHELD = "(withheld)"
LONGEST_LINE = 2000  # characters of a call; of a command line, what a shell takes
LONGEST = 500  # characters of an error or of a figure that is text
# Names of modules whose version tells of a library of another name.
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}
# Figures worth a place in the table and what they are called there, the first that a command has; files have them all.
FIGURES = {
    "images": "images", "computed": "computed", "reused": "reused", "n_failed": "failed",
    "images_per_second": "images/s", "metric": "metric", "test_roc_auc": "test ROC AUC",
    "test_accuracy": "test accuracy", "test_r2": "test R2", "test_average_precision": "test AP",
    "test_rmse": "test RMSE", "trials": "trials", "samples": "samples", "points": "points", "recipes": "recipes",
    "chunks": "chunks", "rows": "rows", "bytes_freed": "bytes freed", "bytes": "bytes", "method": "method",
    "run": "run",
}  # fmt: skip
NOT_WORTH_A_ZERO = ("n_failed", "images_per_second")
COLUMNS = 5
HEAD = """# What was done here

Kept by featurecache from the files in `runs/`, the newest first; times are UTC.

| time | command | status | seconds | figures |
| --- | --- | --- | ---: | --- |
"""
# A path in running text: it begins where no word does, and is no part of a URL.
_PATH = re.compile(r"(?<![\w/.~\\-])(?!//)(?:~[\w.-]*|[A-Za-z]:)?[\\/](?=\w)[^\s'\"`,;:()\[\]]*")


@dataclass(frozen=True)
class Call:
    """A call from Python: the function and what it was given."""

    name: str
    options: Mapping[str, Any]

    def text(self, base: Path) -> str:
        """As Python would write it, with no absolute path: `featurecache.extract(manifest='m.csv', store='cache')`."""
        options = plain(self.options, base, text_paths=True)
        text = f"{self.name}({', '.join(f'{name}={value!r}' for name, value in options.items())})"
        return text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} ..."


def keeper(path: Path) -> Path | None:
    """The path, if it has a journal: a store, a run, or the RUN.tmp of a joint run that can be resumed."""
    signs = ((path / "index.sqlite").is_file(), (path / "run.json").is_file(), (path / "checkpoint").is_dir())
    return path if any(signs) else None


def entry(
    command: str,
    line: str | Call,
    status: str,
    started: datetime,
    seconds: float,
    figures: Mapping[str, Any],
    *,
    failed: int = 0,
    error: str = "",
    withheld: Sequence[str] = (),
) -> dict[str, Any]:
    """What a journal keeps of a command.

    Args:
        command: its name.
        line: the command line, or the call from Python.
        status: done, failed, partly failed or interrupted.
        started: when it began, UTC.
        seconds: how long it took.
        figures: what --json prints; numbers, text, and tables of these are kept, lists (of samples, say) are not.
        failed: how many samples failed.
        error: what it said went wrong.
        withheld: text that must not be kept, such as the ids of forgotten samples.
    """
    kept = {
        "schema": SCHEMA,
        "command": command,
        "line": line,
        "status": status,
        "started": started.isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 3),
        "featurecache": package_version(),
        "versions": loaded_versions(),
        "figures": {name: value for name, value in figures.items() if is_figure(value)},
        "failed": failed,
        "error": error[:LONGEST],
    }
    return without(kept, withheld)


def is_figure(value: Any) -> bool:
    """Whether a value is a number, short text, or a table of these."""
    if isinstance(value, Mapping):
        return all(is_figure(item) and not isinstance(item, Mapping) for item in value.values())
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)


def loaded_versions() -> dict[str, str]:
    """The libraries that this process has imported, so those that the command used; asking costs no time."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        version = getattr(sys.modules.get(MODULES.get(name, name)), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


def without(kept: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """An entry whose free text holds none of the words, not even as a part of others."""
    words = [word for word in words if word]
    hidden = {name: WITHHELD for name in ("line", "error") if any(word in str(kept.get(name, "")) for word in words)}
    return {**kept, **hidden}


def add(path: Path, kept: Mapping[str, Any]) -> None:
    """Add an entry to the journal of a store or run; where nothing can be written there, nothing happens.

    The file appears under its name complete or not at all, and summary.md is replaced as a whole, so that any number of
    processes can do this at once.
    """
    base = Path(os.path.abspath(path)).parent
    moved = {
        **plain({**kept, "line": "", "error": ""}, base, text_paths=True),
        "line": portable_line(kept["line"], base),
        "error": portable_prose(kept["error"], base),
    }
    started = datetime.fromisoformat(kept["started"])
    name = f"{started:%Y%m%dT%H%M%S}.{started.microsecond // 1000:03}Z-{os.getpid()}"
    folder = path / FOLDER
    with suppress(OSError):  # read-only media, a full disk: the command itself did what it said
        folder.mkdir(exist_ok=True)
        names = set(os.listdir(folder))
        free = next(f for n in range(len(names) + 1) if (f := f"{name}{f'-{n}' * (n > 0)}.json") not in names)
        publish(path, folder / free, dump_json(moved))
        summarise(path, free)


def portable_line(line: str | Call, base: Path) -> str:
    """A command line or call without absolute paths."""
    if isinstance(line, Call):
        return line.text(base)
    return WITHHELD if line == WITHHELD else portable_command(line, base)


def portable_prose(text: str, base: Path) -> str:
    """Text whose absolute paths are given relative to `base`, or by their last name alone."""
    for known in (base, Path.home()):  # these may hold spaces, at which the pattern ends
        if known != Path(known.anchor):
            text = text.replace(f"{known}{os.sep}", "")
    return _PATH.sub(lambda found: portable_path(found.group(), base), text)


def publish(path: Path, file: Path, text: str) -> None:
    """Write a file of the journal in `path` under a hidden name, then put it in place."""
    staged = path / FOLDER / f".{file.name}.{os.getpid()}"
    try:
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, file)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def listed(path: Path) -> list[str]:
    """Names of the entries of a journal, oldest first."""
    with suppress(OSError):
        return sorted(n for n in os.listdir(path / FOLDER) if n.endswith(".json") and not n.startswith("."))
    return []


def read(path: Path, name: str) -> dict[str, Any] | None:
    """An entry; None where the file is gone, or is none."""
    try:
        found = json.loads((path / FOLDER / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("started"), str) else None


def summarise(path: Path, newest: str = "") -> None:
    """Write summary.md from the files in `runs/`, once more if another process has added one meanwhile.

    Args:
        path: of the store or run.
        newest: the file that was added; where the table has all others, they need not be read again.
    """
    names = listed(path)
    for _ in range(5):
        for name in names[:-KEPT]:
            (path / FOLDER / name).unlink(missing_ok=True)
        names = names[-KEPT:]
        told, asked = table(path), names[-SHOWN:]
        if names[-1:] == [newest] and len(told) == min(len(names) - 1, SHOWN):
            asked = [newest]
        else:
            told = []
        rows = [row(found) for name in reversed(asked) if (found := read(path, name)) is not None]
        rows = [*rows, *told][:SHOWN]
        newest = ""
        older = f"\n{len(names) - SHOWN:,} older ones are in `runs/` alone.\n" if len(names) > SHOWN else ""
        publish(path, path / SUMMARY, HEAD + "".join(rows) + older)
        if (now := listed(path)) == names:
            return
        names = now


def table(path: Path) -> list[str]:
    """The rows of summary.md as it stands."""
    with suppress(OSError, UnicodeDecodeError):
        lines = (path / SUMMARY).read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.startswith("| 2")]
    return []


def row(kept: Mapping[str, Any]) -> str:
    """An entry as a row of the table."""
    figures = kept.get("figures")
    figures = figures if isinstance(figures, dict) else {}
    chosen = [name for name in FIGURES if not isinstance(figures.get(name), dict | None)]
    chosen = [name for name in chosen if figures[name] or name not in NOT_WORTH_A_ZERO][:COLUMNS]
    told = [f"{FIGURES[name]} {shown(figures[name])}" for name in chosen]
    if error := str(kept.get("error") or ""):
        told.insert(0, error if len(error) <= 160 else f"{error[:160]} ...")
    cells = [
        kept["started"][:19].replace("T", " "),
        kept.get("command", ""),
        kept.get("status", ""),
        f"{kept['seconds']:,.1f}" if isinstance(kept.get("seconds"), int | float) else "",
        ", ".join(told),
    ]
    return f"| {' | '.join(plain_cell(str(cell)) for cell in cells)} |\n"


def shown(value: Any) -> str:
    """A figure in few characters."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def plain_cell(text: str) -> str:
    """Text that neither ends a cell of a Markdown table nor is taken for HTML."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def withhold(path: Path, words: Sequence[str]) -> None:
    """Take command lines and errors that hold one of the words out of a journal: forgotten samples are not named there.

    Raises:
        OSError: an entry can't be written.
    """
    changed = False
    for name in listed(path):
        kept = read(path, name)
        if kept is not None and (cleaned := without(kept, words)) != kept:
            publish(path, path / FOLDER / name, dump_json(cleaned))
            changed = True
    for staged in (path / FOLDER).glob(".*"):  # of a process that was killed while it wrote
        staged.unlink(missing_ok=True)
    if changed:
        summarise(path)
