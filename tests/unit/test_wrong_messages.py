"""Messages that decode well and make no sense, from members and from strangers: no role ever raises an exception.

An exception in a role ends its process. A stranger changes nothing at all; a member that talks nonsense may cost its job
(with a sentence), and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.ids import Attempt, Microbatch
from layerwise.messages import (
    Assignment,
    BlockPlace,
    Hello,
    Lease,
    LeaseKind,
    Message,
    NamedTensors,
    Offer,
    Probed,
    Ready,
    Role,
    StartTraining,
    Tensors,
)
from layerwise.roles import Send
from layerwise.server.metrics import coordinator_metrics
from layerwise.worker.backward_role import BackwardRole
from layerwise.worker.forward_role import ForwardRole
from tests.simulation.counting_block import activation, gradient, target
from tests.unit.played_cluster import PlayedCluster
from tests.unit.test_coordinator_role import cluster, hold_training
from tests.unit.test_shard_role import PLAN, Bench

MESSAGES = typing.get_args(Message)
INT64 = (1 << 63) - 1

numbers = st.integers(-2, 12) | st.sampled_from((100, 1 << 31, 1 << 40, INT64, -INT64 - 1))
floats = st.sampled_from((0.0, 1.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan")))
DOCUMENTS = (
    "", "null", "[]", "{}", "[1]", "3", '"x"', "{", "nan", "[" * 5000, '{"a": ' * 2000,
    '{"watermark": 0, "above": [], "dropped": []}',
    '{"watermark": 2, "above": [4], "dropped": [4]}',
    '{"watermark": 9223372036854775807, "above": [], "dropped": []}',
    '{"watermark": 0, "above": [9223372036854775807], "dropped": []}',
    '{"watermark": -1, "above": [], "dropped": []}',
    '{"watermark": true, "above": {}, "dropped": null}',
    '{"layers": [], "num_train_samples": 1, "num_validation_samples": 1, "microbatch_samples": 1, "input_bytes": 1}',
    '{"layers": [{}], "num_train_samples": "x"}',
)  # fmt: skip
indices = st.integers(0, PLAN.num_microbatches - 1)
microbatches = indices.map(PLAN.microbatch) | st.sampled_from(
    (Microbatch(0, 0, 2), Microbatch(0, 7, 9), Microbatch(INT64, 0, 1), Microbatch(0, 0, INT64), Microbatch(0, INT64 - 1, INT64))
)  # fmt: skip
tensors = (
    indices.map(lambda index: activation(index, -1))
    | indices.map(lambda index: activation(index, 1))
    | indices.map(lambda index: gradient(index, 3))
    | indices.map(target)
    | st.sampled_from((Tensors((None,)), Tensors((), single=False), Tensors((None, None), single=False)))
)


@functools.cache
def values(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of a field's type; those that name something name it rightly as often as not.

    The same object for the same field: making a strategy takes longer than drawing from it.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Microbatch:
        return microbatches
    if hint is Attempt:
        return st.builds(Attempt, microbatches, st.integers(-1, 3))
    if hint is Tensors:
        return tensors
    if hint is NamedTensors:
        return st.sampled_from(
            (NamedTensors((), ()), NamedTensors(("w",), (None,)), NamedTensors(("a", "b"), (None, None)))
        )
    if hint is int:
        return numbers
    if hint is float:
        return floats
    if hint is bool:
        return st.booleans()
    if hint is str:
        if name == "job":
            return st.sampled_from(("job", "toy-1", "toy-2", ""))
        if name.endswith("_json"):
            return st.sampled_from(DOCUMENTS)
        return st.sampled_from(
            ("", "x", "shard-0", "applied", "open", "stopping", "order", "load-failed: x", "\n", "y" * 1000)
        )
    if origin is types.UnionType:
        return st.one_of(*(st.none() if one is types.NoneType else values(one, name) for one in arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0], name), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(one, name) for one in arguments))
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    hints = typing.get_type_hints(hint)
    return st.builds(hint, **{field.name: values(hints[field.name], field.name) for field in dataclasses.fields(hint)})


def said(*but: type[Any]) -> st.SearchStrategy[Message]:
    """Any message but those."""
    return st.sampled_from([cls for cls in MESSAGES if cls not in but]).flatmap(lambda cls: values(cls, ""))


def training() -> tuple[PlayedCluster, str]:
    """A job that trains and waits for a worker that does nothing."""
    played = cluster(forward=2)
    played.hold = hold_training
    job = played.submit()
    assert played.state(job) == "running"
    return played, job


def look(played: PlayedCluster, job: str) -> str:
    """Everything that anybody may ask of the role; gives the job's state."""
    document = played.role.job(job)
    json.dumps(document)
    json.dumps(played.role.nodes(played.now))
    for family in coordinator_metrics(played.role, played.now):
        assert family.name.startswith("layerwise_")
    return str(document["state"])


