from __future__ import annotations

from typing import Any

from layerwise.job import JobSpec, parse_job
from layerwise.messages import Hello, Role
from layerwise.server.job_record import JobRecord, JobState, PlacementRecord
from layerwise.server.membership import Membership
from layerwise.server.placement import (
    RETURN_SECONDS,
    Places,
    Shortage,
    Vacancy,
    place,
    places_before,
    replacement,
)


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
    chosen = replacement(Vacancy(role=Role.FORWARD, block=-1), job(), found, 0.0)
    assert chosen is not None
    assert chosen.name == "forward-1"
    assert replacement(Vacancy(role=Role.BACKWARD, block=0), job(), found, 0.0) is None


def test_a_lost_shard_s_place_is_kept_for_its_name_and_then_given_to_any() -> None:
    found = members("shard-3", "shard-7")
    vacancy = Vacancy(role=Role.SHARD, block=1, expected="shard-5", since=100.0)
    assert replacement(vacancy, job(), found, 100.0 + RETURN_SECONDS) is None
    chosen = replacement(vacancy, job(), found, 100.1 + RETURN_SECONDS)
    assert chosen is not None
    assert chosen.name == "shard-3"
    members("shard-5", into=found)
    for now in (100.0, 200.0):
        same = replacement(vacancy, job(), found, now)
        assert same is not None
        assert same.name == "shard-5"


def test_a_process_that_can_not_run_the_job_is_no_replacement_even_under_the_expected_name() -> None:
    found = members("shard-5")
    vacancy = Vacancy(role=Role.SHARD, block=0, expected="shard-5", since=0.0)
    assert replacement(vacancy, job(device="cuda"), found, 100.0) is None
    found.assign(["shard-5"], "other-1", 5.0)
    assert replacement(vacancy, job(), found, 100.0) is None


def test_who_works_for_a_job_is_read_from_its_record_in_the_blocks_order() -> None:
    placement = (
        PlacementRecord(process="shard-9", role=Role.SHARD, block=1, life=4),
        PlacementRecord(process="shard-2", role=Role.SHARD, block=0, life=3),
        PlacementRecord(process="forward-1", role=Role.FORWARD, block=-1),
        PlacementRecord(process="backward-0", role=Role.BACKWARD, block=1),
    )
    record = JobRecord(
        job="toy-1",
        number=1,
        name="toy",
        state=JobState.RUNNING,
        spec_json="{}",
        directory="runs/toy",
        created=0.0,
        placement=placement,
    )
    assert places_before(record) == Places(
        shards=("shard-2", "shard-9"), forward=("forward-1",), backward=(("backward-0", 1),)
    )
