"""What reaches a block: tensors that fit it, from those who were asked for them. The rest is refused and harms nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerwise.errors import NotFoundError
from layerwise.ids import Attempt, Microbatch
from layerwise.job import parse_job
from layerwise.messages import (
    MAX_OFFERED_BYTES,
    Abort,
    BoundaryGradient,
    Closed,
    Evaluated,
    EvaluateForward,
    Failure,
    Forward,
    Grant,
    LeaseRequest,
    Message,
    NamedTensors,
    Offer,
    Outcome,
    PushGradient,
    Samples,
    TaskFinished,
    TaskRequest,
    Tensors,
)
from layerwise.probe import probe
from layerwise.profile import Profile
from layerwise.server.first_shard import MAX_UNFIT
from layerwise.server.frame_checks import FrameChecks
from layerwise.tasks import EvaluateTask
from tests.simulation.counting_block import activation, target
from tests.unit.test_shard_role import Bench, attempt, sent

torch.set_num_threads(1)

JOB = {
    "name": "x",
    "model": {"name": "mlp", "hidden": [6, 5]},
    "data": {"name": "digits", "batch": 12},
    "async": {"accumulation": 3},
}
ATTEMPT = Attempt(Microbatch(0, 0, 4))
COMMON: dict[str, Any] = {"job": "x-1", "attempt": ATTEMPT, "number": 0, "life": 1}


@pytest.fixture(scope="module")
def profile() -> Profile:
    found = probe(parse_job(JOB), device=torch.device("cpu"))
    assert Profile.from_json(found.to_json()) == found
    return found


def checks(profile: Profile, start: int, stop: int, *, detached: bool = True) -> FrameChecks:
    parameters = {1: {"weight": ("float32", (5, 6)), "bias": ("float32", (5,))}}
    return FrameChecks(
        profile, start=start, stop=stop, parameters=parameters, detached=detached, classes=10, tokens=None
    )


def forward(inputs: Any, targets: Any = None, **changes: Any) -> Forward:
    goals = torch.arange(4) if targets is None else targets
    message = Forward(**COMMON, needed_from=3, inputs=Tensors((inputs,)), targets=Tensors((goals,)))
    return replace(message, **changes)


def gradient(*items: Any) -> BoundaryGradient:
    return BoundaryGradient(**COMMON, gradients=Tensors(items, single=len(items) == 1))


def push(layer: int, names: tuple[str, ...], *items: Any) -> PushGradient:
    return PushGradient(**COMMON, layer=layer, revision=0, read=0, gradients=NamedTensors(names, items))


def finished(*items: Any) -> TaskFinished:
    return TaskFinished(**COMMON, gradients=Tensors(items, single=len(items) == 1))


def evaluate(inputs: Any, targets: Any, start: int = 0, stop: int = 4) -> EvaluateForward:
    return EvaluateForward(
        job="x-1", version=1, start=start, stop=stop, life=1, inputs=Tensors((inputs,)), targets=Tensors((targets,))
    )


def offered(inputs: Any, targets: Any = None, dropped: str = "") -> Offer:
    """An offer that brings what `forward` would."""
    message = forward(inputs, targets)
    samples = Samples(inputs=message.inputs, targets=message.targets, dropped=dropped)
    return Offer(job="x-1", attempt=message.attempt, life=1, samples=samples)


SAMPLES, HIDDEN, CLASSES = torch.zeros(4, 64), torch.zeros(4, 6), torch.arange(4)
NAMES = ("weight", "bias")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (0, forward(SAMPLES)),
        (0, forward(SAMPLES, torch.tensor([-100, 0, 9, 1]))),
        (0, offered(SAMPLES)),
        (0, replace(offered(SAMPLES), samples=None)),
        (0, forward(torch.zeros(2, 64), torch.arange(2), attempt=Attempt(Microbatch(0, 12, 14)))),
        (1, forward(HIDDEN)),
        (1, forward(torch.zeros(1, 6), torch.arange(1), attempt=Attempt(Microbatch(0, 12, 13)))),
        (0, gradient(HIDDEN)),
        (0, gradient(None)),
        (0, gradient(None, None, None)),
        (1, push(1, NAMES, torch.zeros(5, 6), torch.zeros(5))),
        (1, push(1, NAMES, torch.zeros(6, 5).t(), None)),
        (1, finished(HIDDEN)),
        (1, TaskFinished(**COMMON, gradients=None)),
        (0, evaluate(SAMPLES, CLASSES)),
        (1, evaluate(torch.zeros(3, 3), CLASSES)),
        (0, LeaseRequest(job="x-1", count=1)),
        (0, TaskRequest(job="x-1", life=1)),
    ],
)
def test_what_fits_passes(profile: Profile, start: int, message: Message) -> None:
    assert checks(profile, start, start + 1).fault(message) == ""


@pytest.mark.parametrize(
    ("start", "message", "words"),
    [
        (0, forward(torch.zeros(3, 64)), "input 0 is float32[3, 64], expected float32[4, 64] for 4 samples"),
        (0, forward(torch.zeros(4, 63)), "input 0 is float32[4, 63]"),
        (0, forward(torch.zeros(4, 64, 1)), "input 0 is float32[4, 64, 1]"),
        (0, forward(SAMPLES.double()), "input 0 is float64[4, 64]"),
        (0, forward(None), "input 0 is missing"),
        (0, replace(forward(SAMPLES), inputs=Tensors((SAMPLES, SAMPLES), single=False)), "2 inputs came, expected 1"),
        (0, replace(forward(SAMPLES), inputs=Tensors((SAMPLES,), single=False)), "the input is a tuple"),
        (0, forward(SAMPLES, CLASSES.float()), "target 0 is float32[4], expected int64[4]"),
        (0, forward(SAMPLES, torch.arange(5)), "target 0 is int64[5]"),
        (0, forward(SAMPLES, torch.tensor([0, 1, 2, 10])), "a class is 10, expected 0 to 9"),
        (0, forward(SAMPLES, torch.tensor([0, 1, 2, -1])), "a class is -1, expected 0 to 9"),
        (1, forward(SAMPLES), "input 0 is float32[4, 64], expected float32[4, 6]"),
        (1, forward(HIDDEN.half()), "input 0 is float16[4, 6]"),
        (1, forward(HIDDEN, torch.zeros(4)), "target 0 is float32[4]"),
        (0, gradient(torch.zeros(4, 7)), "gradient 0 is float32[4, 7], expected float32[4, 6]"),
        (0, gradient(HIDDEN, HIDDEN), "2 gradients came, expected 1"),
        (0, gradient(HIDDEN.bfloat16()), "gradient 0 is bfloat16[4, 6]"),
        (1, push(2, NAMES, None, None), "layer 2 is not in this block"),
        (1, push(-1, NAMES, None, None), "layer -1 is not in this block"),
        (1, push(1, ("bias", "weight"), None, None), "it names bias, weight, layer 1 trains weight, bias"),
        (1, push(1, (), *()), "it names nothing"),
        (1, push(1, NAMES, torch.zeros(6, 5), None), "the gradient of weight is float32[6, 5], the parameter float32[5, 6]"),
        (1, push(1, NAMES, torch.zeros(5, 6).double(), None), "the gradient of weight is float64[5, 6]"),
        (1, finished(torch.zeros(4, 5)), "gradient 0 is float32[4, 5], expected float32[4, 6]"),
        (0, offered(SAMPLES.double()), "input 0 is float64[4, 64]"),
        (0, offered(SAMPLES, torch.tensor([0, 1, 2, 10])), "a class is 10, expected 0 to 9"),
        (0, offered(SAMPLES, dropped="a torn file"), "a dropped microbatch came with tensors"),
        (0, evaluate(SAMPLES, CLASSES, 0, 5), "expected float32[5, 64] for 5 samples"),
        (0, evaluate(SAMPLES, CLASSES, 4, 4), "there are no validation samples 4 to 4"),
        (0, evaluate(SAMPLES, CLASSES, -4, 0), "there are no validation samples -4 to 0"),
        (0, evaluate(SAMPLES, CLASSES, 0, 1 << 62), "there are no validation samples"),
        (1, evaluate(HIDDEN, CLASSES.float()), "target 0 is float32[4]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(profile: Profile, start: int, message: Message, words: str) -> None:
    assert words in checks(profile, start, start + 1).fault(message)


@pytest.mark.parametrize("message", [TaskRequest(job="x-1", life=1), finished(HIDDEN), push(1, NAMES, None, None)])
def test_nobody_takes_tasks_of_a_job_without_detached_workers(profile: Profile, message: Message) -> None:
    found = checks(profile, 1, 2, detached=False).fault(message)
    assert found == "the job has no detached backward workers"


@pytest.mark.parametrize("start", [0, 1])
def test_a_microbatch_that_is_given_up_comes_without_tensors(profile: Profile, start: int) -> None:
    found = checks(profile, start, start + 1)
    nothing, something = Tensors.none(), Tensors((torch.zeros(4, 6),))
    given_up = Forward(**COMMON, needed_from=3, inputs=nothing, targets=nothing, dropped="a torn file")
    backwards = BoundaryGradient(**COMMON, gradients=nothing, dropped="a torn file")
    assert [found.fault(given_up), found.fault(backwards)] == ["", ""]
    assert found.fault(replace(given_up, inputs=something)) == "a dropped microbatch came with tensors"
    assert found.fault(replace(backwards, gradients=something)) == "a dropped microbatch came with gradients"


def test_sizes_that_depend_on_the_samples_themselves_are_not_held_against_anybody() -> None:
    job = {**JOB, "model": {"name": "mlp", "hidden": [6, 5], "batchnorm": True}}
    found = probe(parse_job(job), device=torch.device("cpu"))  # a single sample can't be run: no size is certain
    one = next(layer for layer in found.layers if layer.index == 0)
    assert one.outputs[0] is not None
    unknown = FrameChecks(found, start=1, stop=2, parameters={}, detached=False)
    assert unknown.fault(forward(torch.zeros(3, *one.output_shapes[0][1:]))) == ""
    assert "float64" in unknown.fault(forward(torch.zeros(4, 6).double()))


# --- what the role makes of it --------------------------------------------------------------------------------------


def granted(bench: Bench, index: int, worker: str = "forward-0") -> Grant:
    ((peer, grant),) = sent(bench.offer(index, worker), Grant)
    assert isinstance(grant, Grant)
    assert peer == worker
    return grant


def tensors_for(grant: Grant, bench: Bench) -> Forward:
    index = grant.attempt.microbatch.start
    return Forward(
        job="job", attempt=grant.attempt, number=grant.number, life=bench.place.life, needed_from=6,
        inputs=activation(index, -1), targets=target(index),
    )  # fmt: skip


def test_samples_that_do_not_fit_are_leased_again_and_training_goes_on() -> None:
    bench = Bench(0)
    bench.start()
    for index in range(4):
        for _ in range(MAX_UNFIT - 1):
            bad = granted(bench, index, "forward-1")
            effects = bench.role.on_unfit("forward-1", tensors_for(bad, bench), "input 0 is float64", 0.0)
            assert [one.number for _, one in sent(effects, Abort) if isinstance(one, Abort)] == [bad.number]
            bench.closed_by(1, index, bad.number, Outcome.ABORTED)
            ((peer, _),) = sent(bench.closed_by(2, index, bad.number, Outcome.ABORTED), Closed)
            assert peer == "forward-1"
        good = granted(bench, index, "forward-0")  # one good worker among bad ones
        bench.hears("forward-0", tensors_for(good, bench))
        bench.work()
        bench.boundary(index, good.number)
        bench.work()
        bench.closed_by(1, index, good.number)
        ((peer, closed),) = sent(bench.closed_by(2, index, good.number), Closed)
        assert isinstance(closed, Closed)
        assert (peer, closed.outcome) == ("forward-0", Outcome.APPLIED)
    assert bench.role.num_refused == 4 * (MAX_UNFIT - 1)
    assert not bench.role.failed


def test_a_job_whose_workers_all_send_what_does_not_fit_ends_with_that_sentence() -> None:
    bench = Bench(0)
    bench.start()
    effects = []
    for _ in range(MAX_UNFIT):
        assert not bench.role.failed
        bad = granted(bench, 0)
        effects = bench.role.on_unfit("forward-0", tensors_for(bad, bench), "input 0 is float64", 0.0)
        for block in (1, 2):
            bench.closed_by(block, 0, bad.number, Outcome.ABORTED)
    ((_, failure),) = sent(effects, Failure)
    assert isinstance(failure, Failure)
    assert "does not fit the job's model (input 0 is float64)" in failure.message


def whole(index: int, life: int) -> Offer:
    samples = Samples(inputs=activation(index, -1), targets=target(index))
    return Offer(job="job", attempt=attempt(index), life=life, samples=samples)


def test_samples_that_came_with_the_offer_are_computed_once_there_is_room() -> None:
    bench = Bench(0, window=2)
    bench.start()
    for index in range(3):
        ((_, grant),) = sent(bench.hears("forward-0", whole(index, bench.place.life)), Grant) or [(None, None)]
        assert (grant is None) == (index == 2)
        assert grant is None or (isinstance(grant, Grant) and grant.arrived)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    bench.closed_by(1, 0, 0)
    effects = bench.closed_by(2, 0, 0)
    ((_, grant),) = sent(effects, Grant)
    assert isinstance(grant, Grant)
    assert (grant.attempt, grant.number, grant.arrived) == (attempt(2), 2, True)
    assert [one.number for _, one in sent(bench.work(), Forward) if isinstance(one, Forward)] == [2]
    # Sent once more after all, they change nothing.
    assert bench.hears("forward-0", tensors_for(grant, bench)) == []
    assert len(bench.queue) == 0


def test_microbatches_of_one_update_are_computed_in_their_order_though_all_are_here_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Synchronously the second one is admitted when the first has arrived: it came before it on the queue."""
    bench = Bench(0, synchronous=True)
    pushed: list[int] = []
    push = bench.queue.push

    def spy(task: Any) -> None:
        pushed.append(task.number)
        push(task)

    monkeypatch.setattr(bench.queue, "push", spy)
    for index in (1, 0):
        bench.hears(f"forward-{index}", whole(index, bench.place.life))
    bench.start()
    assert pushed == [0, 1]


