"""How stages tell of long work: they report to a Reporter, whatever draws it."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What a stage tells while it works. One task at a time is usual; names tell several apart."""

    def begin(self, task: str, total: int | None, unit: str = "images", *, done: int = 0) -> None:
        """A task of `total` units starts (None: unknown), `done` of which were done before."""

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """`n` more units are done; `status` is a short text shown beside the bar."""

    def end(self, task: str) -> None:
        """The task is over."""

    def note(self, message: str) -> None:
        """Something that a user should read although the work goes on."""


class Silent:
    """A Reporter that drops everything: the default of the Python API."""

    def begin(self, task: str, total: int | None, unit: str = "images", *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, task: str, n: int = 1, *, status: str = "") -> None:
        """Nothing."""

    def end(self, task: str) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""
