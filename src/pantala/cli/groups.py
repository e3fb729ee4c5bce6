"""Groups of commands: a word of flyctl's stands for the command that is meant (`ls`, `rm`), and a command that does not
exist is refused with the one that comes near."""

from __future__ import annotations

import click

SPELLINGS = {
    "ls": ("list",),
    "rm": ("destroy", "delete", "remove", "unset"),
    "remove": ("destroy", "delete", "unset"),
    "delete": ("destroy", "remove", "unset"),
    "display": ("show",),
    "lease": ("leases",),
}
"""What a word stands for where the group has no command of that name: the first of these that it has."""


class CommandGroup(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        named = (cmd_name, *SPELLINGS.get(cmd_name, ()))
        return next((found for name in named if (found := super(CommandGroup, self).get_command(ctx, name))), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]}?", ctx) from error
            raise
