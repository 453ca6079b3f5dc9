"""The ``layerwise`` command: its list of commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import NoReturn

import click

from layerwise.cli import exit_codes
from layerwise.errors import LayerwiseError, sentence
from layerwise.process_end import end_process
from layerwise.version import VERSION

# Name of the command, the file that holds it, and its line in the list: the file is loaded when the command is called.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("local", "train a job on this machine, from start to end"),
    "up": ("local", "keep a cluster running on this machine until Ctrl-C"),
    "submit": ("jobs", "queue a job on a cluster"),
    "jobs": ("jobs", "list the jobs of a cluster"),
    "status": ("jobs", "show a job, or the cluster"),
    "logs": ("jobs", "show what a job has logged"),
    "cancel": ("jobs", "stop a job at its next update, with a last cut"),
    "resume": ("resume", "go on with a job that was stopped"),
    "nodes": ("jobs", "list the processes of a cluster"),
    "drain": ("drain", "send all jobs away from a machine"),
    "evaluate": ("results", "compute loss and metrics of a cut with plain PyTorch"),
    "export": ("results", "write a cut as one model.safetensors"),
    "audit": ("results", "check a job's promises against its event log"),
    "replay": ("replay", "execute a recorded run again, bit for bit"),
    "plan": ("planning", "show how a job would be split and what staleness to expect"),
    "verify": ("planning", "compare window 1 with a plain PyTorch loop, bit for bit"),
    "chaos": ("chaos", "train a job under planned faults, and report"),
    "schema": ("planning", "print the JSON Schema of job files"),
    "coordinator": ("services", "run a coordinator"),
    "node": ("node", "run a machine's shards and workers and keep them running"),
    "shard": ("services", "run a shard server"),
    "forward": ("services", "run a forward worker"),
    "backward": ("services", "run a detached backward worker"),
    "healthcheck": ("services", "ask a coordinator or shard whether it serves"),
}


class LazyGroup(click.Group):
    """Lists every command without loading any, and loads the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"layerwise.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nExamples:\n  layerwise train examples/digits.yaml\n  layerwise up\n  layerwise submit -f job.yaml",
)
@click.version_option(VERSION, prog_name="layerwise")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors.")
def cli() -> None:
    """Train one model across machines that differ, are slow, or come and go.

    Data goes to standard output, progress and errors to standard error. Exit status: 0 done, 1 the job failed, 2
    usage, 3 the coordinator is unreachable, 4 not found, 5 not allowed, 6 cancelled, 7 out of memory, 124 time-out, 130 interrupted.
    """


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; errors become one sentence on standard error."""
    debug = "--debug" in arguments
    if debug:
        from layerwise.tracebacks import show_tracebacks

        show_tracebacks()
    try:
        status = cli.main(args=arguments, prog_name="layerwise", standalone_mode=False)
        return status if isinstance(status, int) else exit_codes.DONE
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `layerwise jobs | head`; Python would complain again when it
        # flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.FAILED
    except LayerwiseError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"layerwise: {error}", err=True)
        return exit_codes.of_error(error)
    except Exception as error:
        if debug:
            traceback.print_exc()
        from layerwise.memory import is_out_of_memory

        if is_out_of_memory(error):
            click.echo(f"layerwise: memory ran out: {sentence(error)}", err=True)
            return exit_codes.OUT_OF_MEMORY
        click.echo(
            f"layerwise: unexpected {type(error).__name__}: {error}; this is a bug, --debug shows where it happened",
            err=True,
        )
        return exit_codes.FAILED


def main() -> NoReturn:
    """The console script."""
    end_process(run(sys.argv[1:]))
