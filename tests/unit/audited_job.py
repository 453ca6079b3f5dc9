"""A small job that tells the truth: real layer ledgers, driven in random order through a crash, retries and a drop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from layerwise.audit import SampleLedgerSummary, StoredEvents
from layerwise.audit_report import AuditReport
from layerwise.dropped import DroppedMicrobatch
from layerwise.event_log import LogHeader
from layerwise.events import Event, MemoryEventLog, Record, WeightMode
from layerwise.ids import Attempt
from layerwise.layer_ledger import Intake, LayerLedger, LedgerState
from layerwise.plan import TrainingPlan

PLAN = TrainingPlan(num_samples=22, batch=8, accumulation=4, num_updates=8)
WINDOW = 3
NUM_LAYERS = 4
BLOCKS = ((0, 2), (2, 4))
CUT = 3
BASE_RATES = (0.1, 0.1, 0.3, 0.1)


def rate(layer: int, samples_before: int, staleness: int) -> float:
    return BASE_RATES[layer] / (1 + samples_before) / (1 + staleness)


@dataclass
class World:
    """Two blocks of layer ledgers, driven by one thread in a random order, as a job would drive them."""

    seed: int
    window: int = WINDOW
    blocks: list[StoredEvents] = field(default_factory=list)
    cuts: dict[int, LedgerState] = field(default_factory=dict)
    retries: dict[int, int] = field(default_factory=dict)
    dropped: list[DroppedMicrobatch] = field(default_factory=list)
    rate_factor: float = 1.0
    saves: frozenset[int] = frozenset({CUT})
    """At which versions the first life is cut."""
    saved: dict[int, dict[int, LedgerState]] = field(default_factory=dict)
    """All of its cuts; ``cuts`` is the one that the next life begins at, by default that at `CUT`."""

    def live(
        self,
        life: int,
        *,
        updates: int,
        drop: frozenset[int] = frozenset(),
        abort: frozenset[int] = frozenset(),
        rate_factor: float = 1.0,
    ) -> None:
        """One life of all layers: from the cuts (or nothing) until one has made ``updates`` updates, or all is done."""
        self.rate_factor = rate_factor
        chance = random.Random(f"{self.seed} {life}")
        logs = {start: MemoryEventLog() for start, _ in BLOCKS}
        ledgers = {
            layer: LayerLedger(
                layer, life, PLAN, logs[start], position_order=self.window == 1, restored=self.cuts.get(layer)
            )
            for start, stop in BLOCKS
            for layer in range(start, stop)
        }
        self.ledgers = ledgers
        waiting = [index for index in range(PLAN.num_microbatches) if any(one.lacks(index) for one in ledgers.values())]
        flying: dict[int, tuple[Attempt, int, list[Callable[[], None]]]] = {}
        number = 0
        while (waiting or flying) and max(one.version for one in ledgers.values()) < updates:
            oldest = min((one for _, one, _ in flying.values()), default=number)
            if waiting and number - oldest < self.window and chance.random() < 0.5:
                index = waiting.pop(0)
                self.retries[index] = self.retries.get(index, 0) + 1
                attempt = Attempt(PLAN.microbatch(index), self.retries[index])
                flying[index] = (attempt, number, self._journey(ledgers, index, attempt, number, index in drop))
                number += 1
            elif flying:
                index = chance.choice(sorted(flying))
                attempt, _, steps = flying[index]
                if index in abort and len(steps) <= NUM_LAYERS + 3:
                    for ledger in ledgers.values():
                        ledger.abort(attempt)
                    abort -= {index}
                    waiting.insert(0, index)
                    del flying[index]
                    continue
                steps.pop(0)()
                if not steps:
                    del flying[index]
        for start, stop in BLOCKS:
            self.blocks.append(StoredEvents(header=self._header(start, stop, life), records=logs[start].records))

    def _journey(
        self, ledgers: dict[int, LayerLedger], index: int, attempt: Attempt, number: int, drop: bool
    ) -> list[Callable[[], None]]:
        """What one microbatch does to each layer, step by step: up, then down; a dropped one gives up half-way down."""
        lacking = [layer for layer in range(NUM_LAYERS) if ledgers[layer].lacks(index)]
        steps: list[Callable[[], None]] = [
            partial(_open if layer in lacking else _hand_on, ledgers[layer], attempt, number)
            for layer in range(NUM_LAYERS)
        ]
        lower = [layer for layer in lacking if drop and layer < 2]
        for layer in reversed(range(NUM_LAYERS)):
            if layer % 2 == 0:
                steps.append(partial(_begin_walk, ledgers, layer, attempt, number))
            if layer not in lacking:
                steps.append(partial(_hand_down, ledgers[layer], attempt, number))
            elif layer in lower:
                steps.append(partial(self._drop, ledgers[layer], attempt))
            else:
                steps.append(partial(self._take, ledgers[layer], attempt))
        if lower:
            self.dropped.append(
                DroppedMicrobatch(microbatch=attempt.microbatch, reason="loss is not finite", missing_from=lower[0])
            )
        return steps

    def _drop(self, ledger: LayerLedger, attempt: Attempt) -> None:
        self._done(ledger, ledger.drop(attempt, "loss is not finite"))

    def _take(self, ledger: LayerLedger, attempt: Attempt) -> None:
        self._done(ledger, ledger.take(attempt, read=ledger.version, mode=WeightMode.LATEST))

    def _done(self, ledger: LayerLedger, intake: Intake) -> None:
        decision = intake.closes
        if decision is None:
            return
        used = None if decision.empty else rate(ledger.layer, decision.samples_before, decision.staleness)
        used = None if used is None else self.rate_factor * used
        version = ledger.updated(used, f"{ledger.layer}-{ledger.life}-{decision.update + 1}")
        if version in self.saves and ledger.life == 0:
            cut = self.saved.setdefault(version, {})[ledger.layer] = ledger.cut()
            if version == CUT:
                self.cuts[ledger.layer] = cut

    def _header(self, start: int, stop: int, life: int) -> LogHeader:
        return LogHeader(
            job="honest",
            num_layers=NUM_LAYERS,
            start=start,
            stop=stop,
            life=life,
            hash_algorithm="none",
            plan=PLAN,
            window=self.window,
            max_staleness=PLAN.max_staleness(self.window),
            position_order=self.window == 1,
            backward_weights="latest",
            layer_names=tuple(f"layer-{layer}" for layer in range(start, stop)),
            rate_factor=self.rate_factor,
        )

    @property
    def ledger(self) -> SampleLedgerSummary:
        dropped = sum(one.microbatch.num_samples for one in self.dropped)
        return SampleLedgerSummary(
            job="honest",
            version=PLAN.num_updates,
            samples_leased=PLAN.total_samples,
            samples_applied=PLAN.total_samples - dropped,
            samples_dropped=dropped,
            dropped=tuple(self.dropped),
        )


def _open(ledger: LayerLedger, attempt: Attempt, number: int) -> None:
    ledger.open(attempt, number)


def _hand_on(ledger: LayerLedger, attempt: Attempt, number: int) -> None:
    ledger.hand_on(attempt, number)


def _hand_down(ledger: LayerLedger, attempt: Attempt, number: int) -> None:
    ledger.hand_down(attempt, number, read=ledger.version, mode=WeightMode.LATEST)


def _begin_walk(ledgers: dict[int, LayerLedger], start: int, attempt: Attempt, number: int) -> None:
    reads = tuple((ledgers[layer].version,) for layer in (start, start + 1))
    ledgers[start].begin_walk(attempt, number, detached=False, reads=reads)


def honest(seed: int = 4, window: int = WINDOW) -> World:
    """A job whose first life dies after some layer's fifth update, and whose second begins at the cut of version 3."""
    world = World(seed, window)
    world.live(0, updates=CUT + 2, abort=frozenset({2, 9}))
    assert len(world.cuts) == NUM_LAYERS
    world.live(1, updates=PLAN.num_updates + 1, drop=frozenset({20}), abort=frozenset({17}))
    return world


Kind = TypeVar("Kind", bound=Event)


def find(
    blocks: list[StoredEvents], kind: type[Kind], block: int, where: Callable[[Kind], bool] = lambda _: True
) -> Kind:
    """The first event of ``kind`` in log ``block`` that fits."""
    return next(event for _, event in blocks[block].records if isinstance(event, kind) and where(event))


def edit(blocks: list[StoredEvents], old: Event, *new: Event) -> list[StoredEvents]:
    """The same logs with ``old`` replaced, and the records numbered anew."""
    result = []
    for block in blocks:
        events: list[Event] = []
        for _, event in block.records:
            events.extend(new if event is old else (event,))
        result.append(replace(block, records=number(events)))
    return result


def number(events: Iterable[Event]) -> list[Record]:
    return [Record(place, event) for place, event in enumerate(events)]


def failed(report: AuditReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]
