"""What commands have in common: how they are declared, and the options that several take."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from layerwise.errors import ConfigError, UnreachableError
from layerwise.supervision import HANG_SECONDS

COORDINATOR_VARIABLE = "LAYERWISE_COORDINATOR"

Function = TypeVar("Function", bound=Callable[..., Any])


def command(name: str, *, examples: Sequence[str]) -> Callable[[Callable[..., Any]], click.Command]:
    """Declare a command; ``examples`` end its help."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)

    def declare(function: Callable[..., Any]) -> click.Command:
        # Read by layerwise.cli.main.run from the arguments themselves, since an error may come before parsing has
        # ended.
        debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors.")
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
        return click.command(name, epilog=epilog, context_settings=settings)(debug(function))

    return declare


def output_option(function: Function) -> Function:
    """``--output table|json`` as ``output``."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Form of the data.",
    )(function)


def coordinator_option(function: Function) -> Function:
    """``--coordinator ADDRESS`` as ``coordinator``; resolve it with `coordinator_address`."""
    return click.option(
        "--coordinator",
        metavar="ADDRESS",
        envvar=COORDINATOR_VARIABLE,
        show_envvar=True,
        help="host:port or unix:/path of the coordinator.  [default: the cluster of `layerwise up`]",
    )(function)


def set_option(function: Function) -> Function:
    """``--set key=value`` (repeatable) as ``overrides``."""
    return click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="Change a value of the job file, such as train.steps=100.",
    )(function)


def allow_import_option(function: Function) -> Function:
    """``--allow-import MODULE`` (repeatable) as ``allow_imports``."""
    return click.option(
        "--allow-import",
        "allow_imports",
        metavar="MODULE",
        multiple=True,
        help="A module of yours that jobs may run code from, with all below it.",
    )(function)


def timeout_option(function: Function) -> Function:
    """``--timeout SECONDS`` as ``timeout``, for commands that wait for a job; None when not given."""
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0.0, min_open=True),
        metavar="SECONDS",
        help="Wait for the job no longer than this; it goes on, the exit status is 124.",
    )(function)


def threads_option(function: Function) -> Function:
    """``--threads N`` as ``threads``; None when not given."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Threads of arithmetic of each shard.  [default: its part of the cores]",
    )(function)


def supervision_options(function: Function) -> Function:
    """``--spare/--no-spare`` as ``spare``, and ``--hang-timeout SECONDS`` as ``hang_timeout`` (0: never)."""
    for option in (
        click.option(
            "--hang-timeout",
            type=click.FloatRange(min=0.0),
            metavar="SECONDS",
            default=HANG_SECONDS,
            show_default=True,
            help="Replace a process that is stopped for so long, or does nothing for four times as long; 0: never.",
        ),
        click.option(
            "--spare/--no-spare",
            default=True,
            show_default=True,
            help="Keep a process with torch loaded (about 275 MB) that takes the place of one that ends.",
        ),
    ):
        function = option(function)
    return function


def refuse_given(names: Sequence[str], where: str) -> None:
    """Refuse the options of the running command whose parameters are in ``names``: they go with ``where`` only.

    Raises:
        click.UsageError: one was given on the command line, whatever its value.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is click.core.ParameterSource.COMMANDLINE:
            turned_off = parameter.secondary_opts and context.params[parameter.name] is False
            option = (parameter.secondary_opts if turned_off else parameter.opts)[-1]
            raise click.UsageError(f"{option} goes with {where} only")


def metrics_option(function: Function) -> Function:
    """``--metrics ADDRESS`` of a cluster that the command starts itself, as ``metrics``; see `metrics_address`."""
    return click.option(
        "--metrics", metavar="ADDRESS", help="Where the coordinator serves /metrics.  [default: a free loopback port]"
    )(function)


def listen_address(given: str | None, *, insecure: bool) -> str | None:
    """``--listen`` of a cluster that the command starts itself, checked before any process is.

    Raises:
        ConfigError: it is no address, or it is taken.
        NotAllowedError: others could reach it, and ``--insecure`` was not said.
    """
    from layerwise.address import check_may_listen, parse_address

    if given is None:
        return None
    address = parse_address(given)
    check_may_listen(address, insecure=insecure)
    return str(address)


def metrics_address(given: str | None, *, insecure: bool | None = None) -> str | None:
    """``--metrics``, likewise; None where the command has no ``--insecure``.

    Raises:
        ConfigError: it is not ``host:port``.
        NotAllowedError: other machines could reach it.
    """
    from layerwise.address import TcpAddress, check_may_listen, parse_address
    from layerwise.errors import NotAllowedError

    if given is None:
        return None
    address = parse_address(given)
    if not isinstance(address, TcpAddress):
        raise ConfigError(f"--metrics: got {given}, expected host:port; port 0 takes a free one")
    if insecure is None and not address.loopback:
        raise NotAllowedError(
            f"--metrics: {given} could be reached from other machines; this command serves on loopback addresses only, "
            "such as 127.0.0.1:9090"
        )
    check_may_listen(address, insecure=bool(insecure))
    return str(address)


def device_name(value: str) -> str:
    """The type of ``--device`` options; whether there is such a device is seen where it is used."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N")
    return value


def runtime_folder() -> Path:
    """The user's own folder for what lives as long as the login; not created here."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "layerwise" if base else Path(f"/tmp/layerwise-{os.getuid()}")


def recorded_coordinator() -> Path:
    """The file in which ``layerwise up`` writes its coordinator's address."""
    return runtime_folder() / "coordinator"


def record_coordinator(address: str) -> Path:
    """Write the address down for other commands of this user; take it back with `forget_coordinator`."""
    folder = runtime_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user; set XDG_RUNTIME_DIR to a folder of your own")
    path = folder / "coordinator"
    path.write_text(address + "\n", encoding="utf-8")
    return path


def forget_coordinator(path: Path, address: str) -> None:
    """Take back what `record_coordinator` wrote, unless a later cluster has taken its place."""
    try:
        if path.read_text(encoding="utf-8").strip() == address:
            path.unlink()
    except FileNotFoundError:
        return


def coordinator_address(given: str | None) -> str:
    """The address that was given, or that of this user's local cluster.

    Raises:
        ConfigError: it is no address.
        UnreachableError: none was given and no local cluster runs.
    """
    from layerwise.address import parse_address

    if given:
        return str(parse_address(given))
    path = recorded_coordinator()
    try:
        if path.stat().st_uid == os.getuid():
            return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        pass
    raise UnreachableError(
        "no cluster of this user runs on this machine; start one with `layerwise up`, "
        f"or name a coordinator with --coordinator or {COORDINATOR_VARIABLE}"
    )
