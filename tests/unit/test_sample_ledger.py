from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from layerwise.applied import AppliedSet
from layerwise.dropped import DroppedMicrobatch
from layerwise.ids import Attempt, Microbatch
from layerwise.messages import Outcome
from layerwise.plan import TrainingPlan
from layerwise.server.sample_ledger import OUT_OF_ORDER, SampleLedger

# Two epochs of five microbatches, the last of each with one sample.
PLAN = TrainingPlan(num_samples=9, batch=4, accumulation=2, num_updates=6)


def indices(attempts: tuple[Attempt, ...]) -> list[int]:
    return [PLAN.index(one.microbatch) for one in attempts]


def ledger_with(*, done: AppliedSet | None = None, partial: tuple[int, ...] = ()) -> SampleLedger:
    return SampleLedger(PLAN, done=done, partial=partial)


def test_leases_are_granted_lowest_first_up_to_the_capacity() -> None:
    ledger = ledger_with()
    assert indices(ledger.lease("a", 3, 0.0)) == [0, 1, 2]
    assert indices(ledger.lease("b", 2, 0.0)) == [3, 4]
    assert ledger.lease("a", 3, 0.0) == ()


def test_a_lost_worker_s_microbatches_go_to_others_at_once_as_the_next_attempt() -> None:
    ledger = ledger_with()
    ledger.lease("a", 2, 0.0)
    assert ledger.lose("a") == 2
    assert [(PLAN.index(one.microbatch), one.attempt) for one in ledger.lease("b", 2, 0.0)] == [(0, 2), (1, 2)]


def test_the_old_attempt_of_a_lost_worker_closes_the_microbatch_once() -> None:
    ledger = ledger_with()
    [old] = ledger.lease("a", 1, 0.0)
    ledger.lose("a")
    [new] = ledger.lease("b", 1, 0.0)
    ledger.give_back("b", new, "open")
    assert ledger.lease("b", 1, 0.0)[0].microbatch == PLAN.microbatch(1)
    assert ledger.close(old, Outcome.APPLIED)
    assert not ledger.close(old, Outcome.APPLIED)
    assert not ledger.close(new, Outcome.APPLIED)
    assert ledger.samples_applied == 2


def test_an_abort_that_overtakes_the_answer_open_does_not_strand_the_microbatch() -> None:
    ledger = ledger_with()
    [old] = ledger.lease("a", 1, 0.0)
    ledger.lose("a")
    [new] = ledger.lease("b", 1, 0.0)
    ledger.close(old, Outcome.ABORTED)
    ledger.give_back("b", new, "open")
    [again] = ledger.lease("b", 1, 0.0)
    assert (again.microbatch, again.attempt) == (old.microbatch, 3)


def test_a_late_abort_of_an_older_attempt_leaves_the_newer_lease_alone() -> None:
    ledger = ledger_with()
    [old] = ledger.lease("a", 1, 0.0)
    ledger.lose("a")
    ledger.lease("b", 1, 0.0)
    ledger.close(old, Outcome.ABORTED)
    assert ledger.lease("b", 1, 0.0) == (), "it still holds what it leased"


def test_dropped_microbatches_are_listed_with_reason_and_layer() -> None:
    ledger = ledger_with()
    [attempt] = ledger.lease("a", 1, 0.0)
    ledger.close(attempt, Outcome.DROPPED, reason="not finite", missing_from=3)
    assert (ledger.samples_applied, ledger.samples_dropped) == (0, 2)
    assert [one.to_json() for one in ledger.dropped] == [
        {"epoch": 0, "start": 0, "stop": 2, "reason": "not finite", "missing_from": 3}
    ]


def test_a_stop_leases_only_what_its_updates_need() -> None:
    ledger = ledger_with()
    ledger.stop_at(2)
    assert indices(ledger.lease("a", 9, 0.0)) == [0, 1, 2, 3]


def test_what_the_stop_declines_is_leased_again_only_if_something_else_is_lost() -> None:
    ledger = ledger_with()
    zero, one, two = ledger.lease("a", 3, 0.0)
    ledger.stop_at(1)
    ledger.give_back("a", two, "stopping")
    assert ledger.lease("a", 9, 0.0) == ()
    assert ledger.samples_leased == 4
    ledger.close(one, Outcome.ABORTED)
    assert indices(ledger.lease("a", 9, 0.0)) == [1, 2]
    ledger.close(zero, Outcome.APPLIED)
    assert not ledger.complete


