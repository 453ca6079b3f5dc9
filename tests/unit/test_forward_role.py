from __future__ import annotations

import pytest
import torch

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
    Hosting,
    Lease,
    LeaseKind,
    LeaseRequest,
    LeaseReturn,
    Metric,
    Offer,
    Outcome,
    Ready,
    Recall,
    Reroute,
    Samples,
    Tensors,
    Unassign,
    Unassigned,
)
from layerwise.roles import Connect, Disconnect, Effect, Send
from layerwise.worker.forward_requests import Forget, Load, LoadEvaluation, Prepare
from layerwise.worker.forward_role import ForwardRole

LIFE = 3
ROUTE = (
    BlockPlace(start=0, stop=2, shard="shard-0", address="here:0", life=LIFE),
    BlockPlace(start=2, stop=4, shard="shard-1", address="here:1", life=LIFE + 1),
)
ASSIGNMENT = Assignment(
    job="job",
    spec_json="{}",
    settings_json="{}",
    profile_json="{}",
    route=ROUTE,
    block=-1,
    cut=0,
    directory="",
    generation=1,
)
DATA = Tensors(("data",))


def attempt(index: int, number: int = 1) -> Attempt:
    return Attempt(Microbatch(0, index, index + 1), number)


def ready_role(window: int = 1, prefetch: int = 2, *, offered_bytes: int = -1) -> ForwardRole:
    """By default tensors follow the grant."""
    role = ForwardRole(prefetch=prefetch, offered_bytes=offered_bytes)
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.take_requests() == [Prepare(assignment=ASSIGNMENT)]
    role.on_prepared("job", window, 0.0)
    return role


def lease(role: ForwardRole, *indices: int) -> None:
    message = Lease(job="job", kind=LeaseKind.TRAIN, attempts=tuple(attempt(index) for index in indices))
    assert role.on_message("coordinator", message, 0.0) == []
    assert role.take_requests() == [Load(job="job", attempt=attempt(index)) for index in sorted(indices)]


def loaded(role: ForwardRole, index: int) -> list[Effect]:
    return role.on_loaded("job", attempt(index), DATA, DATA, 0.0)


def offer(index: int, samples: Samples | None = None) -> Send:
    return Send("shard-0", Offer(job="job", attempt=attempt(index), life=LIFE, samples=samples))


def grant(role: ForwardRole, index: int, number: int = 0, life: int = LIFE, *, arrived: bool = False) -> list[Effect]:
    message = Grant(job="job", attempt=attempt(index), number=number, life=life, arrived=arrived)
    return role.on_message("shard-0", message, 0.0)


def decline(role: ForwardRole, index: int, reason: str, life: int = LIFE) -> list[Effect]:
    return role.on_message("shard-0", Decline(job="job", attempt=attempt(index), reason=reason, life=life), 0.0)


def ask(count: int) -> Send:
    return Send("coordinator", LeaseRequest(job="job", count=count))


def back(index: int, reason: str) -> Send:
    return Send("coordinator", LeaseReturn(job="job", attempt=attempt(index), reason=reason))


def test_an_assigned_worker_links_to_the_first_shard_and_asks_for_leases() -> None:
    role = ForwardRole(prefetch=2, offered_bytes=-1)
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


def test_small_samples_come_along_with_the_offer() -> None:
    role = ready_role(offered_bytes=80)
    small, large = Tensors((torch.zeros(10),)), Tensors((torch.zeros(11),))
    lease(role, 0, 1)
    effects = role.on_loaded("job", attempt(0), small, small, 0.0)
    assert effects == [offer(0, Samples(inputs=small, targets=small))]
    assert role.on_loaded("job", attempt(1), large, small, 0.0) == []
    assert grant(role, 0, arrived=True) == [offer(1)]  # nothing more of the first one, and the second is too large
    (forward, *rest) = grant(role, 1)
    assert isinstance(forward, Send)
    assert isinstance(forward.message, Forward)
    assert forward.message.inputs is large
    assert rest == []


