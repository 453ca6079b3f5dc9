from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.errors import NotFiniteError, NotFoundError, NotOwnerError, RejectedError, WrongLifeError
from layerwise.events import AbortEvent, AccumulateEvent, ForwardEvent, WeightMode
from layerwise.gradient_sum import first_not_finite
from layerwise.ids import Attempt
from layerwise.messages import NamedTensors, PushGradient, Tensors
from layerwise.tasks import ApplyTask, BackwardTask, DropResult, EvaluateTask, ForwardTask, run_to_end
from tests.integration.own_code import BecomesSteep
from tests.unit.pipeline import OPTIMIZERS, Pipeline, assert_same, plain_loop

WIDTH = 12


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def samples(count: int = 20) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.randn(count, WIDTH)], torch.randint(0, 5, (count,))


def normalised_model() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)),
        nn.Dropout(0.3),
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh()),
        nn.Linear(16, 5),
    ]


# Window 1 is plain training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("splits", [(), (2,), (1, 3)])
def test_window_one_equals_the_plain_loop_bit_for_bit(
    optimizer: str, accumulation: int, splits: tuple[int, ...]
) -> None:
    modules = normalised_model()
    inputs, targets = samples()
    pipeline = Pipeline(
        modules,
        inputs,
        targets,
        optimizer=OPTIMIZERS[optimizer],
        accumulation=accumulation,
        splits=splits,
        num_updates=7,
    )
    losses = pipeline.train()
    expected, expected_losses = plain_loop(pipeline, modules)
    assert losses == expected_losses
    assert_same(pipeline.state(), expected)


@pytest.mark.parametrize("mode", [WeightMode.STASHED, WeightMode.RECOMPUTE])
def test_every_weight_mode_equals_the_plain_loop_at_window_one(mode: WeightMode) -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(), accumulation=4, splits=(2,), mode=mode, optimizer=OPTIMIZERS["muon"])
    pipeline.train()
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])
    assert all(layer.num_stashes == 0 for block in pipeline.blocks for layer in block.layers)


def backward_in_turn(pipeline: Pipeline, index: int) -> bool:
    """The backward pass of two blocks; whether the lower one computed while the upper one still had updates to make."""
    lower, upper = pipeline.blocks
    attempt, versions = pipeline.attempt(index), [layer.ledger.version for layer in upper.layers]
    steps = upper.backward(BackwardTask(attempt=attempt, number=index, gradients=None))
    early = False
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            gradients = end.value.gradients
            break
        if step is not None:
            assert not early, "it is handed on once"
            early = True
            assert [layer.ledger.version for layer in upper.layers] == versions
            taken = [one.event.layer for one in pipeline.events.records if isinstance(one.event, AccumulateEvent)]
            assert taken[-3:] == [4, 3, 2], "every layer has written down what the block before computes with"
            run_to_end(lower.backward(BackwardTask(attempt=attempt, number=index, gradients=step.gradients)))
    assert early == (gradients is None)
    if not early:
        run_to_end(lower.backward(BackwardTask(attempt=attempt, number=index, gradients=gradients)))
    return early


@pytest.mark.parametrize("mode", list(WeightMode))
def test_the_input_gradient_is_handed_on_before_the_updates_are_made(mode: WeightMode) -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(16), accumulation=2, splits=(2,), mode=mode, optimizer=OPTIMIZERS["muon"])
    for block in pipeline.blocks:
        block.updates_last = True
    early = []
    for index in range(pipeline.plan.num_microbatches):
        pipeline.forward(index)
        early.append(backward_in_turn(pipeline, index))
    assert early == [False, True] * 4, "only where an update falls due"
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])


def test_updates_that_were_left_for_later_are_made_whatever_happens_on_the_way() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,))
    upper = pipeline.blocks[1]
    upper.updates_last = True
    pipeline.forward(0)
    upper.layers[0].abort(pipeline.attempt(0))
    with pytest.raises(RejectedError, match="not open"):
        run_to_end(upper.backward(BackwardTask(attempt=pipeline.attempt(0), number=0, gradients=None)))
    assert [layer.ledger.version for layer in upper.layers] == [0, 1, 1]
    pipeline.forward(1)  # no layer is locked any more
    upper.backward(BackwardTask(attempt=pipeline.attempt(1), number=1, gradients=None)).close()
    assert upper.drop(pipeline.attempt(1), "given up").missing_from == 2


