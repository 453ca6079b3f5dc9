from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwise.optimizers import (
    alias_parameters,
    build_optimizer,
    leave_to_adam,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from layerwise.sections import AdamW, Muon, OptimizerSettings, Sgd

SETTINGS: list[OptimizerSettings] = [
    Sgd(lr=0.1),
    Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    AdamW(lr=0.01),
    Muon(lr=0.02, weight_decay=0.1),
]
SHAPES = {"0.weight": (6, 4), "0.bias": (6,), "1.kernel": (5, 3, 2, 2), "1.scale": (), "2.weight": (3, 8)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(named: dict[str, nn.Parameter], step: int) -> dict[str, Tensor]:
    found = {}
    for position, (name, parameter) in enumerate(named.items()):
        generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name) + 7 * (position >= 0))
        found[name] = torch.randn(parameter.shape, generator=generator)
    return found


def train(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for name, gradient in gradients(named, step).items():
            named[name].grad = gradient
        set_learning_rate(optimizer, 1 / (1 + step))
        optimizer.step()


def identical(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: one.name)
def test_one_optimizer_a_layer_equals_one_for_the_whole_model_bit_for_bit(settings: OptimizerSettings) -> None:
    whole, split = parameters(), parameters()
    train(build_optimizer(settings, whole.items()), whole, 0, 4)
    for layer in "012":
        own = {name: one for name, one in split.items() if name.startswith(layer)}
        train(build_optimizer(settings, own.items()), own, 0, 4)
    assert identical(whole, split)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: one.name)
def test_saved_state_continues_bit_for_bit(settings: OptimizerSettings) -> None:
    straight, stopped = parameters(), parameters()
    train(build_optimizer(settings, straight.items()), straight, 0, 5)
    first = build_optimizer(settings, stopped.items())
    train(first, stopped, 0, 2)
    saved = {name: value.clone() for name, value in optimizer_state(first).items()}
    assert list(saved) == sorted(saved)
    assert all(isinstance(value, Tensor) for value in saved.values())
    second = build_optimizer(settings, stopped.items())
    load_optimizer_state(second, saved)
    train(second, stopped, 2, 5)
    assert identical(straight, stopped)


def test_state_of_another_parameter_is_refused_and_changes_nothing() -> None:
    named = parameters()
    optimizer = build_optimizer(AdamW(), named.items())
    train(optimizer, named, 0, 1)
    before = optimizer_state(optimizer)
    with pytest.raises(ValueError, match=r"elsewhere/step"):
        load_optimizer_state(optimizer, {"elsewhere/step": torch.zeros(())})
    assert list(optimizer_state(optimizer)) == list(before)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("adjust", ["original", "match-rms-adamw"])
def test_muon_equals_torchs_where_nu_is_the_momentum(shape: tuple[int, int], adjust: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = Muon.model_validate({"lr": 0.02, "momentum": 0.95, "nu": 0.95, "weight_decay": 0.1, "adjust_lr": adjust})
    optimizer = build_optimizer(settings, [("weight", ours)])
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, adjust_lr_fn=adjust.replace("-", "_")
    )
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_the_rest_of_muon_equals_torchs_adam() -> None:
    torch.manual_seed(0)
    start = torch.randn(7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = Muon(adam_lr=0.01, adam_weight_decay=0.1)
    optimizer = build_optimizer(settings, [("bias", ours)])
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    for _ in range(5):
        gradient = torch.randn(7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_smaller_nu_follows_the_fresh_gradient() -> None:
    named = nn.Parameter(torch.zeros(3, 3))
    optimizer = build_optimizer(Muon(lr=1.0, nu=0.0), [("weight", named)])
    for gradient in (torch.eye(3), -torch.eye(3)):
        named.data.zero_()
        named.grad = gradient
        optimizer.step()
    assert (named.diagonal() > 0.5).all()


def test_muon_leaves_marked_parameters_and_vectors_to_adam() -> None:
    named = parameters()
    leave_to_adam(named["2.weight"])
    optimizer = build_optimizer(Muon(), alias_parameters(named.items()).items())
    groups = {group["algorithm"]: group["param_names"] for group in optimizer.param_groups}
    assert groups == {"muon": ["0.weight", "1.kernel"], "adam": ["0.bias", "1.scale", "2.weight"]}


def test_a_parameter_without_gradient_is_not_touched() -> None:
    for settings in SETTINGS:
        named = parameters()
        before = named["0.weight"].detach().clone()
        optimizer = build_optimizer(settings, named.items())
        named["2.weight"].grad = torch.ones(3, 8)
        optimizer.step()
        assert torch.equal(named["0.weight"], before)
        assert all(key.startswith("2.weight/") for key in optimizer_state(optimizer))


def test_aliases_share_memory_and_leave_a_waiting_graph_alone() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    loss = module(torch.ones(4, 3)).square().sum()
    aliases = alias_parameters(module.named_parameters())
    assert list(aliases) == ["weight"]
    aliases["weight"].grad = torch.ones(2, 3)
    build_optimizer(Sgd(lr=0.5), aliases.items()).step()
    assert aliases["weight"].data_ptr() == module.weight.data_ptr()
    loss.backward()
    assert module.weight.grad is not None


def test_gradient_strides_do_not_change_the_step() -> None:
    for settings in SETTINGS:
        one, other = nn.Parameter(torch.ones(4, 3, 2, 2)), nn.Parameter(torch.ones(4, 3, 2, 2))
        gradient = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        one.grad = gradient
        other.grad = gradient.to(memory_format=torch.channels_last)
        build_optimizer(settings, [("kernel", one)]).step()
        build_optimizer(settings, [("kernel", other)]).step()
        assert torch.equal(one, other)


def test_rates_scale_every_group_from_what_the_job_file_says() -> None:
    named = parameters()
    optimizer = build_optimizer(Muon(lr=0.02, adam_lr=0.004), named.items())
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.001]
