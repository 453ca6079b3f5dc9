"""The decider behind clusters and nodes: restarts, delays, the spare, processes that hang. No process is started."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.supervision import (
    GAP_SECONDS,
    MOST_DELAY_SECONDS,
    MOST_SPARE_FAILURES,
    QUICK_DEATH_SECONDS,
    SILENCE_FACTOR,
    SPARE_DELAY_SECONDS,
    START_SECONDS,
    KillProcess,
    ProcessState,
    ReportEnd,
    ReportNoSpare,
    StartProcess,
    StartSpare,
    Supervision,
)

SIGKILL = -9
LONG = 10 * QUICK_DEATH_SECONDS
HANG = 15.0


def running(*names: str, spare: bool = False, hang_seconds: float | None = None, **settings: object) -> Supervision:
    """A supervision at time 0 of processes that are up, with a spare that is ready."""
    made = Supervision(hang_seconds=hang_seconds, **settings)  # type: ignore[arg-type]
    for name in names:
        assert made.start(name, 0.0, warm=name != "coordinator") == [StartProcess(name=name)]
        assert made.on_beat(name, 0.0) == []
    if spare:
        assert made.keep_spare(0.0) == [StartSpare()]
        assert made.on_spare_ready(0.0) == []
    return made


def tick(supervision: Supervision, start: float, stop: float, *alive: str) -> dict[float, object]:
    """Tick every second, with signs of life of ``alive``; the decisions by time."""
    found: dict[float, object] = {}
    now = start
    while now <= stop:
        for name in alive:
            supervision.on_beat(name, now)
        for decision in supervision.on_tick(now):
            found[now] = decision
        now += 1.0
    return found


def test_a_process_that_dies_is_started_again_at_once() -> None:
    supervision = running("shard-0")
    assert supervision.on_end("shard-0", SIGKILL, LONG) == [
        ReportEnd(name="shard-0", status=SIGKILL, delay=0.0, quick_deaths=0),
        StartProcess(name="shard-0"),
    ]


def test_the_spare_takes_the_place_of_a_shard_and_a_new_one_starts_when_that_is_up() -> None:
    supervision = running("shard-0", "forward-0", spare=True)
    assert StartProcess(name="shard-0", adopt=True) in supervision.on_end("shard-0", SIGKILL, LONG)
    assert not supervision.spare_ready
    assert supervision.on_tick(LONG) == []
    assert supervision.on_beat("shard-0", LONG) == [StartSpare()]
    assert supervision.on_spare_ready(LONG) == []
    assert StartProcess(name="forward-0", adopt=True) in supervision.on_end("forward-0", SIGKILL, LONG)


def test_two_that_die_together_do_not_share_a_spare() -> None:
    supervision = running("shard-0", "shard-1", spare=True)
    assert StartProcess(name="shard-0", adopt=True) in supervision.on_end("shard-0", SIGKILL, LONG)
    assert StartProcess(name="shard-1", adopt=False) in supervision.on_end("shard-1", SIGKILL, LONG)


def test_a_spare_that_is_not_ready_is_not_used() -> None:
    supervision = running("shard-0")
    assert supervision.keep_spare(0.0) == [StartSpare()]
    assert StartProcess(name="shard-0", adopt=False) in supervision.on_end("shard-0", SIGKILL, LONG)


def test_the_coordinator_never_takes_the_spare() -> None:
    supervision = running("coordinator", spare=True)
    assert StartProcess(name="coordinator", adopt=False) in supervision.on_end("coordinator", SIGKILL, LONG)
    assert supervision.spare_ready


def test_no_spare_is_started_while_a_process_starts() -> None:
    supervision = Supervision()
    supervision.start("shard-0", 0.0, warm=True)
    assert supervision.keep_spare(0.0) == []
    assert supervision.on_tick(1.0) == []
    assert supervision.on_beat("shard-0", 2.0) == [StartSpare()]
    assert supervision.keep_spare(3.0) == []


def test_a_crash_loop_is_slowed_down_and_costs_no_spares() -> None:
    supervision = running("shard-0", spare=True)
    delays, now = [], 1.0
    for _ in range(12):
        report, *starts = supervision.on_end("shard-0", 1, now)
        assert isinstance(report, ReportEnd)
        assert report.delay is not None
        delays.append(report.delay)
        if report.delay:
            assert starts == []
            assert supervision.on_tick(now + report.delay * 0.99) == []
            now += report.delay
            starts = supervision.on_tick(now)
            assert starts == [StartProcess(name="shard-0", adopt=False)]
        supervision.on_beat("shard-0", now)
        supervision.on_spare_ready(now)
        now += 1.0
    assert delays[0] == 0.0
    assert delays[1:] == sorted(delays[1:])
    assert delays[1] > 0.0
    assert delays[-1] == MOST_DELAY_SECONDS


def test_a_life_of_some_length_ends_the_crash_loop() -> None:
    supervision = running("shard-0")
    for now in (1.0, 2.0):
        supervision.on_end("shard-0", 1, now)
    assert supervision.on_tick(10.0) == [StartProcess(name="shard-0")]
    report = supervision.on_end("shard-0", 1, 10.0 + QUICK_DEATH_SECONDS)[0]
    assert report == ReportEnd(name="shard-0", status=1, delay=0.0, quick_deaths=0)


def test_a_limit_of_quick_deaths_is_the_end() -> None:
    supervision = running("shard-0", most_quick_deaths=2)
    assert len(supervision.on_end("shard-0", 1, 1.0)) == 2
    assert supervision.on_end("shard-0", 1, 2.0) == [ReportEnd(name="shard-0", status=1, delay=None, quick_deaths=2)]
    assert tick(supervision, 3.0, 100.0) == {}


@pytest.mark.parametrize("status", [2, 5])
def test_a_wrong_configuration_is_not_tried_again(status: int) -> None:
    supervision = running("shard-0")
    assert supervision.on_end("shard-0", status, LONG) == [
        ReportEnd(name="shard-0", status=status, delay=None, quick_deaths=0)
    ]
    assert tick(supervision, LONG, 2 * LONG) == {}


def test_without_restart_an_end_is_reported_and_stands() -> None:
    supervision = running("shard-0", restart=False)
    assert supervision.on_end("shard-0", SIGKILL, LONG) == [
        ReportEnd(name="shard-0", status=SIGKILL, delay=None, quick_deaths=0)
    ]
    assert supervision.start("shard-0", LONG, warm=True) == [StartProcess(name="shard-0")]


def test_an_end_on_purpose_is_no_problem_and_no_quick_death() -> None:
    supervision = running("shard-0", most_quick_deaths=2)
    for now in (0.1, 0.2, 0.3, 0.4):
        supervision.expect_end("shard-0")
        assert supervision.on_end("shard-0", SIGKILL, now) == [StartProcess(name="shard-0")]


def test_a_process_that_runs_is_not_started_twice() -> None:
    assert running("shard-0").start("shard-0", 1.0, warm=True) == []


def test_a_stopped_process_is_killed_and_replaced_by_the_spare() -> None:
    supervision = running("shard-0", "shard-1", spare=True, hang_seconds=HANG)
    supervision.on_tick(0.0)
    found: dict[float, object] = {}
    for now in range(1, 40):
        supervision.on_beat("shard-1", now)
        supervision.on_state("shard-0", ProcessState.STOPPED, now)
        for decision in supervision.on_tick(now):
            found[now] = decision
    assert list(found) == [HANG]
    killed = found[HANG]
    assert isinstance(killed, KillProcess)
    assert killed.name == "shard-0"
    assert "stopped" in killed.reason
    report, start, *_ = supervision.on_end("shard-0", SIGKILL, 40.0)
    assert isinstance(report, ReportEnd)
    assert start == StartProcess(name="shard-0", adopt=True)


def test_a_process_that_was_killed_soon_after_its_start_was_in_no_crash_loop() -> None:
    supervision = running("shard-0", hang_seconds=2.0)
    supervision.on_state("shard-0", ProcessState.STOPPED, 1.0)
    assert [type(decision) for decision in supervision.on_tick(3.0)] == [KillProcess]
    report = supervision.on_end("shard-0", SIGKILL, 3.0)[0]
    assert report == ReportEnd(name="shard-0", status=SIGKILL, delay=0.0, quick_deaths=0)


def test_one_that_goes_on_in_time_lives() -> None:
    supervision = running("shard-0", hang_seconds=HANG)
    for now in range(1, 15):
        supervision.on_state("shard-0", ProcessState.STOPPED, now)
        assert supervision.on_tick(now) == []
    assert tick(supervision, 15.0, 60.0, "shard-0") == {}


def test_a_silent_event_loop_gets_more_time_than_a_stopped_process() -> None:
    supervision = running("shard-0", hang_seconds=HANG)
    found = tick(supervision, 0.0, 200.0)
    assert list(found) == [SILENCE_FACTOR * HANG]
    assert "event loop" in str(found[SILENCE_FACTOR * HANG])


def test_a_process_that_never_says_anything_is_killed_after_a_longer_time() -> None:
    supervision = Supervision(hang_seconds=HANG)
    supervision.start("shard-0", 0.0, warm=True)
    assert list(tick(supervision, 0.0, 300.0)) == [START_SECONDS]


def test_a_process_under_a_debugger_may_be_silent_for_ever() -> None:
    supervision = running("shard-0", hang_seconds=HANG)
    for now in range(1000):
        supervision.on_state("shard-0", ProcessState.TRACED, now)
        assert supervision.on_tick(now) == []


def test_no_one_is_killed_where_that_is_off() -> None:
    assert tick(running("shard-0"), 0.0, 1000.0) == {}


def test_silence_while_the_supervisor_itself_was_stopped_does_not_count() -> None:
    supervision = running("shard-0", hang_seconds=HANG)
    supervision.on_tick(0.0)
    supervision.on_state("shard-0", ProcessState.STOPPED, 1.0)
    assert tick(supervision, 1.0, 4.0) == {}
    assert supervision.on_tick(4.0 + GAP_SECONDS + 1000.0) == []


def test_a_spare_that_was_lost_is_replaced_after_a_while() -> None:
    supervision = running("shard-0", spare=True)
    assert supervision.on_spare_end(SIGKILL, 1.0) == []
    assert StartProcess(name="shard-0", adopt=False) in supervision.on_end("shard-0", SIGKILL, 5.0)
    supervision.on_beat("shard-0", 6.0)
    assert list(tick(supervision, 7.0, 100.0).items()) == [(1.0 + SPARE_DELAY_SECONDS, StartSpare())]


def test_a_spare_that_can_not_be_started_is_given_up_and_that_is_said_once() -> None:
    supervision = running("shard-0")
    decisions = supervision.keep_spare(0.0)
    now, told = 0.0, []
    for _ in range(MOST_SPARE_FAILURES + 2):
        if StartSpare() in decisions:
            told += supervision.on_spare_end(1, now)
        now += SPARE_DELAY_SECONDS
        decisions = supervision.on_tick(now)
    assert told == [ReportNoSpare(status=1)]
    assert tick(supervision, now, now + 1000.0) == {}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["end", "wrong", "beat", "stop", "tick", "ready", "spare end", "on purpose", "start"]),
        st.sampled_from(["shard-0", "shard-1", "coordinator"]),
        st.floats(0.0, 40.0),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_each_process_runs_at_most_once_and_there_is_at_most_one_spare(
    events: list[tuple[str, str, float]],
) -> None:
    """A model of the shell: what runs, and whether there is a spare, follows from the decisions and the events alone."""
    supervision = Supervision(hang_seconds=HANG)
    alive: set[str] = set()
    killed: set[str] = set()
    spare, ready, now = False, False, 0.0

    def carry_out(decisions: list[object]) -> None:
        nonlocal spare, ready
        for decision in decisions:
            if isinstance(decision, StartProcess):
                assert decision.name not in alive
                alive.add(decision.name)
                if decision.adopt:
                    assert spare
                    assert ready
                    assert decision.name != "coordinator"
                    spare = ready = False
            elif isinstance(decision, StartSpare):
                assert not spare
                spare = True
            elif isinstance(decision, KillProcess):
                assert decision.name in alive
                assert decision.name not in killed
                killed.add(decision.name)

    for name in ("shard-0", "shard-1", "coordinator"):
        carry_out([*supervision.start(name, now, warm=name != "coordinator")])
    carry_out([*supervision.keep_spare(now)])
    for event, name, seconds in events:
        now += seconds
        if event in ("end", "wrong") and name in alive:
            alive.discard(name)
            killed.discard(name)
            carry_out([*supervision.on_end(name, 2 if event == "wrong" else SIGKILL, now)])
        elif event == "on purpose" and name in alive:
            supervision.expect_end(name)
            alive.discard(name)
            killed.discard(name)
            carry_out([*supervision.on_end(name, SIGKILL, now)])
        elif event == "beat" and name in alive:
            carry_out([*supervision.on_beat(name, now)])
        elif event == "stop" and name in alive:
            carry_out([*supervision.on_state(name, ProcessState.STOPPED, now)])
        elif event == "ready" and spare:
            ready = True
            carry_out([*supervision.on_spare_ready(now)])
        elif event == "spare end" and spare:
            spare = ready = False
            carry_out([*supervision.on_spare_end(1, now)])
        elif event == "start":
            carry_out([*supervision.start(name, now, warm=name != "coordinator")])
        elif event == "tick":
            carry_out([*supervision.on_tick(now)])
        assert supervision.spare_ready == ready
