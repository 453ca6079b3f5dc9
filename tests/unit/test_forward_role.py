from __future__ import annotations

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    Closed,
    Decline,
    Evaluated,
    EvaluateForward,
    Failure,
    Forward,
    Grant,
    Lease,
    LeaseKind,
    LeaseRequest,
    LeaseReturn,
    Metric,
    Offer,
    Outcome,
    Ready,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Effect, Send
from layerwise.worker.forward_role import Forget, ForwardRole, Load, LoadEvaluation, Prepare

LIFE = 3
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=LIFE),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=LIFE + 1),
)
ASSIGNMENT = Assignment(
    job="job", spec_json="{}", settings_json="{}", profile_json="{}", route=ROUTE, block=-1, cut=0, directory="", generation=1
)
DATA = Tensors(("data",))


def attempt(index: int, number: int = 1) -> Attempt:
    return Attempt(Microbatch(0, index, index + 1), number)


def ready_role(window: int = 1, prefetch: int = 2) -> ForwardRole:
    role = ForwardRole(prefetch=prefetch)
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.take_requests() == [Prepare(assignment=ASSIGNMENT)]
    role.on_prepared("job", window, 0.0)
    return role


def lease(role: ForwardRole, *indices: int) -> None:
    message = Lease(job="job", kind=LeaseKind.TRAIN, attempts=tuple(attempt(index) for index in indices))
    assert role.on_message("coordinator", message, 0.0) == []
    assert role.take_requests() == [Load(job="job", attempt=attempt(index)) for index in indices]


def loaded(role: ForwardRole, index: int) -> list[Effect]:
    return role.on_loaded("job", attempt(index), DATA, DATA, 0.0)


def offer(index: int) -> Send:
    return Send("shard-0", Offer(job="job", attempt=attempt(index), life=LIFE))


def grant(role: ForwardRole, index: int, number: int = 0, life: int = LIFE) -> list[Effect]:
    return role.on_message("shard-0", Grant(job="job", attempt=attempt(index), number=number, life=life), 0.0)


def decline(role: ForwardRole, index: int, reason: str, life: int = LIFE) -> list[Effect]:
    return role.on_message("shard-0", Decline(job="job", attempt=attempt(index), reason=reason, life=life), 0.0)


def ask(count: int) -> Send:
    return Send("coordinator", LeaseRequest(job="job", count=count))


def back(index: int, reason: str) -> Send:
    return Send("coordinator", LeaseReturn(job="job", attempt=attempt(index), reason=reason))


def test_an_assigned_worker_links_to_the_first_shard_and_asks_for_leases() -> None:
    role = ForwardRole(prefetch=2)
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.on_prepared("job", 3, 0.0) == [
        Connect("shard-0", "here:0"),
        Send("coordinator", Ready(job="job", block=-1, generation=1)),
        ask(5),
    ]


def test_data_that_is_missing_fails_the_job() -> None:
    role = ForwardRole()
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    effects = role.on_prepare_failed("job", "no data at /data", 0.0)
    assert effects == [Send("coordinator", Failure(job="job", message="no data at /data"))]


def test_only_one_offer_waits_and_tensors_follow_the_grant() -> None:
    role = ready_role()
    lease(role, 0, 1)
    assert loaded(role, 0) == [offer(0)]
    assert loaded(role, 1) == []
    effects = grant(role, 0, number=7)
    forward = Forward(job="job", attempt=attempt(0), number=7, life=LIFE, needed_from=4, inputs=DATA, targets=DATA)
    assert effects == [Send("shard-0", forward), offer(1)]


def test_a_lower_microbatch_takes_the_place_of_a_higher_one_that_waits() -> None:
    role = ready_role()
    lease(role, 1, 0)
    assert loaded(role, 1) == [offer(1)]
    assert loaded(role, 0) == [offer(0)]
    # The grant of the replaced offer was on its way: it is as good, and the newer offer still waits.
    assert len(grant(role, 1)) == 1
    assert grant(role, 0)[0].message.attempt == attempt(0)  # type: ignore[union-attr, misc]


