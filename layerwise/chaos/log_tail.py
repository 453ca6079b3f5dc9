"""How far a job has come, read from the event logs while they are written.

The coordinator's document says the same, but a second later, and not at all while the coordinator is away. A record is
in the log before its effect leaves the shard, so that what is seen here is never late by more than a poll.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from layerwise.event_log import find_logs

_UPDATE, _RESTORE, _HEADER = b'"event":"update"', b'"event":"restore"', b'"num_layers":'
_CHECKSUM_BYTES = 9
_SEGMENT = re.compile(r"segment-(\d+)\.")


@dataclass(slots=True)
class LayerProgress:
    """One layer: its newest life, its version there, and when it made each of its updates, in all lives."""

    life: int
    version: int
    updated_at: list[float] = field(default_factory=list)


class _LogFile:
    """One log folder, read segment by segment."""

    def __init__(self, folder: Path) -> None:
        self.life = int(folder.name.removeprefix("life-"))
        self._folder = folder
        self._segment = -1
        self._file: BinaryIO | None = None
        self._rest = b""

    def lines(self) -> list[bytes]:
        """The whole lines since the last call."""
        found: list[bytes] = []
        while True:
            if self._file is not None:
                parts = (self._rest + self._file.read()).split(b"\n")
                self._rest = parts.pop()
                found += parts
            following = self._following()
            if following is None:
                return found
            self.close()
            self._segment, path = following
            self._file, self._rest = path.open("rb"), b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _following(self) -> tuple[int, Path] | None:
        """The next segment; the oldest ones may have been removed, the newest one's name may be a preliminary one."""
        numbered = [(int(match[1]), path) for path in self._folder.iterdir() if (match := _SEGMENT.match(path.name))]
        return min((one for one in numbered if one[0] > self._segment), default=None)


class LogTail:
    """Follows all event logs in a job's ``directory``. One thread at a time; close it."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._files: dict[Path, _LogFile] = {}
        self._num_layers = 0
        self.layers: dict[int, LayerProgress] = {}
        self.num_updates = 0
        """Updates of all layers in all lives."""

    @property
    def lowest_version(self) -> int:
        """The version that every layer has reached in its newest life; 0 before all layers are there."""
        if not self.layers or len(self.layers) < self._num_layers:
            return 0
        return min(layer.version for layer in self.layers.values())

    @property
    def num_layers(self) -> int:
        """Layers of the job, 0 before the first log begins."""
        return self._num_layers

    def poll(self, now: float) -> None:
        """Take in what was written since the last call; it is taken to have happened at ``now``."""
        for folder in find_logs(self._directory):
            file = self._files.setdefault(folder, _LogFile(folder))
            for line in file.lines():
                self._take(line, file.life, now)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _take(self, line: bytes, life: int, now: float) -> None:
        update = _UPDATE in line
        if not update and _RESTORE not in line:
            if not self._num_layers and _HEADER in line:
                self._num_layers = int(json.loads(line[_CHECKSUM_BYTES:])["num_layers"])
            return
        record = json.loads(line[_CHECKSUM_BYTES:])
        layer = self.layers.setdefault(record["layer"], LayerProgress(life, record["version"]))
        if life < layer.life:
            return  # its owner was replaced, and has written for nobody since
        layer.life, layer.version = life, record["version"]
        if update:
            layer.updated_at.append(now)
            self.num_updates += 1
