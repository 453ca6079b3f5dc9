from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.eager import EagerAdamW, EagerSgd

PAIRS: list[tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = [
    (EagerSgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (EagerAdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS, ids=["sgd", "adamw"])
def test_it_is_torchs_optimizer_bit_for_bit_hooks_included(
    ours: type[torch.optim.Optimizer], theirs: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    results, heard = [], []
    for kind in (ours, theirs, ours):  # before and after torch has put its own hooks around the other's method
        parameter = nn.Parameter(torch.ones(4, 3))
        optimizer = kind([{"params": [parameter]}, {"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0}], **arguments)
        optimizer.register_step_post_hook(lambda *_: heard.append(1))
        for step in range(3):
            parameter.grad = torch.full((4, 3), 0.5 + step).requires_grad_()
            optimizer.step()
        assert optimizer.param_groups[1]["weight_decay"] == arguments["weight_decay"]
        results.append((parameter.detach(), optimizer.state[parameter]))
    assert len(heard) == 9
    for other, state in results[1:]:
        assert torch.equal(other, results[0][0])
        assert not other.requires_grad
        assert all(torch.equal(state[key], value) for key, value in results[0][1].items())


def test_no_optimizer_imports_the_compiler() -> None:
    code = (
        "import sys\n"
        "import torch\n"
        "from layerwise.optimizers import build_optimizer\n"
        "from layerwise.sections import AdamW, Muon, Sgd\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "for settings in (Sgd(), AdamW(), Muon()):\n"
        "    optimizer = build_optimizer(settings, layer.named_parameters())\n"
        "    layer(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "False\n"
