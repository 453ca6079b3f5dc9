"""Muon: momentum made orthogonal on matrices, Adam on everything else, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.eager import EagerOptimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen for a steep slope at zero (Keller Jordan's Muon)."""
EPSILON = 1e-7


class Muon(EagerOptimizer):
    """Orthogonalised momentum whose fresh gradient has a weight of its own.

    For a matrix with gradient ``g`` and its running average ``m = momentum m + (1 - momentum) g``, the step goes along
    the orthogonal factor of ``nu m + (1 - nu) g`` (Newton-Schulz in bfloat16). At ``nu = momentum`` this is
    `torch.optim.Muon` with Nesterov momentum; a smaller ``nu`` stays stable when gradients are late. Tensors with more
    than two dimensions (convolutions) are matrices of their first dimension by the rest.

    ``matrices`` get this; ``others`` get Adam with decoupled weight decay, torch's arithmetic. Both are named, and no
    parameter's arithmetic depends on which others are there.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[str, nn.Parameter]],
        others: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        momentum: float = 0.95,
        nu: float = 0.7,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adjust_lr: str = "original",
        adam_lr: float = 3e-3,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        adam_eps: float = 1e-8,
        adam_weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = []
        named = list(matrices)
        if named:
            groups.append(
                {
                    "params": named,
                    "algorithm": "muon",
                    "lr": lr,
                    "momentum": momentum,
                    "nu": nu,
                    "ns_steps": ns_steps,
                    "weight_decay": weight_decay,
                    "adjust_lr": adjust_lr,
                }
            )
        named = list(others)
        if named:
            groups.append(
                {
                    "params": named,
                    "algorithm": "adam",
                    "lr": adam_lr,
                    "betas": adam_betas,
                    "eps": adam_eps,
                    "weight_decay": adam_weight_decay,
                }
            )
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; the others keep their state as it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = self._orthogonal if group["algorithm"] == "muon" else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _orthogonal(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(average, group["nu"]).flatten(1).contiguous()
        update = orthogonal_factor(direction, group["ns_steps"]).view(parameter.shape)
        rate: float = group["lr"]
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * _rate_ratio(group["adjust_lr"], direction.shape))

    @staticmethod
    def _adam(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        first, second = group["betas"]
        state["step"] += 1
        step: float = state["step"].item()
        rate: float = group["lr"]
        parameter.mul_(1 - rate * group["weight_decay"])
        average: Tensor = state["exp_avg"]
        square: Tensor = state["exp_avg_sq"]
        average.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square.sqrt() / math.sqrt(1 - second**step)).add_(group["eps"])
        parameter.addcdiv_(average, scale, value=-rate / (1 - first**step))


def orthogonal_factor(matrix: Tensor, steps: int) -> Tensor:
    """Approximately ``U V^T`` of ``matrix = U S V^T``, shape ``[rows, columns]``, in bfloat16.

    The iteration does not converge: after 5 steps the singular values lie between about 0.5 and 1.5.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    factor = matrix.bfloat16()
    if tall:
        factor = factor.T
    factor = factor / factor.norm().clamp(min=EPSILON)
    for _ in range(steps):
        gram = factor @ factor.T
        factor = torch.addmm(factor, torch.addmm(gram, gram, gram, beta=b, alpha=c), factor, beta=a)
    return factor.T.contiguous() if tall else factor


def _rate_ratio(adjust: str, shape: torch.Size) -> float:
    rows, columns = shape
    if adjust == "match-rms-adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
