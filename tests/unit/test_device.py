"""Which device a name means. What moves tensors to a GPU and back is run by the tests that start a cluster, where there is one."""

from __future__ import annotations

import pytest
import torch

from layerwise.device import resolve_device, transfers, transfers_in_order
from layerwise.errors import ConfigError
from layerwise.messages import Tensors


class Accelerator:
    """What `resolve_device` asks torch, as on a machine with ``count`` devices of ``kind``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, *, streams: bool = True) -> None:
        device = None if kind is None else torch.device(kind)
        module = type("Module", (), {"Stream": object} if streams else {})
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)


@pytest.mark.parametrize(
    ("kind", "count", "name", "found"),
    [
        (None, 0, "auto", "cpu"),
        (None, 0, "cpu", "cpu"),
        ("cuda", 2, "auto", "cuda:0"),
        ("cuda", 2, "cpu", "cpu"),
        ("cuda", 2, "cuda", "cuda:0"),
        ("cuda", 2, "cuda:1", "cuda:1"),
        ("xpu", 1, "auto", "xpu:0"),
        ("xpu", 1, "xpu:0", "xpu:0"),
    ],
)
def test_a_name_means_a_device_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, name: str, found: str
) -> None:
    Accelerator(monkeypatch, kind, count)
    assert resolve_device(name) == torch.device(found)


@pytest.mark.parametrize(
    ("kind", "count", "name", "reason"),
    [
        (None, 0, "cuda", "this machine has no CUDA devices"),
        ("cuda", 1, "cuda:1", "this machine has 1 CUDA device$"),
        ("cuda", 2, "cuda:2", "this machine has 2 CUDA devices"),
        ("cuda", 2, "xpu:0", "this machine has no XPU devices"),
        (None, 0, "meta", "this machine has no META devices"),
        (None, 0, "gpu", "not a device; use auto, cpu or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, name: str, reason: str
) -> None:
    Accelerator(monkeypatch, kind, count)
    with pytest.raises(ConfigError, match=f"--device {name}: {reason}"):
        resolve_device(name)


def test_an_accelerator_without_streams_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator(monkeypatch, "mps", 1, streams=False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no MPS devices"):
        resolve_device("mps")


@pytest.mark.parametrize("mover", [transfers, transfers_in_order])
def test_on_the_cpu_tensors_stay_where_they_are(mover: type) -> None:
    moves = mover(torch.device("cpu"))
    tensors = Tensors((torch.ones(2), None))
    assert moves.load(tensors) is tensors
    assert moves.unload(tensors) is tensors
