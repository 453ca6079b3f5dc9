"""What holds for every test: one thread of arithmetic a process, repeatable examples, nothing left running."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# Before anything imports torch, here or in a process that a test starts: on a small machine several processes with a
# thread a core each only take turns.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

# Inherited by every process that the tests start, so that one is found at the end even when its parent is gone.
MARK = "LAYERWISE_TEST_RUN"
os.environ[MARK] = uuid.uuid4().hex

# How long threads and processes that were told to stop may take after the last test. Not a sleep: waiting ends with the
# last of them.
GRACE_SECONDS = 5.0

settings.register_profile("layerwise", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("layerwise"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "layerwise")

leaks_key = pytest.StashKey[list[str]]()


def _left_processes() -> list[psutil.Process]:
    """Return the processes that descend from this one or carry its mark, without this one."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                found[process.pid] = process
        except psutil.Error:
            continue  # ended meanwhile, or somebody else's
    found.pop(os.getpid(), None)
    return [process for process in found.values() if not _belongs_to_python(process)]


def _belongs_to_python(process: psutil.Process) -> bool:
    """Tell whether it is multiprocessing's book-keeper, which lives as long as the interpreter that started it."""
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _left_threads() -> list[threading.Thread]:
    """Return what a test should have joined: threads that keep the interpreter alive, and layerwise's own."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    return [thread for thread in others if not thread.daemon or thread.name.startswith("layerwise")]


def _describe(process: psutil.Process) -> str:
    try:
        return f"process {process.pid} ({process.status()}): {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"process {process.pid}"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After the last fixture is down: fail the run for what is still alive, name it, and end the processes."""
    for thread in _left_threads():
        thread.join(GRACE_SECONDS)
    _, alive = psutil.wait_procs(_left_processes(), timeout=GRACE_SECONDS)
    leaks = [_describe(process) for process in alive]
    leaks += [f"thread {thread.name!r} (daemon: {thread.daemon})" for thread in _left_threads()]
    session.config.stash[leaks_key] = leaks
    if leaks and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what ``pytest_sessionfinish`` found."""
    leaks = config.stash.get(leaks_key, [])
    if leaks:
        terminalreporter.section("left running by the tests", red=True, bold=True)
        for leak in leaks:
            terminalreporter.line(leak)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder of mode 0700 with a short name: a unix socket's path may have some 100 characters, tmp_path more."""
    folder = Path(tempfile.mkdtemp(prefix="lw-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
