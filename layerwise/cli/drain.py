"""``drain``: send all jobs away from a machine, without losing an update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import command, coordinator_option, output_option, refuse_given, timeout_option
from layerwise.cli.output import print_json
from layerwise.errors import DeadlineError

POLL_SECONDS = 0.2


@command(
    "drain",
    examples=[
        "layerwise drain rack-2",
        "layerwise drain rack-2 --timeout 600",
        "layerwise drain shard-rack-2-0 --output json",
        "layerwise drain rack-2 --undo",
    ],
)
@click.argument("node", metavar="NODE")
@click.option("--undo", is_flag=True, help="Let jobs come to NODE again.")
@timeout_option
@coordinator_option
@output_option
def drain_command(node: str, undo: bool, timeout: float | None, coordinator: str | None, output: str) -> int:
    """Have every job leave NODE: a node's name, a host, or one process, as `nodes` shows them.

    Jobs stop at their next update, with a cut there, and go on from it with free processes elsewhere; nothing is lost or
    done twice. Returns when NODE is empty. It gets no new work until --undo, also after a restart of the coordinator or
    of its own processes. Exit status 5, and nothing changed, when too few other processes are free.
    """
    from layerwise.cli.jobs import coordinator_client

    if undo:
        refuse_given(["timeout"], "a drain without --undo")
    with coordinator_client(coordinator) as client:
        document = client.drain(node, undo=undo)
        if not undo:
            if document["jobs"]:
                click.echo(f"{', '.join(document['jobs'])} must leave {node}", err=True)
            document["processes"] = wait_until_empty(client.list_nodes, document, timeout)
    if output == "json":
        print_json({**document, "jobs": sorted({one["job"] for one in document["processes"] if one["job"]})})
    else:
        click.echo(f"{node} takes work again" if undo else f"{node} is empty")
    return exit_codes.DONE


def wait_until_empty(
    list_nodes: Callable[[], list[dict[str, Any]]],
    document: dict[str, Any],
    timeout: float | None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Return the processes of ``document``, the answer to a drain, when none of them works for a job.

    Raises:
        DeadlineError: that is not so within ``timeout`` seconds.
    """
    node, names = document["node"], {one["name"] for one in document["processes"]}
    deadline = None if timeout is None else clock() + timeout
    while True:
        processes = [one for one in list_nodes() if one["name"] in names]
        jobs = sorted({one["job"] for one in processes if one["job"]})
        if not jobs:
            return processes
        if deadline is not None and clock() >= deadline:
            raise DeadlineError(f"{node} is not empty yet, {', '.join(jobs)} is still there; it goes on leaving")
        sleep(POLL_SECONDS)
