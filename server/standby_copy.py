"""One copy of a block in memory: whole, or on its way from another shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from layerwise.messages import LayerFile, StandbyPart, StandbyRequest, Tensors
from layerwise.roles import Send


class StandbyBytes(Protocol):
    """One layer of a copy, whole."""

    def part(self, offset: int) -> Tensors:
        """The bytes from ``offset`` on, not more than fit into one message; ``ValueError`` where there are none."""
        ...


class StandbySink(Protocol):
    """One layer of a copy while it arrives."""

    @property
    def num_received(self) -> int:
        """Bytes that are here."""
        ...

    def add(self, part: Tensors) -> None:
        """The next bytes; ``ValueError`` when they can't be that."""
        ...

    def finish(self) -> StandbyBytes:
        """All are here; ``CorruptError`` when their hash is another one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyCopy:
    """All layers of ``block`` at ``version``, as they were copied in ``life``."""

    block: int
    life: int
    version: int
    files: tuple[LayerFile, ...]
    layers: Mapping[int, StandbyBytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of its layers."""
        return sum(file.num_bytes for file in self.files)


@dataclass(slots=True, kw_only=True)
class StandbyPull:
    """A copy that is being fetched from ``peer``, layer by layer and part by part. Not thread-safe."""

    job: str
    peer: str
    block: int
    life: int
    version: int
    files: tuple[LayerFile, ...]
    layers: dict[int, StandbyBytes] = field(default_factory=dict)
    sink: StandbySink | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that are here."""
        return sum(file.num_bytes for file in self.files[: len(self.layers)]) + self._num_received

    def ask(self) -> Send:
        """For the next part."""
        request = StandbyRequest(
            job=self.job,
            block=self.block,
            life=self.life,
            version=self.version,
            layer=self._file.layer,
            offset=self._num_received,
        )
        return Send(self.peer, request)

    def awaits(self, peer: str, part: StandbyPart) -> bool:
        """Whether ``part`` is the answer to what was asked last."""
        asked = (self.peer, self.block, self.life, self.version, self._file.layer, self._num_received)
        return (peer, part.block, part.life, part.version, part.layer, part.offset) == asked

    def take(self, part: StandbyPart, make_sink: Callable[[LayerFile], StandbySink]) -> bool:
        """Add what has arrived; True when that was the last of it.

        Raises:
            ValueError: the peer has no such copy, or this is none of its parts.
            CorruptError: a layer's hash is another one than was told.
        """
        if not part.data.items:
            raise ValueError(f"{self.peer} does not have it any more")
        if self.sink is None:
            self.sink = make_sink(self._file)
        self.sink.add(part.data)
        if self._num_received == self._file.num_bytes:
            self.layers[self._file.layer], self.sink = self.sink.finish(), None
        return len(self.layers) == len(self.files)

    def copy(self) -> StandbyCopy:
        """The copy, once it is whole."""
        return StandbyCopy(block=self.block, life=self.life, version=self.version, files=self.files, layers=self.layers)

    @property
    def _file(self) -> LayerFile:
        """What is asked for now."""
        return self.files[len(self.layers)]

    @property
    def _num_received(self) -> int:
        return self.sink.num_received if self.sink is not None else 0
