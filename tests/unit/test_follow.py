"""How following a job ends: with its last document, whatever the coordinator does meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.client import CoordinatorClient
from layerwise.errors import DeadlineError, NotFoundError, UnreachableError
from layerwise.follow import JobFollower, Silent
from tests.unit.played_client import PlayedClient

DONE = {"job": "tiny-1", "state": "done"}
AWAY = UnreachableError("no coordinator answers at unix:/played")


def follower(client: Any, **arguments: float) -> JobFollower:
    typed: CoordinatorClient = client
    return JobFollower(typed, "tiny-1", Silent(), **arguments)


@pytest.mark.parametrize("error", [AWAY, DeadlineError("no answer")])
def test_a_coordinator_that_is_away_when_the_job_has_ended_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("layerwise.follow.RETRY_SECONDS", 0.0)
    client = PlayedClient(error, error, error, DONE).play(monkeypatch)
    assert follower(client).run() == DONE


def test_one_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    client = PlayedClient(AWAY).play(monkeypatch)
    with pytest.raises(UnreachableError, match="no coordinator answers"):
        follower(client, reconnect_seconds=0.0).run()


def test_a_refusal_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client = PlayedClient(DONE, NotFoundError("no job tiny-1")).play(monkeypatch)
    with pytest.raises(NotFoundError):
        follower(client).run()
    assert client.asked == 2


def test_whoever_waits_for_the_last_word_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cluster that has given its coordinator up would be waited for."""

    def give_up() -> None:
        raise ZeroDivisionError

    client = PlayedClient(AWAY).play(monkeypatch)
    running = follower(client, reconnect_seconds=3600.0)
    reader = client.follow_events

    def follow_events(job: str, offset: int = 0) -> Any:
        yield from reader(job, offset)
        running.interrupt(give_up)  # before the end of the events is told, or after it

    monkeypatch.setattr(client, "follow_events", follow_events)
    with pytest.raises(ZeroDivisionError):
        running.run()


def test_what_was_last_seen_is_there_when_following_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    running = follower(PlayedClient({"job": "tiny-1", "steps": 3}, endless=True).play(monkeypatch))
    with pytest.raises(DeadlineError):
        running.run(timeout=0.01)
    assert running.document == {"job": "tiny-1", "steps": 3}
