"""The run that a new one overwrites: put aside while the new one starts, deleted at its first update, else put back.

::

    runs/digits/.overwritten/job.json, cuts, events, ...     the earlier run, while
    runs/digits/job.json, coordinator, logs                  the new one starts here

A crash in between leaves both where they are. The next overwriting then takes the one aside for the earlier run, unless
the one beside it has come as far as a cut. What layerwise has not made stays where it is in any case.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from layerwise.cuts import newest_cut
from layerwise.errors import BusyError, ConfigError, LayerwiseError, NotAllowedError, sentence
from layerwise.run_directory import JOB_FILE, LOCK_FILE, RESULT_FILE, DirectoryLock, spec_in

ASIDE = ".overwritten"
LOGS = "logs"
RUN_NAMES = (JOB_FILE, RESULT_FILE, "coordinator", "cuts", "events", LOGS)
QUEUE_FILE = Path("coordinator", "jobs.sqlite3")


class EarlierRun:
    """What lies in the ``directory`` that a new run is to have.

    Raises:
        NotAllowedError: something lies there, and it is no run of ours.
        ConfigError: what is there is no directory, or it may not be read.
        BusyError: somebody works there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._aside = directory / ASIDE
        if not directory.exists():
            return
        if not directory.is_dir():
            raise ConfigError(f"{directory} is a file; checkpoint.path must name a directory")
        try:
            names = {one.name for one in directory.iterdir()}
            if names and not _is_run(directory, names):
                raise NotAllowedError(
                    f"{directory} was not made by layerwise, so --overwrite does not delete it; choose another path"
                )
            if names:
                DirectoryLock(directory).close()
        except OSError as error:
            raise ConfigError(f"checkpoint.path: {directory} can't be used: {error.strerror}") from error

    def set_aside(self) -> bool:
        """Make room for the new run; whether there is an earlier one, to be deleted or put back.

        Raises:
            BusyError: somebody works there; nothing was changed.
            ConfigError: the disk refused; nothing was changed.
        """
        if not self._is_there():
            return False
        lock = DirectoryLock(self._directory)
        try:
            if not self._is_there():
                return False
            if _holds_run(self._aside) and newest_cut(self._directory) is None:
                # A crash cut an overwriting short: the run here never began, the earlier one waits already.
                self._remove_run()
                return True
            self._remove(self._aside)
            if not _holds_run(self._directory):
                return False
            self._aside.mkdir()
            try:
                self._move(self._directory, self._aside)
            except BaseException:
                self._move(self._aside, self._directory)
                self._aside.rmdir()
                raise
        except OSError as error:
            raise ConfigError(
                f"checkpoint.path: the run in {self._directory} can't be overwritten: {error.strerror}; choose another path"
            ) from error
        finally:
            lock.close()
        return True

    def put_back(self) -> str:
        """Have the earlier run as it was; says where it is, in a sentence that is empty when there was none.

        The logs of the new one's processes, which say why it did not begin, go behind its own.
        """
        if not self._aside.is_dir():
            return ""
        try:
            lock = DirectoryLock(self._directory)
            try:
                self._put_back()
            finally:
                lock.close()
        except (BusyError, OSError) as error:
            return f"warning: the earlier run is in {self._aside} and can't be put back: {sentence(error)}"
        return f"the earlier run in {self._directory} stays as it was"

    def _put_back(self) -> None:
        for log in (self._directory / LOGS).glob("*.log"):
            (self._aside / LOGS).mkdir(exist_ok=True)
            with (self._aside / LOGS / log.name).open("ab") as before:
                before.write(log.read_bytes())
        self._remove_run()
        self._move(self._aside, self._directory)
        self._aside.rmdir()

    def delete(self) -> None:
        """The new run has begun. What can't be deleted stays."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def _is_there(self) -> bool:
        return self._aside.exists() or _holds_run(self._directory)

    def _remove_run(self) -> None:
        for name in RUN_NAMES:
            self._remove(self._directory / name)

    def _move(self, folder: Path, target: Path) -> None:
        for name in RUN_NAMES:
            if (folder / name).exists():
                (folder / name).rename(target / name)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_NAMES)


def _is_run(directory: Path, names: set[str]) -> bool:
    """Whether layerwise made it: its job can be read; or, where that is damaged, nothing else is there than a run's.

    A job's file alone may be a user's own, in a folder of their work: every run of `train` has a lock too, every other
    one a cut as soon as it is worth something.
    """
    if names <= {LOCK_FILE, ASIDE} or {LOCK_FILE, ASIDE} <= names:
        return True
    try:
        spec_in(directory)
    except LayerwiseError:
        return (directory / QUEUE_FILE).is_file() and names <= {*RUN_NAMES, LOCK_FILE, ASIDE}
    return LOCK_FILE in names or newest_cut(directory) is not None
