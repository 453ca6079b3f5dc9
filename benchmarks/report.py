"""Where results go: one section of ``benchmarks/RESULTS.md`` for each benchmark, replaced when it is run again."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
TITLE = """# Results

Measured by `make bench`; each section says with which command, when and on which machine. Ratios are within one run, medians over the repeats,
with the spread in brackets.
"""


def machine() -> str:
    """The machine in a few words."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))
        model = found.group(1) if found else model
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({model}), Python {platform.python_version()}, torch {torch.__version__}"


def write_section(name: str, command: str, text: str) -> None:
    """Put ``text`` under the heading ``name``, in place of what is there."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    section = f"## {name}\n\n`{command}`, {date}, {machine()}.\n\n{text.strip()}\n"
    existing = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else TITLE
    pattern = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(existing):
        updated = pattern.sub(lambda _: section + "\n", existing)
    else:
        updated = existing.rstrip() + "\n\n" + section
    RESULTS.write_text(updated.rstrip() + "\n", encoding="utf-8")
    print(section)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
