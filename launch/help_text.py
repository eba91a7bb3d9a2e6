"""What `--help` says of options."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class PlainFlags(TyperGroup):
    """A group of commands in whose help an option that takes no value shows none: newer Typers write `<bool>`."""

    def get_params(self, ctx: Any) -> Any:
        return plain(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None and not isinstance(command, PlainFlags) and "get_params" not in vars(command):
            own = command.get_params
            command.get_params = lambda context: plain(own(context))
        return command


def plain(params: Any) -> Any:
    """The parameters, flags among them without a type."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
