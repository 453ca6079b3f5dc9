from __future__ import annotations

from typing import Any

from layerwise.job import JobSpec, parse_job
from layerwise.messages import Hello, Role
from layerwise.server.membership import Membership
from layerwise.server.placement import Places, Shortage, place, replacement


def job(**cluster: Any) -> JobSpec:
    return parse_job({"name": "toy", "model": "mlp", "data": "digits", "cluster": cluster})


def members(*names: str, device: str = "cpu", host: str = "here", into: Membership | None = None) -> Membership:
    found = into if into is not None else Membership()
    for name in names:
        role = Role(name.partition("-")[0])
        found.join(Hello(role=role, name=name, address="", device=device, host=host, pid=1, version="1"), 0.0)
    return found


def test_processes_are_taken_in_the_natural_order_of_their_names() -> None:
    found = members("shard-10", "shard-2", "shard-1", "forward-1", "forward-0")
    assert place(job(shards=2), found) == Places(shards=("shard-1", "shard-2"), forward=("forward-0",), backward=())


def test_a_shortage_says_what_is_needed_what_is_free_and_who_has_the_rest() -> None:
    found = members("shard-0", "shard-1", "forward-0")
    found.assign(["shard-0"], "other-1", 5.0)
    assert place(job(shards=2), found) == Shortage(
        reason="needs 2 shards; 1 of 2 is free (the others work for other-1)", lacking=False
    )
    assert place(job(shards=3), found) == Shortage(
        reason="needs 3 shards; 1 of 2 is free (the others work for other-1)", lacking=True
    )


def test_shards_on_the_wrong_device_do_not_count() -> None:
    found = members("shard-0", "forward-0")
    members("shard-1", device="cuda:0", into=found)
    assert place(job(shards=2, device="cuda"), found) == Shortage(
        reason="needs 2 shards; 1 of 1 is free; 1 more are not on cuda", lacking=True
    )
    assert place(job(shards=1, device="cuda:0"), found) == Places(
        shards=("shard-1",), forward=("forward-0",), backward=()
    )


def test_shards_are_spread_over_devices_before_two_share_one() -> None:
    found = members("shard-0", "shard-1", device="cuda:0")
    members("shard-2", device="cuda:1", into=found)
    members("forward-0", into=found)
    placed = place(job(shards=2), found)
    assert isinstance(placed, Places)
    assert placed.shards == ("shard-0", "shard-2")


def test_a_replacement_is_a_free_process_of_the_role() -> None:
    found = members("forward-0", "forward-1")
    found.assign(["forward-0"], "toy-1", 5.0)
    chosen = replacement(Role.FORWARD, job(), found)
    assert chosen is not None
    assert chosen.name == "forward-1"
    assert replacement(Role.BACKWARD, job(), found) is None
