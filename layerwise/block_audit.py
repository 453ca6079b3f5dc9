"""Replays one block's log of one life, layer by layer: the part of an audit that needs no other log."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Protocol

from layerwise.audit_report import Findings
from layerwise.errors import CorruptError
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    Record,
    WalkEvent,
)
from layerwise.ids import Attempt
from layerwise.layer_audit import LayerAudit
from layerwise.log_header import LogHeader
from layerwise.log_summary import LogSummary
from layerwise.rate_book import RateBook


class BlockEvents(Protocol):
    """One block's log of one life: a `LogReader`, or a `StoredEvents`."""

    @property
    def header(self) -> LogHeader:
        """Who wrote it."""
        ...

    @property
    def records(self) -> Iterable[Record]:
        """Every record that is kept, in order."""
        ...

    @property
    def summary(self) -> LogSummary | None:
        """What stands for the records before."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEvents:
    """`BlockEvents` in memory."""

    header: LogHeader
    records: Iterable[Record]
    summary: LogSummary | None = None


class AttemptNumbers:
    """Which attempt each admission number belongs to, among the blocks of one life."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._attempts: dict[int, Attempt] = {}
        self._numbers: dict[Attempt, int] = {}

    def take(self, layer: int, attempt: Attempt, number: int) -> None:
        """``attempt`` came to ``layer`` as ``number``."""
        if attempt not in self._numbers:
            self._findings.count("numbers")
        other = self._attempts.setdefault(number, attempt)
        if other != attempt:
            self._findings.fail("numbers", f"layer {layer} met {attempt} as number {number}, which belongs to {other}")
        elif self._numbers.setdefault(attempt, number) != number:
            known = self._numbers[attempt]
            self._findings.fail(
                "numbers", f"layer {layer} met {attempt} as number {number}, elsewhere it is number {known}"
            )


def replay_block(
    block: BlockEvents,
    findings: Findings,
    rates: RateBook,
    numbers: AttemptNumbers,
    wanted: Container[int] | None = None,
) -> tuple[LayerAudit, ...]:
    """Feed each of the block's layers its records, after what the summary says of those that were removed.

    For ``wanted`` see `LayerAudit`.
    """
    header = block.header
    layers = {
        layer: LayerAudit(layer, header, findings, rates, wanted=wanted) for layer in range(header.start, header.stop)
    }
    expected = 0
    try:
        if block.summary is not None:
            _go_on(layers, block.summary, findings)
            expected = block.summary.sequence
        for sequence, event in block.records:
            findings.count("log")
            if sequence != expected:
                findings.fail("log", f"{log_name(header)}: record {sequence} follows record {expected - 1}")
            expected = sequence + 1
            layer = layers.get(event.layer)
            if layer is None:
                findings.fail(
                    "log", f"{log_name(header)}: record {sequence} is of layer {event.layer}, which is in another block"
                )
                continue
            if isinstance(event, WalkEvent):
                _check_walk(event, header, layers, findings)
            else:
                layer.take(event)
            number = _number(event)
            if number is not None:
                numbers.take(*number)
    except CorruptError as error:
        findings.fail("log", str(error))
    return tuple(layers.values())


def _go_on(layers: dict[int, LayerAudit], summary: LogSummary, findings: Findings) -> None:
    """Take over what was found when the records before were removed."""
    try:
        for number, layer in layers.items():
            layer.go_on(summary.layers[number])
        for name, count in summary.examined.items():
            findings.count(name, count)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{log_name(summary.header)}: its summary can't be read: {error}") from error


def _check_walk(event: WalkEvent, header: LogHeader, layers: dict[int, LayerAudit], findings: Findings) -> None:
    """A walk reads every layer of its block, at versions that they have had."""
    if event.layer != header.start or len(event.reads) != header.stop - header.start:
        findings.fail(
            "log",
            f"{log_name(header)}: a walk of {event.attempt} from layer {event.layer} reads {len(event.reads)} layers",
        )
        return
    for index, versions in enumerate(event.reads, start=header.start):
        layers[index].read(event.attempt, versions[0], at_most=True)


def _number(event: Event) -> tuple[int, Attempt, int] | None:
    if isinstance(event, ForwardEvent | AccumulateEvent | AbortEvent | PassEvent | BackwardEvent | WalkEvent):
        return event.layer, event.attempt, event.number
    if isinstance(event, DropEvent) and event.number is not None:
        return event.layer, event.attempt, event.number
    return None


def log_name(header: LogHeader) -> str:
    """Which log that is, in messages."""
    return f"log of block {header.start}-{header.stop}, life {header.life}"
