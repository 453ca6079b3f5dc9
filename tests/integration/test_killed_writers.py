"""Real processes, killed by SIGKILL at the fault points of the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_crash_points import POINTS

ROOT = Path(__file__).parents[2]
RARE = {f"{what}.{kind}" for what in ("spec", "result") for kind in ("write", "rename")}
"""Points that the scenario reaches only once."""


@pytest.mark.parametrize("part", range(3))
def test_a_process_killed_at_a_fault_point_leaves_what_it_had_promised(tmp_path: Path, part: int) -> None:
    """Each point at its first reach; the renames later too, and the writes torn."""
    faults = [f"{point}:1:kill" for point in sorted(POINTS)]
    faults += [f"{point}:4:kill" for point in sorted(POINTS - RARE) if point.endswith(".rename")]
    faults += [f"{point}:2:torn" for point in sorted(POINTS - RARE) if point.endswith(".write")]
    mine = faults[part::3]
    command = [sys.executable, "-m", "tests.integration.killed_writer", str(tmp_path), *mine]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = found.stdout.splitlines()
    assert found.returncode == 0, found.stdout + found.stderr
    assert lines == [f"{fault} killed" for fault in mine]


def test_a_process_that_reaches_no_fault_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integration.killed_writer", str(tmp_path), "cut.rename:9999:kill"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "cut.rename:9999:kill not reached\n"