def test_an_offer_of_what_the_plan_does_not_cut_is_refused_also_where_its_samples_do_not_fit() -> None:
    bench = Bench(0)
    bench.start()
    offer = replace(whole(0, bench.place.life), attempt=Attempt(Microbatch(7, 1, 2), attempt(0).attempt))
    assert bench.role.on_unfit("forward-0", offer, "input 0 is float64", 0.0) == []
    assert (bench.role.num_open, bench.role.failed) == (0, False)


def test_samples_that_do_not_fit_cost_the_offer_its_number() -> None:
    bench = Bench(0)
    bench.start()
    effects = bench.role.on_unfit("forward-0", whole(0, bench.place.life), "input 0 is float64", 0.0)
    ((_, grant),) = sent(effects, Grant)
    ((_, abort),) = sent(effects, Abort)
    assert isinstance(grant, Grant)
    assert isinstance(abort, Abort)
    assert (grant.number, grant.arrived) == (abort.number, True)
    assert len(bench.queue) == 0


def test_samples_of_a_worker_that_is_lost_before_the_grant_are_forgotten() -> None:
    bench = Bench(0, window=2)
    bench.start()
    for index in range(3):
        bench.hears(f"forward-{index}", whole(index, bench.place.life))
    bench.role.on_lost("forward-2", 0.0)
    bench.work()
    bench.boundary(0, 0)
    bench.work()
    bench.closed_by(1, 0, 0)
    assert sent(bench.closed_by(2, 0, 0), Grant) == []
    assert bench.role.num_open == 1


