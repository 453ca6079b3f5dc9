from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.assembly import foreign_parameters
from layerwise.errors import ConfigError
from layerwise.ids import Microbatch
from layerwise.layer_compute import LayerCompute
from layerwise.layer_module import LayerModule
from layerwise.messages import Tensors


class Masked(nn.Module):
    """A buffer that never changes, one that is written, one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum += x.detach().sum(0)
        self.last = x.mean(0)
        return x * self.mask


def run(module: LayerModule, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    before = module.buffers
    given = module.copies_for_writing(before)
    module.set_buffers(given)
    module((x,), True)
    after = module.learn_written(before, given)
    module.set_buffers(after)
    return before


def test_after_the_first_pass_only_written_buffers_are_copied() -> None:
    module = LayerModule(Masked(), 0, "masked")
    assert module.may_write_buffers
    x = torch.randn(2, 3, requires_grad=True)
    before = run(module, x)
    assert torch.equal(before[1], torch.zeros(3))
    mask, total, last = module.copies_for_writing(module.buffers)
    assert mask is module.buffers[0]
    assert total is not module.buffers[1]
    assert last is not module.buffers[2]
    assert not module.buffers[2].requires_grad


def test_constant_buffers_are_learned_to_be_constant() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.ones(3))
    module.forward = lambda x: x * module.mask  # type: ignore[method-assign, assignment]
    layer = LayerModule(module, 0, "constant")
    run(layer, torch.randn(2, 3))
    assert not layer.may_write_buffers


def test_running_statistics_are_written_whatever_the_first_batch_shows() -> None:
    module = LayerModule(nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False)), 0, "norm")
    module.module.eval()
    run(module, torch.randn(2, 3))
    assert module.may_write_buffers


def test_exchanged_tensors_are_given_back_also_after_an_error() -> None:
    linear = nn.Linear(3, 2)
    module = LayerModule(linear, 0, "linear")
    own = dict(linear.named_parameters())
    others = [torch.zeros(2, 3), torch.ones(2)]

    def fail() -> None:
        with module.exchanged(parameters=others, training=False):
            assert torch.equal(module((torch.randn(1, 3),), True).items[0], torch.ones(1, 2))
            assert not linear.training
            raise KeyError("layer")

    with pytest.raises(KeyError):
        fail()
    assert linear.training
    assert all(dict(linear.named_parameters())[name] is one for name, one in own.items())


def test_an_output_in_a_parameters_memory_is_copied() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, self.table

    inner = Table()
    outputs = LayerModule(inner, 0, "table")((torch.randn(1),), True)
    inner.table.data.zero_()
    assert outputs.items[1].abs().sum() > 0


def test_what_a_layer_may_not_return_is_named() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> list[object]:
            return [x, 3]

    with pytest.raises(ConfigError, match=r"layer 4 \(wrong\) returned a list with Tensor, int in it"):
        LayerModule(Wrong(), 4, "wrong")((torch.randn(1),), True)


def test_a_tuple_is_one_argument_as_in_sequential() -> None:
    class Add(nn.Module):
        def forward(self, parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return parts[0] + parts[1]

    outputs = LayerModule(Add(), 0, "add")((torch.ones(1), torch.ones(1)), False)
    assert outputs == Tensors((torch.tensor([2.0]),))


def test_the_lowest_layer_owns_a_shared_parameter() -> None:
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    third.bias = second.bias
    assert foreign_parameters([first, second, third], 5) == [[], [("weight", (5, 0))], [("bias", (6, 0))]]


def test_layers_that_share_views_or_buffers_are_refused() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight.data[:2])
    with pytest.raises(ConfigError, match="layers 0 and 1 share memory"):
        foreign_parameters([first, second], 0)
    norms = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    norms[1].running_mean = norms[0].running_mean
    with pytest.raises(ConfigError, match="layers 0 and 1 share memory"):
        foreign_parameters(norms, 0)


def test_a_buffer_is_known_as_written_also_if_the_first_write_changed_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positive", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.positive += (x > 0).sum()
            return x

    module = LayerModule(Counting(), 0, "counting")
    run(module, -torch.ones(2, 3))
    assert module.may_write_buffers
    before = run(module, torch.ones(2, 3))
    assert before[0] == 0
    assert module.buffers[0] == 6


def test_evaluation_leaves_buffers_alone_that_a_module_writes_always() -> None:
    compute = LayerCompute(LayerModule(Masked(), 0, "masked"), seed=1, version=lambda: 0)
    kept = compute.module.buffers
    compute.evaluate(Tensors((torch.ones(2, 3),)), Microbatch(0, 0, 2), (), kept)
    assert torch.equal(kept[1], torch.zeros(3))
    assert all(one is other for one, other in zip(compute.module.buffers, kept, strict=True))
