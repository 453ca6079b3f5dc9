"""The optimizers of a job file, for one layer or for a whole model with the same arithmetic.

Always the plain loop over parameters (no ``foreach``, no fused kernels): so a parameter moves bit for bit the same way
whether its optimizer holds one layer or all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.eager import EagerAdamW, EagerSgd
from layerwise.muon import Muon
from layerwise.sections import AdamW, OptimizerSettings, Sgd
from layerwise.sections import Muon as MuonSettings

ADAM_MARK = "layerwise_adam"
"""Attribute of a parameter that is no hidden matrix (embedding, head, first convolution): Muon leaves it to Adam."""

BASE_LR = "base_lr"
"""Key of a parameter group: its learning rate before schedule and delay policy."""


def leave_to_adam(*parameters: Tensor) -> None:
    """Mark ``parameters`` as not to be made orthogonal by Muon."""
    for parameter in parameters:
        setattr(parameter, ADAM_MARK, True)


def alias_parameters(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Parameters in the same memory with version counters and gradients of their own; frozen ones are left out.

    An optimizer that steps on them does not disturb autograd graphs which wait for their backward pass.
    """
    aliases = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            alias = nn.Parameter(parameter.data)
            if getattr(parameter, ADAM_MARK, False):
                leave_to_adam(alias)
            aliases[name] = alias
    return aliases


def build_optimizer(
    settings: OptimizerSettings, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer over ``named_parameters`` (at least one). Each group has ``base_lr`` beside ``lr``."""
    named = list(named_parameters)
    optimizer: torch.optim.Optimizer
    if isinstance(settings, Sgd):
        optimizer = EagerSgd(
            named,
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            foreach=False,
            fused=False,
        )
    elif isinstance(settings, AdamW):
        optimizer = EagerAdamW(
            named,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            foreach=False,
            fused=False,
        )
    else:
        optimizer = _muon(settings, named)
    for group in optimizer.param_groups:
        group[BASE_LR] = group["lr"]
    return optimizer


def _muon(settings: MuonSettings, named: list[tuple[str, nn.Parameter]]) -> Muon:
    hidden = {name for name, one in named if one.ndim in (2, 3, 4, 5) and not getattr(one, ADAM_MARK, False)}
    return Muon(
        [(name, one) for name, one in named if name in hidden],
        [(name, one) for name, one in named if name not in hidden],
        lr=settings.lr,
        momentum=settings.momentum,
        nu=settings.nu,
        ns_steps=settings.ns_steps,
        weight_decay=settings.weight_decay,
        adjust_lr=settings.adjust_lr,
        adam_lr=settings.adam_lr,
        adam_betas=settings.adam_betas,
        adam_eps=settings.adam_eps,
        adam_weight_decay=settings.adam_weight_decay,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to ``factor`` times what the job file says for it."""
    for group in optimizer.param_groups:
        group["lr"] = group[BASE_LR] * factor


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, as ``parameter/key`` sorted by name; the tensors themselves, not copies.

    A parameter that never had a gradient has no entries. Step counters are 0-d float32 tensors.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in sorted(_named(optimizer).items()):
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if value is not None:
                found[f"{name}/{key}"] = value
    return found


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, bit for bit; what the optimizer remembered before is forgotten.

    Tensors are copied; those of a parameter's shape get its strides and device, the others stay on the CPU.

    Raises:
        ValueError: a name that is none of this optimizer's parameters; nothing was changed.
    """
    named = _named(optimizer)
    entries: list[tuple[nn.Parameter, str, Tensor]] = []
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        if name not in named:
            raise ValueError(f"optimizer state {full!r} belongs to none of the parameters {sorted(named)}")
        entries.append((named[name], key, value))
    optimizer.state.clear()
    for parameter, key, value in entries:
        if value.shape == parameter.shape and value.ndim > 0:
            placed = torch.empty_like(
                parameter, dtype=value.dtype, memory_format=torch.preserve_format, requires_grad=False
            )
            placed.copy_(value)
        elif key == "step":
            placed = value.detach().clone().cpu()
        else:
            placed = value.detach().clone().to(parameter.device)
        optimizer.state[parameter][key] = placed


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    groups: list[dict[str, Any]] = optimizer.param_groups
    return {
        name: parameter
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