def test_what_came_too_early_waits_until_something_has_closed() -> None:
    ledger = ledger_with()
    zero, one = ledger.lease("a", 2, 0.0)
    ledger.give_back("a", one, "order")
    assert indices(ledger.lease("a", 2, 0.0)) == [2]
    ledger.close(zero, Outcome.APPLIED)
    assert indices(ledger.lease("a", 2, 0.0)) == [1]


def test_while_paused_only_what_an_open_microbatch_may_wait_for_is_leased() -> None:
    ledger = ledger_with()
    ledger.lease("a", 1, 0.0)
    ledger.lease("b", 1, 0.0)
    ledger.lose("a")
    assert indices(ledger.lease("b", 5, 0.0, paused=True)) == [0]


def test_after_a_restore_partly_applied_microbatches_come_first() -> None:
    done = AppliedSet(watermark=2, above={4})
    ledger = ledger_with(done=done, partial=(5,))
    assert indices(ledger.lease("a", 3, 0.0)) == [5, 2, 3]
    assert ledger.samples_applied == 2 + 2 + 1


def test_an_expired_lease_goes_to_another_worker_and_the_first_may_still_finish_it() -> None:
    ledger = ledger_with()
    [old] = ledger.lease("a", 1, 0.0)
    assert ledger.expire(60.0) == 1
    [new] = ledger.lease("b", 1, 61.0)
    assert new.attempt == 2
    assert ledger.close(old, Outcome.APPLIED)
    assert ledger.lease("b", 1, 62.0) == (), "it still holds the newer lease"
    ledger.give_back("b", new, "applied")
    assert len(ledger.lease("b", 1, 63.0)) == 1


def test_a_lease_expires_later_by_the_time_in_which_nobody_could_be_heard() -> None:
    ledger = ledger_with()
    ledger.lease("a", 1, 0.0)
    ledger.excuse(50.0, 100.0)
    assert ledger.expire(50.0) == 0
    assert ledger.expire(51.0) == 1


def test_returning_what_is_no_microbatch_of_the_plan_changes_nothing() -> None:
    ledger = ledger_with()
    ledger.give_back("a", Attempt(Microbatch(0, 1, 2)), "open")
    assert ledger.num_open == 0


def test_attempts_of_a_later_route_are_numbered_above_those_before() -> None:
    ledger = SampleLedger(PLAN, first_attempt=3001)
    [first] = ledger.lease("a", 1, 0.0)
    assert first.attempt == 3001
    ledger.lose("a")
    [again] = ledger.lease("b", 1, 0.0)
    assert (again.microbatch, again.attempt) == (first.microbatch, 3002)
    [other] = ledger.lease("b", 2, 0.0)
    assert other.attempt == 3001


def test_an_attempt_of_the_route_before_that_is_reported_late_closes_its_microbatch_once() -> None:
    ledger = SampleLedger(PLAN, first_attempt=3001)
    [new] = ledger.lease("a", 1, 0.0)
    old = Attempt(new.microbatch, 2)
    ledger.close(old, Outcome.ABORTED)  # nothing: a newer one is under way
    assert ledger.lease("a", 1, 0.0) == (), "it still holds the newer lease"
    assert ledger.close(new, Outcome.APPLIED)
    assert not ledger.close(old, Outcome.APPLIED)


def test_what_was_dropped_on_the_route_before_keeps_its_explanation() -> None:
    before = ledger_with()
    [attempt] = before.lease("a", 1, 0.0)
    before.close(attempt, Outcome.DROPPED, reason="not finite")
    after = ledger_with(done=before.closed())
    assert [one.reason for one in after.dropped] == ["dropped before the restore"]
    after = SampleLedger(PLAN, done=before.closed(), drops=before.drops.values(), missing_from={0: 3})
    assert after.dropped == [DroppedMicrobatch(microbatch=attempt.microbatch, reason="not finite", missing_from=3)]
    assert (after.samples_dropped, after.samples_applied) == (2, 0)


