"""``resume``: go on with a job, on a cluster or on one of its own."""

from __future__ import annotations

from pathlib import Path

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import (
    COORDINATOR_VARIABLE,
    allow_import_option,
    command,
    coordinator_option,
    device_name,
    metrics_address,
    metrics_option,
    output_option,
    refuse_given,
    supervision_options,
    threads_option,
    timeout_option,
)


@command(
    "resume",
    examples=[
        "layerwise resume runs/digits",
        "layerwise resume digits-1 --follow",
        "layerwise resume /shared/runs/digits --coordinator host:7070",
        "layerwise resume runs/digits --shards 3",
    ],
)
@click.argument("job", metavar="JOB|DIRECTORY")
@click.option(
    "--shards", type=click.IntRange(min=1), metavar="N", help="Split the model among so many.  [default: as before]"
)
@coordinator_option
@click.option("-f", "--follow", is_flag=True, help="Show the job until it has ended; the exit status is the job's.")
@allow_import_option
@click.option(
    "--device",
    "devices",
    type=device_name,
    multiple=True,
    metavar="auto|cpu|cuda:N",
    help="Devices of the shards (with a DIRECTORY).",
)
@threads_option
@metrics_option
@supervision_options
@timeout_option
@click.option("--quiet", is_flag=True, help="No progress.")
@output_option
def resume_command(
    job: str,
    shards: int | None,
    coordinator: str | None,
    follow: bool,
    allow_imports: tuple[str, ...],
    devices: tuple[str, ...],
    threads: int | None,
    metrics: str | None,
    spare: bool,
    hang_timeout: float,
    timeout: float | None,
    quiet: bool,
    output: str,
) -> int:
    """Go on with a failed or cancelled job from its newest cut.

    A DIRECTORY (anything with a slash in it, or an existing folder) is trained on by a cluster of its own, as `train`
    does, unless --coordinator names one. A JOB is queued again by the coordinator that knows it. With --shards its layers
    are spread anew; everything else stays as it was. Options of a cluster's processes go with a DIRECTORY that is
    trained on so.
    """
    directory = Path(job).expanduser().absolute()
    is_directory = "/" in job or directory.is_dir()
    embedded = is_directory and coordinator is None
    if embedded:
        refuse_given(["timeout"], "a job of a cluster")
    else:
        own = ["allow_imports", "devices", "threads", "metrics", "spare", "hang_timeout"]
        refuse_given(own, f"a DIRECTORY without --coordinator and {COORDINATOR_VARIABLE}")
        if not follow:
            refuse_given(["timeout", "quiet"], "--follow")
    if embedded:
        from layerwise.cli.local import run_embedded
        from layerwise.run_directory import spec_in

        spec = spec_in(directory)
        arguments = {
            "spec": spec if shards is None else spec.with_shards(shards),
            "directory": directory,
            "resume": True,
            "allow_imports": allow_imports,
            "threads": threads,
            "devices": devices,
            "metrics": metrics_address(metrics),
            "spare": spare,
            "hang_seconds": hang_timeout or None,
        }
        return run_embedded(arguments, output, quiet=quiet)

    from layerwise.cli.jobs import coordinator_client
    from layerwise.cli.output import print_json

    with coordinator_client(coordinator) as client:
        # What it logged in earlier runs has been seen.
        offset = 0 if is_directory else int(client.get_job(job)["num_events"])
        named = {"directory": str(directory)} if is_directory else {"job": job}
        document = client.resume(**named, shards=shards or 0)
        if follow:
            from layerwise.cli.following import follow_job

            return follow_job(client, document, output, offset=offset, quiet=quiet, timeout=timeout)
    if output == "json":
        print_json(document)
    else:
        click.echo(document["job"])
    return exit_codes.DONE
