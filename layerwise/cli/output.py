"""Standard output: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from layerwise.json_text import json_text


def print_json(value: object) -> None:
    """One JSON document on one line."""
    click.echo(json_text(value, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns under their names; numbers to the right."""
    cells = [[format_cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[place]) for row in cells), 0) for place, name in enumerate(columns)]
    right = [
        bool(rows) and all(isinstance(row[place], (int, float, type(None))) for row in rows)
        for place in range(len(columns))
    ]
    for line in ([name.upper() for name in columns], *cells):
        parts = [
            text.rjust(width) if aligned else text.ljust(width)
            for text, width, aligned in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def print_facts(facts: Mapping[str, object]) -> None:
    """One ``name  value`` a line; what is empty is left out."""
    shown = {name: format_cell(value) for name, value in facts.items() if value not in (None, "", (), [])}
    width = max((len(name) for name in shown), default=0)
    for name, text in shown.items():
        click.echo(f"{name.ljust(width)}  {text}")


def format_cell(value: object) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def format_bytes(number: float | None) -> str:
    """``1.5 GB``, in powers of 1000."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def format_count(number: int) -> str:
    """``1,234``."""
    return f"{number:,}"


def job_facts(document: Mapping[str, Any]) -> dict[str, object]:
    """A job's document as `print_facts` shows it."""
    from layerwise.progress import format_seconds

    staleness, ledger = document.get("staleness") or {}, document.get("ledger") or {}
    validation = document.get("validation") or {}
    steps, total = document.get("steps") or 0, document.get("total_steps")
    facts: dict[str, object] = {
        "job": document["job"],
        "state": document["state"],
        "message": document.get("message"),
        "waiting for": document.get("waiting_for"),
        "steps": f"{steps} of {total}" if total else steps,
        "epochs": document.get("epochs") or None,
        "samples": document.get("samples") or None,
        "time": format_seconds(document["seconds"]) if document.get("seconds") else None,
        "samples/s": document.get("samples_per_second"),
        "train loss": document.get("train_loss"),
    }
    for name, value in validation.items():
        if name not in ("version", "seconds"):
            facts[f"validation {name}"] = value
    if staleness.get("mean") is not None:
        facts["staleness"] = (
            f"mean {staleness['mean']:.3f}, p50 {staleness['p50']}, p99 {staleness['p99']}, "
            f"max {staleness['max']} updates"
        )
    if ledger.get("samples_leased"):
        facts["ledger"] = (
            f"{ledger['samples_leased']} samples leased = "
            f"{ledger['samples_applied']} applied + {ledger['samples_dropped']} dropped"
        )
    for name in ("window", "accumulation", "backward_weights", "delay_policy", "max_staleness"):
        facts[name.replace("_", " ")] = document.get(name)
    cuts = document.get("cuts") or []
    facts["cuts"] = [one["version"] for one in cuts]
    facts["joined"] = document.get("joined_workers")
    facts["warnings"] = "; ".join(document.get("warnings") or ())
    facts["directory"] = document.get("directory")
    return facts
