"""The layer's ledger: against a model that keeps everything in plain lists, and the cases worth a name."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from layerwise.errors import CorruptError, RejectedError
from layerwise.events import CutEvent, ForwardEvent, MemoryEventLog, RestoreEvent, UpdateEvent, WeightMode
from layerwise.ids import Attempt
from layerwise.layer_ledger import Intake, LayerLedger, LedgerState, UpdateDecision
from layerwise.plan import TrainingPlan

PLAN = TrainingPlan(num_samples=22, batch=8, accumulation=4, num_updates=9)  # 11 microbatches an epoch: 4 + 4 + 3


def make(
    *, plan: TrainingPlan = PLAN, position_order: bool = False, restored: LedgerState | None = None
) -> tuple[LayerLedger, MemoryEventLog]:
    events = MemoryEventLog()
    return LayerLedger(2, 5, plan, events, position_order=position_order, restored=restored), events


def attempt(index: int, number: int = 1) -> Attempt:
    return Attempt(PLAN.microbatch(index), number)


def take(ledger: LayerLedger, index: int) -> Intake:
    ledger.open(attempt(index), index)
    return ledger.take(attempt(index), read=ledger.version, mode=WeightMode.LATEST)


@dataclass
class Model:
    """What a layer must have done, as one list of what came in and one of what is open."""

    order: list[tuple[int, int | None]] = field(default_factory=list)  # (index, its staleness, None for a tombstone)
    open: dict[int, tuple[Attempt, int, int]] = field(default_factory=dict)  # index -> attempt, number, base
    written: set[int] = field(default_factory=set)

    @property
    def taken(self) -> set[int]:
        return {index for index, _ in self.order}

    def version(self, plan: TrainingPlan) -> int:
        return next(
            update for update in range(plan.num_updates + 1) if plan.gradients_before(update + 1) > len(self.order)
        )


class LedgerMachine(RuleBasedStateMachine):
    """Random forwards, gradients, drops, aborts, cuts and restores, repeated ones and refused ones among them."""

    @initialize(order=st.booleans())
    def begin(self, order: bool) -> None:
        self.position_order = order
        self.ledger, self.events = make(position_order=order)
        self.model = Model()
        self.summed: list[int] = []
        self.number = 0
        self.cut: tuple[LedgerState, Model] | None = None

    def close(self, intake: Intake) -> None:
        """Do what the intake asks for, and compare it with the model."""
        model = self.model
        self.summed.extend(intake.ready)
        update = PLAN.update_of(len(model.order) - 1)
        members = model.order[PLAN.gradients_before(update) :]
        if len(model.order) < PLAN.gradients_before(update + 1):
            assert intake.closes is None
            if not self.position_order:
                assert self.summed == [index for index, staleness in members if staleness is not None]
            return
        ages = [staleness for _, staleness in members if staleness is not None]
        order = [index for index, staleness in members if staleness is not None]
        sizes = {index: PLAN.microbatch(index).num_samples for index, _ in model.order}
        assert intake.closes == UpdateDecision(
            update=update,
            staleness=max(ages, default=0),
            samples=sum(sizes[index] for index in order),
            samples_before=sum(sizes[index] for index, _ in model.order[: PLAN.gradients_before(update)]),
            num_gradients=len(order),
        )
        assert intake.closes.empty == (not order)
        if not self.position_order:
            assert self.summed == order
        else:
            assert sorted(self.summed) == sorted(order)
        self.summed.clear()
        rate = None if intake.closes.empty else 0.5
        assert self.ledger.updated(rate, f"digest {update + 1}") == update + 1
        event = self.events.records[-1].event
        assert isinstance(event, UpdateEvent)
        assert event.open_tickets == len(model.open)

    @rule(index=st.integers(0, PLAN.num_microbatches - 1), retry=st.integers(1, 2))
    def forward(self, index: int, retry: int) -> None:
        one = attempt(index, retry)
        if index in self.model.taken or index in self.model.open:
            with pytest.raises(RejectedError):
                self.ledger.open(one, self.number)
            return
        expected = index not in self.model.written
        assert self.ledger.writes_buffers(index) is expected
        assert self.ledger.open(one, self.number) is expected
        self.model.open[index] = (one, self.number, self.ledger.version)
        self.model.written.add(index)
        self.number += 1

    @rule(index=st.integers(0, PLAN.num_microbatches - 1), retry=st.integers(1, 2))
    def gradient_of_anything(self, index: int, retry: int) -> None:
        one = attempt(index, retry)
        if index in self.model.taken:
            assert self.ledger.take(one, read=0, mode=WeightMode.RECOMPUTE) == Intake(taken=False)
        elif index not in self.model.open or self.model.open[index][0] != one:
            with pytest.raises(RejectedError, match="not open"):
                self.ledger.take(one, read=self.ledger.version, mode=WeightMode.LATEST)
        else:
            self._gradient(index)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data())
    def gradient(self, data: st.DataObject) -> None:
        self._gradient(data.draw(st.sampled_from(sorted(self.model.open))))

    def _gradient(self, index: int) -> None:
        one, _, base = self.model.open.pop(index)
        version = self.ledger.version
        intake = self.ledger.take(one, read=version, mode=WeightMode.LATEST)
        assert intake.taken
        self.model.order.append((index, version - base))
        self.close(intake)

    @rule(index=st.integers(0, PLAN.num_microbatches - 1), retry=st.integers(1, 2))
    def drop(self, index: int, retry: int) -> None:
        one = attempt(index, retry)
        if index in self.model.taken:
            assert self.ledger.drop(one, "again") == Intake(taken=False)
        elif index in self.model.open and self.model.open[index][0] != one:
            with pytest.raises(RejectedError, match="still open"):
                self.ledger.drop(one, "another attempt is open")
        else:
            self.model.open.pop(index, None)
            intake = self.ledger.drop(one, "a reason")
            self.model.order.append((index, None))
            self.close(intake)

    @rule(index=st.integers(0, PLAN.num_microbatches - 1), retry=st.integers(1, 2))
    def abort(self, index: int, retry: int) -> None:
        is_open = index in self.model.open and self.model.open[index][0] == attempt(index, retry)
        assert self.ledger.abort(attempt(index, retry)) is is_open
        if is_open:
            del self.model.open[index]

    @rule(chance=st.randoms(use_true_random=False))
    def a_while_of_training(self, chance: random.Random) -> None:
        for _ in range(30):
            fresh = [
                index for index in range(PLAN.num_microbatches) if index not in self.model.taken | set(self.model.open)
            ]
            if self.model.open and (not fresh or len(self.model.open) > 4 or chance.random() < 0.4):
                self._gradient(chance.choice(sorted(self.model.open)))
            elif fresh:
                self.forward(chance.choice(fresh[:6]), 1)

    @precondition(lambda self: self.ledger.accumulated == 0)
    @rule()
    def save(self) -> None:
        state = self.ledger.cut()
        assert LedgerState.from_json(json.loads(json.dumps(state.to_json()))) == state
        self.cut = (state, Model(order=list(self.model.order), written=set(self.model.written)))

    @precondition(lambda self: self.cut is not None)
    @rule()
    def restore(self) -> None:
        assert self.cut is not None
        state, model = self.cut
        self.ledger, self.events = make(position_order=self.position_order, restored=state)
        self.model = Model(order=list(model.order), written=set(model.written))
        self.summed.clear()
        assert self.ledger.revision == state.revision + 1

    @invariant()
    def agrees_with_the_model(self) -> None:
        model, ledger = self.model, self.ledger
        assert ledger.version == model.version(PLAN)
        assert {index for index in range(PLAN.num_microbatches) if not ledger.lacks(index)} == model.taken
        assert ledger.accumulated == len(model.order) - PLAN.gradients_before(ledger.version)
        assert [one.attempt for one in ledger.staleness.tickets] == [one for one, _, _ in model.open.values()]
        ledger.staleness.check()
        assert [record.sequence for record in self.events.records] == list(range(len(self.events.records)))


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_layer_ledger_agrees_with_a_simple_model = LedgerMachine.TestCase


def test_duplicate_gradient_changes_nothing() -> None:
    ledger, events = make()
    take(ledger, 0)
    before = (len(events.records), ledger.accumulated, ledger.staleness.staleness)
    assert ledger.take(attempt(0), read=0, mode=WeightMode.LATEST) == Intake(taken=False)
    assert (len(events.records), ledger.accumulated, ledger.staleness.staleness) == before


def test_update_closes_after_the_planned_count_whatever_came() -> None:
    ledger, _ = make()
    for index in (7, 3, 9):
        assert take(ledger, index).closes is None
    intake = take(ledger, 5)
    assert intake.closes == UpdateDecision(update=0, staleness=0, samples=8, samples_before=0, num_gradients=4)


def test_tombstone_fills_a_place_and_its_samples_count_for_the_schedule() -> None:
    ledger, _ = make()
    for index in (0, 1, 2):
        take(ledger, index)
    closing = ledger.drop(attempt(3), "its data can't be read").closes
    assert closing is not None
    assert (closing.samples, closing.num_gradients) == (6, 3)
    ledger.updated(0.1, "d")
    assert ledger.samples == 8
    assert ledger.applied.dropped == {3}


def test_update_of_tombstones_only_asks_for_no_step() -> None:
    ledger, events = make()
    intake = Intake(taken=False)
    for index in range(4):
        intake = ledger.drop(attempt(index), "no data")
    assert intake.closes is not None
    assert intake.closes.empty
    assert ledger.updated(None, "same") == 1
    event = events.records[-1].event
    assert isinstance(event, UpdateEvent)
    assert (event.learning_rate, event.gradients) == (None, 0)
    assert ledger.learning_rate is None


def test_position_order_holds_gradients_until_those_before_them_came() -> None:
    ledger, _ = make(position_order=True)
    assert take(ledger, 2).ready == ()
    assert take(ledger, 0).ready == (0,)
    assert take(ledger, 3).ready == ()
    closing = take(ledger, 1)
    assert closing.ready == (1, 2, 3)
    assert closing.closes is not None


def test_tombstone_lets_gradients_behind_it_go_on_in_position_order() -> None:
    ledger, _ = make(position_order=True)
    assert take(ledger, 1).ready == ()
    assert ledger.drop(attempt(0), "no data").ready == (1,)


def test_arrival_order_holds_nothing() -> None:
    ledger, _ = make()
    assert [take(ledger, index).ready for index in (2, 0, 3)] == [(2,), (0,), (3,)]


def test_retry_does_not_write_buffers_again_even_after_a_restore() -> None:
    ledger, _ = make()
    assert ledger.open(attempt(0), 0) is True
    ledger.abort(attempt(0))
    assert ledger.open(attempt(0, 2), 1) is False
    restored, events = make(restored=ledger.cut())
    assert restored.open(attempt(0, 3), 0) is False
    assert restored.open(attempt(1), 1) is True
    assert [record.event.buffers for record in events.records if isinstance(record.event, ForwardEvent)] == [
        False,
        True,
    ]


def test_gradient_that_read_impossible_weights_is_refused_and_changes_nothing() -> None:
    ledger, events = make()
    ledger.open(attempt(8), 0)
    for index in range(4):
        if take(ledger, index).closes:
            ledger.updated(0.1, "d")
    records = len(events.records)
    for read, mode in ((2, WeightMode.LATEST), (-1, WeightMode.RECOMPUTE), (1, WeightMode.STASHED)):
        with pytest.raises(RejectedError, match="forward pass read version 0 and the layer is at version 1"):
            ledger.take(attempt(8), read=read, mode=mode)
    assert len(events.records) == records
    assert ledger.take(attempt(8), read=0, mode=WeightMode.STASHED).taken
    assert ledger.staleness.staleness == (4, 1)
    assert ledger.staleness.misalignment == (5,)


def test_microbatch_of_another_plan_is_refused() -> None:
    other = TrainingPlan(num_samples=22, batch=6, accumulation=2, num_updates=9)
    ledger, _ = make()
    with pytest.raises(RejectedError, match="not a microbatch of this plan"):
        ledger.open(Attempt(other.microbatch(0)), 0)


def test_cut_is_refused_while_gradients_wait() -> None:
    ledger, _ = make()
    take(ledger, 0)
    with pytest.raises(AssertionError, match="1 gradients wait"):
        ledger.cut()


def test_nothing_is_taken_in_while_an_update_is_due() -> None:
    ledger, _ = make()
    for index in range(4):
        take(ledger, index)
    with pytest.raises(AssertionError, match="was not made"):
        ledger.drop(attempt(5), "too early")


def test_cut_and_restore_are_recorded_with_what_they_hold() -> None:
    ledger, events = make()
    for index in (1, 0, 2, 3):
        intake = take(ledger, index)
    assert intake.closes
    ledger.updated(0.1, "after one")
    state = ledger.cut()
    assert events.records[-1].event == CutEvent(layer=2, version=1, digest="after one")
    _, later = make(restored=state)
    assert later.records[0].event == RestoreEvent(
        layer=2,
        version=1,
        revision=2,
        samples=8,
        digest="after one",
        applied=state.applied,
        buffers=state.buffers,
    )


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"samples": 9}, {"layer": 3}, {"applied": {"watermark": 3, "above": [], "dropped": []}}],
    ids=str,
)
def test_state_that_contradicts_the_plan_is_not_restored(change: dict[str, object]) -> None:
    ledger, _ = make()
    for index in range(4):
        intake = take(ledger, index)
    assert intake.closes
    ledger.updated(0.1, "d")
    state = LedgerState.from_json({**ledger.cut().to_json(), **change})
    with pytest.raises(CorruptError, match="can't be restored"):
        make(restored=state)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1"},
        {"samples": -1},
        {"digest": None},
        {"applied": []},
        {"buffers": {"watermark": -2}},
        {"staleness": [1, -1]},
        {"misalignment": 3},
    ],
    ids=str,
)
def test_values_that_are_no_state_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not a layer's ledger|not an applied set"):
        LedgerState.from_json({**LedgerState(layer=2).to_json(), **change})


def test_staleness_is_counted_on_over_lives_from_what_the_cut_knew() -> None:
    """After a resume mean and maximum were those of the last life alone."""
    ledger, _ = make()
    for index in range(4):
        ledger.open(attempt(index), index)
    for index in range(4, 8):
        ledger.open(attempt(index), index)
    for index in range(4):
        ledger.take(attempt(index), read=0, mode=WeightMode.LATEST)
    ledger.updated(0.1, "a")
    for index in range(4, 8):
        ledger.take(attempt(index), read=1, mode=WeightMode.LATEST)
    ledger.updated(0.1, "b")
    saved = json.loads(json.dumps(ledger.cut().to_json()))
    take(ledger, 8)  # lost, and made again by the next life
    again, _ = make(restored=LedgerState.from_json(saved))
    assert (again.staleness.staleness, again.staleness.misalignment) == ((4, 4), (4, 4))
    take(again, 8)
    assert again.staleness.staleness == (5, 4)
    again.staleness.check()
    del saved["staleness"], saved["misalignment"]  # as it was written before these were kept
    older, _ = make(restored=LedgerState.from_json(saved))
    assert older.staleness.staleness == ()
