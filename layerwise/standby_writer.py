"""The thread that makes a block's standby copies ready to travel while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from layerwise.cuts import file_digest, layer_file_name
from layerwise.layer import LayerCopy
from layerwise.layer_file import layer_bytes
from layerwise.messages import LayerFile
from layerwise.standby_bytes import LayerBytes
from layerwise.threads import VitalThread

log = logging.getLogger(__name__)

Written = Callable[[int, tuple[LayerFile, ...], dict[int, LayerBytes]], None]
"""``written(version, files, layers)``: all layers of the block at ``version``, as bytes with their hashes."""


class StandbyWriter:
    """Gathers the layers' copies version by version and turns the newest whole one into bytes. `put` may be called from any thread.

    ``before_write`` runs first: it puts the event log up to the copy on disk. Who restores the copy goes on with what is
    written there, and the log's own disk may have been lost with the machine.

    One version is written at a time and one waits: a newer one takes its place.
    """

    def __init__(self, job: str, num_layers: int, written: Written, *, before_write: Callable[[], None]) -> None:
        self._job = job
        self._num_layers = num_layers
        self._written = written
        self._before_write = before_write
        self._changed = threading.Condition()
        self._copies: dict[int, dict[int, LayerCopy]] = {}
        self._waiting: tuple[int, tuple[LayerCopy, ...]] | None = None
        self._closed = False
        self._complains = True
        self._thread = VitalThread(target=self._run, name=f"standby-writer-{job}", daemon=True)
        self._thread.start()

    def put(self, copy: LayerCopy) -> None:
        """One layer's copy; the last one completes its version."""
        with self._changed:
            layers = self._copies.setdefault(copy.state.version, {})
            layers[copy.layer] = copy
            if len(layers) < self._num_layers:
                return
            del self._copies[copy.state.version]
            self._waiting = copy.state.version, tuple(layers[index] for index in sorted(layers))
            self._changed.notify()

    def close(self, timeout_seconds: float = 60.0) -> None:
        """End the thread; what waits is of no use any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (work := self._take()) is not None:
            version, copies = work
            try:
                self._before_write()
            except OSError as error:
                if self._complains:
                    log.warning(
                        "no standby copies of job %s as long as its event log can't be saved: %s", self._job, error
                    )
                self._complains = False
                continue
            self._complains = True
            files: list[LayerFile] = []
            layers: dict[int, LayerBytes] = {}
            for copy in copies:
                data = layer_bytes(self._job, copy)
                name = layer_file_name(copy.layer, copy.life)
                files.append(
                    LayerFile(
                        layer=copy.layer, life=copy.life, name=name, num_bytes=len(data), digest=file_digest(data)
                    )
                )
                layers[copy.layer] = LayerBytes(bytearray(data))
            self._written(version, tuple(files), layers)

    def _take(self) -> tuple[int, tuple[LayerCopy, ...]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting is not None)
            work, self._waiting = self._waiting, None
            return None if self._closed else work