def test_what_was_dropped_and_is_lost_in_the_restore_is_leased_to_be_dropped_again() -> None:
    before = ledger_with()
    [attempt] = before.lease("a", 1, 0.0)
    before.close(attempt, Outcome.DROPPED, reason="not finite", missing_from=2)
    after = SampleLedger(PLAN, drops=before.drops.values())
    assert after.dropped == []
    [again, other] = after.lease("b", 2, 0.0)
    assert after.reason_to_drop(again.microbatch) == "not finite"
    assert after.reason_to_drop(other.microbatch) == ""
    assert after.close(again, Outcome.DROPPED, reason="the route found its tombstone")
    assert after.dropped == [DroppedMicrobatch(microbatch=attempt.microbatch, reason="not finite")]


def test_samples_that_can_t_be_loaded_are_given_up_once_and_leased_again_to_be_dropped() -> None:
    ledger = ledger_with()
    [first] = ledger.lease("a", 1, 0.0)
    assert ledger.give_up("a", first, "a torn file")
    assert not ledger.give_up("a", first, "said once more")
    assert (ledger.dropped, ledger.samples_given_up(0), ledger.num_decisions) == ([], 2, 1)
    [again] = ledger.lease("b", 1, 0.0)
    assert (again.microbatch, again.attempt) == (first.microbatch, 2)
    assert ledger.reason_to_drop(again.microbatch) == "a torn file"
    ledger.close(again, Outcome.DROPPED, reason="a torn file")
    assert [one.reason for one in ledger.dropped] == ["a torn file"]
    assert (ledger.samples_leased, ledger.samples_dropped) == (2, 2)


def test_what_comes_back_out_of_order_when_it_is_its_turn_already_is_leased_at_once() -> None:
    ledger = ledger_with()
    [first] = ledger.lease("a", 1, 0.0)
    [second] = ledger.lease("b", 1, 0.0)
    ledger.close(first, Outcome.APPLIED)
    ledger.give_back("b", second, OUT_OF_ORDER)  # said before the first one closed, by a worker that was paused since
    [again] = ledger.lease("a", 1, 0.0)
    assert (again.microbatch, again.attempt) == (second.microbatch, 2)


def test_what_comes_before_everything_else_but_must_wait_for_a_partial_one_is_not_leased_without_end() -> None:
    ledger = ledger_with(partial=(3,))
    partial, first = ledger.lease("a", 2, 0.0)
    assert indices((partial, first)) == [3, 0]
    ledger.give_back("a", first, OUT_OF_ORDER)
    assert indices(ledger.lease("a", 2, 0.0)) == [1]
    ledger.close(partial, Outcome.APPLIED)
    assert indices(ledger.lease("a", 2, 0.0)) == [0]


def test_when_everything_came_back_out_of_order_it_is_leased_again() -> None:
    ledger = ledger_with(partial=(3,))
    held = ledger.lease("a", 2, 0.0)
    for one in (held[1], held[0]):
        ledger.give_back("a", one, OUT_OF_ORDER)
    assert indices(ledger.lease("a", 2, 0.0)) == [3, 0]


def test_who_no_longer_has_the_lease_can_t_give_it_up() -> None:
    ledger = ledger_with()
    [late] = ledger.lease("a", 1, 0.0)
    assert ledger.expire(1.0) == 1
    [current] = ledger.lease("b", 1, 2.0)
    assert not ledger.give_up("a", late, "too slow a disk")
    assert not ledger.give_up("b", Attempt(Microbatch(9, 0, 2), 1), "no such samples")
    assert ledger.reason_to_drop(current.microbatch) == ""


def test_a_microbatch_that_was_applied_on_every_layer_after_all_is_not_given_up_any_more() -> None:
    ledger = ledger_with()
    [first] = ledger.lease("a", 1, 0.0)
    assert ledger.give_up("a", first, "a torn file")
    assert ledger.close(first, Outcome.APPLIED)
    assert not ledger.drops
    assert (ledger.samples_applied, ledger.samples_dropped) == (2, 0)


