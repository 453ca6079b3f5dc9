"""What is made of a run under faults: recovery from the moments of updates, rewinds and repeats from the logs."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from layerwise.applied import AppliedSet
from layerwise.chaos.faults import ProcessFault, ProcessFaultKind
from layerwise.chaos.injector import Injector
from layerwise.chaos.log_facts import read_log_facts
from layerwise.chaos.log_tail import LayerProgress, LogTail
from layerwise.chaos.plan import ChaosPlan, Scenario
from layerwise.chaos.recovery import RecoveryWatch, longest_stall, time_to_updates
from layerwise.chaos.report import ChaosReport, Hang, ReplayOutcome
from layerwise.event_log import EventLog
from layerwise.events import AccumulateEvent, RestoreEvent, UpdateEvent, WeightMode
from layerwise.ids import Attempt, Microbatch
from tests.unit.test_event_log import HEADER

BEGIN = 100.0


def layers(*moments: list[float], versions: tuple[int, ...] | None = None) -> dict[int, LayerProgress]:
    found = versions or tuple(len(one) for one in moments)
    return {index: LayerProgress(1, found[index], list(one)) for index, one in enumerate(moments)}


def begin(watch: RecoveryWatch, before: dict[int, LayerProgress], now: float, version: int = 1) -> None:
    watch.begin(fault="kill", kind="kill", process="shard-0", version=version, layers=before, now=now)


def test_a_job_has_recovered_when_every_layer_has_made_another_update() -> None:
    watch = RecoveryWatch(BEGIN)
    begin(watch, layers([101.0], [101.0]), 102.0)
    watch.observe(layers([101.0, 103.0], [101.0]), 1, 103.0)
    assert watch.outcomes({})[0].recovery_seconds is None
    watch.observe(layers([101.0, 103.0], [101.0, 105.0]), 1, 106.0)
    outcome = watch.outcomes({})[0]
    assert (outcome.at, outcome.recovery_seconds, outcome.caught_up_seconds) == (2.0, 3.0, 4.0)


def test_a_rewound_job_catches_up_later_than_it_recovers() -> None:
    watch = RecoveryWatch(BEGIN)
    begin(watch, layers([101.0]), 102.0, version=7)
    watch.observe(layers([101.0, 103.0], versions=(5,)), 5, 103.0)
    assert watch.outcomes({})[0].caught_up_seconds is None
    watch.observe(layers([101.0, 103.0, 104.0], versions=(7,)), 7, 104.0)
    assert watch.outcomes({})[0].caught_up_seconds == 2.0


@pytest.mark.parametrize(
    ("begun", "end", "longest"),
    [(10.0, 20.0, 6.0), (12.5, 20.0, 6.0), (0.0, 11.0, 1.0), (18.5, 20.0, 1.0), (30.0, 40.0, None), (13.0, 15.0, 3.0)],
)
def test_a_stall_counts_from_the_last_update_before_the_fault(begun: float, end: float, longest: float | None) -> None:
    assert longest_stall(layers([10.0, 11.0, 12.0, 18.0, 19.0]), begun, end) == longest


@pytest.mark.parametrize(("begun", "seconds"), [(0.0, 10.0), (10.5, 1.5), (11.0, 2.0), (12.0, None), (20.0, None)])
def test_the_next_updates_after_a_moment_are_those_of_the_slowest_layer(begun: float, seconds: float | None) -> None:
    assert time_to_updates(layers([10.0, 11.0, 13.0], [9.0, 12.0]), begun) == seconds


def test_without_layers_nothing_has_been_updated() -> None:
    assert time_to_updates({}, 0.0) is None


class Processes:
    """Processes that only remember what was done to them."""

    def __init__(self, *names: str) -> None:
        self.pids = dict.fromkeys(names, 1)
        self.done: list[str] = []

    def kill(self, name: str) -> None:
        self.done.append(f"kill {name}")

    def pause(self, name: str) -> None:
        self.done.append(f"pause {name}")

    def unpause(self, name: str) -> None:
        self.done.append(f"unpause {name}")


class Played:
    """An injector over processes and a job that are played."""

    def __init__(
        self, folder: Path, *faults: ProcessFault, names: tuple[str, ...] = ("shard-0", "coordinator")
    ) -> None:
        self.processes = Processes(*names)
        self.tail = LogTail(folder)
        self.document: dict[str, object] = {"blocks": [{"shard": "shard-0"}]}
        self.watch = RecoveryWatch(0.0)
        self.injector = Injector(faults, self.processes, self.tail, self.watch, lambda: self.document)

    def reach(self, version: int) -> None:
        self.tail.layers[0] = LayerProgress(1, version)


def kill(target: str, version: int, after: float = 0.0) -> ProcessFault:
    return ProcessFault(kind=ProcessFaultKind.KILL, target=target, at_version=version, after=after)


def test_a_fault_waits_for_its_version_and_then_for_its_moment(tmp_path: Path) -> None:
    played = Played(tmp_path, kill("shard:0", 5, after=0.5))
    played.reach(4)
    assert not played.injector.step(1.0)
    played.reach(5)
    assert not played.injector.step(2.0)
    assert not played.injector.step(2.4)
    assert played.injector.step(2.5)
    assert played.processes.done == ["kill shard-0"]
    assert not played.injector.waiting
    assert not played.injector.step(3.0)


def test_a_fault_waits_for_a_process_that_is_away(tmp_path: Path) -> None:
    played = Played(tmp_path, kill("shard:0", 1), kill("coordinator", 2))
    played.processes.pids.pop("shard-0")
    played.reach(9)
    for now in (1.0, 2.0):
        played.injector.step(now)
    assert played.processes.done == []
    played.processes.pids["shard-0"] = 2
    for now in (3.0, 4.0, 5.0):
        played.injector.step(now)
    assert played.processes.done == ["kill shard-0", "kill coordinator"]


def test_everybody_means_every_process_that_runs(tmp_path: Path) -> None:
    played = Played(tmp_path, kill("all", 1))
    played.reach(1)
    played.injector.step(0.0)
    assert sorted(played.processes.done) == ["kill coordinator", "kill shard-0"]


def test_a_paused_process_goes_on_after_its_time_or_at_the_end(tmp_path: Path) -> None:
    fault = ProcessFault(kind=ProcessFaultKind.PAUSE, target="shard:0", at_version=1, seconds=3600.0)
    played = Played(tmp_path, fault)
    played.reach(1)
    played.injector.step(0.0)
    assert played.injector.paused == ("shard-0",)
    played.injector.step(1.0)
    played.injector.end()
    assert played.processes.done == ["pause shard-0", "unpause shard-0"]
    assert played.injector.paused == ()


def test_a_pause_tells_whether_the_process_was_replaced_meanwhile(tmp_path: Path) -> None:
    faults = [
        ProcessFault(kind=ProcessFaultKind.PAUSE, target="shard:0", at_version=version, seconds=5.0)
        for version in (1, 2)
    ]
    played = Played(tmp_path, *faults, names=("shard-0", "shard-1"))
    played.reach(2)
    played.injector.step(0.0)
    played.injector.step(time.monotonic() + 6.0)
    played.document = {"blocks": [{"shard": "shard-0"}]}
    played.injector.step(0.0)
    played.document = {"blocks": [{"shard": "shard-1"}]}
    played.injector.step(time.monotonic() + 6.0)
    assert [one.replaced for one in played.watch.outcomes({})] == [False, True]


def restore(version: int, applied: AppliedSet | None = None) -> RestoreEvent:
    return RestoreEvent(
        layer=1,
        version=version,
        revision=version,
        samples=0,
        digest="",
        applied=applied or AppliedSet(),
        buffers=AppliedSet(),
    )


def accumulate(start: int, attempt: int = 1) -> AccumulateEvent:
    return AccumulateEvent(
        layer=1,
        attempt=Attempt(Microbatch(0, start, start + 4), attempt),
        number=start,
        base=0,
        read=0,
        mode=WeightMode.LATEST,
        update=0,
    )


def update(version: int) -> UpdateEvent:
    return UpdateEvent(
        layer=1,
        version=version,
        revision=version,
        gradients=2,
        samples=8,
        samples_before=0,
        staleness=0,
        open_tickets=0,
        learning_rate=0.1,
        digest="",
    )


def write_two_lives(folder: Path) -> None:
    header = replace(HEADER, num_layers=2, start=1, stop=2, layer_names=("Linear",), life=1)
    with EventLog(folder, header) as log:
        for event in (restore(0), accumulate(0), accumulate(4), update(1), accumulate(8), accumulate(12), update(2)):
            log.append(event)
    with EventLog(folder, replace(header, life=2)) as log:
        for event in (restore(1), accumulate(8, attempt=2), accumulate(12, attempt=2), update(2)):
            log.append(event)


def test_the_logs_tell_how_far_a_block_fell_back_and_what_was_done_again(tmp_path: Path) -> None:
    write_two_lives(tmp_path)
    facts = read_log_facts(tmp_path)
    assert [(one.life, one.from_version, one.to_version, one.updates) for one in facts.rewinds] == [(2, 2, 1, 1)]
    assert (facts.rewind_updates, facts.samples_redone, facts.attempts_repeated) == (1, 8, 2)


def test_a_life_that_wrote_nothing_is_none(tmp_path: Path) -> None:
    write_two_lives(tmp_path)
    folder = tmp_path / "events" / "block-1-2" / "life-3"
    folder.mkdir()
    (folder / "segment-000000.log").touch()
    assert len(read_log_facts(tmp_path).rewinds) == 1


def test_the_tail_follows_lives_and_needs_every_layer(tmp_path: Path) -> None:
    tail = LogTail(tmp_path)
    tail.poll(1.0)
    assert (tail.lowest_version, tail.num_layers) == (0, 0)
    write_two_lives(tmp_path)
    tail.poll(2.0)
    assert tail.lowest_version == 0  # layer 0 is yet to come
    other = replace(HEADER, num_layers=2, start=0, stop=1, layer_names=("Linear",), life=1)
    with EventLog(tmp_path, other) as log:
        log.append(replace(restore(0), layer=0))
        log.append(replace(update(1), layer=0))
        log.flush()
        tail.poll(3.0)
        log.append(replace(update(2), layer=0))
        log.flush()
        tail.poll(4.0)
    assert tail.lowest_version == 2
    assert tail.layers[0].updated_at == [3.0, 4.0]
    assert (tail.layers[1].life, tail.num_updates) == (2, 5)
    tail.close()


def test_half_a_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "events" / "block-0-1" / "life-1"
    folder.mkdir(parents=True)
    header = json.dumps({"num_layers": 1}, separators=(",", ":")).encode()
    record = update(3).to_json(0).replace('"layer":1', '"layer":0').encode()
    lines = b"".join(b"%08x %b\n" % (crc32(text), text) for text in (header, record))
    file, tail = folder / "segment-000000.log", LogTail(tmp_path)
    file.write_bytes(lines[:-20])
    tail.poll(1.0)
    assert tail.lowest_version == 0
    file.write_bytes(lines)
    tail.poll(2.0)
    assert tail.lowest_version == 3
    tail.close()


DONE = {"state": "done", "job": "j-1", "ledger": {"samples_applied": 8}, "total_samples": 8, "steps": 2}


def report(**changes: object) -> ChaosReport:
    values: dict[str, object] = {
        "plan": ChaosPlan(scenario=Scenario.MIXED, seed=3),
        "directory": "/run",
        "document": DONE,
        "baseline": None,
        "faults": (),
        "unfired": (),
        "log_facts": None,
        "audit": None,
        "replay": ReplayOutcome(exact=True, detail=""),
        "resumes": 0,
        "seconds": 1.0,
        "hang": None,
        **changes,
    }
    return ChaosReport(**values)  # type: ignore[arg-type]


def test_a_run_passes_when_all_happened_and_all_holds() -> None:
    assert report().passed
    assert report().to_json()["passed"] is True


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"unfired": ("kill shard:0 at version 3",)}, "did not happen: kill shard:0"),
        ({"document": {"state": "failed", "message": "out of luck"}}, "the job is failed: out of luck"),
        (
            {"document": {"state": "done", "ledger": {"samples_applied": 7}, "total_samples": 8}},
            "7 samples were applied",
        ),
        ({"replay": ReplayOutcome(exact=False, detail="layer 3")}, "the replay differs: layer 3"),
        (
            {"hang": Hang(seconds=21.0, phase="training", stacks={"shard-0": "..."})},
            r"nothing moved for 21 s \(training\)",
        ),
        ({"problems": ("no audit: empty",)}, "no audit: empty"),
        (
            {"document": {**DONE, "validation": {"accuracy": 0.7}}, "baseline": {"validation": {"accuracy": 0.9}}},
            r"learned too little: accuracy 0\.7 with faults, 0\.9 without \(at least 0\.85 will do\)",
        ),
    ],
)
def test_a_run_fails_with_a_sentence(changes: dict[str, object], sentence: str) -> None:
    failed = report(**changes)
    assert not failed.passed
    assert len(failed.failures) == 1
    assert re.search(sentence, failed.failures[0])
    assert json.loads(json.dumps(failed.to_json()))["failures"] == list(failed.failures)
