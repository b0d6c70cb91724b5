"""The errors that users meet: each is also a builtin, says what was found and what to do, and knows its exit status."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar


class FeatureCacheError(Exception):
    """Base of every error that featurecache raises on purpose.

    Attributes:
        exit_status: what the command line exits with (1 failed, 2 wrong use or bad input).
    """

    exit_status: ClassVar[int] = 1


class InputError(FeatureCacheError, ValueError):
    """Wrong use or bad input. `problems` holds every complaint when several were found at once."""

    exit_status: ClassVar[int] = 2
    problems: tuple[str, ...] = ()

    @classmethod
    def from_problems(
        cls, summary: str, problems: Sequence[str], *, advice: Sequence[str] = (), shown: int = 20
    ) -> InputError:
        """One error for all complaints about an input, so that nobody has to fix them one run at a time.

        Args:
            summary: the first line, without the complaints.
            problems: one line each; all are kept in `problems`, the first `shown` are in the message.
            advice: what to do about them, a line each; always in the message, and behind the complaints in `problems`.
            shown: how many complaints the message holds.
        """
        lines = [f"  - {problem}" for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"  - ... and {len(problems) - shown} more")
        error = cls("\n".join([summary, *lines, *advice]))
        error.problems = (*problems, *advice)
        return error


class MissingFileError(InputError, FileNotFoundError):
    """A file or directory that was named does not exist."""


class ReadError(FeatureCacheError, ValueError):
    """A payload can't be turned into an array.

    Attributes:
        deterministic: True where the same bytes will fail again (undecodable, over the limit), so that it may be
            remembered; False for I/O, permission and memory errors, which are tried again on every run.
    """

    def __init__(self, message: str, *, deterministic: bool = True) -> None:
        super().__init__(message)
        self.deterministic = deterministic


class RecipeMismatchError(InputError):
    """Features of another recipe than the one a model was fitted on."""


class StoreError(FeatureCacheError, RuntimeError):
    """The store can't do what was asked."""


class CorruptionError(StoreError):
    """Stored bytes are missing, truncated, changed or swapped; names array, chunk and samples."""


class LockedError(StoreError, BlockingIOError):
    """Another process writes to the store; `pid` is the holder's process id, 0 where unknown."""

    def __init__(self, message: str, *, pid: int = 0) -> None:
        super().__init__(message)
        self.pid = pid


class RunError(FeatureCacheError, RuntimeError):
    """A run directory is incomplete, changed since it was written, or of an unknown kind."""

    exit_status: ClassVar[int] = 2


class DependencyError(FeatureCacheError, ImportError):
    """An optional package is needed; the message holds the `pip install` line."""

    exit_status: ClassVar[int] = 2


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest of `choices`, or '' where nothing is near.

    But for a slip of the pen, a choice that is a word of the name goes before one that is spelt like it: with `id` and
    `view_column`, `id_column` is taken for `id`.
    """
    pool = list(choices)
    near = get_close_matches(name, pool, n=1, cutoff=0.9)
    near = near or [choice for word in _words(name) for choice in pool if _words(choice) == [word]]
    near = near or get_close_matches(name, pool, n=1, cutoff=0.6)
    if not near:
        folded = {choice.lower(): choice for choice in pool}
        near = [folded[found] for found in get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)]
    return f" Did you mean {near[0]!r}?" if near else ""


def _words(name: str) -> list[str]:
    """`--id_column` -> id, column."""
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]
