"""A block whose steps come from the record: the code that trains, with the moments between its steps made visible."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from layerwise.block import Block
from layerwise.events import Event
from layerwise.gradient_sum import Gradients
from layerwise.kept_pass import KeptPass
from layerwise.layer_compute import LayerPass


class EmittedEvents:
    """An `EventSink` that gathers what the layers write down until somebody compares it with the record."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def append(self, event: Event) -> None:
        """Keep ``event``."""
        self.events.append(event)

    def take(self) -> list[Event]:
        """All that was gathered since the last call."""
        taken, self.events = self.events, []
        return taken


class RecordedBlock(Block):
    """A `Block` that holds a layer's gradient back until `settle`.

    While others moved a layer on, a backward pass may have computed with older weights than those that the gradient
    then updated.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._held: Callable[[], None] | None = None

    def _take(self, kept: KeptPass, forward: LayerPass, found: Gradients, reads: tuple[int, ...]) -> None:
        assert self._held is None, "the gradient of the layer above was not settled"
        self._held = partial(super()._take, kept, forward, found, reads)

    def settle(self) -> None:
        """Take in the gradient that the last step has computed."""
        held, self._held = self._held, None
        if held is not None:
            held()
