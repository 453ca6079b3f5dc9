"""What was trained in any order, through any number of lives, is computed again to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.audit import audit_directory
from layerwise.cli.main import run as command
from layerwise.cuts import cut_folder, layer_files, load_manifest
from layerwise.errors import ConfigError, NotAllowedError, NotFiniteError, NotFoundError
from layerwise.event_log import EventLog, LogReader, find_logs
from layerwise.events import BackwardEvent, PassEvent, WalkEvent
from layerwise.ids import Attempt
from layerwise.job import JobSpec
from layerwise.log_retention import remove_old_records
from layerwise.machine import Machine, this_machine
from layerwise.replay import Replay, ReplayReport, Until, parse_until
from layerwise.replay.history import read_history
from layerwise.verify import cut_state, first_difference
from tests.unit.recorded_run import ALLOWED, RecordedRun, recorded_spec

LAST = 10


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(f"layerwise.disk.os.{name}", lambda file: None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(mode: str, window: int = 3) -> JobSpec:
    return recorded_spec(**{"async": {"window": window, "accumulation": 2, "backward_weights": mode}})


def recorded(
    spec: JobSpec, directory: Path, *restarts: tuple[int, list[int] | None, int], **settings: Any
) -> RecordedRun:
    """A whole run; each restart says after which update, of which blocks (``None``: all), at which cut."""
    run = RecordedRun(spec, directory, **settings)
    run.begin()
    for updates, blocks, cut in restarts:
        run.train(updates)
        run.commit(cut)
        run.begin(blocks, cut)
    run.train()
    run.commit(LAST)
    run.close()
    return run


def check(directory: Path, **arguments: Any) -> tuple[Replay, ReplayReport]:
    """The audit is clean, and a replay reaches every hash and leaves nothing behind."""
    found = audit_directory(directory)
    assert found.passed, "\n".join(found.lines())
    replay = Replay(directory, allowed_imports=ALLOWED, **arguments)
    report = replay.run()
    assert report.passed, "\n".join(report.lines())
    assert report.left_out == ()
    assert report.notes == ()
    return replay, report


def check_whole(directory: Path, start: int = 0) -> ReplayReport:
    """The replay has gone through all records from ``start`` on, to the saved last cut."""
    replay, report = check(directory, start=start)
    lives = [life for life in replay.history.lives if start == 0 or life.version >= start]
    assert report.updates == sum(life.num_updates for life in lives)
    assert report.records == sum(life.num_records for life in lives)
    assert LAST in report.cuts
    assert {one.version for one in report.layers} == {LAST}
    for one in replay._running:
        assert one.execution.num_passes == 0
        assert one.execution.num_past_weights == 0
    return report


def events_of(directory: Path, kind: type) -> list[Any]:
    return [
        record.event
        for folder in find_logs(directory)
        for record in LogReader(folder).records
        if isinstance(record.event, kind)
    ]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mode", ["latest", "stashed", "recompute"])
def test_every_weight_mode_is_replayed_with_steps_of_others_in_between(tmp_path: Path, mode: str, seed: int) -> None:
    recorded(weights(mode, 4), tmp_path, seed=seed, splits=(1, 3), interleaved=True)
    check_whole(tmp_path)


@pytest.mark.parametrize("seed", [1, 2])
def test_aborted_and_dropped_attempts_are_replayed(tmp_path: Path, seed: int) -> None:
    recorded(recorded_spec(), tmp_path, seed=seed, aborted=0.2, dropped=0.1)
    check_whole(tmp_path)


@pytest.mark.parametrize("detached", [0.0, 1.0])
def test_a_run_that_ended_at_a_gradient_that_is_not_finite_is_replayed_to_where_it_stopped(
    tmp_path: Path, detached: float
) -> None:
    """With other passes through the layer in the log, behind the gradients that made no update."""
    spec = recorded_spec(
        model={"import": "tests.integration.own_code:becomes_steep", "calls": 10, "classes": 10},
        **{"async": {"window": 4, "accumulation": 2, "backward_weights": "recompute" if detached else "latest"}},
    )
    run = RecordedRun(spec, tmp_path, splits=(2,), detached=detached)
    run.begin()
    with pytest.raises(NotFiniteError, match="layer 2"):
        run.train()
    for index in range(run.plan.num_microbatches - 2, run.plan.num_microbatches):
        with pytest.raises(NotFiniteError, match="layer 2"):
            list(run._journey(index, Attempt(run.plan.microbatch(index), 1)))
    run.commit(3)
    run.close()
    check(tmp_path)


@pytest.mark.parametrize("seed", [2, 3])
def test_detached_workers_are_replayed_also_those_that_were_lost(tmp_path: Path, seed: int) -> None:
    recorded(
        weights("recompute", 4),
        tmp_path,
        seed=seed,
        splits=(1, 3),
        detached=0.7,
        lost=0.15,
        aborted=0.1,
        interleaved=True,
    )
    report = check_whole(tmp_path)
    assert report.lives == 3
    lives = read_history(tmp_path, {}).lives
    assert any(life.past_reads for life in lives), "some worker should have read what its layer had left"
    assert any(life.walks for life in lives), "some task should have been given twice"


@pytest.mark.parametrize("mode", ["latest", "stashed", "recompute"])
@pytest.mark.parametrize("seed", [1, 2])
def test_blocks_that_were_restored_alone_are_replayed(tmp_path: Path, mode: str, seed: int) -> None:
    """Layers that have a microbatch hand it on without a ticket: what they read then is in the log as well."""
    recorded(weights(mode), tmp_path, (5, [1], 3), (8, [0], 6), seed=seed, interleaved=True)
    report = check_whole(tmp_path)
    assert report.lives == 4
    assert events_of(tmp_path, PassEvent)
    assert events_of(tmp_path, BackwardEvent)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_middle_block_is_lost_while_detached_workers_compute(tmp_path: Path, seed: int) -> None:
    recorded(
        weights("recompute"), tmp_path, (5, [1], 3), (8, [0, 2], 6), seed=seed, splits=(1, 3), detached=0.6, lost=0.1
    )
    assert check_whole(tmp_path).lives == 6
    assert all(len(event.reads) in (1, 2) for event in events_of(tmp_path, WalkEvent))


def test_a_resumed_job_is_replayed_through_both_lives_or_from_where_it_was_resumed(tmp_path: Path) -> None:
    recorded(recorded_spec(), tmp_path, (4, None, 3))
    assert check_whole(tmp_path).lives == 4
    report = check_whole(tmp_path, start=3)
    assert (report.start, report.lives) == (3, 2)
    assert Replay(tmp_path).start.version == 3, "the oldest cut on disk"


def test_layers_that_share_a_weight_are_replayed(tmp_path: Path) -> None:
    model = {"import": "tests.integration.own_code:shared", "width": 64, "between": 1}
    data = {"import": "tests.integration.own_code:ramp", "samples": 96, "validation_samples": 8, "batch": 8}
    settings = {"window": 4, "accumulation": 2, "backward_weights": "recompute"}
    spec = recorded_spec(model=model, data=data, **{"async": settings})
    recorded(spec, tmp_path, splits=(3,), detached=0.4, lost=0.1, interleaved=True)
    check_whole(tmp_path)
    walks = [event for event in events_of(tmp_path, WalkEvent) if event.layer == 0]
    assert all([len(one) for one in event.reads] == [1, 1, 2] for event in walks)


def test_a_transformer_is_replayed(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(Path(__file__).read_text())
    model = {"name": "transformer-lm", "layers": 2, "width": 16, "heads": 2, "context": 12, "dropout": 0.1}
    spec = recorded_spec(model=model, data={"name": "text", "path": str(text), "batch": 8})
    recorded(spec, tmp_path / "job", (5, [1], 3), interleaved=True)
    check_whole(tmp_path / "job")


def test_synchronous_runs_can_be_replayed_from_every_saved_cut(tmp_path: Path) -> None:
    """By default from the oldest one, where there is more than one."""
    run = recorded(weights("latest", 1), tmp_path)
    assert check(tmp_path)[0].start.version == 0
    assert check_whole(tmp_path).start == 0
    assert run.saved[0].files.keys() >= {3, 6, 9}
    run.commit(3)
    run.commit(9)
    assert Replay(tmp_path).start.version == 3
    assert check(tmp_path, start=9)[1].updates == 4


def test_a_replay_begins_inside_a_life_where_no_ticket_is_open(tmp_path: Path) -> None:
    run = RecordedRun(weights("latest", 1), tmp_path)
    run.begin()
    run.train()
    run.commit(6)
    run.close()  # what is logged is on disk only now
    _, report = check(tmp_path, start=6)
    assert (report.start, report.updates, report.cuts) == (6, 4 * 4, ())


def test_an_open_ticket_keeps_a_replay_from_beginning_at_a_cut(tmp_path: Path) -> None:
    run = RecordedRun(recorded_spec(), tmp_path, seed=2)
    run.begin()
    run.train()
    run.commit(6)
    run.close()
    with pytest.raises(NotFoundError, match=r"can't begin at version 6: .* possible are 0"):
        Replay(tmp_path, start=6)
    assert Replay(tmp_path).start.version == 0


def test_a_trimmed_log_is_replayed_from_a_cut_in_the_part_that_is_left(tmp_path: Path) -> None:
    run = RecordedRun(weights("latest", 1), tmp_path)
    run.begin()
    run.train()
    run.commit(6)
    run.commit(LAST)
    run.close()
    for folder in find_logs(tmp_path):
        reader = LogReader(folder)
        records = list(reader.records)
        shutil.rmtree(folder)
        with EventLog(tmp_path, reader.header, segment_bytes=1000, retry_seconds=1e6) as log:
            for record in records:
                log.append(record.event)
                log.flush()
                log.tend()
    assert check(tmp_path, start=0)[1].updates == 4 * LAST
    assert remove_old_records(tmp_path, 6, kept_bytes=0) > 0
    _, report = check(tmp_path, start=6)
    assert (report.start, report.updates, report.cuts) == (6, 4 * 4, (LAST,))
    assert Replay(tmp_path).start.version == 6
    with pytest.raises(NotFoundError, match="possible are 6, 10"):
        Replay(tmp_path, start=0)


# Where it stops ------------------------------------------------------------------------------------------------------


def test_stopped_at_an_update_the_layers_are_those_of_the_cut(tmp_path: Path) -> None:
    """Whatever the layers have done after it meanwhile, and though the update was made in two lives."""
    run = recorded(recorded_spec(), tmp_path / "job", (8, [1], 3), seed=4)
    run_files = layer_files(load_manifest(run.directory, LAST))
    replay, report = check(run.directory, start=0, until=parse_until(str(LAST)))
    assert report.stopped_at == f"update {LAST}"
    saved = replay.save(tmp_path / "saved")
    assert saved == cut_folder(tmp_path / "saved", LAST)
    assert layer_files(load_manifest(tmp_path / "saved", LAST)) == run_files, "byte for byte"
    at_five, report = check(run.directory, start=0, until=Until(update=5))
    assert {copy.state.version for copy in at_five.copies.values()} == {5}
    assert [copy.life for _, copy in sorted(at_five.copies.items())] == [1, 1, 3, 3]
    at_five.save(tmp_path / "five")
    assert len(cut_state(tmp_path / "five", 5)) == len(cut_state(run.directory, LAST))
    assert first_difference(cut_state(tmp_path / "five", 5), cut_state(run.directory, LAST)) is not None


def test_stopped_at_a_sample_every_layer_has_taken_it_in(tmp_path: Path) -> None:
    run = recorded(recorded_spec(), tmp_path / "job", seed=2)
    index = run.plan.index(run.plan.microbatch(7))
    start = run.plan.microbatch(7).start
    replay, report = check(run.directory, start=0, until=parse_until(f"0:{start + 1}"))
    assert report.stopped_at == f"sample 0:{start + 1}"
    assert all(not layer.ledger.lacks(index) for layer in replay.layers.values())
    assert max(layer.ledger.version for layer in replay.layers.values()) < LAST
    folder = replay.save(tmp_path / "saved")
    names = {path.name for path in folder.iterdir()}
    assert names == {"layers.json", *(f"layer-{number:03d}.safetensors" for number in range(4))}
    with pytest.raises(NotAllowedError, match="not empty"):
        replay.save(tmp_path / "saved")


def test_a_place_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    recorded(recorded_spec(), tmp_path)
    for wrong in ("next", "1:", "-3", "1:2:3"):
        with pytest.raises(ConfigError, match="expected an update"):
            parse_until(wrong)
    with pytest.raises(ConfigError, match="samples an epoch"):
        Replay(tmp_path, until=parse_until("0:100000"))
    report = Replay(tmp_path, start=0, until=parse_until("11")).run()
    assert not report.passed
    assert report.unfinished == "the run ended before update 11"


def test_what_was_recorded_on_a_gpu_is_computed_on_this_machines_and_the_rest_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(device: torch.device, precision: str) -> Machine:
        return replace(this_machine(device, precision), device="some GPU")

    asked: list[str] = []

    def gpu_here(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")  # this machine may have none: what counts is who is asked

    recorded(recorded_spec(), tmp_path / "cpu")
    monkeypatch.setattr("layerwise.build.this_machine", on_a_gpu)
    recorded(recorded_spec(), tmp_path / "gpu")
    monkeypatch.setattr("layerwise.replay.replay.resolve_device", gpu_here)
    check(tmp_path / "cpu", start=0)
    assert asked == []
    report = Replay(tmp_path / "gpu", start=0, allowed_imports=ALLOWED).run()
    assert report.passed, "\n".join(report.lines())
    assert report.notes == ("device: some GPU was recorded, here is cpu",)
    assert set(asked) == {"auto"}
    asked.clear()
    assert Replay(tmp_path / "gpu", start=0, device=torch.device("cpu"), allowed_imports=ALLOWED).run().passed
    assert asked == []


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no saved cut"):
        Replay(tmp_path)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_reached_and_what_it_can_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(recorded(recorded_spec(), tmp_path / "job").directory)
    assert command(["replay", directory, "--from", "0"]) == 0
    said = capsys.readouterr().out
    assert "40 updates" in said
    assert f"equal bit for bit to the saved cuts {LAST}" in said
    assert "every hash is the recorded one" in said
    assert command(["replay", directory, "--from", "3"]) == 4
    assert "possible are 0" in capsys.readouterr().err
    assert command(["replay", directory, "--until", "soon"]) == 2
    assert command(["replay", directory, "--until", "3", "--save", directory]) == 5
    assert command(["replay", str(tmp_path / "none")]) == 4
    assert command(["replay", directory, "--until", "3", "--save", str(tmp_path / "at"), "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["stopped_at"], document["saved"]) == ("update 3", str(tmp_path / "at" / "cuts" / "00000003"))
