from __future__ import annotations

import json

from layerwise.silence import LOOKS, MOVING_BYTES, Silence, Verdict, patience


def looks(silence: Silence, number: int, *, waiting: bool = True, sent_bytes: int = 0) -> list[Verdict]:
    return [silence.look(waiting=waiting, sent_bytes=sent_bytes) for _ in range(number)]


def fresh() -> Silence:
    silence = Silence()
    assert silence.look(waiting=True) is Verdict.FINE  # it was heard when the stream was opened
    return silence


def test_a_silent_peer_is_asked_once_and_then_given_up() -> None:
    assert looks(fresh(), LOOKS + 1) == [Verdict.ASK, *[Verdict.FINE] * (LOOKS - 1), Verdict.GIVE_UP]


def test_a_sign_of_life_begins_the_wait_anew() -> None:
    silence = fresh()
    looks(silence, LOOKS)
    silence.hear()
    assert looks(silence, LOOKS + 1) == [Verdict.FINE, Verdict.ASK, *[Verdict.FINE] * (LOOKS - 1)]


def test_a_peer_that_owes_nothing_may_be_silent_for_ever() -> None:
    assert set(looks(fresh(), 100, waiting=False)) == {Verdict.FINE}


def test_a_peer_is_not_given_up_while_much_still_leaves_for_it() -> None:
    """A slow path: the question has not arrived yet, behind all that left before it."""
    assert set(looks(fresh(), 100, sent_bytes=MOVING_BYTES)) == {Verdict.FINE}


def test_ones_own_pause_is_no_silence_of_others() -> None:
    """However late the next look comes, it is one look; what has come meanwhile is heard before the one after it."""
    silence = fresh()
    looks(silence, LOOKS - 1)
    assert silence.look(waiting=True) is not Verdict.GIVE_UP
    silence.hear()
    assert silence.look(waiting=True) is Verdict.FINE


def test_processes_of_a_job_wait_longer_than_a_stopped_process_keeps_its_place() -> None:
    assert patience(json.dumps({"timeouts": {"heartbeat": 60.0}})) == 80.0
    assert patience("{}") == 0.0
