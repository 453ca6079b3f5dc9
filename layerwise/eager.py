"""torch's optimizers without what torch wraps around their methods for ``torch.compile``.

The wrappers import the compiler at the first parameter group and at the first step: a second of arithmetic and some
60 MB in every process that has an optimizer, where nothing is ever compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """The base of optimizers whose parameter groups are added without the compiler."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class EagerSgd(EagerOptimizer, torch.optim.SGD):
    """`torch.optim.SGD`, bit for bit."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        return inspect.unwrap(torch.optim.SGD.step)(self, closure)


class EagerAdamW(EagerOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW`, bit for bit."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)
