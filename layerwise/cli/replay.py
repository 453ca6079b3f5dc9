"""``replay``: a recorded run again, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from layerwise.cli import exit_codes
from layerwise.cli.options import allow_import_option, command, coordinator_option, device_name, output_option
from layerwise.cli.output import print_json
from layerwise.cli.results import job_directory


@command(
    "replay",
    examples=[
        "layerwise replay runs/digits",
        "layerwise replay digits-1 --from 0 --output json",
        "layerwise replay runs/digits --until 120 --save at-120",
        "layerwise replay runs/digits --until 2:64 --save at-sample",
    ],
)
@click.argument("job", metavar="DIRECTORY|JOB")
@click.option(
    "--from",
    "start",
    type=click.IntRange(min=0),
    metavar="CUT",
    help="Begin at the cut of this version, 0: the initial weights.  [default: at or before the oldest saved cut]",
)
@click.option(
    "--until",
    metavar="UPDATE|EPOCH:POSITION",
    help="Stop when all layers have made this update, or have taken in the sample at this place of the epoch's order.",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Write the layers as they are at the end: a cut at an update, else a safetensors file a layer.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of arithmetic.  [default: as recorded]")
@click.option(
    "--device",
    type=device_name,
    metavar="auto|cpu|cuda:N",
    help="Where to compute.  [default: on the CPU what was recorded there, on this machine's GPU what was on one]",
)
@allow_import_option
@coordinator_option
@click.option("--quiet", is_flag=True, help="No progress.")
@output_option
def replay_command(
    job: str,
    start: int | None,
    until: str | None,
    save: Path | None,
    threads: int | None,
    device: str | None,
    allow_imports: tuple[str, ...],
    coordinator: str | None,
    quiet: bool,
    output: str,
) -> int:
    """Execute a run again from its event logs, in the recorded order with the recorded reads, and compare every hash.

    Through crashes, resumes and rewinds, to the same parameters bit for bit: on the CPU in float32, with the processor
    type, the torch version and the threads of the record; on a GPU of the same kind as far as its operations repeat. Exit
    status 1 when an update differs; the first one is named.
    """
    directory, _ = job_directory(job, coordinator)
    from layerwise.device import resolve_device
    from layerwise.replay import Replay, parse_until
    from layerwise.replay.saving import check_empty

    stop = None if until is None else parse_until(until)
    if save is not None:
        check_empty(save)
    place = None if device is None else resolve_device(device)
    replay = Replay(directory, start=start, until=stop, threads=threads, device=place, allowed_imports=allow_imports)
    shown = not quiet and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        click.echo(f"\r{done} of {total} updates", nl=False, err=True)

    report = replay.run(progress if shown else None)
    if shown:
        click.echo(err=True)
    saved = replay.save(save) if save is not None and report.divergence is None else None
    if output == "json":
        print_json({**report.to_json(), "saved": None if saved is None else str(saved)})
    else:
        for line in report.lines():
            click.echo(line)
        if saved is not None:
            click.echo(saved)
    return exit_codes.DONE if report.passed else exit_codes.FAILED
