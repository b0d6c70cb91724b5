"""Commands: flags are shown without a value, where Typer writes `<bool>`; of a list given twice nothing gets lost."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def without_value(params: list[Any]) -> list[Any]:
    """The parameters, of which flags have no name for a value."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


def refuse_second_list(order: list[Any], ctx: Any) -> None:
    """`--target A --target B` would quietly be B alone: say how several are given.

    Args:
        order: the parameters as they were typed.
        ctx: of the command.

    Raises:
        typer.BadParameter: one that takes a list with commas is there twice.
    """
    for param in order:
        if "," in (param.metavar or "") and not param.multiple and order.count(param) > 1:
            flag = param.opts[0]
            raise typer.BadParameter(f"given twice; several go together: {flag} {param.metavar}", ctx=ctx, param=param)


class Command(TyperCommand):
    """A command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed."""
        if not ctx.resilient_parsing:
            refuse_second_list(self.make_parser(ctx).parse_args(list(args))[2], ctx)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, for parsing and for its help."""
        return without_value(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its parameters, for parsing and for its help."""
        return without_value(super().get_params(ctx))
