from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt
from layerwise.messages import Outcome
from layerwise.plan import TrainingPlan
from layerwise.server.admission import GENERATION_BITS, Admission, ClosedNumber, Decision, Declined, Granted
from layerwise.server.cut_schedule import CutSchedule

PLAN = TrainingPlan(num_samples=7, batch=2, accumulation=2, num_updates=8)  # 7 microbatches and 4 updates an epoch


def admission(
    *,
    window: int = 3,
    blocks: int = 1,
    synchronous: bool = False,
    every: int | None = None,
    done: AppliedSet | None = None,
    held: AppliedSet | None = None,
    started: bool = True,
    durable: int = 0,
    generation: int = 0,
    synchronous_until: int = 0,
) -> Admission:
    made = Admission(
        plan=PLAN,
        window=window,
        num_blocks=blocks,
        schedule=CutSchedule(final=PLAN.num_updates, intervals=() if every is None else (every,)),
        synchronous=synchronous,
        durable=durable,
        generation=generation,
        synchronous_until=synchronous_until,
    )
    if started:
        made.start(done or AppliedSet(), held, 0.0)
    return made


def attempt(index: int, number: int = 1) -> Attempt:
    return Attempt(PLAN.microbatch(index), number)


def granted(decisions: list[Decision]) -> list[tuple[str, int, int]]:
    return [(one.peer, PLAN.index(one.attempt.microbatch), one.number) for one in decisions if isinstance(one, Granted)]


def declined(decisions: list[Decision]) -> list[tuple[str, str]]:
    return [(one.peer, one.reason) for one in decisions if isinstance(one, Declined)]


def close(made: Admission, number: int, outcome: Outcome = Outcome.APPLIED) -> list[Decision]:
    entry = made.get(number)
    assert entry is not None
    return made.report(number, entry.attempt, 0, outcome, 0.0)


def test_nothing_is_granted_before_training_begins() -> None:
    made = admission(started=False)
    assert made.offer("a", attempt(0), 0.0) == []
    assert granted(made.start(AppliedSet(), None, 0.0)) == [("a", 0, 0)]


def test_the_window_counts_from_the_oldest_open_number() -> None:
    made = admission(window=3)
    for index in range(3):
        assert granted(made.offer("a", attempt(index), 0.0)) == [("a", index, index)]
    assert made.offer("a", attempt(3), 0.0) == []
    assert granted(close(made, 1)) == []  # the span from 0 is still 3
    assert granted(close(made, 0)) == [("a", 3, 3)]
    assert made.span == 2


def test_a_number_closes_when_every_block_has_reported_it() -> None:
    made = admission(blocks=2)
    made.offer("a", attempt(0), 0.0)
    assert made.report(0, attempt(0), 1, Outcome.APPLIED, 0.0, loss=0.5) == []
    assert made.report(0, attempt(0), 1, Outcome.APPLIED, 0.0) == []  # a repeat
    assert made.report(0, attempt(1), 0, Outcome.APPLIED, 0.0) == []  # another attempt under the same number
    (closed,) = made.report(0, attempt(0), 0, Outcome.APPLIED, 0.0)
    assert isinstance(closed, ClosedNumber)
    assert (closed.number, closed.outcome, closed.loss, closed.peer) == (0, Outcome.APPLIED, 0.5, "a")
    assert 0 in made.done


def test_a_new_offer_replaces_the_one_that_waits_on_the_same_link() -> None:
    made = admission(window=1)
    made.offer("a", attempt(0), 0.0)
    made.offer("b", attempt(2), 0.0)
    made.offer("b", attempt(1), 0.0)
    assert made.num_waiting == 1
    assert granted(close(made, 0)) == [("b", 1, 1)]


def test_arrival_order_decides_with_a_larger_window() -> None:
    made = admission(window=2)
    assert granted(made.offer("a", attempt(5), 0.0)) == [("a", 5, 0)]
    assert granted(made.offer("b", attempt(3), 0.0)) == [("b", 3, 1)]


def test_window_one_admits_in_position_order() -> None:
    made = admission(window=1)
    assert made.offer("a", attempt(1), 0.0) == []
    assert granted(made.offer("b", attempt(0), 0.0)) == [("b", 0, 0)]
    assert granted(close(made, 0)) == [("a", 1, 1)]


def test_synchronous_mode_flushes_at_each_update_and_waits_for_the_tensors_before() -> None:
    made = admission(window=4, synchronous=True)
    made.offer("a", attempt(0), 0.0)
    assert made.offer("b", attempt(1), 0.0) == []  # the tensors of 0 are not here
    assert granted(made.arrived(0, attempt(0), 0.0) or []) == [("b", 1, 1)]
    made.arrived(1, attempt(1), 0.0)
    assert made.offer("a", attempt(2), 0.0) == []  # update 1 begins when update 0 is closed
    close(made, 0)
    assert granted(close(made, 1)) == [("a", 2, 2)]