def test_an_update_that_fails_leaves_no_layer_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,))
    upper = pipeline.blocks[1]
    upper.updates_last = True

    def fail(decision: object) -> None:
        raise RuntimeError("no more memory")

    pipeline.forward(0)
    monkeypatch.setattr(upper.layers[1], "_update", fail)
    with pytest.raises(RuntimeError, match="no more memory"):
        run_to_end(upper.backward(BackwardTask(attempt=pipeline.attempt(0), number=0, gradients=None)))
    assert [layer.ledger.version for layer in upper.layers] == [1, 0, 1]
    for layer in upper.layers:
        with layer.compute.lock.exclusive():
            pass


def test_clipping_and_position_order_equal_the_plain_loop() -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(), accumulation=2, clip=0.05, position_order=True, splits=(1,))
    pipeline.train()
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])


def test_detached_workers_equal_the_plain_loop_and_pull_only_what_moved() -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(), accumulation=2, splits=(2,), mode=WeightMode.RECOMPUTE)
    workers = pipeline.detached_workers()
    pulled = []
    for index in range(pipeline.plan.num_microbatches):
        pipeline.forward(index)
        tasks = pipeline.detached_backward(index, workers)
        pulled.append(sum(len(task.states) for task in tasks))
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])
    assert pulled[:4] == [5, 0, 5, 0]


def test_synchronous_sums_do_not_depend_on_the_order_of_arrival() -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(16), accumulation=4, position_order=True, num_updates=2)
    for first in (0, 4):
        for index in range(first, first + 4):
            pipeline.forward(index)
        for index in (first + 2, first, first + 3, first + 1):
            pipeline.backward(index)
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])


# Which weights a backward pass reads --------------------------------------------------------------------------------


def two_linear(mode: WeightMode, depth: int = 2) -> Pipeline:
    modules = [nn.Linear(WIDTH, WIDTH, bias=False).double() for _ in range(depth - 1)]
    inputs = [torch.randn(8, WIDTH, dtype=torch.float64)]
    modules.append(nn.Linear(WIDTH, 5, bias=False).double())
    return Pipeline(modules, inputs, torch.randint(0, 5, (8,)), batch=4, mode=mode, num_updates=3)


def gradients(pipeline: Pipeline, change: float) -> list[torch.Tensor]:
    """Microbatch 0's gradients, with the last layer's weights moved between its forward and its backward pass."""
    found: dict[int, torch.Tensor] = {}
    block = pipeline.blocks[0]
    for layer in block.layers:
        take = layer.take

        def noted(attempt, gradients, *, layer=layer, take=take, **how):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202
            found[layer.index] = gradients[0].clone()
            return take(attempt, gradients, **how)

        layer.take = noted  # type: ignore[method-assign]
    pipeline.forward(0)
    with torch.no_grad():
        pipeline.modules[-1].weight.data.add_(change)  # type: ignore[union-attr, operator]
    pipeline.backward(0)
    return [found[index] for index in sorted(found)]


def test_latest_weights_differ_from_stashed_ones_as_the_chain_rule_says() -> None:
    torch.manual_seed(5)
    latest_pipeline = two_linear(WeightMode.LATEST)
    torch.manual_seed(5)
    stashed_pipeline = two_linear(WeightMode.STASHED)
    x = latest_pipeline.inputs[0][:4]
    logits = (x @ latest_pipeline.modules[0].weight.T @ latest_pipeline.modules[1].weight.T).detach().requires_grad_()
    nn.functional.cross_entropy(logits, latest_pipeline.targets[:4]).backward()  # type: ignore[no-untyped-call]
    error = logits.grad
    assert error is not None
    change = 0.25
    latest, stashed = gradients(latest_pipeline, change), gradients(stashed_pipeline, change)
    moved = torch.full((5, WIDTH), change, dtype=torch.float64)
    assert torch.allclose(latest[0] - stashed[0], moved.T @ error.T @ x, rtol=0, atol=1e-12)
    assert torch.equal(latest[1], stashed[1])


def test_with_one_layer_the_weight_mode_makes_no_difference() -> None:
    torch.manual_seed(5)
    latest = two_linear(WeightMode.LATEST, depth=1)
    torch.manual_seed(5)
    stashed = two_linear(WeightMode.STASHED, depth=1)
    assert torch.equal(gradients(latest, 0.5)[0], gradients(stashed, 0.5)[0])


