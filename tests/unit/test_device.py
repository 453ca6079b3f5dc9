"""Which device a name means, and in what order tensors go to an accelerator and back.

On a machine with a GPU the tests that start a cluster run there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from layerwise.device import _USED, HostTransfers, resolve_device, transfers, transfers_in_order
from layerwise.errors import ConfigError
from layerwise.messages import Tensors


def accelerator(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, *, lacks: str = "") -> None:
    """Have torch answer as on a machine with ``count`` devices of ``kind``."""
    device = None if kind is None else torch.device(kind)
    module = type("Module", (), {name: None for name in _USED if name != lacks})
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
    accelerator(monkeypatch, kind, count)
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
    accelerator(monkeypatch, kind, count)
    with pytest.raises(ConfigError, match=f"--device {name}: {reason}"):
        resolve_device(name)


def test_an_accelerator_without_streams_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator(monkeypatch, "mps", 1, lacks="Stream")
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no MPS devices"):
        resolve_device("mps")


@pytest.mark.parametrize("mover", [transfers, transfers_in_order])
def test_on_the_cpu_tensors_stay_where_they_are(mover: Callable[[torch.device], HostTransfers]) -> None:
    moves = mover(torch.device("cpu"))
    tensors = Tensors((torch.ones(2), None))
    assert moves.load(tensors) is tensors
    assert moves.unload(tensors) is tensors


GPU = torch.device("cuda", 1)


@dataclass
class Clocks:
    """An accelerator that only knows what came before what: each stream has the newest moment of every stream that it has waited for."""

    current: str = "default"
    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    num_streams: int = 0

    def do(self) -> tuple[str, int]:
        """Work is queued on the current stream; gives its stream and moment."""
        own = self.moments.setdefault(self.current, {})
        own[self.current] = own.get(self.current, 0) + 1
        return self.current, own[self.current]

    def wait(self, waiting: str, other: str) -> None:
        """What ``waiting`` does from now on comes after all that ``other`` has queued."""
        own = self.moments.setdefault(waiting, {})
        for name, moment in self.moments.get(other, {}).items():
            own[name] = max(own.get(name, 0), moment)

    def is_after(self, who: str, work: tuple[str, int]) -> bool:
        """Whether ``who`` (a stream, or the host) may rely on ``work``."""
        return self.moments.get(who, {}).get(work[0], 0) >= work[1]


@dataclass
class Stream:
    """One of its streams."""

    clocks: Clocks
    name: str

    def wait_stream(self, other: Stream) -> None:
        """See torch."""
        self.clocks.wait(self.name, other.name)

    def synchronize(self) -> None:
        """The host waits."""
        self.clocks.wait("host", self.name)


class Module:
    """Its module in torch."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks

    def Stream(self, device: torch.device) -> Stream:
        """A new one."""
        assert device == GPU
        self.clocks.num_streams += 1
        return Stream(self.clocks, f"stream {self.clocks.num_streams}")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Within it ``stream`` is the current one."""
        before, self.clocks.current = self.clocks.current, stream.name
        yield
        self.clocks.current = before

    def synchronize(self, device: torch.device) -> None:
        """The host waits for everything."""
        assert device == GPU
        for name in list(self.clocks.moments):
            self.clocks.wait("host", name)


@dataclass
class Data:
    """A tensor on the host or on the accelerator. ``made`` is the work that made it."""

    clocks: Clocks
    device: torch.device
    pinned: bool = False
    made: tuple[str, int] = ("", 0)
    used_on: list[str] = field(default_factory=list)

    def is_pinned(self) -> bool:
        """See torch."""
        return self.pinned

    def pin_memory(self) -> Data:
        """See torch."""
        return Data(self.clocks, self.device, pinned=True)

    def to(self, device: torch.device, *, non_blocking: bool) -> Data:
        """Copied, from pinned memory without waiting."""
        assert self.pinned
        assert non_blocking
        return Data(self.clocks, device, made=self.clocks.do())

    def record_stream(self, stream: Stream) -> None:
        """See torch."""
        self.used_on.append(stream.name)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """An accelerator; what is copied to the host must have been made before, as seen from the stream that copies."""
    made = Clocks()

    def to_host(data: Data) -> Data:
        assert data.made == ("", 0) or made.is_after(made.current, data.made), "it is copied before it is made"
        return Data(made, torch.device("cpu"), pinned=True, made=made.do())

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module(made))
    monkeypatch.setattr("layerwise.device.to_host", to_host)
    return made


def computed(clocks: Clocks, moves: HostTransfers, *read: Any) -> tuple[str, int]:
    """A pass that reads what was loaded."""
    with moves.computing():
        work = clocks.do()
        assert all(clocks.is_after(clocks.current, one.made) for one in read), "it is read before it has come"
        assert all(clocks.current in one.used_on for one in read), "its memory may be handed on while it is read"
    return work


def test_what_was_loaded_is_there_when_a_pass_reads_it_and_stays_until_it_has(clocks: Clocks) -> None:
    moves = transfers(GPU)
    loaded = moves.load(
        Tensors((Data(clocks, torch.device("cpu")), None, Data(clocks, torch.device("cpu"), pinned=True)))
    )
    assert [None if one is None else one.device for one in loaded.items] == [GPU, None, GPU]
    computed(clocks, moves, loaded.items[0], loaded.items[2])


def test_copies_do_not_wait_for_the_passes_that_are_queued(clocks: Clocks) -> None:
    moves = transfers(GPU)
    work = computed(clocks, moves)
    loaded = moves.load(Tensors((Data(clocks, torch.device("cpu")),)))
    assert not clocks.is_after(loaded.items[0].made[0], work)


def test_what_is_on_the_device_already_is_not_copied(clocks: Clocks) -> None:
    there = Data(clocks, GPU)
    assert transfers(GPU).load(Tensors((there,))).items == (there,)


def test_what_a_pass_has_made_is_whole_on_the_host(clocks: Clocks) -> None:
    moves = transfers(GPU)
    made = Data(clocks, GPU, made=computed(clocks, moves))
    (host, nothing) = moves.unload(Tensors((made, None), single=False)).items
    assert nothing is None
    assert clocks.is_after("host", host.made), "the host does not wait for the copy"
    assert len(made.used_on) == 1


def test_finish_waits_for_everything(clocks: Clocks) -> None:
    moves = transfers(GPU)
    work = computed(clocks, moves)
    assert not clocks.is_after("host", work)
    moves.finish()
    assert clocks.is_after("host", work)


def test_in_order_everything_is_on_the_stream_that_is_current(clocks: Clocks) -> None:
    moves = transfers_in_order(GPU)
    with moves.computing():
        assert clocks.current == "default"
    (host,) = moves.unload(Tensors((Data(clocks, GPU, made=clocks.do()),))).items
    assert host.made[0] == "default"
    assert clocks.num_streams == 0