def test_what_every_layer_has_is_declined() -> None:
    made = admission(done=AppliedSet(watermark=2))
    assert declined(made.offer("a", attempt(1), 0.0)) == [("a", "applied")]


def test_a_newer_attempt_waits_until_it_is_known_whether_the_older_goes_on() -> None:
    made = admission()
    made.offer("a", attempt(0), 0.0)
    assert made.offer("b", attempt(0, 2), 0.0) == []
    assert declined(made.arrived(0, attempt(0), 0.0) or []) == [("b", "open")]


def test_a_newer_attempt_is_admitted_once_the_older_is_aborted() -> None:
    made = admission()
    made.offer("a", attempt(0), 0.0)
    made.offer("b", attempt(0, 2), 0.0)
    aborted, decisions = made.lose("a", 0.0)
    assert [entry.number for entry in aborted] == [0]
    assert granted(decisions) == []  # its number is still open
    assert made.arrived(0, attempt(0), 0.0) is None  # too late
    assert granted(close(made, 0, Outcome.ABORTED)) == [("b", 0, 1)]


def test_of_two_waiting_attempts_the_newer_is_admitted() -> None:
    made = admission(window=1)
    made.offer("a", attempt(0), 0.0)
    made.offer("b", attempt(1, 1), 0.0)
    made.offer("c", attempt(1, 2), 0.0)
    decisions = close(made, 0)
    assert granted(decisions) == [("c", 1, 1)]
    assert declined(decisions) == [("b", "open")]


def test_a_microbatch_that_arrived_goes_on_without_its_worker() -> None:
    made = admission()
    made.offer("a", attempt(0), 0.0)
    made.arrived(0, attempt(0), 0.0)
    aborted, _ = made.lose("a", 0.0)
    assert aborted == []
    (closed,) = close(made, 0)
    assert isinstance(closed, ClosedNumber)
    assert closed.peer is None


def test_tensors_that_do_not_come_in_time_are_aborted_once() -> None:
    made = admission()
    made.offer("a", attempt(0), 5.0)
    assert made.abort_late(5.0) == []
    assert [entry.number for entry in made.abort_late(5.1)] == [0]
    assert made.abort_late(5.1) == []


def test_admission_stops_at_the_third_cut_that_is_not_durable() -> None:
    made = admission(window=9, every=1)
    assert [len(granted(made.offer("a", attempt(index), 0.0))) for index in range(7)] == [1] * 6 + [0]
    assert granted(made.cut_durable(1, 0.0)) == [("a", 6, 6)]


def test_a_stop_fills_whole_updates() -> None:
    made = admission(window=4)
    for index in range(3):
        made.offer("a", attempt(index), 0.0)
    version, decisions = made.stop(0.0)
    assert version == 2  # three are admitted, two updates take four
    assert decisions == []
    assert granted(made.offer("b", attempt(6), 0.0)) == [("b", 6, 3)]
    assert made.offer("a", attempt(4), 0.0) == []
    for number in range(3):
        assert declined(close(made, number)) == []
    assert declined(close(made, 3)) == [("a", "stopping")]
    assert made.complete
    assert declined(made.offer("b", attempt(5), 0.0)) == [("b", "stopping")]


def test_a_place_that_is_freed_during_a_stop_is_filled_by_what_waits() -> None:
    made = admission(window=4)
    made.offer("a", attempt(0), 0.0)
    made.offer("b", attempt(1), 0.0)
    assert made.stop(0.0)[0] == 1
    assert made.offer("b", attempt(3), 0.0) == []
    made.lose("a", 0.0)
    assert granted(close(made, 0, Outcome.ABORTED)) == [("b", 3, 2)]


def test_a_stop_completes_what_only_some_layers_have() -> None:
    # After a restore at version 1, one layer has 0 and 1, another 0 and 4.
    made = admission(done=AppliedSet(watermark=1), held=AppliedSet(watermark=2, above={4}), durable=1)
    version, _ = made.stop(0.0)
    assert version == 2  # 0, 1 and 4 are three; one more fills the second update
    assert granted(made.offer("a", attempt(1), 0.0)) == [("a", 1, 0)]
    assert granted(made.offer("a", attempt(2), 0.0)) == [("a", 2, 1)]
    assert made.offer("a", attempt(3), 0.0) == []  # no place is left but that of 4
    for number in range(2):
        close(made, number)
    assert not made.complete
    assert granted(made.offer("b", attempt(4), 0.0)) == [("b", 4, 2)]
    close(made, 2)
    assert made.complete


def test_a_stop_with_nothing_admitted_ends_at_the_restored_version() -> None:
    assert admission().stop(0.0)[0] == 0
    assert admission(done=AppliedSet(watermark=4), durable=2).stop(0.0)[0] == 2


