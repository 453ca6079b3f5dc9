"""Changes to a job file said beside it: ``train.optimizer.lr=0.01``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import ConfigError
from layerwise.job import JobSpec, parse_job
from layerwise.specification import describe, plain, read_mapping

ALTERNATIVES = {"train.steps": "epochs", "train.epochs": "steps"}
"""Keys of which a job has one or the other: saying one takes the other away."""


def read_job(job: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> JobSpec:
    """The job in the file ``job`` (``-``: standard input) or in a map, with ``overrides`` put in before it is checked.

    Raises:
        ConfigError: the file can't be read, or the job, or an override, can't be meant.
    """
    if isinstance(job, Mapping):
        source, values = "job", plain(job, "job")
    else:
        source = "standard input" if str(job) == "-" else str(job)
        values = read_mapping(_text(job), source)
    for override in overrides:
        apply_override(values, override)
    return parse_job(values, source=source)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the value at a dotted key in place.

    The value is read as YAML; a section given by its bare name becomes a map. ``train.steps`` takes the place of
    ``train.epochs``, and the other way round.

    Raises:
        ConfigError: ``override`` is not ``key=value``, or a key leads through something that is no section.
    """
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected key=value with a dotted key, such as train.steps=100")
    value = read_mapping(f"value: {text}", f"--set {override}")["value"]
    section = values
    for depth, name in enumerate(keys[:-1], start=1):
        inner = section.get(name)
        if inner is None:
            inner = {}
        elif isinstance(inner, str):
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} is {describe(inner)}, not a section")
        section[name] = inner
        section = inner
    section[keys[-1]] = value
    other = ALTERNATIVES.get(".".join(keys))
    if other is not None and value is not None:
        section.pop(other, None)


def _text(path: str | Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no job file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the job file {path} can't be read: {error}") from None
