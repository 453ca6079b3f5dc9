"""A job's directory on disk, as the command line sees it: which one a new run gets, which job lies in one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from layerwise import disk
from layerwise.errors import BusyError, ConfigError, CorruptError, NotFoundError
from layerwise.job import JobSpec, parse_job
from layerwise.json_text import json_text
from layerwise.overrides import read_job

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
LOCK_FILE = "lock"
NAMES_BEFORE_TRAINING = {JOB_FILE, RESULT_FILE, LOCK_FILE, "coordinator", "logs"}


def directory_for(wanted: str | Path, *, overwrite: bool = False) -> Path:
    """The absolute directory that a new run gets: ``wanted``, or with a number behind it when a run lies there already.

    So that training twice neither fails nor mixes two runs nor destroys one. With ``overwrite`` it is ``wanted``: what
    lies there is the `layerwise.earlier_run.EarlierRun`, which goes with the new one's first update. A run that failed
    before it trained anything is deleted: its job is mended now.

    Raises:
        ConfigError: something that is no directory is in the way, or it may not be read.
    """
    first = Path(wanted).expanduser().absolute()
    if overwrite:
        return first
    return next(one for one in _candidates(first) if not _taken(one) or _cleared(one))


def _candidates(first: Path) -> Iterator[Path]:
    yield first
    for number in count(2):
        yield first.with_name(f"{first.name}-{number}")


def _taken(path: Path) -> bool:
    try:
        if not path.exists():
            return False
        if not path.is_dir():
            raise ConfigError(f"{path} is a file; checkpoint.path must name a directory")
        return any(path.iterdir())
    except OSError as error:
        raise ConfigError(f"checkpoint.path: {path} can't be looked into: {error.strerror}") from error


def _cleared(path: Path) -> bool:
    """Delete the logs and the queue of a run that failed before it trained anything; False where there is more."""
    if not _never_began(path):
        return False
    try:
        lock = DirectoryLock(path)
    except BusyError:
        return False
    try:
        # Whoever had the lock before may have begun a run here.
        if not _never_began(path):
            return False
        shutil.rmtree(path)
    finally:
        lock.close()
    return True


def _never_began(path: Path) -> bool:
    if not path.is_dir() or not {one.name for one in path.iterdir()} <= NAMES_BEFORE_TRAINING:
        return False
    try:
        document = load_result(path)
    except CorruptError:
        return False
    return document is not None and document.get("state") == "failed"


def save_spec(directory: Path, spec: JobSpec) -> None:
    """Keep the job beside its run, for `resume`.

    Raises:
        ConfigError: the directory can't be made, or not written into.
    """
    text = json.dumps(json.loads(spec.to_json()), indent=2) + "\n"
    try:
        disk.write_durably(directory / JOB_FILE, text.encode(), "spec")
    except OSError as error:
        raise ConfigError(f"checkpoint.path: {directory} can't be written into: {error.strerror}") from error


def spec_in(directory: Path) -> JobSpec:
    """The job whose run lies in ``directory``.

    Raises:
        NotFoundError: no run lies there.
    """
    if (directory / JOB_FILE).is_file():
        return read_job(directory / JOB_FILE)
    from layerwise.cuts import load_manifest, newest_cut

    version = newest_cut(directory) if directory.is_dir() else None
    if version is None:
        raise NotFoundError(
            f"no run in {directory}: expected the directory of a job, with its {JOB_FILE} or a saved cut"
        )
    manifest = load_manifest(directory, version)
    return parse_job(manifest["spec"], source=f"cut {version} in {directory}")


def save_result(directory: Path, document: dict[str, Any] | None) -> None:
    """Keep the document of a job that has ended; None: it has not, whatever an earlier one said."""
    path = directory / RESULT_FILE
    if document is None:
        disk.delete(path, "result")
    else:
        disk.write_durably(path, (json_text(document, indent=2) + "\n").encode(), "result")


def load_result(directory: Path) -> dict[str, Any] | None:
    """What `save_result` kept."""
    path = directory / RESULT_FILE
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is no JSON document: {error}") from error
    return document


class DirectoryLock:
    """Keeps a second process from using ``directory``; the kernel lets go of it however the holder ends.

    Raises:
        BusyError: somebody uses it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._file, 20).decode("ascii", errors="replace").strip()
            os.close(self._file)
            raise BusyError(
                f"{directory} is in use by process {owner or '?'}; wait for it or end it, or choose another directory"
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        """Let go."""
        os.close(self._file)