def test_offers_that_wait_for_one_that_nobody_makes_are_given_back() -> None:
    made = admission(window=1)
    made.offer("a", attempt(2), 1.0)
    made.offer("b", attempt(1), 2.0)
    assert made.unblock(2.0) == []  # b has not waited that long
    assert declined(made.unblock(2.5)) == [("a", "order"), ("b", "order")]
    assert granted(made.offer("a", attempt(0), 3.0)) == [("a", 0, 0)]


def test_what_a_stop_still_needs_is_not_given_back_as_if_it_did_not() -> None:
    """Simulated seed 3226: its worker's link was broken for a second, and nobody ever brought 1 again."""
    made = admission(window=1)
    made.offer("a", attempt(0), 0.0)
    made.arrived(0, attempt(0), 0.0)
    assert made.stop(0.0)[0] == 1  # that is two microbatches: 0 and 1
    close(made, 0)
    made.offer("b", attempt(2), 1.0)
    assert declined(made.unblock(2.0)) == [("b", "stopping")]
    made = admission(window=1)
    made.offer("a", attempt(0), 0.0)
    made.stop(0.0)
    close(made, 0, Outcome.ABORTED)
    made.offer("b", attempt(1), 1.0)
    made.offer("c", attempt(2), 1.0)
    assert declined(made.unblock(2.0)) == [("b", "order"), ("c", "stopping")]


def test_what_some_layers_have_comes_first_in_position_order() -> None:
    made = admission(window=1, done=AppliedSet(watermark=1), held=AppliedSet(watermark=1, above={4}))
    assert made.offer("a", attempt(1), 0.0) == []
    assert granted(made.offer("b", attempt(4), 0.0)) == [("b", 4, 0)]


def test_an_unknown_microbatch_is_refused() -> None:
    made = admission()
    with pytest.raises(ValueError, match="not a microbatch of this plan"):
        made.offer("a", Attempt(PLAN.microbatch(0).__class__(0, 0, 2)), 0.0)


class Brute:
    """Admission as a list of what was said, with every question answered by looking through it all."""

    def __init__(self, window: int, ordered: bool) -> None:
        self.window, self.ordered = window, ordered
        self.numbers: list[tuple[int, int]] = []  # (index, attempt) by number
        self.closed: dict[int, Outcome] = {}
        self.arrived: set[int] = set()
        self.waiting: dict[str, tuple[int, int]] = {}

    def open(self) -> list[int]:
        return [number for number in range(len(self.numbers)) if number not in self.closed]

    def done(self) -> set[int]:
        return {self.numbers[number][0] for number, outcome in self.closed.items() if outcome is Outcome.APPLIED}

    def settle(self) -> set[tuple[str, int]]:
        """Grants, as (peer, number)."""
        grants: set[tuple[str, int]] = set()
        while True:
            under_way = {self.numbers[number][0]: number for number in self.open()}
            for peer, (index, attempt_) in list(self.waiting.items()):
                number = under_way.get(index)
                older = number is not None and (number in self.arrived or self.numbers[number][1] >= attempt_)
                if index in self.done() or older:
                    del self.waiting[peer]
            span = len(self.numbers) - min(self.open(), default=len(self.numbers))
            able = [peer for peer, (index, _) in self.waiting.items() if index not in under_way]
            if self.ordered:
                missing = set(range(PLAN.num_microbatches)) - self.done() - under_way.keys()
                able = [peer for peer in able if self.waiting[peer][0] == min(missing, default=-1)]
                able.sort(key=lambda peer: -self.waiting[peer][1])
            if span >= self.window or not able:
                return grants
            self.numbers.append(self.waiting.pop(able[0]))
            grants.add((able[0], len(self.numbers) - 1))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("oooaacccx"), st.integers(0, 13), st.integers(0, 2)), max_size=60),
)
def test_admission_agrees_with_counting_by_hand(window: int, steps: list[tuple[str, int, int]]) -> None:
    made, brute = admission(window=window), Brute(window, ordered=window == 1)
    for what, index, peer_number in steps:
        peer = "abc"[peer_number]
        under_way = brute.open()
        decisions: list[Decision] = []
        if what == "o":
            tries = 1 + sum(one == index for one, _ in brute.numbers)
            decisions = made.offer(peer, attempt(index, tries), 0.0)
            brute.waiting.pop(peer, None)
            brute.waiting[peer] = (index, tries)
        elif under_way:
            number = under_way[index % len(under_way)]
            known = attempt(*brute.numbers[number])
            if what == "a":
                decisions = made.arrived(number, known, 0.0) or []
                brute.arrived.add(number)
            else:
                outcome = Outcome.APPLIED if what == "c" else Outcome.ABORTED
                decisions = made.report(number, known, 0, outcome, 0.0)
                brute.closed[number] = outcome
        assert {(one.peer, one.number) for one in decisions if isinstance(one, Granted)} == brute.settle()
        assert [entry.number for entry in made.open_numbers()] == brute.open()
        assert set(range(PLAN.num_microbatches)) - set(made.done.missing(PLAN.num_microbatches)) == brute.done()
        assert made.span <= window


