"""Every change on disk that must survive a crash, one function each. Each is a fault point, see `layerwise.fault_points`.

``what`` says what the file is (``cut``, ``manifest``, ...); it is the first half of the point's name.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from layerwise.fault_points import Operation, points

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS}


def make_folder(folder: Path, what: str) -> None:
    """Create ``folder`` and what it lies in, each of them durably; one that exists stays."""
    if folder.is_dir():
        return
    make_folder(folder.parent, what)
    _before(what, "make-folder", folder)
    folder.mkdir(exist_ok=True)
    _after(what, "make-folder", folder)
    sync_folder(folder.parent, what)


def create(path: Path, what: str) -> int:
    """Begin a file that does not exist yet, for appending; gives its descriptor."""
    _before(what, "create", path)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
    _after(what, "create", path)
    return file


def create_empty(path: Path, what: str) -> None:
    """Create a file whose name is its message."""
    os.close(create(path, what))


def write(file: int, data: bytes | memoryview, path: Path, what: str) -> None:
    """Append all of ``data``; one system call unless the file system takes less."""
    if points.watcher is not None:
        operation = Operation(what=what, kind="write", path=str(path), data=data, file=file)
        points.watcher.before(operation)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    if points.watcher is not None:
        points.watcher.after(operation)


def sync_file(file: int, path: Path, what: str) -> None:
    """Wait until the disk has the file's content."""
    _before(what, "sync", path)
    os.fdatasync(file)
    _after(what, "sync", path)


def rename(path: Path, target: Path, what: str) -> None:
    """Put ``path`` in the place of ``target``, whatever is there."""
    _before(what, "rename", path, target)
    path.replace(target)
    _after(what, "rename", path, target)


def sync_folder(folder: Path, what: str) -> None:
    """Wait until the disk has what was created, renamed or deleted in ``folder``."""
    _before(what, "sync-folder", folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _after(what, "sync-folder", folder)


def delete(path: Path, what: str) -> None:
    """Delete a file; one that is not there is fine."""
    _before(what, "delete", path)
    path.unlink(missing_ok=True)
    _after(what, "delete", path)


def delete_folder(folder: Path, what: str) -> None:
    """Delete an empty folder; ``OSError`` when something is in it."""
    _before(what, "delete-folder", folder)
    folder.rmdir()
    _after(what, "delete-folder", folder)


def reserve(file: int, start: int, num_bytes: int, path: Path, what: str) -> bool:
    """Give the file room for ``num_bytes`` from ``start`` on without making it longer.

    What is written there later needs no more room on the disk. False where the file system can't do that.

    Raises:
        OSError: there is no such room.
    """
    _before(what, "reserve", path)
    if _fallocate is None:
        return False
    if _fallocate(file, _KEEP_SIZE, start, num_bytes) != 0:
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        raise OSError(number, os.strerror(number), str(path))
    _after(what, "reserve", path)
    return True


def write_durably(path: Path, data: bytes | memoryview, what: str) -> None:
    """Write ``path`` so that after any crash it is whole, or as it was: aside, synced, renamed, folder synced.

    Raises:
        OSError: the disk refused; ``path`` is as it was (or, if only the last sync failed, maybe whole).
    """
    make_folder(path.parent, what)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)  # of a process that had our number
        file = create(aside, what)
        try:
            write(file, data, aside, what)
            sync_file(file, aside, what)
        finally:
            os.close(file)
        rename(aside, path, what)
    except OSError:
        _unlink_if_possible(aside)
        raise
    sync_folder(path.parent, what)


def _unlink_if_possible(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the error that led here says more


def _before(what: str, kind: str, path: Path, target: Path | None = None) -> None:
    if points.watcher is not None:
        points.watcher.before(Operation(what=what, kind=kind, path=str(path), target=str(target or "")))


def _after(what: str, kind: str, path: Path, target: Path | None = None) -> None:
    if points.watcher is not None:
        points.watcher.after(Operation(what=what, kind=kind, path=str(path), target=str(target or "")))


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
    except AttributeError:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    found: Callable[[int, int, int, int], int] = function
    return found


_fallocate = _find_fallocate()
