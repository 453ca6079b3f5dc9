"""One block in one life: its records are executed one after the other, by the code that made them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn

from layerwise.errors import LayerwiseError
from layerwise.events import CutEvent, Event, Record, UpdateEvent
from layerwise.head import Head
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.log_reader import LogReader
from layerwise.replay.divergence import DivergedError, Divergence
from layerwise.replay.exchange import Exchange
from layerwise.replay.execution import Blocked, Execution
from layerwise.replay.life_index import LifeIndex, Owners
from layerwise.replay.recorded_block import EmittedEvents, RecordedBlock


class BlockReplay:
    """Executes one log. `step` is called from one thread.

    Every event that the layers emit on the way must be the next one recorded of that layer, in every field: versions,
    learning rates, hashes.
    """

    def __init__(
        self,
        index: LifeIndex,
        block: RecordedBlock,
        emitted: EmittedEvents,
        exchange: Exchange,
        *,
        owners: Owners,
        head: Head | None,
        on_cut: Callable[[CutEvent, LayerCopy], None],
        after_cut: int | None = None,
    ) -> None:
        """``after_cut``: begin each layer behind its cut of that version. For the others see `Execution`."""
        self.index = index
        self.block = block
        self.execution = Execution(index, block, exchange, owners=owners, head=head, on_cut=on_cut)
        self.num_updates = 0
        self.num_records = 0
        self.num_left = index.num_records
        self._emitted = emitted
        self._ahead: dict[int, deque[Event]] = {layer.index: deque() for layer in block.layers}
        self._records: Iterator[Record] = iter(LogReader(index.folder).records)
        self._next_record: Record | None = next(self._records, None)
        self._skipping = set(self._ahead) if after_cut is not None else set()
        self._after_cut = after_cut
        if after_cut is not None:
            self._emitted.take()  # the restore that the replay has made itself
        else:
            self._sort()

    @property
    def layers(self) -> tuple[TrainedLayer, ...]:
        """The block's layers."""
        return self.block.layers

    @property
    def next_record(self) -> Record | None:
        """The record that `step` will execute; ``None`` at the end."""
        return self._next_record

    def step(self, *, crowded: bool = False) -> Event | Blocked | None:
        """Execute the next record: gives its event; or why that must wait; or ``None`` at the end of the log.

        ``crowded``: run ahead of the block above although it has much to do.

        Raises:
            DivergedError: what was recorded does not come about.
        """
        record = self._next_record
        if record is None:
            return None
        event = record.event
        skipped = self._skip(event)
        if not skipped:
            ahead = self._ahead.get(event.layer)
            if ahead is None:
                self._diverge(record, "a record of a layer of another block", "", "")
            if not ahead:
                try:
                    blocked = self.execution.execute(event, crowded=crowded)
                except DivergedError:
                    raise
                except (LayerwiseError, ValueError, AssertionError) as error:
                    self._diverge(record, f"event {event.event!r} is refused", _said(event), str(error))
                if blocked is not None:
                    return blocked
                self._sort()
            self._compare(record)
            self.num_records += 1
            self.num_updates += isinstance(event, UpdateEvent)
        self.num_left -= 1
        self._next_record = next(self._records, None)
        return event

    def close(self) -> None:
        """This life is over: nothing is kept."""
        self.execution.close()
        self._emitted.take()
        self._next_record = None

    # --- records ------------------------------------------------------------------------------------------------------

    def _skip(self, event: Event) -> bool:
        if event.layer not in self._skipping:
            return False
        if isinstance(event, CutEvent) and event.version == self._after_cut:
            self._skipping.discard(event.layer)
        return True

    def _sort(self) -> None:
        for event in self._emitted.take():
            self._ahead[event.layer].append(event)

    def _compare(self, record: Record) -> None:
        event, ahead = record.event, self._ahead[record.event.layer]
        if not ahead:
            self._diverge(record, f"event {event.event!r} does not come about", _said(event), "nothing")
        found = ahead.popleft()
        if found == event:
            return
        if type(found) is not type(event):
            self._diverge(record, "another event comes about", _said(event), _said(found))
        names = [name for name in event.__slots__ if getattr(event, name) != getattr(found, name)]
        if "digest" in names and "version" not in names:
            self._diverge(
                record, "another hash of the layer's state", getattr(event, "digest", ""), getattr(found, "digest", "")
            )
        self._diverge(
            record,
            f"another {' and '.join(names)} of event {event.event!r}",
            ", ".join(f"{name} {getattr(event, name)}" for name in names),
            ", ".join(f"{name} {getattr(found, name)}" for name in names),
        )

    def _diverge(self, record: Record, what: str, recorded: str, replayed: str) -> NoReturn:
        event = record.event
        attempt = getattr(event, "attempt", None)
        version = event.version if isinstance(event, UpdateEvent) else self._version(event.layer) + 1
        raise DivergedError(
            Divergence(
                layer=event.layer,
                life=self.index.header.life,
                version=version,
                record=record.sequence,
                attempt="" if attempt is None else str(attempt),
                what=what,
                recorded=recorded,
                replayed=replayed,
                advice="",
            )
        )

    def _version(self, layer: int) -> int:
        return next((one.ledger.version for one in self.block.layers if one.index == layer), -1)


def _said(event: Event) -> str:
    return event.to_json(0).partition(",")[2].rstrip("}")
