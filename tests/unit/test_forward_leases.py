from __future__ import annotations

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import DroppedAttempt, Grant, Lease, LeaseKind, Samples, Tensors
from layerwise.worker.forward_leases import ForwardLeases

SAMPLES = Samples(inputs=Tensors(("data",)), targets=Tensors(("data",)))
TOMBSTONE = Samples(inputs=Tensors.none(), targets=Tensors.none(), dropped="file is torn")


def attempt(index: int) -> Attempt:
    return Attempt(Microbatch(0, index, index + 1), 1)


def leases(*indices: int, drops: tuple[int, ...] = ()) -> ForwardLeases:
    dropped = tuple(DroppedAttempt(attempt=attempt(index), reason="file is torn") for index in drops)
    made = ForwardLeases()
    attempts = tuple(attempt(index) for index in indices)
    made.add(Lease(job="job", kind=LeaseKind.TRAIN, attempts=attempts, drops=dropped))
    return made


def test_a_microbatch_that_is_given_up_is_offered_in_its_turn_and_never_loaded() -> None:
    held = leases(0, 2, drops=(1,))
    assert held.load(3) == [attempt(0), attempt(2)]
    assert held.offer() == (attempt(1), TOMBSTONE)
    held.loaded(attempt(2), SAMPLES)
    assert held.offer() is None
    held.loaded(attempt(0), SAMPLES)
    assert held.offer() == (attempt(0), SAMPLES)
    assert held.send(attempt(1)) == TOMBSTONE


def test_a_microbatch_that_is_given_up_is_still_so_after_it_has_made_room() -> None:
    held = leases(drops=(5,))
    held.load(1)
    held.add(Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(3),)))
    assert held.load(1) == [attempt(3)]
    assert held.num_later == 1
    assert not held.reclaim(attempt(5))
    assert held.send(attempt(5)) == TOMBSTONE


def test_with_the_link_ends_what_was_sent_or_granted_and_what_was_offered_is_offered_again() -> None:
    held = leases(0, 1, 2)
    held.load(3)
    held.loaded(attempt(0), SAMPLES)
    held.loaded(attempt(1), SAMPLES)
    held.offer()
    held.send(attempt(0))
    held.offer()
    assert held.await_samples(Grant(job="job", attempt=attempt(2), number=7, life=1))
    assert held.lose_link() == [attempt(0)]
    assert held.offer() == (attempt(1), SAMPLES)
    assert held.grant_of(attempt(2)) is None
    assert len(held) == 2