def test_a_grant_of_what_was_offered_whole_sends_nothing_whatever_became_of_the_lease() -> None:
    role = ready_role(window=1, prefetch=1, offered_bytes=1 << 20)
    samples = Samples(inputs=DATA, targets=DATA)
    lease(role, 1, 2)
    assert loaded(role, 2) == [offer(2, samples)]
    assert loaded(role, 1) == [offer(1, samples)]
    # An even lower one takes the room of the first: nothing of it is loaded any more, and its grant is on its way.
    message = Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(0),))
    assert role.on_message("coordinator", message, 0.0) == []
    assert role.take_requests() == [Load(job="job", attempt=attempt(0))]
    assert grant(role, 2, arrived=True) == []
    assert role.take_requests() == []
    assert loaded(role, 0) == [offer(0, samples)]
    closed = Closed(job="job", attempt=attempt(2), outcome=Outcome.APPLIED, life=LIFE, loss=0.5)
    role.on_message("shard-0", closed, 1.0)
    assert role.num_leases == 2


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


def test_what_is_leased_before_the_data_are_there_begins_with_them() -> None:
    """Evaluations were asked for at once: the shell had no data of the job, and the process ended."""
    role = ForwardRole(prefetch=2)
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    role.take_requests()
    samples = Microbatch(0, 0, 4)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=6, ranges=(samples,)), 0.0)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(0),)), 0.0)
    assert role.take_requests() == []
    role.on_prepared("job", 1, 1.0)
    assert role.take_requests() == [
        Load(job="job", attempt=attempt(0)),
        LoadEvaluation(job="job", version=6, samples=samples),
    ]


def test_an_unassigned_worker_forgets_the_job() -> None:
    role = ready_role()
    lease(role, 0)
    left = [Disconnect("shard-0"), Send("coordinator", Unassigned(job="job"))]
    assert role.on_message("coordinator", Unassign(job="job"), 0.0) == left
    assert role.take_requests() == [Forget(job="job")]
    assert loaded(role, 0) == []
    assert role.num_leases == 0


def test_a_worker_that_is_assigned_anew_leaves_what_it_has_offered_with_the_link() -> None:
    role = ready_role()
    lease(role, 0)
    loaded(role, 0)
    assert role.on_message("coordinator", ASSIGNMENT, 1.0) == [Disconnect("shard-0")]
    assert role.take_requests() == [Forget(job="job"), Prepare(assignment=ASSIGNMENT)]
    assert role.on_prepared("job", 1, 2.0)[0] == Connect("shard-0", "here:0")


# A new route ----------------------------------------------------------------------------------------------------------


def reroute(shard: str = "shard-0", life: int = LIFE, generation: int = 4) -> Reroute:
    first = BlockPlace(start=0, stop=2, shard=shard, address=f"there:{shard}", life=life)
    return Reroute(job="job", route=(first, ROUTE[1]), block=-1, generation=generation, durable=0)


def ready(generation: int) -> Send:
    return Send("coordinator", Ready(job="job", block=-1, generation=generation))


def test_a_new_route_gives_up_all_leases_and_is_answered_with_ready() -> None:
    role = ready_role()
    lease(role, 0, 1, 2)
    for index in range(3):
        loaded(role, index)
    grant(role, 0)  # one is sent, one offered, one ready
    effects = role.on_message("coordinator", reroute(), 5.0)
    assert effects == [Connect("shard-0", "there:shard-0"), ready(4), ask(3)]
    assert role.num_leases == 0
    assert role.on_lost("forward-9", 5.0) == []


def test_a_first_shard_that_was_replaced_is_left_and_only_the_new_one_s_life_is_answered() -> None:
    role = ready_role()
    lease(role, 0)
    effects = role.on_message("coordinator", reroute("shard-5", LIFE + 7), 5.0)
    assert effects[:2] == [Disconnect("shard-0"), Connect("shard-5", "there:shard-5")]
    lease(role, 1)
    (offered,) = loaded(role, 1)
    assert offered == Send("shard-5", Offer(job="job", attempt=attempt(1), life=LIFE + 7))
    granted = Grant(job="job", attempt=attempt(1), number=1, life=LIFE + 7)
    assert role.on_message("shard-0", granted, 5.0) == []
    (effect,) = role.on_message("shard-5", granted, 5.0)
    assert isinstance(effect, Send)
    assert isinstance(effect.message, Forward)
    assert (effect.peer, effect.message.life) == ("shard-5", LIFE + 7)


