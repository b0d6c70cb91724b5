"""Which settings of a head are worth searching, and in what range; said by the head, used by `tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    """A number between `low` and `high`, both included; `log`: spread over orders of magnitude; `whole`: an integer."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


Space = dict[str, Span | Choice]
"""Setting -> where it is searched."""