def test_an_offer_with_more_than_may_wait_is_refused() -> None:
    bench = Bench(0)
    bench.start()
    large = Samples(inputs=Tensors((torch.zeros(MAX_OFFERED_BYTES // 4),)), targets=Tensors((torch.zeros(1),)))
    offer = replace(whole(0, bench.place.life), samples=large)
    assert bench.hears("forward-0", offer) == []
    assert (bench.role.num_refused, bench.role.num_open) == (1, 0)


def test_only_the_worker_that_was_granted_a_number_brings_its_samples() -> None:
    bench = Bench(0)
    bench.start()
    grant = granted(bench, 0)
    assert bench.hears("stranger", tensors_for(grant, bench)) == []
    assert bench.role.on_unfit("stranger", tensors_for(grant, bench), "input 0 is float64", 0.0) == []
    assert len(bench.queue) == 0
    assert bench.role.num_refused == 2
    bench.hears("forward-0", tensors_for(grant, bench))
    assert len(bench.queue) == 1


def test_an_unfit_message_of_another_life_gives_nothing_up() -> None:
    bench = Bench(0)
    bench.start()
    grant = granted(bench, 0)
    older = replace(tensors_for(grant, bench), life=bench.place.life - 1)
    assert bench.role.on_unfit("forward-0", older, "input 0 is float64", 0.0) == []
    bench.hears("forward-0", tensors_for(grant, bench))
    assert len(bench.queue) == 1
    assert attempt(0) == grant.attempt


def test_evaluations_of_cuts_that_are_not_held_are_forgotten() -> None:
    bench = Bench(0)
    bench.start()
    for version in range(1000):
        asked = EvaluateForward(
            job="job", version=version, start=0, stop=4, life=bench.place.life, inputs=Tensors((None,)), targets=Tensors((None,))
        )  # fmt: skip
        bench.hears("stranger", asked)
        task = bench.queue.try_pop()
        assert isinstance(task, EvaluateTask)
        assert bench.role.on_task_failed(task, NotFoundError("it is not held"), 0.0) == []
    late = Evaluated(job="job", version=999, start=0, stop=4, life=bench.place.life, loss=1.0, metrics=())
    assert bench.hears("shard-1", late) == [], "nobody waits for it any more"
    assert not bench.role.failed