def test_without_an_update_in_between_all_weight_modes_give_the_same_bits() -> None:
    modules = normalised_model()
    inputs, targets = samples()
    states = []
    for mode in WeightMode:
        pipeline = Pipeline(modules, inputs, targets, accumulation=4, mode=mode, splits=(2,), num_updates=1)
        for index in range(4):
            pipeline.forward(index)
        for index in range(4):
            pipeline.backward(index)
        states.append(pipeline.state())
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_stashed_weights_are_shared_by_passes_of_one_version_and_freed_with_the_last() -> None:
    pipeline = two_linear(WeightMode.STASHED)
    block = pipeline.blocks[0]
    pipeline.forward(0)
    pipeline.forward(1)
    assert [layer.num_stashes for layer in block.layers] == [1, 1]
    pipeline.backward(0)
    pipeline.forward(2)
    assert [layer.num_stashes for layer in block.layers] == [2, 2]
    pipeline.backward(1)
    assert [layer.num_stashes for layer in block.layers] == [1, 1]
    block.abort(pipeline.attempt(2))
    assert [layer.num_stashes for layer in block.layers] == [0, 0]


def test_a_layer_with_derived_weights_recomputes_under_latest_and_the_log_says_so() -> None:
    torch.manual_seed(5)
    modules = [nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 5)]
    pipeline = Pipeline(modules, *samples(), flags={0: {"derived_weights": True}}, num_updates=2)
    pipeline.forward(0)
    pipeline.forward(1)
    x, labels = (one.items[0] for one in pipeline.samples(1))
    logits = pipeline.modules[1](pipeline.modules[0](x)).detach().requires_grad_()
    (error,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), [logits])
    pipeline.backward(0)
    before = [one.detach().clone() for one in pipeline.modules[0].parameters()]
    new = pipeline.modules[0](x)
    flowing = error @ pipeline.modules[1].weight.detach()  # type: ignore[operator]
    wanted = torch.autograd.grad([new], list(pipeline.modules[0].parameters()), [flowing])
    pipeline.backward(1)
    for old, gradient, one in zip(before, wanted, pipeline.modules[0].parameters(), strict=True):
        assert torch.allclose(one, old - 0.1 * gradient, rtol=0, atol=1e-6)
    records = [one.event for one in pipeline.events.records]
    modes = [(one.layer, one.mode) for one in records if isinstance(one, AccumulateEvent)]
    assert modes == [(1, WeightMode.LATEST), (0, WeightMode.RECOMPUTE)] * 2


def test_stashed_weights_need_no_recomputation_of_derived_ones() -> None:
    modules = [nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), nn.Linear(WIDTH, 5)]
    flags = {0: {"derived_weights": True}}
    pipeline = Pipeline(modules, *samples(), flags=flags, num_updates=2, mode=WeightMode.STASHED)
    pipeline.forward(0)
    pipeline.forward(1)
    pipeline.backward(0)
    pipeline.backward(1)
    taken = [one.event for one in pipeline.events.records if isinstance(one.event, AccumulateEvent)]
    assert [(one.mode, one.base, one.read) for one in taken] == [(WeightMode.STASHED, 0, 0)] * 6


# Buffers ------------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its forward passes in an integer buffer, in place, and uses the count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x * self.weight / self.passes + self.average


def counting_model() -> list[nn.Module]:
    return [Counting(), nn.Linear(WIDTH, WIDTH), Counting(), nn.Linear(WIDTH, 5)]


@pytest.mark.parametrize("mode", list(WeightMode))
def test_buffers_are_written_once_a_microbatch_whatever_runs_again(mode: WeightMode) -> None:
    pipeline = Pipeline(counting_model(), *samples(), mode=mode, splits=(2,), num_updates=3)
    pipeline.forward(0)
    for block in reversed(pipeline.blocks):
        block.abort(pipeline.attempt(0))
    pipeline.forward(0, attempt=2)
    pipeline.forward(1)
    pipeline.backward(0, attempt=2)
    pipeline.backward(1)
    buffers = {name: one for name, one in pipeline.state().items() if name.endswith("passes")}
    assert {name: int(one) for name, one in buffers.items()} == {"buffer:0.passes": 2, "buffer:2.passes": 2}
    writes = [
        (one.event.layer, one.event.attempt.attempt)
        for one in pipeline.events.records
        if isinstance(one.event, ForwardEvent) and one.event.buffers and one.event.attempt.microbatch.start == 0
    ]
    assert writes == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_in_place_integer_buffers_equal_the_plain_loop() -> None:
    modules = counting_model()
    pipeline = Pipeline(modules, *samples(), num_updates=4, mode=WeightMode.RECOMPUTE)
    pipeline.train()
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])