# The coordinator ------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.lists(said(Hello), min_size=1, max_size=10))
def test_a_stranger_changes_nothing_at_the_coordinator(messages: list[Message]) -> None:
    played, job = training()
    before = played.role.job(job)
    for message in messages:
        assert played.role.on_message("stranger", message, played.now) == []
    assert played.role.job(job) == before
    assert look(played, job) == "running"


@settings(max_examples=200)
@given(st.sampled_from(("shard-0", "shard-1", "forward-0", "forward-1")), st.lists(said(Hello), min_size=1, max_size=6))
def test_a_member_that_talks_nonsense_costs_its_job_at_most(name: str, messages: list[Message]) -> None:
    played, job = training()
    for message in messages:
        played.perform(played.role.on_message(name, message, played.now))
        played.run()
        state = look(played, job)
        assert state in ("running", "failed", "done", "stopping", "cancelled")
        assert "\n" not in played.role.job(job)["message"].strip()
    played.perform(played.role.on_tick(played.now + 1.0))
    played.run()
    look(played, job)


@settings(max_examples=100)
@given(st.lists(said(Hello), min_size=1, max_size=4), st.booleans())
def test_nonsense_while_a_job_is_prepared_costs_that_job_at_most(messages: list[Message], probed: bool) -> None:
    played = cluster()
    played.silent = {"shard-1"} if probed else {"shard-0"}
    job = played.submit()
    for name in ("shard-0", "shard-1", "forward-0"):
        for message in messages:
            played.perform(played.role.on_message(name, message, played.now))
            played.run()
            look(played, job)


@settings(max_examples=60)
@given(st.lists(values(Hello, ""), min_size=1, max_size=20), st.sampled_from(("stranger", "shard-0", "forward-0", "x")))
def test_hellos_without_end_are_borne(hellos: list[Hello], name: str) -> None:
    played, job = training()
    for hello in hellos:
        for said_name in (hello.name, name):
            played.perform(played.role.on_message(name, dataclasses.replace(hello, name=said_name), played.now))
            played.run()
    look(played, job)
    assert len(played.role.members) <= 5


# A block ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(0, 2), st.lists(said(Offer), min_size=1, max_size=10))
def test_a_stranger_changes_nothing_at_a_block(block: int, messages: list[Message]) -> None:
    bench = Bench(block)
    bench.start()
    before = bench.role.describe()
    for message in messages:
        if type(message).__name__ in ("EvaluateForward", "TaskRequest"):
            continue  # every worker may ask
        message = dataclasses.replace(message, **({"life": bench.place.life} if hasattr(message, "life") else {}))
        assert bench.hears("stranger", message) == []
    assert bench.role.describe() == before
    assert not bench.role.failed
    assert len(bench.queue) == 0


@settings(max_examples=250)
@given(
    st.integers(0, 2),
    st.lists(
        st.tuples(st.sampled_from(("shard-0", "shard-1", "shard-2", "coordinator", "forward-0")), said()), max_size=12
    ),
    st.booleans(),
)
def test_no_message_raises_an_exception_at_a_block(block: int, heard: list[tuple[str, Message]], started: bool) -> None:
    bench = Bench(block)
    if started:
        bench.start()
    for peer, message in heard:
        if hasattr(message, "job"):
            message = dataclasses.replace(message, job="job")
        if hasattr(message, "life"):
            message = dataclasses.replace(message, life=bench.place.life)
        effects = bench.hears(peer, message)
        assert all(isinstance(effect.peer, str) for effect in effects if isinstance(effect, Send))
        bench.role.on_tick(bench.now)
    bench.role.on_lost("forward-0", bench.now)