class LedgerBesideFirstShard(RuleBasedStateMachine):
    """Workers, links with delay, and a first shard that keeps the rules of admission, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = SampleLedger(PLAN)
        self.num_workers = 2
        self.held: dict[str, list[Attempt]] = {"w1": [], "w2": []}
        self.granted: dict[int, list[int]] = {}
        self.open: dict[int, tuple[Attempt, str | None]] = {}
        self.done: dict[int, Outcome] = {}
        self.reports: deque[tuple[Attempt, Outcome]] = deque()
        self.returns: dict[str, deque[tuple[Attempt, str]]] = {"w1": deque(), "w2": deque()}

    def _lease(self, worker: str, capacity: int) -> None:
        for attempt in self.ledger.lease(worker, capacity, 0.0):
            index = PLAN.index(attempt.microbatch)
            assert all(attempt.attempt > older for older in self.granted.setdefault(index, []))
            self.granted[index].append(attempt.attempt)
            self.held[worker].append(attempt)

    def _offer(self, worker: str, attempt: Attempt) -> None:
        self.held[worker].remove(attempt)
        index = PLAN.index(attempt.microbatch)
        if index in self.done:
            self.returns[worker].append((attempt, "applied"))
        elif index in self.open:
            self.returns[worker].append((attempt, "open"))
        else:
            self.open[index] = (attempt, worker)

    def _close(self, index: int, outcome: Outcome) -> None:
        attempt, _ = self.open.pop(index)
        if outcome is not Outcome.ABORTED:
            self.done[index] = outcome
        self.reports.append((attempt, outcome))

    @rule(worker=st.integers(0, 9), capacity=st.integers(1, 4))
    def lease(self, worker: int, capacity: int) -> None:
        self._lease(sorted(self.held)[worker % len(self.held)], capacity)

    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        choices = [(worker, attempt) for worker, attempts in sorted(self.held.items()) for attempt in attempts]
        if choices:
            self._offer(*data.draw(st.sampled_from(choices)))

    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def close(self, data: st.DataObject, outcome: Outcome) -> None:
        if self.open:
            self._close(data.draw(st.sampled_from(sorted(self.open))), outcome)

    @rule(again=st.booleans())
    def report(self, again: bool) -> None:
        if self.reports:
            attempt, outcome = self.reports.popleft()
            self.ledger.close(attempt, outcome)
            if again:
                self.ledger.close(attempt, outcome)

    @rule(worker=st.integers(0, 9))
    def answer(self, worker: int) -> None:
        name = sorted(self.returns)[worker % len(self.returns)]
        if self.returns[name]:
            self.ledger.give_back(name, *self.returns[name].popleft())

    @precondition(lambda self: self.num_workers < 6)
    @rule(worker=st.integers(0, 9), arrived=st.booleans())
    def lose(self, worker: int, arrived: bool) -> None:
        name = sorted(self.held)[worker % len(self.held)]
        del self.held[name], self.returns[name]
        self.ledger.lose(name)
        for index in [index for index, (_, owner) in self.open.items() if owner == name and not arrived]:
            self._close(index, Outcome.ABORTED)
        self.num_workers += 1
        self.held[f"w{self.num_workers}"], self.returns[f"w{self.num_workers}"] = [], deque()

    @invariant()
    def the_books_balance(self) -> None:
        ledger = self.ledger
        open_samples = sum(PLAN.microbatch(index).num_samples for index in ledger._open)
        assert ledger.samples_leased == ledger.samples_applied + ledger.samples_dropped + open_samples
        assert all(index not in ledger._closed for index in ledger._open)
        reported = set(self.done) - {PLAN.index(one.microbatch) for one, _ in self.reports}
        assert {index for index in range(PLAN.num_microbatches) if index in ledger._closed} == reported

    def teardown(self) -> None:
        """From wherever it got to, the run can be brought to its end."""
        for _ in range(20 * PLAN.num_microbatches):
            if self.ledger.complete:
                break
            for worker in list(self.held):
                while self.returns[worker]:
                    self.answer(sorted(self.returns).index(worker))
                self._lease(worker, 2)
                for attempt in list(self.held[worker]):
                    self._offer(worker, attempt)
            for index in list(self.open):
                self._close(index, Outcome.APPLIED)
            while self.reports:
                self.report(False)
        assert self.ledger.complete
        dropped = sum(PLAN.microbatch(index).num_samples for index, how in self.done.items() if how is Outcome.DROPPED)
        assert self.ledger.samples_dropped == dropped
        assert self.ledger.samples_applied + dropped == PLAN.total_samples == self.ledger.samples_leased


TestLedgerBesideFirstShard = LedgerBesideFirstShard.TestCase
TestLedgerBesideFirstShard.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