def test_data_that_were_loading_for_the_route_before_are_not_offered() -> None:
    role = ready_role()
    lease(role, 0)
    role.on_message("coordinator", reroute(), 5.0)
    assert loaded(role, 0) == []
    again = Attempt(Microbatch(0, 0, 1), 4001)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(again,)), 5.0)
    assert role.take_requests() == [Load(job="job", attempt=again)]
    assert role.on_loaded("job", again, DATA, DATA, 5.0) == [
        Send("shard-0", Offer(job="job", attempt=again, life=LIFE))
    ]


def test_a_worker_that_was_told_to_stop_asks_for_leases_again_on_a_new_route() -> None:
    role = ready_role()
    lease(role, 0)
    loaded(role, 0)
    decline(role, 0, "stopping")
    assert role.on_tick(50.0) == []
    assert ask(3) in role.on_message("coordinator", reroute(), 50.0)


def test_evaluations_of_the_route_before_are_given_up() -> None:
    role = ready_role()
    samples = Microbatch(0, 0, 4)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=6, ranges=(samples,)), 0.0)
    role.take_requests()
    role.on_message("coordinator", reroute(), 1.0)
    assert role.on_evaluation_loaded("job", 6, samples, DATA, DATA, 1.0) == []
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.EVALUATE, version=6, ranges=(samples,)), 1.0)
    assert role.take_requests() == [LoadEvaluation(job="job", version=6, samples=samples)]
    assert len(role.on_evaluation_loaded("job", 6, samples, DATA, DATA, 1.0)) == 1


def test_a_worker_that_waited_for_its_link_uses_that_of_the_new_route_at_once() -> None:
    role = ready_role()
    role.on_lost("shard-0", 1.0)
    assert Connect("shard-5", "there:shard-5") in role.on_message("coordinator", reroute("shard-5"), 1.1)
    assert [one for one in role.on_tick(9.0) if isinstance(one, Connect)] == []


def test_a_worker_whose_data_are_not_there_yet_answers_for_the_newest_route_once_they_are() -> None:
    role = ForwardRole(prefetch=2, offered_bytes=-1)
    role.on_message("coordinator", ASSIGNMENT, 0.0)
    assert role.on_message("coordinator", reroute("shard-5"), 0.5) == [Disconnect("shard-0")]
    assert role.on_prepared("job", 1, 1.0) == [Connect("shard-5", "there:shard-5"), ready(4), ask(3)]


def test_only_newer_routes_of_the_coordinator_count() -> None:
    role = ready_role()
    lease(role, 0)
    assert role.on_message("shard-0", reroute(), 1.0) == []
    assert role.on_message("coordinator", reroute(generation=1), 1.0) == []
    nowhere = Reroute(job="job", route=(), block=-1, generation=9, durable=0)
    assert role.on_message("coordinator", nowhere, 1.0) == []
    assert (
        role.on_message("coordinator", Reroute(job="other", route=ROUTE, block=-1, generation=9, durable=0), 1.0) == []
    )
    assert role.num_leases == 1


def test_what_a_worker_works_for_is_what_it_tells_a_coordinator_that_was_started_again() -> None:
    role = ready_role()
    assert role.hosting == (Hosting(job="job", block=-1, life=0, generation=1),)
    role.on_message("coordinator", reroute(), 1.0)
    assert role.hosting == (Hosting(job="job", block=-1, life=0, generation=4),)
    role.on_message("coordinator", Unassign(job="job"), 2.0)
    assert role.hosting == ()


# Leases for later -----------------------------------------------------------------------------------------------------


def test_leases_beyond_what_may_be_loaded_are_held_lowest_first_and_loaded_as_others_close() -> None:
    role = ready_role(window=1, prefetch=1)
    role.on_message(
        "coordinator",
        Lease(job="job", kind=LeaseKind.TRAIN, attempts=tuple(attempt(index) for index in (5, 1, 3, 2))),
        0.0,
    )
    assert role.take_requests() == [Load(job="job", attempt=attempt(index)) for index in (1, 2)]
    assert role.num_leases == 4
    loaded(role, 1)
    grant(role, 1)
    closed = Closed(job="job", attempt=attempt(1), outcome=Outcome.APPLIED, life=LIFE)
    role.on_message("shard-0", closed, 1.0)
    assert role.take_requests() == [Load(job="job", attempt=attempt(3))]