def test_the_numbers_of_a_generation_are_above_all_of_those_before() -> None:
    before, after = admission(window=9, generation=6), admission(window=9, generation=7)
    old = [granted(before.offer("a", attempt(index), 0.0))[0][2] for index in range(3)]
    new = [granted(after.offer("a", attempt(index), 0.0))[0][2] for index in range(3)]
    assert old == [(6 << GENERATION_BITS) + count for count in range(3)]
    assert new == [(7 << GENERATION_BITS) + count for count in range(3)]
    assert {number >> GENERATION_BITS for number in new} == {7}


def test_reports_of_another_generation_close_nothing() -> None:
    made = admission(generation=7)
    made.offer("a", attempt(0), 0.0)
    number = 7 << GENERATION_BITS
    assert made.report(6 << GENERATION_BITS, attempt(0), 0, Outcome.APPLIED, 0.0) == []
    assert made.arrived(6 << GENERATION_BITS, attempt(0), 0.0) is None
    assert made.span == 1
    assert len(made.report(number, attempt(0), 0, Outcome.APPLIED, 0.0)) == 1


def test_the_window_of_a_late_generation_counts_from_its_first_number() -> None:
    made = admission(window=2, generation=5)
    for index in range(2):
        assert len(granted(made.offer("a", attempt(index), 0.0))) == 1
    assert made.offer("a", attempt(2), 0.0) == []
    assert made.span == 2


def test_after_a_rollback_updates_follow_one_another_until_the_window_opens_again() -> None:
    made = admission(window=4, synchronous_until=2)
    assert made.synchronous
    assert granted(made.offer("b", attempt(1), 0.0)) == []  # not before microbatch 0
    assert granted(made.offer("a", attempt(0), 0.0)) == [("a", 0, 0)]
    assert granted(made.arrived(0, attempt(0), 0.0) or []) == [("b", 1, 1)]
    assert granted(made.offer("a", attempt(2), 0.0)) == []  # of the next update
    made.arrived(1, attempt(1), 0.0)
    assert granted(close(made, 0)) == []
    assert granted(close(made, 1)) == [("a", 2, 2)]
    made.arrived(2, attempt(2), 0.0)
    assert granted(made.offer("b", attempt(3), 0.0)) == [("b", 3, 3)]
    made.arrived(3, attempt(3), 0.0)
    assert granted(made.offer("a", attempt(6), 0.0)) == []
    close(made, 2)
    assert granted(close(made, 3)) == [("a", 6, 4)]  # any microbatch, and the whole window
    assert not made.synchronous
    assert [granted(made.offer("b", attempt(index), 0.0)) for index in (4, 5)] == [[("b", 4, 5)], [("b", 5, 6)]]


def test_what_only_some_layers_lack_goes_alone_while_updates_follow_one_another() -> None:
    done, held = AppliedSet(), AppliedSet()
    held.add(1)
    held.add(3)
    made = admission(window=4, synchronous_until=4, done=done, held=held)
    assert granted(made.offer("a", attempt(0), 0.0)) == []
    assert granted(made.offer("b", attempt(1), 0.0)) == [("b", 1, 0)]
    made.arrived(0, attempt(1), 0.0)
    assert granted(made.offer("b", attempt(3), 0.0)) == []
    assert granted(close(made, 0)) == [("b", 3, 1)]
    made.arrived(1, attempt(3), 0.0)
    # All layers have 1 and 3 now, which is one update: 0 and 2 make the next one.
    assert granted(close(made, 1)) == [("a", 0, 2)]
    made.arrived(2, attempt(0), 0.0)
    assert granted(made.offer("a", attempt(2), 0.0)) == [("a", 2, 3)]
    made.arrived(3, attempt(2), 0.0)
    assert granted(made.offer("a", attempt(4), 0.0)) == []
    close(made, 2)
    assert granted(close(made, 3)) == [("a", 4, 4)]


def test_a_microbatch_more_than_the_update_takes_waits_where_later_ones_are_on_all_layers_already() -> None:
    done = AppliedSet()
    done.add(2)  # one of the first update's two, by count
    made = admission(window=4, synchronous_until=4, done=done)
    assert granted(made.offer("a", attempt(0), 0.0)) == [("a", 0, 0)]
    made.arrived(0, attempt(0), 0.0)
    assert granted(made.offer("a", attempt(1), 0.0)) == []  # it would meet that update on its way
    assert granted(close(made, 0)) == [("a", 1, 1)]
