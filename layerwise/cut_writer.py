"""The thread that puts cuts on disk while training goes on."""

from __future__ import annotations

import logging
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path

from layerwise.cuts import delete_layer_files, is_durable
from layerwise.layer import LayerCopy
from layerwise.layer_file import save_layer
from layerwise.messages import LayerFile
from layerwise.threads import VitalThread

log = logging.getLogger(__name__)

Done = Callable[[tuple[LayerFile, ...], str], None]
MAX_WAITING = 8
"""Cuts that may wait for the disk; admission does not let more come to be."""
MAX_UNFINISHED = 4
"""Cuts of which this block's files may wait for those of others: as many as admission lets be pending, and the last."""


class CutWriter:
    """Saves the cuts of one block, oldest first, in a thread of its own. `save` may be called from any thread.

    ``before_save`` runs there before each cut: it puts on disk what must not be missing beside the cut after a power
    cut, which is the event log up to it.

    A cut that can't be saved leaves nothing, and the files of cuts that other blocks could not save are deleted after a
    while: a full disk must not get fuller with every cut that fails.
    """

    def __init__(self, directory: str | Path, job: str, *, before_save: Callable[[], None] = lambda: None) -> None:
        self._directory = Path(directory)
        self._job = job
        self._before_save = before_save
        self._saved: deque[tuple[int, tuple[LayerFile, ...]]] = deque()
        self._queue: queue.Queue[tuple[int, tuple[LayerCopy, ...], Done] | None] = queue.Queue(MAX_WAITING)
        self._thread = VitalThread(target=self._run, name=f"cut-writer-{job}", daemon=True)
        self._thread.start()

    def save(self, version: int, copies: tuple[LayerCopy, ...], done: Done) -> None:
        """Begin to save; ``done(files, error)`` is called on the writer's thread."""
        try:
            self._queue.put_nowait((version, copies, done))
        except queue.Full:
            done((), f"cut {version} was not saved: {MAX_WAITING} cuts wait for a slow disk already")

    @property
    def num_waiting(self) -> int:
        """Cuts that wait for the disk."""
        return self._queue.qsize()

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Save what waits, then end the thread."""
        try:
            self._queue.put(None, timeout=timeout_seconds)
        except queue.Full:
            log.warning("cut writer of job %s did not end: the disk is too slow", self._job)
            return
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            version, copies, done = work
            files: list[LayerFile] = []
            try:
                self._before_save()
                for copy in copies:
                    files.append(save_layer(self._directory, self._job, copy))
            except Exception as error:  # whatever it is: a cut of which nobody hears is waited for
                delete_layer_files(self._directory, version, files)
                what = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
                done((), f"cut {version} could not be saved in {self._directory}: {what}")
            else:
                self._saved.append((version, tuple(files)))
                done(tuple(files), "")
            self._forget_unfinished()

    def _forget_unfinished(self) -> None:
        while len(self._saved) > MAX_UNFINISHED:
            version, files = self._saved.popleft()
            try:
                finished = is_durable(self._directory, version)
            except OSError as error:
                log.warning("files of cut %d in %s are not cleaned up: %s", version, self._directory, error)
                continue
            if not finished:
                delete_layer_files(self._directory, version, files)
