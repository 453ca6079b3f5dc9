from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise import disk
from layerwise.errors import ConfigError
from layerwise.fault_points import (
    FIRED_VARIABLE,
    VARIABLE,
    DiskFault,
    FaultAction,
    FaultPlan,
    fired_disk_faults,
    parse_faults,
    points,
)

WRITE = """
import sys
from pathlib import Path
from layerwise import disk
for number in range(3):
    disk.write_durably(Path(sys.argv[1]) / f"file-{number}", b"0123456789", "cut")
"""


@pytest.fixture(autouse=True)
def _no_faults_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "watcher", None)


def plan(text: str, fired: Path | None = None) -> None:
    points.watcher = FaultPlan(parse_faults(text), fired)


def run(folder: Path, faults: str, fired: Path | None = None) -> int:
    """Write three files in a process of its own; gives its exit status."""
    environment = {**os.environ, VARIABLE: faults, FIRED_VARIABLE: str(fired or "")}
    return subprocess.run([sys.executable, "-c", WRITE, str(folder)], env=environment, check=False).returncode


def test_a_plan_is_read_from_the_variable_and_written_the_same() -> None:
    text = "cut.rename:3:kill,event-log.reserve:2-40:enospc,manifest.*:1-:erofs"
    faults = parse_faults(text)
    assert ",".join(map(str, faults)) == text
    assert faults[1] == DiskFault(point="event-log.reserve", first=2, last=40, action=FaultAction.ENOSPC)
    assert parse_faults(" , ") == ()


@pytest.mark.parametrize(
    "text", ["cut.rename", "cut.rename:0:kill", "cut.rename:x:kill", "cut.rename:1:burn", ":1:kill", "a:3-2:kill"]
)
def test_a_plan_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="LAYERWISE_FAULTS: no plan of faults can be read from it"):
        parse_faults(text)


@pytest.mark.parametrize(
    ("action", "number"),
    [("enospc", errno.ENOSPC), ("erofs", errno.EROFS), ("eio", errno.EIO), ("eacces", errno.EACCES)],
)
def test_an_operation_fails_at_the_reaches_that_are_planned(tmp_path: Path, action: str, number: int) -> None:
    plan(f"cut.rename:2-3:{action}")
    for reach, fails in enumerate((False, True, True, False), start=1):
        path = tmp_path / f"file-{reach}"
        if fails:
            with pytest.raises(OSError) as raised:
                disk.write_durably(path, b"data", "cut")
            assert raised.value.errno == number
        else:
            disk.write_durably(path, b"data", "cut")
        assert path.exists() is not fails
    assert not list(tmp_path.glob(".*"))


def test_a_partial_write_leaves_half_of_it(tmp_path: Path) -> None:
    plan("event-log.write:1:partial")
    file = disk.create(tmp_path / "log", "event-log")
    with pytest.raises(OSError, match="No space left"):
        disk.write(file, b"0123456789", tmp_path / "log", "event-log")
    os.close(file)
    assert (tmp_path / "log").read_bytes() == b"01234"


@pytest.mark.parametrize(
    ("faults", "whole", "aside"),
    [
        ("cut.create:2:kill", 1, None),
        ("cut.write:2:kill", 1, 0),
        ("cut.write:2:torn", 1, 5),
        ("cut.sync:2:kill", 1, 10),
        ("cut.rename:2:kill", 1, 10),
        ("cut.sync-folder:2:kill", 2, None),
        ("cut.*:7:kill", 1, 0),
    ],
)
def test_a_process_kills_itself_where_it_is_told_to(tmp_path: Path, faults: str, whole: int, aside: int | None) -> None:
    assert run(tmp_path, faults) == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.glob("file-*")] == [b"0123456789"] * whole
    assert [path.stat().st_size for path in tmp_path.glob(".*")] == ([] if aside is None else [aside])


def test_a_fault_that_has_fired_is_noted_and_not_repeated_by_the_next_process(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    folder = tmp_path / "files"
    folder.mkdir()
    faults = "cut.rename:1:kill,cut.rename:2:kill,cut.rename:9:kill"
    assert run(folder, faults, fired) == -signal.SIGKILL
    assert [text for text, _ in fired_disk_faults(fired)] == ["cut.rename:1:kill"]
    assert run(folder, faults, fired) == -signal.SIGKILL
    assert [text for text, _ in fired_disk_faults(fired)] == ["cut.rename:1:kill", "cut.rename:2:kill"]
    assert run(folder, faults, fired) == 0
    assert len(list(folder.glob("file-*"))) == 3


def test_without_a_plan_nothing_is_watched() -> None:
    code = "from layerwise.fault_points import points; print(points.watcher)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLE)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert found.stdout == "None\n"


def test_a_file_is_given_room_without_getting_longer(tmp_path: Path) -> None:
    file = disk.create(tmp_path / "log", "event-log")
    if disk.reserve(file, 0, 1 << 20, tmp_path / "log", "event-log"):
        assert os.fstat(file).st_blocks * 512 >= 1 << 20
    disk.write(file, b"abc", tmp_path / "log", "event-log")
    os.close(file)
    assert (tmp_path / "log").read_bytes() == b"abc"


def test_a_room_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    plan("event-log.reserve:1:enospc")
    file = disk.create(tmp_path / "log", "event-log")
    with pytest.raises(OSError, match="No space left"):
        disk.reserve(file, 0, 4096, tmp_path / "log", "event-log")
    os.close(file)
