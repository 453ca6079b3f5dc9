"""Commands that talk to a coordinator: ``submit``, ``jobs``, ``status``, ``logs``, ``cancel``, ``nodes``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import (
    command,
    coordinator_address,
    coordinator_option,
    output_option,
    refuse_given,
    set_option,
    timeout_option,
)
from layerwise.cli.output import format_bytes, job_facts, print_facts, print_json, print_table

if TYPE_CHECKING:
    from layerwise.client import CoordinatorClient, JobEvent


@contextmanager
def coordinator_client(coordinator: str | None) -> Iterator[CoordinatorClient]:
    """A client of the coordinator that an option, the environment or the local cluster names."""
    from layerwise.client import CoordinatorClient

    with CoordinatorClient(coordinator_address(coordinator)) as client:
        yield client


@command(
    "submit",
    examples=[
        "layerwise submit job.yaml",
        "layerwise submit --follow job.yaml --set train.seed=2",
        "layerwise submit job.yaml --coordinator host:7070",
    ],
)
@click.argument("spec", metavar="SPEC")
@set_option
@coordinator_option
@click.option("-f", "--follow", is_flag=True, help="Show the job until it has ended; the exit status is the job's.")
@timeout_option
@output_option
def submit_command(
    spec: str,
    overrides: tuple[str, ...],
    coordinator: str | None,
    follow: bool,
    timeout: float | None,
    output: str,
) -> int:
    """Queue the job in SPEC (a YAML or JSON file, or - for standard input) and print its id.

    Through a unix socket, relative paths in the job count from here; otherwise from the working directory of each
    process.
    """
    from layerwise.overrides import read_job

    if not follow:
        refuse_given(["timeout"], "--follow")
    job = read_job(spec, overrides)
    with coordinator_client(coordinator) as client:
        if client.address.startswith("unix:"):
            job = job.with_absolute_paths(Path.cwd())
        document = client.submit(job.to_json())
        if follow:
            from layerwise.cli.following import follow_job

            return follow_job(client, document, output, timeout=timeout)
    if output == "json":
        print_json(document)
    else:
        click.echo(document["job"])
    return exit_codes.DONE


@command("jobs", examples=["layerwise jobs", "layerwise jobs --output json | jq -r '.[].job'"])
@coordinator_option
@output_option
def jobs_command(coordinator: str | None, output: str) -> int:
    """List the jobs of a cluster, oldest first."""
    with coordinator_client(coordinator) as client:
        documents = client.list_jobs()
    if output == "json":
        print_json(documents)
        return exit_codes.DONE
    rows = [
        [
            one["job"],
            one["state"],
            f"{one.get('steps') or 0}/{one.get('total_steps') or '?'}",
            one.get("train_loss"),
            one.get("samples_per_second"),
            (one.get("staleness") or {}).get("mean"),
            one.get("waiting_for") or one.get("message") or "",
        ]
        for one in documents
    ]
    print_table(["job", "state", "steps", "loss", "samples/s", "staleness", "message"], rows)
    return exit_codes.DONE


@command(
    "status", examples=["layerwise status", "layerwise status digits-1", "layerwise status digits-1 --output json"]
)
@click.argument("job", required=False)
@coordinator_option
@output_option
def status_command(job: str | None, coordinator: str | None, output: str) -> int:
    """Show JOB; without one, count the processes and jobs of the cluster."""
    with coordinator_client(coordinator) as client:
        if job is not None:
            document = client.get_job(job)
            if output == "json":
                print_json(document)
                return exit_codes.DONE
            print_facts(job_facts(document))
            if blocks := document.get("blocks"):
                click.echo()
                columns = ["block", "layers", "shard", "device", "version", "open_attempts", "store_bytes"]
                rows = [
                    [
                        one["block"],
                        f"{one['start']}-{one['stop'] - 1}",
                        one["shard"],
                        one["device"],
                        one["version"],
                        one["open_attempts"],
                        format_bytes(one["store_bytes"]),
                    ]
                    for one in blocks
                ]
                print_table([name.replace("_", " ") for name in columns], rows)
            return exit_codes.DONE
        nodes, jobs = client.list_nodes(), client.list_jobs()
    roles = {role: [one for one in nodes if one["role"] == role] for role in ("shard", "forward", "backward")}
    states = {
        state: sum(one["state"] == state for one in jobs) for state in dict.fromkeys(one["state"] for one in jobs)
    }
    summary = {
        "coordinator": client.address,
        "processes": {
            role: {"total": len(found), "free": sum(one["state"] == "free" for one in found)}
            for role, found in roles.items()
        },
        "jobs": states,
    }
    if output == "json":
        print_json(summary)
        return exit_codes.DONE
    facts: dict[str, object] = {"coordinator": client.address}
    for role, found in roles.items():
        facts[f"{role} processes"] = f"{len(found)} ({sum(one['state'] == 'free' for one in found)} free)"
    facts["jobs"] = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
    print_facts(facts)
    return exit_codes.DONE


@command(
    "logs", examples=["layerwise logs digits-1", "layerwise logs -f digits-1", "layerwise logs digits-1 --output json"]
)
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@coordinator_option
@output_option
def logs_command(job: str, follow: bool, coordinator: str | None, output: str) -> int:
    """Show what JOB has logged. With --follow, a coordinator that is away for less than a minute does not matter."""
    with coordinator_client(coordinator) as client:
        for event in client.follow_events(job) if follow else client.events(job):
            print_event(event, output)
    return exit_codes.DONE


def print_event(event: JobEvent, output: str) -> None:
    """One line on standard output."""
    if output == "json":
        print_json(
            {
                "offset": event.offset,
                "time": event.time,
                "level": event.level,
                "message": event.message,
                "fields": dict(event.fields),
            }
        )
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    click.echo(f"{when}  {event.level:<7}  {event.message}")


@command("cancel", examples=["layerwise cancel digits-1", "layerwise cancel digits-1 --wait"])
@click.argument("job")
@click.option("--wait", is_flag=True, help="Return when it has ended.")
@timeout_option
@coordinator_option
@output_option
def cancel_command(job: str, wait: bool, timeout: float | None, coordinator: str | None, output: str) -> int:
    """Stop JOB at its next update and save a cut there, from which `resume` goes on.

    With --wait the exit status is 1 when it has failed instead.
    """
    if not wait:
        refuse_given(["timeout"], "--wait")
    with coordinator_client(coordinator) as client:
        document = client.cancel(job)
        if wait:
            from layerwise.cli.following import show_last
            from layerwise.errors import LayerwiseError
            from layerwise.follow import JobFollower, Silent

            follower = JobFollower(client, job, Silent(), refresh_seconds=60.0)
            try:
                document = follower.run(timeout=timeout)
            except (LayerwiseError, KeyboardInterrupt):
                show_last(follower.document or document, output)
                raise
    if output == "json":
        print_json(document)
    else:
        click.echo(f"{document['job']} {document['state']}")
    return exit_codes.FAILED if wait and document["state"] == "failed" else exit_codes.DONE


@command("nodes", examples=["layerwise nodes", "layerwise nodes --output json"])
@coordinator_option
@output_option
def nodes_command(coordinator: str | None, output: str) -> int:
    """List the processes of a cluster."""
    with coordinator_client(coordinator) as client:
        nodes = client.list_nodes()
    if output == "json":
        print_json(nodes)
        return exit_codes.DONE
    rows = [
        [
            one["name"],
            one["role"],
            one["state"],
            one.get("job") or "",
            {None: "", "": "any job"}.get(one.get("join"), one.get("join")),
            one["device"] or "",
            one["host"],
            one["pid"],
            format_bytes(one.get("resident_bytes")),
            f"{one.get('heartbeat_age') or 0:.1f} s",
            one.get("metrics_address") or "",
        ]
        for one in nodes
    ]
    print_table(["name", "role", "state", "job", "joins", "device", "host", "pid", "memory", "seen", "metrics"], rows)
    return exit_codes.DONE
