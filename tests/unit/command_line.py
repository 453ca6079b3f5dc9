"""The command line as a test meets it: parsed, never run."""

from __future__ import annotations

from typing import Any

import click

from layerwise.cli.main import cli


def parse(words: list[str]) -> dict[str, Any]:
    """Parse as the console script would, without running the command; raises ``click.UsageError`` as it would."""
    context = click.Context(cli, info_name="layerwise")
    command = cli.get_command(context, words[0])
    if command is None:
        raise click.UsageError(f"no such command: {words[0]}")
    return command.make_context(words[0], words[1:], parent=context).params
