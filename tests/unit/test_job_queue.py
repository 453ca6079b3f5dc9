from __future__ import annotations

import pytest

from layerwise.errors import NotAllowedError
from layerwise.job import parse_job
from layerwise.server.job_book import JobBook
from layerwise.server.job_queue import JobQueue
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.memory_store import MemoryJobStore
from layerwise.server.placement import Shortage
from tests.unit.played_cluster import spec

LACKING = Shortage(reason="needs 2 shards; 1 of 1 is free", lacking=True)
TAKEN = Shortage(reason="needs 2 shards; 1 of 2 is free", lacking=False)


class Waiting:
    """A queue of jobs that lack processes for 30 s at most, and its store."""

    def __init__(self) -> None:
        self.store = MemoryJobStore()
        self.book = JobBook(self.store)
        self.queue = JobQueue(self.book)

    def submit(self) -> str:
        return self.queue.submit(parse_job(spec(timeouts={"start": 30.0})), "runs/toy", 0.0)

    def wait(self, shortage: Shortage, now: float) -> bool:
        """The first job is found to lack processes."""
        record = self.first
        return self.queue.wait(record, self.book.spec(record), shortage, now)

    @property
    def first(self) -> JobRecord:
        assert self.queue.first is not None
        return self.queue.first

    def said(self, job: str) -> list[str]:
        return [event.message for event in self.store.events(job, 0, 100)]


def test_a_resumed_job_waits_behind_those_that_were_submitted_meanwhile() -> None:
    waiting = Waiting()
    resumed, other = waiting.submit(), waiting.submit()
    waiting.book.close(waiting.first, JobState.CANCELLED, "cancelled", "info", 1.0)
    waiting.queue.resume(resumed, 2.0)
    assert waiting.queue.places() == {other: (1, ""), resumed: (2, "1 job is before it")}
    # Also for the next coordinator: numbers are not given twice.
    again = JobQueue(JobBook(waiting.store))
    last = again.submit(parse_job(spec()), "runs/toy", 3.0)
    assert list(again.places()) == [other, resumed, last]


def test_a_job_that_waits_or_is_done_cannot_be_resumed_and_is_as_before() -> None:
    waiting = Waiting()
    job = waiting.submit()
    with pytest.raises(NotAllowedError, match="is queued"):
        waiting.queue.resume(job, 1.0)
    waiting.book.close(waiting.first, JobState.DONE, "", "info", 2.0)
    known, said = waiting.book.record(job), waiting.said(job)
    with pytest.raises(NotAllowedError, match="submit it again, with more steps"):
        waiting.queue.resume(job, 3.0)
    assert (waiting.store.load(), waiting.said(job)) == ((known,), said)


def test_a_job_for_which_the_cluster_is_too_small_says_so_once_and_fails_after_its_time_limit() -> None:
    waiting = Waiting()
    job = waiting.submit()
    assert [waiting.wait(LACKING, now) for now in (0.0, 15.0, 30.0, 31.0)] == [True, True, True, False]
    assert waiting.queue.first is None
    assert waiting.book.record(job).state is JobState.FAILED
    assert waiting.said(job) == [
        "submitted as toy-1",
        f"waiting: {LACKING.reason}",
        f"{LACKING.reason}, and no more came within 30 s: start them, or ask for fewer in cluster:",
    ]


def test_a_job_may_wait_for_ever_for_processes_that_other_jobs_have() -> None:
    waiting = Waiting()
    job = waiting.submit()
    assert waiting.wait(LACKING, 0.0)
    assert waiting.wait(TAKEN, 1000.0)
    assert waiting.queue.places() == {job: (1, TAKEN.reason)}
    assert waiting.wait(LACKING, 2000.0)
    assert waiting.wait(LACKING, 2030.0)


def test_time_in_which_no_process_could_present_itself_is_no_part_of_the_limit() -> None:
    waiting = Waiting()
    waiting.submit()
    assert waiting.wait(LACKING, 0.0)
    waiting.queue.excuse(60.0, 70.0)
    assert waiting.wait(LACKING, 90.0)
    assert not waiting.wait(LACKING, 91.0)


def test_a_job_that_was_not_waiting_meanwhile_has_all_its_time_when_it_is_resumed() -> None:
    waiting = Waiting()
    job = waiting.submit()
    assert waiting.wait(LACKING, 0.0)
    waiting.book.close(waiting.first, JobState.CANCELLED, "cancelled", "info", 10.0)
    waiting.queue.end_waiting()
    waiting.queue.resume(job, 100.0)
    assert waiting.wait(LACKING, 100.0)
    assert waiting.wait(LACKING, 130.0)
