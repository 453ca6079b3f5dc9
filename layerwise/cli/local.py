"""``train`` and ``up``: clusters of this machine that belong to the command."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import (
    allow_import_option,
    command,
    device_name,
    forget_coordinator,
    listen_address,
    metrics_address,
    metrics_option,
    output_option,
    record_coordinator,
    set_option,
    supervision_options,
    threads_option,
)


@command(
    "train",
    examples=[
        "layerwise train examples/digits.yaml",
        "layerwise train job.yaml --set train.steps=50 --set cluster.shards=4",
        "layerwise train job.yaml --output json | tail -n 1 | jq .validation",
        "layerwise train job.yaml --allow-import my_package",
    ],
)
@click.argument("spec", metavar="SPEC")
@set_option
@allow_import_option
@click.option(
    "--overwrite",
    is_flag=True,
    help="Delete the run that lies at checkpoint.path at this one's first update; else this one gets a number.",
)
@click.option(
    "--device",
    "devices",
    type=device_name,
    multiple=True,
    metavar="auto|cpu|cuda:N",
    help="Devices of the shards, given out in turn.",
)
@threads_option
@metrics_option
@supervision_options
@click.option("--quiet", is_flag=True, help="No progress.")
@output_option
def train_command(
    spec: str,
    overrides: tuple[str, ...],
    allow_imports: tuple[str, ...],
    overwrite: bool,
    devices: tuple[str, ...],
    threads: int | None,
    metrics: str | None,
    spare: bool,
    hang_timeout: float,
    quiet: bool,
    output: str,
) -> int:
    """Train the job in SPEC (YAML or JSON, - for standard input) on a cluster of its own, and end the cluster.

    Ctrl-C stops at the next update, saves a cut there and says how to go on; a second Ctrl-C ends everything at once.
    """
    from layerwise.overrides import read_job
    from layerwise.run_directory import directory_for

    job = read_job(spec, overrides).with_absolute_paths(Path.cwd())
    metrics = metrics_address(metrics)
    directory = directory_for(job.checkpoint_path, overwrite=overwrite)
    note = "" if directory == Path(job.checkpoint_path) else earlier_run(Path(job.checkpoint_path), directory)
    return run_embedded(
        {
            "spec": job,
            "directory": directory,
            "overwrite": overwrite,
            "allow_imports": allow_imports,
            "threads": threads,
            "devices": devices,
            "metrics": metrics,
            "spare": spare,
            "hang_seconds": hang_timeout or None,
        },
        output,
        quiet=quiet,
        note=note,
    )


def earlier_run(wanted: Path, directory: Path) -> str:
    """What to say when a run lies where this one would have gone."""
    return (
        f"{short(wanted)} holds an earlier run (go on with it: layerwise resume {quote(short(wanted))}); "
        f"this run goes to {short(directory)}"
    )


def run_embedded(arguments: dict[str, Any], output: str, *, quiet: bool, note: str = "") -> int:
    """Run a job on a cluster of its own (arguments of `EmbeddedRun`) and show it; returns the exit status."""
    from layerwise.cli.following import show_last, show_result, shown_progress, signals_call
    from layerwise.embedded import EmbeddedRun
    from layerwise.errors import LayerwiseError
    from layerwise.tracebacks import log_ends

    with shown_progress(quiet=quiet) as view:
        if note:
            view.note(note)
        run = EmbeddedRun(view=view, **arguments)
        again = f"go on with it: {run.how_to_resume}"
        log_ends_before = log_ends(run.directory / "logs")
        with signals_call(run.interrupt):
            try:
                document = run.run()
            except KeyboardInterrupt:
                show_last(run.document, output)
                saved = f"; what was saved before stays: {again}" if run.resumable else " before training began"
                view.say(f"ended at once{saved}")
                return exit_codes.INTERRUPTED
            except LayerwiseError:
                show_last(run.document, output)
                raise
    stopped = bool(run.interrupts) and document["state"] == "cancelled"
    remedy = ""
    if document["state"] == "failed":
        remedy = remedy_of(document, run.how_to_resume if run.resumable else "", run.directory)
        remedy += where_tracebacks_are(run.directory / "logs", log_ends_before)
    status = show_result(document, output, remedy=remedy.removeprefix("; "))
    if document["state"] == "cancelled":
        steps = f"{document.get('steps') or 0} of {document.get('total_steps') or '?'}"
        advice = again if run.resumable else "nothing was trained"
        click.echo(f"stopped at step {steps}; {advice}" if stopped else advice, err=True)
    return exit_codes.INTERRUPTED if stopped else status


def remedy_of(document: dict[str, Any], how_to_resume: str, directory: Path) -> str:
    """What to do about a run that failed, unless its message says so. ``how_to_resume`` is empty where it can't be."""
    if how_to_resume and how_to_resume in str(document.get("message")):
        return ""
    if how_to_resume and (document.get("cuts") or document.get("steps")):
        return f"go on with it: {how_to_resume}"
    return f"nothing was trained; the logs of its processes are in {short(directory / 'logs')}"


