"""What stands for the part of an event log that was removed: where each layer was when the kept part begins.

One file of one checked line beside the segments; its number is that of the first segment kept::

    <block's and life's folder>/summary-000012.log      segments 0 to 11 are gone
                                segment-000012.log

The summary of a ``whole`` life says where it ended; no segment follows. It is made by the audit's own replay of what is
removed, never from the counters that the audit checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise import disk
from layerwise.errors import CorruptError
from layerwise.log_header import LogHeader, checked_line, text_of_line

_NAME = re.compile(r"summary-(\d{6})\.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSummary:
    """The state after the removed records: those before number ``sequence``, in the segments before ``segment``.

    ``layers`` has each layer's state as `layerwise.layer_audit.LayerAudit` wrote it. ``examined`` counts what the
    audit looked at in the removed part; it found nothing wrong there, else that had not been removed.
    """

    header: LogHeader
    segment: int
    sequence: int
    whole: bool
    layers: Mapping[int, Mapping[str, Any]]
    examined: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.header.to_json(),
            "segment": self.segment,
            "sequence": self.sequence,
            "whole": self.whole,
            "layers": {str(layer): dict(state) for layer, state in self.layers.items()},
            "examined": dict(self.examined),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogSummary:
        """The inverse of `to_json`; ``ValueError``, ``KeyError`` or ``TypeError`` when it is none."""
        header = LogHeader.from_json(dict(value))
        layers = {int(layer): state for layer, state in value["layers"].items()}
        if sorted(layers) != list(range(header.start, header.stop)):
            raise ValueError(f"states of layers {sorted(layers)}")
        return cls(
            header=header,
            segment=int(value["segment"]),
            sequence=int(value["sequence"]),
            whole=bool(value["whole"]),
            layers=layers,
            examined={str(name): int(count) for name, count in value["examined"].items()},
        )


def save_summary(folder: Path, summary: LogSummary) -> None:
    """Put it beside the segments, durably; ``OSError`` when the disk refuses."""
    line = checked_line(json.dumps(summary.to_json(), separators=(",", ":")))
    disk.write_durably(folder / f"summary-{summary.segment:06d}.log", line, "log-summary")


def summaries_in(folder: Path) -> dict[int, Path]:
    """The summaries' files by the segment that they stand before."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return found


def load_summary(path: Path) -> LogSummary:
    """Read one.

    Raises:
        CorruptError: it does not fit its checksum, or can't be meant.
    """
    text = text_of_line(path.read_bytes())
    if text is None:
        raise CorruptError(f"event log {path}: its checksum does not fit")
    try:
        return LogSummary.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"event log {path}: not a summary that can be read: {error}") from error
