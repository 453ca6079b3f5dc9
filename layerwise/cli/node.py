"""``node``: a machine's shards and workers, kept running by one process."""

from __future__ import annotations

import json
import socket
import sys

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import (
    allow_import_option,
    command,
    coordinator_address,
    coordinator_option,
    device_name,
    supervision_options,
    threads_option,
)
from layerwise.cli.services import LISTEN_HELP, service_options, start_logging


@command(
    "node",
    examples=[
        "layerwise node --coordinator host:7070 --insecure --device cuda:0 --device cuda:1 --listen 0.0.0.0:7071 --advertise me:7071",
        "layerwise node --coordinator host:7070 --shards 0 --forward 2",
    ],
)
@coordinator_option
@click.option("--shards", type=click.IntRange(min=0), help="Shard servers.  [default: one for each --device, else one]")
@click.option("--forward", type=click.IntRange(min=0), default=0, show_default=True, help="Forward workers.")
@click.option("--backward", type=click.IntRange(min=0), default=0, show_default=True, help="Detached backward workers.")
@click.option(
    "--device",
    "devices",
    type=device_name,
    multiple=True,
    metavar="auto|cpu|cuda:N",
    help="Devices of the shards and backward workers, given out in turn.  [default: auto]",
)
@threads_option
@click.option(
    "--listen",
    metavar="ADDRESS",
    default="127.0.0.1:0",
    show_default=True,
    help=f"Of the first shard: {LISTEN_HELP} The next shards have the next ports.",
)
@click.option(
    "--advertise",
    metavar="ADDRESS",
    default="",
    help="Where others reach the first shard; the next ones have the next ports.  [default: where it listens]",
)
@click.option("--name", default="", help="The node's name, part of its processes' names.  [default: the host's]")
@supervision_options
@allow_import_option
@service_options
def node_command(
    coordinator: str | None,
    shards: int | None,
    forward: int,
    backward: int,
    devices: tuple[str, ...],
    threads: int | None,
    listen: str,
    advertise: str,
    name: str,
    spare: bool,
    hang_timeout: float,
    allow_imports: tuple[str, ...],
    metrics: str,
    insecure: bool,
    exit_with_parent: bool,
    log_level: str,
    log_format: str,
) -> int:
    """Run this machine's shards and workers, and start again what ends; one such process a machine.

    --metrics is the node's own; its processes have the ports after it. Exit status 2 when one of them can't run as the
    command line says.
    """
    start_logging(log_level, log_format)
    address = coordinator_address(coordinator)
    from layerwise.node import NodeSettings, run_node

    settings = NodeSettings(
        coordinator=address,
        name=name or socket.gethostname(),
        shards=shards if shards is not None else len(devices) or 1,
        forward=forward,
        backward=backward,
        devices=devices or ("auto",),
        threads=threads,
        listen=listen,
        advertise=advertise,
        metrics=metrics,
        allow_imports=allow_imports,
        insecure=insecure,
        log_level=log_level,
        log_format=log_format,
        spare=spare,
        hang_seconds=hang_timeout or None,
    )

    def show(name: str, line: str) -> None:
        sys.stderr.write((json_line if log_format == "json" else text_line)(name, line))
        sys.stderr.flush()

    run_node(settings, on_line=show, exit_with_parent=exit_with_parent)
    return exit_codes.DONE


def text_line(name: str, line: str) -> str:
    """A line of a process's log, with its name before it."""
    return f"{name}: {line}\n"


def json_line(name: str, line: str) -> str:
    """The same for logs of JSON objects: the name is one more key, and what was no object becomes one."""
    try:
        value = json.loads(line)
    except ValueError:
        value = line
    fields = value if isinstance(value, dict) else {"message": line}
    return json.dumps({"process": name, **fields}) + "\n"
