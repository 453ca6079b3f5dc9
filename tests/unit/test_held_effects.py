"""What waits for the coordinator's disk, and what must not overtake it."""

from __future__ import annotations

from layerwise.messages import CommitCut, CutDurable, Message, Reroute, Stop
from layerwise.roles import Disconnect, Effect, Send
from layerwise.server.held_effects import HeldEffects

REROUTE = Reroute(job="j", route=(), block=0, generation=2, durable=0)
STOP, DURABLE = Stop(job="j"), CutDurable(job="j", version=4)


def to(peer: str, *messages: Message) -> list[Effect]:
    return [Send(peer, message) for message in messages]


def test_what_needs_the_disk_waits_and_the_rest_goes() -> None:
    held = HeldEffects()
    commit = CommitCut(job="j", version=6, files=(), manifest_json="{}", keep=(4, 6))
    assert held.admit([*to("a", STOP, REROUTE), *to("b", commit), *to("c", DURABLE)]) == [
        *to("a", STOP),
        *to("c", DURABLE),
    ]
    assert held.peers == ("a", "b")
    assert held.release(held.newest) == [*to("a", REROUTE), *to("b", commit)]
    assert held.newest == 0


def test_nothing_overtakes_what_its_process_must_hear_first() -> None:
    held = HeldEffects()
    held.admit(to("a", REROUTE))
    asked = held.newest
    assert held.admit([*to("a", STOP), *to("b", STOP)]) == to("b", STOP)
    held.admit(to("b", REROUTE))
    assert held.release(asked) == to("a", REROUTE)
    assert held.admit(to("a", DURABLE)) == []
    assert held.release(held.newest) == [*to("a", STOP), *to("b", REROUTE), *to("a", DURABLE)]
    assert held.admit(to("a", STOP)) == to("a", STOP)


def test_what_a_lost_process_was_to_be_told_is_not_told_to_the_next_of_its_name() -> None:
    held = HeldEffects()
    held.admit([*to("a", REROUTE, STOP), *to("b", REROUTE)])
    held.lose("a")
    assert held.admit(to("a", DURABLE)) == to("a", DURABLE)
    assert held.release(held.newest) == to("b", REROUTE)


def test_who_is_disconnected_is_disconnected_at_once() -> None:
    held = HeldEffects()
    held.admit(to("a", REROUTE))
    assert held.admit([Disconnect("a"), *to("a", STOP)]) == [Disconnect("a"), *to("a", STOP)]
    assert held.newest == 0


def test_all_of_a_turn_may_have_to_wait() -> None:
    held = HeldEffects()
    assert held.admit([*to("a", STOP), *to("b", STOP)], all_wait=True) == []
    assert held.release(held.newest) == [*to("a", STOP), *to("b", STOP)]
