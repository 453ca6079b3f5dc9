"""Weights that a layer has left, for passes that read them all the same.

With several slots, or with detached workers, a backward pass may have read a version while others moved the layer on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from layerwise.errors import CorruptError
from layerwise.layer import TrainedLayer
from layerwise.plan import TrainingPlan


class PastWeights:
    """Keeps the versions that will be read after their layer has left them, each as long as somebody will.

    ``reads`` counts these readers by layer and version.
    """

    def __init__(
        self, layers: Sequence[TrainedLayer], plan: TrainingPlan, reads: Mapping[tuple[int, int], int]
    ) -> None:
        self._layers = {layer.index: layer for layer in layers}
        self._plan = plan
        self._reads = dict(reads)
        self._kept: dict[tuple[int, int], list[torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def before_intake(self, layer: TrainedLayer) -> None:
        """A gradient or tombstone will be taken in: where it makes an update, the version before is kept."""
        ledger = layer.ledger
        key = (layer.index, ledger.version)
        if key in self._reads and ledger.accumulated + 1 >= self._plan.count(ledger.version):
            self._kept[key] = [one.detach().clone() for one in layer.module.parameters.values()]

    @contextmanager
    def reading(self, versions: Mapping[int, int]) -> Iterator[None]:
        """Within it each layer in ``versions`` has the weights of that version, and says that it is at it."""
        with ExitStack() as stack:
            for index, version in versions.items():
                layer = self._layers[index]
                if version != layer.ledger.version:
                    stack.enter_context(self._exchanged(layer, version))
            yield
        for index, version in versions.items():
            key = (index, version)
            if version != self._layers[index].ledger.version:
                self._reads[key] -= 1
                if self._reads[key] == 0:
                    del self._reads[key]
                    self._kept.pop(key, None)

    @contextmanager
    def _exchanged(self, layer: TrainedLayer, version: int) -> Iterator[None]:
        kept = self._kept.get((layer.index, version))
        if kept is None:
            raise CorruptError(
                f"a pass is recorded to have read version {version} of layer {layer.index}, which is at version "
                f"{layer.ledger.version} and has not been at that one"
            )
        parameters = list(layer.module.parameters.values())
        now = [one.detach().clone() for one in parameters]
        usual = layer.compute.version
        try:
            # In place, so that graphs that hold the parameters see it; past autograd's version counter, as updates do.
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
            layer.compute.version = lambda: version
            yield
        finally:
            layer.compute.version = usual
            for parameter, value in zip(parameters, now, strict=True):
                parameter.data.copy_(value)
