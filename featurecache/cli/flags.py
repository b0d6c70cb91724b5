"""Help of commands: an option that takes no value is shown without one, where Typer writes `<bool>`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def without_value(params: list[Any]) -> list[Any]:
    """The parameters, of which flags have no name for a value."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, for parsing and for its help."""
        return without_value(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, for parsing and for its help."""
        return without_value(super().get_params(ctx))
