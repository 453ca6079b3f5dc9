"""The activation store: what a block keeps of each microbatch between its forward and its backward pass."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from layerwise.errors import RejectedError
from layerwise.ids import Attempt
from layerwise.layer_compute import LayerPass
from layerwise.messages import Tensors


@dataclass(slots=True)
class KeptPass:
    """One microbatch's forward pass through a block.

    ``passes`` are the layers' own, lowest first, from the lowest that a gradient must reach; empty where the backward
    pass begins with the forward pass again. ``buffers`` has every layer's buffers as read. In the last block ``loss``
    hangs on ``head``, the detached outputs of its last layer. ``updates`` are to be made when the backward pass is over.
    """

    attempt: Attempt
    number: int
    inputs: Tensors
    targets: Tensors
    input_gradient: bool
    tickets: frozenset[int]
    passes: list[LayerPass] = field(default_factory=list)
    buffers: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    stashed: list[LayerPass] = field(default_factory=list)
    updates: list[ExitStack] = field(default_factory=list)
    head: Tensors | None = None
    loss: torch.Tensor | None = None
    num_bytes: int = 0


class ActivationStore:
    """Kept passes by attempt, and their bytes. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Attempt, KeptPass] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of activations kept (those inside autograd's graphs as the probe measured them)."""
        return self._num_bytes

    def put(self, kept: KeptPass) -> None:
        """Keep ``kept``; ``RejectedError`` when this attempt is here already."""
        with self._lock:
            if kept.attempt in self._kept:
                raise RejectedError(
                    f"forward of {kept.attempt} refused: it was run already and waits for its backward pass"
                )
            self._kept[kept.attempt] = kept
            self._num_bytes += kept.num_bytes

    def get(self, attempt: Attempt) -> KeptPass:
        """What ``attempt`` keeps; ``RejectedError`` when nothing is."""
        with self._lock:
            kept = self._kept.get(attempt)
        if kept is None:
            raise RejectedError(f"nothing is kept of {attempt} here: it was aborted, finished, or never came")
        return kept

    def pop(self, attempt: Attempt) -> KeptPass | None:
        """Take out what ``attempt`` keeps."""
        with self._lock:
            kept = self._kept.pop(attempt, None)
            if kept is not None:
                self._num_bytes -= kept.num_bytes
            return kept
