from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.errors import ConfigError
from layerwise.faults import (
    FRAMES_BETWEEN,
    VARIABLE,
    FrameFault,
    FrameFaultKind,
    FrameFaults,
    fired_faults,
    frame_fault_variable,
    frame_faults_of,
)


def fault(frame: int, *, sender: str = "", kind: FrameFaultKind = FrameFaultKind.DROP) -> FrameFault:
    return FrameFault(kind=kind, receiver="shard-1", sender=sender, frame=frame)


def test_nothing_is_planned_without_the_variable() -> None:
    assert frame_faults_of("shard-1", {}) is None


def test_a_plan_reaches_its_receiver_and_nobody_else(tmp_path: Path) -> None:
    variable = frame_fault_variable([fault(1)], tmp_path / "fired")
    assert frame_faults_of("shard-0", variable) is None
    found = frame_faults_of("shard-1", variable)
    assert found is not None
    assert found.next_fault("shard-0") == fault(1)
    assert found.next_fault("shard-0") is None


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"faults":[{"kind":"melt"}],"fired":"x"}', '{"faults":[]}'])
def test_a_plan_that_can_not_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        frame_faults_of("shard-1", {VARIABLE: text})


@pytest.mark.parametrize("wrong", [{"frame": 0}, {"frame": 1, "seconds": -1.0}, {"frame": 1, "receiver": ""}])
def test_an_impossible_fault_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        FrameFault.from_json({"kind": "delay", "receiver": "shard-1", **wrong})


def test_frames_are_counted_for_each_sender_pattern(tmp_path: Path) -> None:
    planned = [fault(2, sender="shard-0"), fault(4), fault(1, sender="forward")]
    faults = FrameFaults(planned, tmp_path / "fired")
    hits = [faults.next_fault(sender) for sender in ("shard-0", "coordinator", "shard-0", "shard-0", "forward-3")]
    assert hits == [None, None, planned[0], planned[1], planned[2]]


def test_two_faults_at_one_frame_hit_two_frames(tmp_path: Path) -> None:
    delay = fault(1, kind=FrameFaultKind.DELAY)
    faults = FrameFaults([fault(1), delay], tmp_path / "fired")
    assert [faults.next_fault("x"), faults.next_fault("x"), faults.next_fault("x")] == [fault(1), delay, None]


def test_what_could_not_be_done_to_a_frame_is_done_to_a_later_one(tmp_path: Path) -> None:
    faults = FrameFaults([fault(1)], tmp_path / "fired")
    first = faults.next_fault("shard-0")
    assert first == fault(1)
    faults.put_back(first)
    assert [faults.next_fault("forward-0") for _ in range(FRAMES_BETWEEN)] == [*[None] * (FRAMES_BETWEEN - 1), fault(1)]
    assert fired_faults(tmp_path / "fired") == []


def test_what_has_happened_is_written_down_and_not_repeated_by_a_successor(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    assert fired_faults(fired) == []
    faults = FrameFaults([fault(1), fault(3)], fired)
    first = faults.next_fault("shard-0")
    assert first is not None
    faults.record(first, "shard-0")
    with fired.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"half": "a line"}))
    assert [one for one, _ in fired_faults(fired)] == [fault(1)]
    successor = FrameFaults([fault(1), fault(3)], fired)
    assert [successor.next_fault("shard-0") for _ in range(3)] == [None, None, fault(3)]
