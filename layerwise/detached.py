"""What a detached backward worker computes: a block's forward pass again, and its layers' gradients one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from layerwise.backward import forward_again, walk_backward
from layerwise.device import HostTransfers
from layerwise.errors import RejectedError
from layerwise.gradient_sum import Gradients
from layerwise.head import Head, loss_gradients, run_head
from layerwise.layer_compute import LayerCompute, LayerPass, Precision
from layerwise.messages import (
    DetachedTask,
    LayerRevision,
    LayerState,
    NamedTensors,
    PushGradient,
    TaskFinished,
    Tensors,
)
from layerwise.tasks import run_to_end


class PulledStates:
    """Which state of each layer is in place: the newest that was pulled."""

    def __init__(self) -> None:
        self._states: dict[int, LayerState] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._states

    def __getitem__(self, layer: int) -> LayerState:
        return self._states[layer]

    def version(self, layer: int) -> int:
        """The version of ``layer``'s state (0 before any was pulled)."""
        state = self._states.get(layer)
        return 0 if state is None else state.version

    @property
    def have(self) -> tuple[LayerRevision, ...]:
        """What is held, in the order of layers."""
        return tuple(
            LayerRevision(layer=one.layer, life=one.life, revision=one.revision)
            for _, one in sorted(self._states.items())
        )

    def hold(self, state: LayerState) -> None:
        """``state`` is in place already."""
        self._states[state.layer] = replace(state, parameters=NamedTensors((), ()))

    @torch.no_grad()
    def take(self, layer: LayerCompute, state: LayerState) -> None:
        """Put ``state`` into ``layer``'s parameters; ``RejectedError`` when it does not fit."""
        foreign = {id(parameter) for parameter, _ in layer.foreign}
        own = {name: one for name, one in layer.module.parameters.items() if id(one) not in foreign}
        if state.parameters.names != tuple(own):
            raise RejectedError(
                f"state of layer {layer.index} refused: it names {state.parameters.names}, the layer has {tuple(own)}"
            )
        with layer.lock.exclusive():
            for (name, parameter), tensor in zip(own.items(), state.parameters.items, strict=True):
                if tensor is None or tensor.shape != parameter.shape:
                    raise RejectedError(f"state of layer {layer.index} refused: {name} is not {tuple(parameter.shape)}")
                parameter.data.copy_(tensor)
        # The tensors are in the layer now; the state's own are not kept.
        self.hold(state)


class DetachedBlock:
    """A block's layers as a detached worker holds them: the newest state pulled of each, and no optimizer.

    One thread at a time.
    """

    def __init__(
        self,
        layers: Sequence[LayerCompute],
        states: PulledStates,
        *,
        head: Head | None,
        transfers: HostTransfers | None = None,
        precision: Precision | None = None,
    ) -> None:
        """``states`` is what the layers' ``version`` asks; ``head`` is there in the last block only."""
        self._layers = tuple(layers)
        self._states = states
        self._head = head
        self._transfers = transfers if transfers is not None else HostTransfers()
        self._precision = precision if precision is not None else Precision()

    @property
    def have(self) -> tuple[LayerRevision, ...]:
        """The states held, for the next `TaskRequest`."""
        return self._states.have

    def run(self, task: DetachedTask) -> Iterator[PushGradient | TaskFinished]:
        """Take the states that came with ``task``; give each lacking layer's gradient as soon as it exists, and the end.

        Raises:
            RejectedError: the task is not for these layers, or a layer's state never came.
        """
        with self._transfers.computing():
            self._place(task)
        passes, outputs = self._forward(task)
        with self._transfers.computing():
            gradients = self._output_gradients(task, outputs)
        found: list[PushGradient] = []

        def sink(forward: LayerPass, gradients: Gradients, reads: tuple[int, ...]) -> None:
            if not forward.ticket:
                return
            state = self._states[forward.index]
            named = NamedTensors(
                tuple(forward.compute.owned), self._transfers.unload(Tensors(tuple(gradients), single=False)).items
            )
            found.append(
                PushGradient(
                    job=task.job,
                    attempt=task.attempt,
                    number=task.number,
                    layer=forward.index,
                    life=state.life,
                    revision=state.revision,
                    read=reads[0],
                    gradients=named,
                )
            )

        walk = walk_backward(passes, gradients, sink)
        while True:
            with self._transfers.computing():
                try:
                    next(walk)
                except StopIteration as end:
                    flowing: tuple[torch.Tensor | None, ...] = end.value
                    break
            yield from found
            found.clear()
        inputs = Tensors(flowing, task.inputs.single)
        yield TaskFinished(
            job=task.job,
            attempt=task.attempt,
            number=task.number,
            life=task.life,
            gradients=self._transfers.unload(inputs) if task.input_gradient else None,
        )

    def _place(self, task: DetachedTask) -> None:
        by_index = {layer.index: layer for layer in self._layers}
        for state in task.states:
            layer = by_index.get(state.layer)
            if layer is None:
                raise RejectedError(
                    f"task {task.attempt} refused: it brings layer {state.layer}, this worker has {sorted(by_index)}"
                )
            self._states.take(layer, state)
        missing = [
            layer.index
            for layer in self._layers
            if layer.index not in self._states or self._states[layer.index].life != task.life
        ]
        if missing:
            raise RejectedError(
                f"task {task.attempt} refused: it brought no state of layers {missing} in life {task.life}"
            )

    def _forward(self, task: DetachedTask) -> tuple[list[LayerPass], Tensors]:
        as_read = {
            index: self._transfers.load(Tensors(named.items, single=False)).items for index, named in task.buffers
        }
        passes: list[LayerPass] = []
        steps = forward_again(
            self._layers,
            self._transfers.load(task.inputs),
            [as_read.get(layer.index) for layer in self._layers],
            task.attempt.microbatch,
            tickets=frozenset(task.lacking),
            gradient=task.input_gradient,
            passes=passes,
        )
        with self._transfers.computing():
            return passes, run_to_end(steps)

    def _output_gradients(self, task: DetachedTask, outputs: Tensors) -> Sequence[torch.Tensor | None]:
        if self._head is not None:
            if task.targets is None:
                raise RejectedError(f"task {task.attempt} refused: it is for the last block and brings no targets")
            loss, head = run_head(self._head, outputs, self._transfers.load(task.targets), self._precision, graph=True)
            return loss_gradients(loss, head.items)
        if task.gradients is None:
            raise RejectedError(f"task {task.attempt} refused: it brings no gradient of the block's outputs")
        if all(one is None for one in task.gradients.items):
            return (None,) * len(outputs.items)
        return self._transfers.load(task.gradients).items
