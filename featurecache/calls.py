"""What the journals are told of: commands and calls from Python open a record; the outermost is written as it ends."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from featurecache.errors import FeatureCacheError, InputError

P = ParamSpec("P")
R = TypeVar("R")
NOT_TOLD = ("reporter",)  # arguments that say nothing of what is done


@dataclass
class Record:
    """What is being done, and how it ends.

    Attributes:
        command: its name.
        line: the command line, or the name of the function that is called.
        options: of the function, by name; None for a command.
        places: stores and runs whose journals get it; those that are there when it ends do.
        status: done, failed, partly failed or interrupted.
        figures: what came out.
        failed: how many samples failed.
        error: what it said went wrong.
        withheld: text that no journal may hold.
    """

    command: str
    line: str
    options: Mapping[str, Any] | None = None
    places: list[Path] = field(default_factory=list)
    status: str = "done"
    figures: Mapping[str, Any] = field(default_factory=dict)
    failed: int = 0
    error: str = ""
    withheld: Sequence[str] = ()

    def write(self, started: datetime, seconds: float) -> None:
        """Add it to the journals."""
        if not self.places or follows():
            return
        from featurecache import journal

        kept_in = (journal.keeper(path) for path in self.places)
        places = {Path(os.path.abspath(place)) for place in kept_in if place is not None}
        if not places:
            return
        kept = journal.entry(
            self.command,
            self.line if self.options is None else journal.Call(self.line, self.options),
            self.status, started, seconds, self.figures,
            failed=self.failed, error=self.error, withheld=self.withheld,
        )  # fmt: skip
        for place in places:
            journal.add(place, kept)


_open: ContextVar[Record | None] = ContextVar("open record", default=None)


@contextmanager
def record(
    command: str, line: str, places: list[Path], *, options: Mapping[str, Any] | None = None
) -> Iterator[Record]:
    """Note what is done within, and write it as it ends; within another record, only that one is written.

    Args:
        command: its name.
        line: the command line, or the name of the function that is called.
        places: stores and runs whose journals get it; may grow meanwhile.
        options: of the function.
    """
    made, outer = Record(command, line, options, places), _open.get()
    if outer is not None:
        outer.places += places
        yield made
        return
    token = _open.set(made)
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        yield made
    except BaseException as error:
        made.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        known = isinstance(error, FeatureCacheError)
        made.error = str(error) if known else f"{type(error).__name__}: {error}".rstrip(": ")
        raise
    finally:
        _open.reset(token)
        made.write(started, time.perf_counter() - clock)


def also(place: Path) -> None:
    """The record that is open concerns this store or run as well."""
    if (made := _open.get()) is not None:
        made.places.append(place)


def call_text() -> str:
    """The call from Python that is going on, without absolute paths, for the record of a run; '' if there is none."""
    made = _open.get()
    if made is None or made.options is None:
        return ""
    from featurecache.journal import Call

    return Call(made.line, made.options).text(Path.cwd())


def withhold(words: Sequence[str]) -> None:
    """No journal may hold this text of the record that is open."""
    if (made := _open.get()) is not None:
        made.withheld = words


def journaled(*places: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of the Python API write to the journals of stores and runs.

    Args:
        places: arguments that are a store, a run or a dataset; a store or run that is returned counts as well.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(function), function.__name__

        @wraps(function)
        def recorded(*args: P.args, **kwargs: P.kwargs) -> R:
            _check_dataset(name, next(iter(signature.parameters)), args, kwargs)
            given = signature.bind(*args, **kwargs).arguments
            options = {**given, **given.get("options", {})}
            told = {key: _neutral(value) for key, value in options.items() if key not in (*NOT_TOLD, "options")}
            found = [path for key in places if (path := _place(options.get(key))) is not None]
            with record(name.replace("_", "-"), f"featurecache.{name}", found, options=told) as made:
                result = function(*args, **kwargs)
                if (path := _place(result)) is not None:
                    found.append(path)
                made.figures, made.failed = figures_of(result), _failures(result)
                made.status = "partly failed" if made.failed else "done"
            return result

        return recorded

    return decorate


def _check_dataset(name: str, first: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse the store and the name of a dataset, which its command takes, in the place of a FeatureDataset."""
    given = args[0] if args else kwargs.get(first)
    if first != "dataset" or not isinstance(given, str | Path):
        return
    named = kwargs.get(first, "NAME") if args else given
    store = str(given) if args else str(kwargs.get("store", "STORE"))
    made = f"featurecache.FeatureDataset({store!r}, dataset={named!r})"
    raise InputError(f"{name} takes a FeatureDataset, which says store and dataset: {name}({made}, ...)")


def _place(value: Any) -> Path | None:
    """The directory of a store, of a run, or of the store that a dataset reads."""
    path = getattr(getattr(value, "store", value), "path", value)
    return Path(path) if isinstance(path, str | Path) else None


def _neutral(value: Any) -> Any:
    """What is told of an argument: plain values as they are, a run by its path, a dataset by its name."""
    if value is None or isinstance(value, bool | int | float | str | Path):
        return value
    if isinstance(value, Mapping):
        return {str(key): _neutral(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_neutral(item) for item in value]
    known = getattr(getattr(value, "binding", None), "name", getattr(value, "path", None))
    return known if isinstance(known, str | Path) else type(value).__name__


def figures_of(result: Any) -> dict[str, Any]:
    """What is told of a result: what `--json` prints of it."""
    if hasattr(result, "to_json"):
        return dict(result.to_json())
    if isinstance(metrics := getattr(result, "metrics", None), Mapping):
        name = "run" if hasattr(result, "record") else "path"
        return {name: str(result.path), **flat_metrics(metrics)}
    return {name: value for name, value in getattr(result, "__dict__", {}).items() if not name.startswith("_")}


def _failures(result: Any) -> int:
    """How many samples failed: of an extraction or prediction, of an evaluation, of a run."""
    listed = getattr(getattr(result, "scored", None) or result, "failures", None)
    return len(getattr(result, "record", {}).get("failed", ()) if listed is None else listed)


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`test_accuracy`, `test_accuracy_low`, `test_accuracy_high` (ends of its interval) and so on."""
    flat: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        figures = metrics.get(split, {})
        for name, value in figures.items():
            if isinstance(value, int | float):
                flat[f"{split}_{name}"] = value
        for name, ends in figures.get("intervals", {}).items():
            if isinstance(ends, list):
                flat[f"{split}_{name}_low"], flat[f"{split}_{name}_high"] = ends
    return flat


def follows() -> bool:
    """Whether torchrun started this process beside a first one, which does the talking."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"
