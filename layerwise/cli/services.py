"""The services: ``coordinator``, ``shard``, ``forward``, ``backward``; and ``healthcheck``, which asks one of them."""

from __future__ import annotations

import faulthandler
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import (
    allow_import_option,
    command,
    coordinator_address,
    coordinator_option,
    device_name,
    output_option,
)
from layerwise.garbage import imports_kept

Function = TypeVar("Function", bound=Callable[..., Any])

LISTEN_HELP = "host:port or unix:/path to listen on; beyond this machine only with --insecure."


def service_options(function: Function) -> Function:
    """What every service takes."""
    for option in (
        click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True),
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            show_default=True,
            help="What is logged to standard error.",
        ),
        click.option("--exit-with-parent", is_flag=True, help="End when standard input ends."),
        click.option(
            "--insecure",
            is_flag=True,
            help="Agree to listen beyond this machine, --metrics included, without encryption or password.",
        ),
        click.option(
            "--metrics", metavar="ADDRESS", default="", help="host:port to serve /metrics on.  [default: nowhere]"
        ),
    ):
        function = option(function)
    return function


def name_option(function: Function) -> Function:
    """``--name`` of a service."""
    return click.option("--name", default="", help="Its name in the cluster.  [default: role, host and process id]")(
        function
    )


def join_option(function: Function) -> Function:
    """``--join`` of a worker."""
    return click.option(
        "--join",
        metavar="[JOB]",
        is_flag=False,
        flag_value="",
        default=None,
        help="Take part in JOB beyond the workers it asks for, and leave at any time; without JOB, in whatever job trains "
        "or trains next, the oldest first.",
    )(function)


@command(
    "coordinator",
    examples=[
        "layerwise coordinator --listen 127.0.0.1:7070 --state /var/lib/layerwise",
        "layerwise coordinator --listen 0.0.0.0:7070 --insecure --metrics 0.0.0.0:9090",
    ],
)
@click.option("--listen", metavar="ADDRESS", default="127.0.0.1:7070", show_default=True, help=LISTEN_HELP)
@click.option(
    "--state",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/.coordinator"),
    show_default=True,
    help="Where jobs, their events and the sample ledger are kept.",
)
@service_options
def coordinator_command(
    listen: str, state: Path, metrics: str, insecure: bool, exit_with_parent: bool, log_level: str, log_format: str
) -> int:
    """Run a coordinator: it takes jobs, places them on the processes that report to it, and never touches a tensor."""
    start_logging(log_level, log_format)
    from layerwise.server.coordinator import run_coordinator

    run_coordinator(
        listen=listen, state=str(state), metrics=metrics, insecure=insecure, exit_with_parent=exit_with_parent
    )
    return exit_codes.DONE


@command(
    "shard",
    examples=[
        "layerwise shard",
        "layerwise shard --coordinator host:7070 --listen 0.0.0.0:7071 --advertise me:7071 --insecure --device cuda:0",
    ],
)
@coordinator_option
@click.option("--listen", metavar="ADDRESS", default="127.0.0.1:0", show_default=True, help=LISTEN_HELP)
@click.option("--advertise", metavar="ADDRESS", default="", help="Where others reach it.  [default: where it listens]")
@click.option(
    "--device",
    type=device_name,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="auto takes a GPU if there is one.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of arithmetic.")
@name_option
@allow_import_option
@service_options
def shard_command(
    coordinator: str | None,
    listen: str,
    advertise: str,
    device: str,
    threads: int,
    name: str,
    allow_imports: tuple[str, ...],
    metrics: str,
    insecure: bool,
    exit_with_parent: bool,
    log_level: str,
    log_format: str,
) -> int:
    """Run a shard server: it holds a block of a job's layers, runs them forward and backward and updates them."""
    start_logging(log_level, log_format)
    address = coordinator_address(coordinator)
    with imports_kept():
        from layerwise.server.shard import run_shard

    run_shard(
        coordinator=address,
        listen=listen,
        advertise=advertise,
        device=device,
        threads=threads,
        name=name,
        metrics=metrics,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    return exit_codes.DONE


@command(
    "forward",
    examples=["layerwise forward", "layerwise forward --coordinator host:7070 --allow-import my_data"],
)
@coordinator_option
@join_option
@name_option
@allow_import_option
@service_options
def forward_command(
    coordinator: str | None,
    name: str,
    join: str | None,
    allow_imports: tuple[str, ...],
    metrics: str,
    insecure: bool,
    exit_with_parent: bool,
    log_level: str,
    log_format: str,
) -> int:
    """Run a forward worker: it leases samples, loads them and streams them through the shards. It keeps nothing."""
    start_logging(log_level, log_format)
    address = coordinator_address(coordinator)
    with imports_kept():
        from layerwise.worker.forward import run_forward

    run_forward(
        coordinator=address,
        name=name,
        metrics=metrics,
        join=join,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    return exit_codes.DONE


@command(
    "backward",
    examples=[
        "layerwise backward",
        "layerwise backward --coordinator host:7070 --device cuda:1",
        "layerwise backward --join digits-1",
    ],
)
@coordinator_option
@click.option(
    "--device",
    type=device_name,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda:N",
    help="auto takes a GPU if there is one.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of arithmetic.")
@join_option
@name_option
@allow_import_option
@service_options
def backward_command(
    coordinator: str | None,
    device: str,
    threads: int,
    name: str,
    join: str | None,
    allow_imports: tuple[str, ...],
    metrics: str,
    insecure: bool,
    exit_with_parent: bool,
    log_level: str,
    log_format: str,
) -> int:
    """Run a detached backward worker: a process that computes a shard's gradients, for jobs that ask for it."""
    start_logging(log_level, log_format)
    address = coordinator_address(coordinator)
    with imports_kept():
        from layerwise.worker.backward import run_backward

    run_backward(
        coordinator=address,
        device=device,
        threads=threads,
        name=name,
        metrics=metrics,
        join=join,
        allow_imports=allow_imports,
        insecure=insecure,
        exit_with_parent=exit_with_parent,
    )
    return exit_codes.DONE


@command(
    "healthcheck",
    examples=["layerwise healthcheck 127.0.0.1:7070", "layerwise healthcheck unix:/run/layerwise/shard.sock"],
)
@click.argument("address")
@click.option("--timeout", "seconds", type=click.FloatRange(min=0.0, min_open=True), default=3.0, show_default=True)
@output_option
def healthcheck_command(address: str, seconds: float, output: str) -> int:
    """Ask the coordinator or shard at ADDRESS whether it serves; exit status 0 when it does, 3 when nobody answers."""
    from layerwise.address import parse_address
    from layerwise.health import check_health

    status = check_health(str(parse_address(address)), seconds=seconds)
    if output == "json":
        click.echo(json.dumps({"address": address, "status": status}))
    else:
        click.echo(status)
    return exit_codes.DONE if status == "serving" else exit_codes.FAILED


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in unix seconds, level, where, what, and a traceback if there is one."""
        line: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start_logging(level: str, form: str) -> None:
    """Log to standard error, where SIGUSR1 and a crash of the interpreter leave the stacks of all threads too."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=number, handlers=[handler])