def test_a_closed_number_makes_room_for_a_lease() -> None:
    role = ready_role()
    lease(role, 0, 1, 2)
    loaded(role, 0)
    grant(role, 0)
    closed = Closed(job="job", attempt=attempt(0), outcome=Outcome.APPLIED, life=LIFE, loss=0.5)
    assert role.on_message("shard-0", closed, 1.0) == [ask(3)]
    assert role.num_leases == 2


def test_a_declined_lease_goes_back_with_its_reason() -> None:
    role = ready_role()
    lease(role, 0, 1)
    loaded(role, 0)
    loaded(role, 1)
    assert decline(role, 0, "open") == [back(0, "open"), offer(1), ask(3)]
    assert decline(role, 1, "stopping") == [back(1, "stopping")]  # and nothing more is asked for
    assert role.on_tick(100.0) == []


def test_answers_to_the_run_before_are_not_taken_for_this_one() -> None:
    role = ready_role()
    lease(role, 0)
    loaded(role, 0)
    assert decline(role, 0, "stopping", life=LIFE - 1) == []
    assert grant(role, 0, life=LIFE - 1) == []
    assert len(grant(role, 0)) == 1


def test_samples_that_can_not_be_loaded_go_back_with_the_sentence() -> None:
    role = ready_role()
    lease(role, 0)
    assert role.on_load_failed("job", attempt(0), "file is torn", 0.0) == [back(0, "load-failed: file is torn")]


def test_room_is_asked_for_again_while_there_is_some() -> None:
    role = ready_role()
    assert role.on_tick(0.5) == []
    assert role.on_tick(1.0) == [ask(3)]
    assert role.on_tick(1.5) == []


def test_a_lost_first_shard_gets_a_new_link_and_what_was_sent_is_left_to_it() -> None:
    role = ready_role()
    lease(role, 0, 1, 2)
    for index in range(3):
        loaded(role, index)
    grant(role, 0)  # sent; 1 is offered, 2 is ready
    assert role.on_lost("shard-0", 1.0) == [back(0, "open")]
    assert [effect for effect in role.on_tick(1.9) if effect != ask(3)] == []
    assert role.on_tick(2.0)[:2] == [Connect("shard-0", "here:0"), offer(1)]


def test_two_evaluation_ranges_at_most_are_on_their_way() -> None:
    role = ready_role()
    ranges = tuple(Microbatch(0, start, start + 4) for start in (0, 4, 8))
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=6, ranges=ranges), 0.0)
    assert role.take_requests() == [LoadEvaluation(job="job", version=6, samples=one) for one in ranges[:2]]
    (effect,) = role.on_evaluation_loaded("job", 6, ranges[0], DATA, DATA, 0.0)
    assert isinstance(effect, Send)
    assert isinstance(effect.message, EvaluateForward)
    assert (effect.message.version, effect.message.life) == (6, LIFE)
    answer = Evaluated(job="job", version=6, start=0, stop=4, life=LIFE, loss=Metric(name="loss", total=2.0, count=4.0))
    assert role.on_message("shard-0", answer, 0.0) == [Send("coordinator", answer)]
    assert role.take_requests() == [LoadEvaluation(job="job", version=6, samples=ranges[2])]


def test_a_newer_evaluation_replaces_what_is_left_of_the_one_before() -> None:
    role = ready_role()
    old, new = Microbatch(0, 0, 4), Microbatch(0, 4, 8)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=2, ranges=(old,)), 0.0)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=4, ranges=(new,)), 0.0)
    assert role.on_evaluation_loaded("job", 2, old, DATA, DATA, 0.0) == []
    assert len(role.on_evaluation_loaded("job", 4, new, DATA, DATA, 0.0)) == 1


def test_an_unassigned_worker_forgets_the_job() -> None:
    role = ready_role()
    lease(role, 0)
    assert role.on_message("coordinator", Unassign(job="job"), 0.0) == [Send("coordinator", Unassigned(job="job"))]
    assert role.take_requests() == [Forget(job="job")]
    assert loaded(role, 0) == []
    assert role.num_leases == 0