# A worker ---------------------------------------------------------------------------------------------------------


def assignment(job: str, block: int) -> Assignment:
    route = tuple(
        BlockPlace(start=2 * one, stop=2 * one + 2, shard=f"shard-{one}", address=f"here:{one}", life=one + 1)
        for one in range(3)
    )
    return Assignment(
        job=job,
        spec_json="{}",
        settings_json="{}",
        profile_json="{}",
        route=route,
        block=block,
        cut=0,
        directory="",
        generation=1,
    )


def forward_worker() -> ForwardRole:
    role = ForwardRole()
    role.on_message("coordinator", assignment("job", -1), 0.0)
    role.on_prepared("job", 3, 0.0)
    lease = Lease(job="job", kind=LeaseKind.TRAIN, attempts=(Attempt(PLAN.microbatch(0)), Attempt(PLAN.microbatch(1))))
    role.on_message("coordinator", lease, 0.0)
    role.take_requests()
    role.on_loaded("job", Attempt(PLAN.microbatch(0)), activation(0, -1), target(0), 0.0)
    return role


def backward_worker() -> BackwardRole:
    role = BackwardRole()
    role.on_message("coordinator", assignment("job", 1), 0.0)
    role.on_built("job", 0.0)
    role.take_requests()
    return role


WORKERS = {"forward": forward_worker, "backward": backward_worker}


@settings(max_examples=100)
@given(st.sampled_from(sorted(WORKERS)), st.lists(said(), min_size=1, max_size=8))
def test_a_stranger_changes_nothing_at_a_worker(kind: str, messages: list[Message]) -> None:
    role = WORKERS[kind]()
    before = role.describe()
    for message in messages:
        assert role.on_message("stranger", message, 0.0) == []
        assert role.take_requests() == []
    assert role.describe() == before


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(WORKERS)),
    st.lists(st.tuples(st.sampled_from(("coordinator", "shard-0", "shard-1")), said(Assignment)), max_size=12),
)
def test_no_message_raises_an_exception_at_a_worker(kind: str, heard: list[tuple[str, Message]]) -> None:
    role = WORKERS[kind]()
    for now, (peer, message) in enumerate(heard):
        role.on_message(peer, dataclasses.replace(message, job="job") if hasattr(message, "job") else message, 0.0)
        role.take_requests()
        role.on_tick(float(now))
    role.on_lost("shard-0", 99.0)
    role.describe()


@pytest.mark.parametrize("role", list(Role))
def test_a_name_that_is_not_the_link_s_is_not_let_in(role: Role) -> None:
    played, job = training()
    hello = Hello(role=role, name="shard-0", address="unix:/x", device="cpu", host="h", pid=1, version="1")
    played.perform(played.role.on_message("stranger", hello, played.now))
    assert look(played, job) == "running"
    assert {node["name"] for node in played.role.nodes(played.now)} == {"shard-0", "shard-1", "forward-0", "forward-1"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_a_profile_that_is_none_fails_its_job_with_a_sentence(document: str) -> None:
    played = cluster()
    played.silent = {"shard-0"}
    job = played.submit()
    played.say("shard-0", Probed(job=job, profile_json=document))
    assert look(played, job) == "failed"
    assert 0 < len(played.role.job(job)["message"]) < 2000


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
@pytest.mark.parametrize("number", [0, 1, 2, 3, 100_000])
def test_a_set_that_is_none_fails_its_job_with_a_sentence(document: str, number: int) -> None:
    played = cluster()
    played.silent = {"shard-1"}
    job = played.submit()
    assert look(played, job) == "preparing"
    played.say("shard-1", Ready(job=job, generation=1, block=1, applied_json=(document,) * number, version=0))
    state, message = look(played, job), played.role.job(job)["message"]
    sound = json.loads(document) if number and document.endswith('"dropped": []}') else None
    if state != "failed":
        assert sound is None or sound["watermark"] == 0
    assert len(message) < 2000


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_a_start_with_a_set_that_is_none_is_refused(document: str) -> None:
    bench = Bench(0)
    bench.hears("coordinator", StartTraining(job="job", done_json=document))
    bench.hears("coordinator", StartTraining(job="job", done_json='{"watermark": 0, "above": []}', held_json=document))
    assert not bench.role.failed