def test_a_loaded_microbatch_makes_room_for_one_that_comes_before_it() -> None:
    """Simulated seed 4031: all places held what had to wait for what was leased after it."""
    role = ready_role(window=1, prefetch=1)
    lease(role, 5, 6)
    loaded(role, 5)
    loaded(role, 6)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(3), attempt(7))), 0.0)
    assert role.take_requests() == [Load(job="job", attempt=attempt(3))]
    assert role.num_leases == 4
    assert loaded(role, 3) == [offer(3)]
    assert role.take_requests() == []


def test_a_microbatch_makes_room_once_it_is_loaded() -> None:
    role = ready_role(window=1, prefetch=1)
    lease(role, 5, 6)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(3),)), 0.0)
    assert loaded(role, 5) == [offer(5)]
    assert role.take_requests() == []
    assert loaded(role, 6) == []
    assert role.take_requests() == [Load(job="job", attempt=attempt(3))]


@pytest.mark.parametrize("reload", ["once granted", "before the grant"])
def test_what_made_room_while_its_grant_was_on_its_way_is_loaded_again_and_sent(reload: str) -> None:
    role = ready_role(window=1, prefetch=1)
    lease(role, 5, 6)
    assert loaded(role, 5) == [offer(5)]
    loaded(role, 6)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(3), attempt(4))), 0.0)
    assert role.take_requests() == [Load(job="job", attempt=attempt(3))]
    assert loaded(role, 3) == [offer(3)]
    assert role.take_requests() == [Load(job="job", attempt=attempt(4))]  # 5 makes room
    loaded(role, 4)
    if reload == "before the grant":
        decline(role, 3, "unneeded")
        decline(role, 4, "unneeded")
        assert grant(role, 5) == []
        assert role.take_requests() == [Load(job="job", attempt=attempt(index)) for index in (5, 6)]
    else:
        assert grant(role, 5) == []
        assert role.take_requests() == [Load(job="job", attempt=attempt(5))]
    sent, *_ = loaded(role, 5)
    assert isinstance(sent, Send)
    assert isinstance(sent.message, Forward)
    assert (sent.message.attempt, sent.message.inputs) == (attempt(5), DATA)
    assert grant(role, 5) == []  # nothing is sent twice


def test_a_grant_ends_with_the_link_that_it_came_over() -> None:
    """Sent under it the samples would be refused, and their lease be held for ever."""
    role = ready_role(window=1, prefetch=1)
    lease(role, 5, 6)
    loaded(role, 5)
    loaded(role, 6)
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(3), attempt(4))), 0.0)
    loaded(role, 3)
    loaded(role, 4)  # 5 has made room
    decline(role, 3, "unneeded")
    decline(role, 4, "unneeded")
    grant(role, 5)
    role.on_lost("shard-0", 1.0)
    assert loaded(role, 5) == []
    assert offer(5) in role.on_tick(2.0)


def test_what_is_urgent_comes_before_what_is_lower() -> None:
    role = ready_role(window=1, prefetch=1)
    lease(role, 0, 1)
    assert loaded(role, 0) == [offer(0)]
    loaded(role, 1)
    urgent = Lease(job="job", kind=LeaseKind.TRAIN, attempts=(attempt(9), attempt(8)), urgent=True)
    role.on_message("coordinator", urgent, 0.0)
    assert role.take_requests() == [Load(job="job", attempt=attempt(8))]
    assert loaded(role, 8) == [offer(8)]
    assert role.take_requests() == [Load(job="job", attempt=attempt(9))]
    assert loaded(role, 9) == []


def test_a_recall_brings_back_what_is_not_being_loaded() -> None:
    role = ready_role(window=1, prefetch=1)
    attempts = tuple(attempt(index) for index in (0, 1, 2, 3))
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=attempts), 0.0)
    role.take_requests()
    assert role.on_message("coordinator", Recall(job="job"), 1.0) == [back(2, "recalled"), back(3, "recalled")]
    assert role.num_leases == 2
    assert role.on_message("coordinator", Recall(job="job"), 1.0) == []


def test_leases_held_for_later_are_given_up_with_a_new_route() -> None:
    role = ready_role(window=1, prefetch=1)
    attempts = tuple(attempt(index) for index in (0, 1, 2, 3))
    role.on_message("coordinator", Lease(job="job", kind=LeaseKind.TRAIN, attempts=attempts), 0.0)
    role.on_message("coordinator", reroute(), 1.0)
    assert role.num_leases == 0
    assert role.on_message("coordinator", Recall(job="job"), 1.0) == []
