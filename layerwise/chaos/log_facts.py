"""What a finished run's event logs say about its lives: how far it fell back, and which samples were done again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.event_log import LogReader, find_logs
from layerwise.events import AccumulateEvent, RestoreEvent, UpdateEvent
from layerwise.ids import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """A block began life ``life`` at ``to_version``, after the one before had reached ``from_version``."""

    start: int
    stop: int
    life: int
    from_version: int
    to_version: int

    @property
    def updates(self) -> int:
        """How far it fell back."""
        return max(self.from_version - self.to_version, 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "updates": self.updates}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFacts:
    """``samples_redone``: (epoch, sample) pairs that some layer took in more than once, in different lives."""

    rewinds: tuple[Rewind, ...]
    samples_redone: int
    attempts_repeated: int

    @classmethod
    def nothing(cls) -> LogFacts:
        """Of a run without logs."""
        return cls(rewinds=(), samples_redone=0, attempts_repeated=0)

    @property
    def rewind_updates(self) -> int:
        """The longest way back."""
        return max((one.updates for one in self.rewinds), default=0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rewinds": [one.to_json() for one in self.rewinds],
            "rewind_updates": self.rewind_updates,
            "samples_redone": self.samples_redone,
            "attempts_repeated": self.attempts_repeated,
        }


@dataclass(slots=True)
class _Life:
    number: int
    restored: int
    reached: int


def read_log_facts(directory: str | Path) -> LogFacts:
    """Read every log in ``directory``.

    Raises:
        CorruptError: a log can't be read.
    """
    taken: dict[int, set[Microbatch]] = {}
    redone: set[Microbatch] = set()
    attempts: dict[Microbatch, int] = {}
    before: dict[tuple[int, int], _Life] = {}
    rewinds = []
    for reader in _readers(Path(directory)):
        header = reader.header
        block, life = (header.start, header.stop), _Life(header.life, 0, 0)
        for record in reader.records:
            match record.event:
                case RestoreEvent() as event:
                    life.restored = life.reached = event.version
                case UpdateEvent() as event:
                    life.reached = max(life.reached, event.version)
                case AccumulateEvent() as event:
                    microbatch = event.attempt.microbatch
                    attempts[microbatch] = max(attempts.get(microbatch, 1), event.attempt.attempt)
                    seen = taken.setdefault(event.layer, set())
                    if microbatch in seen:
                        redone.add(microbatch)
                    seen.add(microbatch)
        earlier = before.get(block)
        if earlier is not None:
            rewinds.append(
                Rewind(
                    start=header.start,
                    stop=header.stop,
                    life=header.life,
                    from_version=earlier.reached,
                    to_version=life.restored,
                )
            )
        before[block] = life
    return LogFacts(
        rewinds=tuple(rewinds),
        samples_redone=sum(one.num_samples for one in redone),
        attempts_repeated=sum(1 for attempt in attempts.values() if attempt > 1),
    )


def _readers(directory: Path) -> Iterator[LogReader]:
    for folder in find_logs(directory):
        # A life whose first line never reached the disk did nothing.
        if any(path.stat().st_size for path in folder.iterdir()):
            yield LogReader(folder)