def where_tracebacks_are(logs: Path, ends: Mapping[int, int]) -> str:
    """Where to look for what the messages are too short for, such as the line of one's own code that failed.

    What the logs held up to their ``ends`` is of an earlier run.
    """
    from layerwise.tracebacks import logs_with_tracebacks

    found = logs_with_tracebacks(logs, ends)
    return f"; for a traceback see {', '.join(map(short, found))}" if found else ""


def short(path: Path) -> str:
    """A path as it can be typed here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@command("up", examples=["layerwise up", "layerwise up --shards 4 --forward 2", "layerwise up --listen 127.0.0.1:7070"])
@click.option("--shards", type=click.IntRange(min=1), default=2, show_default=True, help="Shard servers.")
@click.option("--forward", type=click.IntRange(min=1), default=1, show_default=True, help="Forward workers.")
@click.option("--backward", type=click.IntRange(min=0), default=0, show_default=True, help="Detached backward workers.")
@click.option("--listen", metavar="ADDRESS", help="Where the coordinator listens.  [default: a private unix socket]")
@click.option(
    "--state", metavar="DIR", type=click.Path(path_type=Path), help="Jobs and logs.  [default: runs/.cluster]"
)
@click.option(
    "--device",
    "devices",
    type=device_name,
    multiple=True,
    metavar="auto|cpu|cuda:N",
    help="Devices of the shards, given out in turn.",
)
@threads_option
@allow_import_option
@metrics_option
@supervision_options
@click.option("--insecure", is_flag=True, help="Agree to listen beyond this machine without encryption or password.")
@output_option
def up_command(
    shards: int,
    forward: int,
    backward: int,
    listen: str | None,
    state: Path | None,
    devices: tuple[str, ...],
    threads: int | None,
    allow_imports: tuple[str, ...],
    metrics: str | None,
    spare: bool,
    hang_timeout: float,
    insecure: bool,
    output: str,
) -> int:
    """Keep a cluster running on this machine until Ctrl-C; `submit`, `jobs` and the others find it by themselves.

    A process that dies is started again. Jobs are remembered: after the next `layerwise up` with the same --state
    they can be resumed.
    """
    from layerwise.cli.following import signals_call
    from layerwise.cli.output import print_json
    from layerwise.cluster import LocalCluster

    signals: list[int] = []

    def end_once() -> None:
        signals.append(1)
        if len(signals) == 1:  # the end itself is not to be interrupted; it has a time limit
            raise KeyboardInterrupt

    def on_problem(sentence: str, last: bool) -> None:
        if runs.is_set():  # before that, the command itself ends with this sentence
            click.echo(f"warning: {sentence}", err=True)

    runs = threading.Event()
    cluster = LocalCluster(
        shards=shards,
        forward=forward,
        backward=backward,
        directory=state if state is not None else Path("runs/.cluster"),
        allow_imports=allow_imports,
        threads=threads,
        devices=devices or ("auto",),
        listen=listen_address(listen, insecure=insecure),
        metrics=metrics_address(metrics, insecure=insecure),
        insecure=insecure,
        restart=True,
        spare=spare,
        hang_seconds=hang_timeout or None,
        on_problem=on_problem,
    )
    with signals_call(end_once), cluster:
        cluster.wait_for_nodes()
        runs.set()
        recorded = record_coordinator(cluster.coordinator_address)
        try:
            if output == "json":
                print_json({"coordinator": cluster.coordinator_address, "pids": cluster.pids})
            else:
                click.echo(cluster.coordinator_address)
            click.echo(f"{len(cluster.names)} processes run, logs in {short(cluster.logs)}; Ctrl-C ends them", err=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            click.echo("ending", err=True)
        finally:
            forget_coordinator(recorded, cluster.coordinator_address)
    return exit_codes.DONE
