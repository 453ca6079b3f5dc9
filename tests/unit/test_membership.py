from __future__ import annotations

import pytest

from layerwise.messages import Heartbeat, Hello, Role
from layerwise.server.membership import Membership, natural_order


def hello(name: str, role: Role = Role.SHARD) -> Hello:
    return Hello(role=role, name=name, address="", device="cpu", host="here", pid=1, version="1")


def test_names_are_in_natural_order() -> None:
    names = ["shard-10", "shard-2", "a", "shard-1", "10", "9"]
    assert sorted(names, key=natural_order) == ["9", "10", "a", "shard-1", "shard-2", "shard-10"]


def test_a_process_is_overdue_after_the_cluster_s_limit_or_its_job_s() -> None:
    members = Membership(heartbeat_timeout=30.0)
    members.join(hello("a"), 0.0)
    members.join(hello("b"), 0.0)
    members.assign(["b"], "toy-1", 5.0)
    assert [one.name for one in members.overdue(6.0)] == ["b"]
    assert [one.name for one in members.overdue(31.0)] == ["a", "b"]
    members.heard("a", 31.0)
    members.release("b", "toy-1")
    assert [one.name for one in members.overdue(30.5)] == ["b"]


def test_nobody_is_overdue_for_a_time_in_which_nobody_could_be_heard() -> None:
    members = Membership(heartbeat_timeout=30.0)
    members.join(hello("a"), 0.0)
    members.join(hello("b"), 95.0)
    members.excuse(80.0, 100.0)
    assert members.overdue(110.0) == []
    assert [one.name for one in members.overdue(111.0)] == ["a"]
    assert [one.name for one in members.overdue(131.0)] == ["a", "b"]


def test_each_return_is_another_incarnation() -> None:
    members = Membership()
    assert members.join(hello("a"), 0.0).incarnation == 1
    with pytest.raises(ValueError, match="already"):
        members.join(hello("a"), 0.0)
    members.lose("a")
    assert members.join(hello("a"), 1.0).incarnation == 2
    assert members.lose("b") is None


def test_bytes_on_the_wire_never_shrink_when_processes_leave() -> None:
    members = Membership()
    for name in ("a", "b"):
        members.join(hello(name), 0.0)
        members.heard(name, 1.0, Heartbeat(sent_bytes=10, received_bytes=4))
    members.lose("a")
    assert members.wire_bytes(Role.SHARD) == (20, 8)


def test_a_process_is_free_only_once_it_has_left_the_very_job_it_was_in() -> None:
    members = Membership()
    members.join(hello("a"), 0.0)
    members.assign(["a"], "toy-2", 5.0)
    members.leave("a")
    members.release("a", "toy-1")
    process = members.get("a")
    assert process is not None
    assert not process.free
    members.release("a", "toy-2")
    assert process.free