def test_a_recomputed_pass_reads_the_buffers_that_its_forward_pass_read() -> None:
    latest = Pipeline(counting_model(), *samples(), accumulation=4, num_updates=1)
    torch.manual_seed(3)
    again = Pipeline(counting_model(), *samples(), accumulation=4, num_updates=1, mode=WeightMode.RECOMPUTE)
    for pipeline in (latest, again):
        for index in range(4):
            pipeline.forward(index)
        for index in range(4):
            pipeline.backward(index)
    assert_same(again.state(), latest.state())


# Shapes of models ---------------------------------------------------------------------------------------------------


class Fork(nn.Module):
    """Passes its input on beside what it makes of it, and something that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, torch.Tensor]:
        y = self.linear(x * self.temperature) * self.frozen
        return y, x, y, None, torch.arange(x.shape[0])


class Join(nn.Module):
    def forward(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        y, x, again, nothing, index = parts
        assert nothing is None
        assert not index.requires_grad
        return y * x + (again if index.dtype == torch.int64 else x)


class Halve(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5)


def forked_model() -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH), Fork(), Join(), nn.Identity(), Halve(), nn.Flatten(), nn.Linear(WIDTH, 5)]


@pytest.mark.parametrize("splits", [(), (2,), (4,)])
@pytest.mark.parametrize("mode", list(WeightMode))
def test_tuples_unused_and_frozen_parameters_and_in_place_layers_equal_the_plain_loop(
    mode: WeightMode, splits: tuple[int, ...]
) -> None:
    modules = forked_model()
    flags = {4: {"clones_input": True}}
    pipeline = Pipeline(modules, *samples(), optimizer=OPTIMIZERS["adamw"], splits=splits, mode=mode, flags=flags)
    pipeline.train()
    expected = plain_loop(pipeline, modules)[0]
    assert_same(pipeline.state(), expected)
    assert not any("unused" in name for name in expected if name.startswith("moment"))


def test_layers_below_the_lowest_trainable_one_count_with_empty_gradients() -> None:
    modules = [nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Dropout(0.1), nn.Linear(WIDTH, 5)]
    pipeline = Pipeline(modules, *samples(), splits=(1,))
    pipeline.train()
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])
    assert [one.version for block in pipeline.blocks for one in block.report()] == [4, 4, 4]


@pytest.mark.parametrize("mode", list(WeightMode))
def test_a_parameter_shared_by_two_layers_of_a_block_equals_the_plain_loop(mode: WeightMode) -> None:
    first, middle, third = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    third.weight = first.weight
    modules = [first, middle, third, nn.Linear(WIDTH, 5)]
    pipeline = Pipeline(modules, *samples(), accumulation=2, optimizer=OPTIMIZERS["adamw"], mode=mode)
    pipeline.train()
    assert pipeline.modules[2].weight is pipeline.modules[0].weight
    assert_same(pipeline.state(), plain_loop(pipeline, modules)[0])


# What a shard's messages ask of it ----------------------------------------------------------------------------------


def test_layers_that_have_a_microbatch_only_pass_the_gradient_on() -> None:
    modules = normalised_model()
    pipeline = Pipeline(modules, *samples(), splits=(2,), num_updates=3)
    upper = pipeline.blocks[1]
    upper.drop(pipeline.attempt(0), "test")  # the upper block has it now, the lower one lacks it
    before = {name: one for name, one in pipeline.state().items() if name[-1] and int(name.split(":")[1][0]) >= 2}
    result = pipeline.forward(0)
    pipeline.backward(0)
    after = pipeline.state()
    assert result.loss is not None
    assert_same({name: after[name] for name in before}, before)
    assert [one.version for one in pipeline.blocks[0].report()] == [1, 1]
    assert not torch.equal(after["parameter:0.0.weight"], modules[0][0].weight)  # type: ignore[index]
    assert upper.store_bytes == 0


def test_a_pass_that_nobody_lacks_keeps_nothing() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    pipeline.forward(0)
    pipeline.backward(0)
    before = pipeline.state()
    result = pipeline.forward(0, attempt=2)
    assert result.loss is not None
    assert pipeline.blocks[0].store_bytes == 0
    assert_same(pipeline.state(), before)


def test_abort_frees_the_store_and_the_tickets() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,))
    pipeline.forward(0)
    assert all(block.store_bytes > 0 for block in pipeline.blocks)
    for block in pipeline.blocks:
        block.abort(pipeline.attempt(0))
    assert all(block.store_bytes == 0 for block in pipeline.blocks)
    assert sum(isinstance(one.event, AbortEvent) for one in pipeline.events.records) == 5
    with pytest.raises(RejectedError, match="nothing is kept"):
        pipeline.backward(0)


def test_a_forward_pass_that_fails_leaves_no_ticket_open() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    block = pipeline.blocks[0]
    task = ForwardTask(
        attempt=pipeline.attempt(0),
        number=0,
        inputs=Tensors((torch.randn(8, WIDTH),)),
        targets=Tensors((torch.zeros(3, dtype=torch.int64),)),
        keep=True,
        input_gradient=False,
    )
    with pytest.raises(ValueError, match="batch_size"):
        run_to_end(block.forward(task))
    assert all(layer.ledger.staleness.num_open == 0 for layer in block.layers)
    pipeline.forward(0, attempt=2)
    pipeline.backward(0, attempt=2)


def test_a_dropped_microbatch_fills_its_place_in_the_update() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), accumulation=2, splits=(2,), num_updates=2)
    pipeline.forward(0)
    pipeline.forward(1)
    pipeline.backward(0)
    assert not any(block.dropped(1) for block in pipeline.blocks)
    whole = [DropResult(missing_from=start, partial=False) for start in (0, 2)]
    assert [block.drop(pipeline.attempt(1), "lost") for block in pipeline.blocks] == whole
    assert [block.drop(pipeline.attempt(1), "lost") for block in pipeline.blocks] == whole  # a repeat says the same
    assert all(block.dropped(1) for block in pipeline.blocks)
    assert [one.version for block in pipeline.blocks for one in block.report()] == [1] * 5
    assert all(block.lacking(1) == () for block in pipeline.blocks)


def test_an_update_of_tombstones_only_advances_the_version_and_nothing_else() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    before = pipeline.state()
    pipeline.blocks[0].drop(pipeline.attempt(0), "lost")
    assert [one.version for one in pipeline.blocks[0].report()] == [1] * 5
    assert_same(pipeline.state(), before)


def buffers_of(pipeline: Pipeline) -> list[torch.Tensor]:
    found = [one for layer in pipeline.blocks[0].layers for one in layer.module.buffers]
    return [one.clone() for one in found if one.is_floating_point()]


def test_samples_that_are_not_finite_can_leave_the_buffers_as_they_were() -> None:
    inputs, targets = samples()
    spoilt = [torch.full_like(inputs[0], float("nan"))]
    for finite_buffers in (False, True):
        pipeline = Pipeline(normalised_model(), spoilt, targets, finite_buffers=finite_buffers)
        before = buffers_of(pipeline)
        pipeline.forward(0)
        same = [torch.equal(one, other) for one, other in zip(before, buffers_of(pipeline), strict=True)]
        assert before
        assert all(same) == finite_buffers
    modules = normalised_model()
    guarded, plain = (Pipeline(modules, inputs, targets, finite_buffers=one) for one in (True, False))
    for pipeline in (guarded, plain):
        pipeline.train()
    assert_same(guarded.state(), plain.state())


def push_for(pipeline: Pipeline, layer: int, life: int = 1, names: tuple[str, ...] | None = None) -> PushGradient:
    owned = pipeline.blocks[0].layers[min(layer, 4)].compute.owned
    return PushGradient(
        job="job",
        attempt=pipeline.attempt(0),
        number=0,
        layer=layer,
        life=life,
        revision=0,
        read=0,
        gradients=NamedTensors(
            tuple(owned) if names is None else names, tuple(torch.zeros_like(one) for one in owned.values())
        ),
    )


def test_a_push_of_another_life_owner_or_layer_changes_nothing() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    block = pipeline.blocks[0]
    pipeline.forward(0)
    before, records = pipeline.state(), len(pipeline.events.records)
    for push, error in (
        (push_for(pipeline, 0, life=2), WrongLifeError),
        (push_for(pipeline, 9), NotOwnerError),
        (push_for(pipeline, 4, names=("wrong",)), RejectedError),
    ):
        with pytest.raises(error):
            run_to_end(block.apply(ApplyTask(worker="b", push=push)))
    assert_same(pipeline.state(), before)
    assert len(pipeline.events.records) == records


def test_a_repeated_push_is_taken_once() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    block = pipeline.blocks[0]
    pipeline.forward(0)
    for _ in range(2):
        run_to_end(block.apply(ApplyTask(worker="b", push=push_for(pipeline, 4))))
    assert block.report()[4].version == 1


def steep_model() -> list[nn.Module]:
    """Layer 1 is infinitely steep in the third microbatch."""
    return [nn.Linear(WIDTH, 8), BecomesSteep(8, calls=3), nn.Linear(8, 5)]


@pytest.mark.parametrize("updates_last", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_no_update_is_made_with_a_gradient_that_is_not_finite(detached: bool, updates_last: bool) -> None:
    mode = WeightMode.RECOMPUTE if detached else WeightMode.LATEST
    pipeline = Pipeline(
        steep_model(),
        *samples(),
        splits=(1,),
        mode=mode,
        optimizer=OPTIMIZERS["adamw"],
        clip=1.0,
        finite_gradients=True,
    )
    workers = pipeline.detached_workers() if detached else []
    upper = pipeline.blocks[1]
    upper.updates_last = updates_last

    def backward(index: int) -> None:
        if detached:
            pipeline.detached_backward(index, workers)
        else:
            pipeline.backward(index)

    for index in range(2):
        pipeline.forward(index)
        backward(index)

    def steep() -> dict[str, torch.Tensor]:
        return {name: one for name, one in pipeline.state().items() if name.partition(":")[2].startswith("1.")}

    before = steep()
    pipeline.forward(2)
    with pytest.raises(NotFiniteError, match=r"layer 1 \(1\) for the update to version 3 is not finite"):
        backward(2)
    after = steep()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"buffer:1.calls"}
    assert [layer.ledger.version for layer in upper.layers] == [2, 3]
    assert pipeline.forward(3).loss is not None  # the layer can be read, and takes nothing more in
    with pytest.raises(NotFiniteError, match="update to version 3"):
        backward(3)
    with pytest.raises(NotFiniteError, match="update to version 3"):
        upper.layers[0].drop(pipeline.attempt(4), "bad sample")


def test_gradients_are_taken_as_they_come_where_divergence_is_ignored() -> None:
    pipeline = Pipeline(steep_model(), *samples())
    for index in range(3):
        pipeline.forward(index)
        pipeline.backward(index)
    assert [one.version for one in pipeline.blocks[0].report()] == [3] * 3
    assert not torch.isfinite(pipeline.state()["parameter:1.linear.weight"]).all()


def test_large_gradients_whose_sum_overflows_are_finite() -> None:
    large = torch.full((8,), 3e38)
    assert first_not_finite({"weight": large, "bias": None}) is None
    assert first_not_finite({"weight": large, "bias": torch.tensor([0.0, float("nan")])}) == "bias"
    assert first_not_finite({"weight": torch.tensor([float("inf"), float("-inf")])}) == "weight"


def test_the_first_layer_that_is_not_finite_is_found() -> None:
    for mode in (WeightMode.LATEST, WeightMode.RECOMPUTE):
        pipeline = Pipeline(normalised_model(), *samples(), splits=(2,), mode=mode)
        with torch.no_grad():
            pipeline.modules[3][0].weight.fill_(float("inf"))  # type: ignore[index, union-attr, operator]
        result = pipeline.forward(0)
        assert result.loss != result.loss
        assert pipeline.blocks[1].first_not_finite(pipeline.attempt(0)) == 3
        assert pipeline.blocks[0].first_not_finite(pipeline.attempt(0)) is None


def test_a_block_given_infinite_inputs_says_so() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,))
    pipeline.inputs[0][0, 0] = float("nan")
    pipeline.forward(0)
    assert [block.first_not_finite(pipeline.attempt(0)) for block in pipeline.blocks] == [-1, -1]


# Cuts and evaluation ------------------------------------------------------------------------------------------------


def test_a_cut_is_all_layers_at_one_version_while_training_goes_on() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,), optimizer=OPTIMIZERS["adamw"], num_updates=4)
    for block in pipeline.blocks:
        block.cut_at(2)
        block.hold_cut(2)
    pipeline.train(0, 2)
    at_two = pipeline.state()
    pipeline.train(2)
    assert pipeline.noted.taken == [2, 2]
    copies = pipeline.copies(2)
    assert [one.state.version for one in copies] == [2] * 5
    again = Pipeline(normalised_model(), *samples(), optimizer=OPTIMIZERS["adamw"], restored=copies, life=2)
    assert_same(again.state(), at_two)


def test_training_from_a_cut_ends_where_the_uninterrupted_run_ends() -> None:
    modules = normalised_model()
    inputs, targets = samples()
    options = {"accumulation": 4, "num_updates": 6, "optimizer": OPTIMIZERS["muon"]}
    whole = Pipeline(modules, inputs, targets, **options)  # type: ignore[arg-type]
    whole.train()
    first = Pipeline(modules, inputs, targets, splits=(3,), **options)  # type: ignore[arg-type]
    for block in first.blocks:
        block.cut_at(4)
    first.train(0, first.plan.gradients_before(4) + 2)  # goes on past the cut, and is lost
    second = Pipeline(modules, inputs, targets, splits=(1,), restored=first.copies(4), life=2, **options)  # type: ignore[arg-type]
    second.train(second.plan.gradients_before(4))
    assert_same(second.state(), whole.state())


def test_evaluation_reads_the_cut_and_changes_nothing() -> None:
    modules = normalised_model()
    inputs, targets = samples()
    pipeline = Pipeline(modules, inputs, targets, splits=(2,), num_updates=4)
    for block in pipeline.blocks:
        block.cut_at(2)
        block.hold_cut(2)
    pipeline.train(0, 2)
    plain = [one.eval() for one in _loaded(modules, pipeline.state())]
    pipeline.train(2)
    before = pipeline.state()
    values, wanted = Tensors((inputs[0][:10],)), Tensors((targets[:10],))
    for block in pipeline.blocks:
        result = run_to_end(block.evaluate(EvaluateTask(version=2, start=0, stop=10, inputs=values, targets=wanted)))
        values = result.outputs or values
    logits = inputs[0][:10]
    with torch.no_grad():
        for module in plain:
            logits = module(logits)
        loss = nn.functional.cross_entropy(logits, targets[:10])
    assert result.loss is not None
    assert result.loss.total == float(loss) * 10
    assert result.metrics[0].count == 10
    assert_same(pipeline.state(), before)
    assert all(module.training for module in pipeline.modules)


def _loaded(modules: list[nn.Module], state: dict[str, torch.Tensor]) -> list[nn.Module]:
    model = nn.Sequential(*modules)
    model.load_state_dict({name.partition(":")[2]: one for name, one in state.items() if not name.startswith("moment")})
    return list(model)


def test_a_cut_that_is_not_held_is_refused_by_its_version() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    task = EvaluateTask(
        version=3, start=0, stop=2, inputs=Tensors((torch.randn(2, WIDTH),)), targets=Tensors((torch.zeros(2),))
    )
    with pytest.raises(NotFoundError, match="no cut of version 3"):
        run_to_end(pipeline.blocks[0].evaluate(task))


def test_released_cuts_leave_memory() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), num_updates=4)
    block = pipeline.blocks[0]
    for version in (1, 2, 3):
        block.cut_at(version)
    block.hold_cut(1)
    pipeline.train()
    assert [one.state.version for one in block.shelf.get(1)] == [1] * 5
    with pytest.raises(NotFoundError):
        block.shelf.get(2)
    block.release_cut(1)
    with pytest.raises(NotFoundError, match="there are \\[3\\]"):
        block.shelf.get(1)


def test_a_repeated_forward_of_one_attempt_is_refused() -> None:
    pipeline = Pipeline(normalised_model(), *samples())
    pipeline.forward(0)
    with pytest.raises(RejectedError, match="still open"):
        pipeline.forward(0)
    assert pipeline.blocks[0].layers[0].ledger.staleness.num_open == 1


def test_a_boundary_gradient_that_never_came_is_refused() -> None:
    pipeline = Pipeline(normalised_model(), *samples(), splits=(2,))
    pipeline.forward(0)
    with pytest.raises(RejectedError, match="gradient of the block's outputs is missing"):
        run_to_end(
            pipeline.blocks[0].backward(
                BackwardTask(attempt=Attempt(pipeline.plan.microbatch(0)), number=0, gradients=None)
            )
        )
