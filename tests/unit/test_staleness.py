"""The staleness ledger: exact counts, for any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import AuditError
from layerwise.ids import Attempt, Microbatch
from layerwise.staleness import StalenessLedger, Ticket


def ticket(index: int, base: int) -> Ticket:
    return Ticket(attempt=Attempt(Microbatch(0, index, index + 1)), number=index, base=base)


@given(st.integers(0, 5), st.lists(st.tuples(st.sampled_from("oadbu"), st.integers(0, 50)), max_size=120))
def test_identity_holds_after_every_event_in_any_order(start: int, events: list[tuple[str, int]]) -> None:
    ledger = StalenessLedger(start)
    ages: dict[int, int] = {}  # of open tickets, aged one update at a time
    closed = left_open = opened = 0
    applied: list[int] = []
    for kind, choice in events:
        index = sorted(ages)[choice % len(ages)] if ages else None
        if kind == "o":
            ledger.open(opened, ticket(opened, ledger.version))
            ages[opened] = 0
            opened += 1
        elif kind == "u":
            assert ledger.advance() == len(ages)
            ages = {one: age + 1 for one, age in ages.items()}
            left_open += len(ages)
        elif index is not None:
            age = ages.pop(index)
            closed += age
            if kind == "a":
                assert ledger.apply(index, read=ledger.version) == age
                applied.append(age)
            else:
                assert (ledger.drop if kind == "d" else ledger.abort)(index) == age
        ledger.check()
        assert ledger.open_age == sum(ages.values())
        assert ledger.num_open == len(ages)
        assert closed + sum(ages.values()) == left_open
    assert list(ledger.staleness) == [applied.count(age) for age in range(max(applied, default=-1) + 1)]
    assert ledger.misalignment == ledger.staleness  # every backward pass read the newest version


def test_misalignment_counts_what_the_backward_pass_read_beyond_the_forward_pass() -> None:
    ledger = StalenessLedger()
    for index in range(3):
        ledger.open(index, ticket(index, 0))
    ledger.advance()
    ledger.advance()
    ledger.apply(0, read=0)
    ledger.apply(1, read=2)
    ledger.apply(2, read=2)
    assert ledger.misalignment == (1, 0, 2)
    assert ledger.staleness == (0, 0, 3)


def test_miscounted_ticket_is_noticed() -> None:
    ledger = StalenessLedger()
    ledger.open(0, ticket(0, 0))
    ledger.advance()
    ledger.version += 1  # a bug: an update that nobody counted
    with pytest.raises(AuditError, match="does not add up"):
        ledger.check()


def test_ticket_opens_at_the_current_version_only_and_once() -> None:
    ledger = StalenessLedger(3)
    ledger.open(0, ticket(0, 3))
    with pytest.raises(AuditError, match="still open"):
        ledger.open(0, ticket(0, 3))
    with pytest.raises(AuditError, match="base 2 at version 3"):
        ledger.open(1, ticket(1, 2))
    with pytest.raises(AuditError, match="no open ticket"):
        ledger.apply(7, read=3)
    assert ledger.tickets == (ticket(0, 3),)
