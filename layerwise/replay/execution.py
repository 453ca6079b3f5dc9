"""What each record makes a block do: the calls of the slot threads and of the detached workers, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from layerwise.detached import DetachedBlock, PulledStates
from layerwise.device import transfers_in_order
from layerwise.errors import NotFiniteError
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    Event,
    ForwardEvent,
    PassEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.head import Head
from layerwise.ids import Attempt
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.messages import LayerState, NamedTensors, PushGradient, TaskFinished, Tensors
from layerwise.replay.exchange import Exchange, Handed, travelled, travelled_by_name
from layerwise.replay.life_index import LifeIndex, Owners, reads_of
from layerwise.replay.past_weights import PastWeights
from layerwise.replay.recorded_block import RecordedBlock
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    ForwardResult,
    ForwardTask,
    Result,
    Steps,
    run_to_end,
)

NO_GRADIENT = Tensors((None,))
"""What stands for a boundary gradient where nothing below wants one."""


@dataclass(slots=True, kw_only=True)
class _Pass:
    """An attempt between its first layer's forward pass and the end of its backward pass."""

    number: int
    handed: Handed
    needed_from: int
    keep: bool
    input_gradient: bool
    forward: Steps[ForwardResult] | None = None
    walk: Steps[BackwardResult] | None = None
    num_walks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """Why the next record can't be executed yet. ``crowded``: only because others are to use up what waits."""

    reason: str
    crowded: bool = False


class Execution:
    """The passes under way in one block and life. One thread; the block's own events tell what came about."""

    def __init__(
        self,
        index: LifeIndex,
        block: RecordedBlock,
        exchange: Exchange,
        *,
        owners: Owners,
        head: Head | None,
        on_cut: Callable[[CutEvent, LayerCopy], None],
    ) -> None:
        """``head`` is there in the last block; ``on_cut`` is told of each cut."""
        self.index = index
        self.block = block
        self._exchange = exchange
        self._owners = owners
        self._head = head
        self._on_cut = on_cut
        self._past = PastWeights(block.layers, index.header.plan, index.past_reads)
        self._passes: dict[Attempt, _Pass] = {}
        self._pushes: dict[Attempt, dict[int, PushGradient]] = {}

    @property
    def num_passes(self) -> int:
        """Attempts that something is kept of."""
        return len(self._passes)

    @property
    def num_past_weights(self) -> int:
        """Versions kept for passes that will still read them."""
        return len(self._past)

    def close(self) -> None:
        """This life is over: nothing is kept."""
        for one in self._passes.values():
            for steps in (one.forward, one.walk):
                if steps is not None:
                    steps.close()
        self._passes.clear()
        self._pushes.clear()

    def execute(self, event: Event, *, crowded: bool) -> Blocked | None:
        """Do what ``event`` says was done; or give why that must wait.

        ``crowded``: run ahead of the block above although it has much to do.

        Raises:
            LayerwiseError, ValueError: it can't be done here and now.
        """
        match event:
            case ForwardEvent() | PassEvent():
                return self._forward(event, crowded=crowded)
            case AccumulateEvent() | BackwardEvent():
                return self._backward(event)
            case WalkEvent(detached=True):
                return self._detached(event)
            case WalkEvent():
                return self._again(event)
            case DropEvent():
                for layer in self.block.layers:
                    self._past.before_intake(layer)
                self._end_forward(event.attempt)
                with suppress(NotFiniteError):
                    self.block.drop(event.attempt, event.reason)
                self._forget(event.attempt)
            case AbortEvent():
                self._end_forward(event.attempt)
                self.block.abort(event.attempt)
                self._forget(event.attempt)
            case CutEvent():
                copies: list[LayerCopy] = []
                self._layer(event.layer).cut_at(event.version, copies.append)
                if copies:
                    self._on_cut(event, copies[0])
        return None

    def _forward(self, event: ForwardEvent | PassEvent, *, crowded: bool) -> Blocked | None:
        block, attempt, plan = self.block, event.attempt, self.index.header.plan
        if event.layer == block.start:
            if self._exchange.waiting(block.stop) >= self.index.header.window and not crowded:
                return Blocked(reason=f"the block from layer {block.stop} has enough to do", crowded=True)
            handed = self._exchange.take_forward(block.start, attempt)
            if handed is None:
                return Blocked(reason=f"{attempt} waits for the outputs of layer {block.start - 1}")
            self._exchange.begin(block.stop, attempt)
            lacking = block.lacking(plan.index(attempt.microbatch))
            below = handed.needed_from < block.start
            one = _Pass(
                number=event.number,
                handed=handed,
                needed_from=min([handed.needed_from, *lacking]),
                keep=below or bool(lacking),
                input_gradient=below,
            )
            one.forward = block.forward(
                ForwardTask(
                    attempt=attempt,
                    number=event.number,
                    inputs=handed.inputs,
                    targets=handed.targets,
                    keep=one.keep,
                    input_gradient=below,
                )
            )
            self._passes[attempt] = one
        one = self._pass(attempt)
        if one.forward is None:
            raise ValueError(f"the forward pass of {attempt} has ended")
        result = _next(one.forward)
        if event.layer == block.stop - 1 and result is None:
            result = _next(one.forward)
        if result is None:
            return None
        one.forward = None
        if result.outputs is not None:
            handed = Handed(inputs=travelled(result.outputs), targets=one.handed.targets, needed_from=one.needed_from)
            self._exchange.put_forward(block.stop, attempt, handed)
        if not one.keep:
            del self._passes[attempt]
        return None

    def _backward(self, event: AccumulateEvent | BackwardEvent) -> Blocked | None:
        block, attempt, layer = self.block, event.attempt, self._layer(event.layer)
        pushes = self._pushes.get(attempt, {})
        if isinstance(event, AccumulateEvent) and event.layer in pushes:
            self._past.before_intake(layer)
            with suppress(NotFiniteError):
                run_to_end(block.apply(ApplyTask(worker="", push=pushes.pop(event.layer))))
            self._release(attempt)
            return None
        one = self._pass(attempt)
        if one.walk is None:
            if block.mode is WeightMode.RECOMPUTE:
                raise ValueError(f"no walk of {attempt} has begun")
            blocked = self._begin_walk(attempt, one)
            if blocked is not None:
                return blocked
        assert one.walk is not None
        with self._past.reading(dict(reads_of(event, self._owners))):
            _next(one.walk)
        self._past.before_intake(layer)
        with suppress(NotFiniteError):  # it was no update when it was recorded either, or that record is missed next
            block.settle()
        if event.layer == block.start:
            result = _next(one.walk)
            if result is None:
                raise ValueError(f"the backward pass of {attempt} does not end at layer {block.start}")
            self._finish(attempt, one, result.gradients)
        return None

    def _begin_walk(self, attempt: Attempt, one: _Pass) -> Blocked | None:
        gradients = None
        if self._head is None:
            gradients = self._exchange.gradient(self.block.stop, attempt)
            if gradients is None:
                return Blocked(reason=f"{attempt} waits for the gradient of layer {self.block.stop}")
        one.walk = self.block.backward(BackwardTask(attempt=attempt, number=one.number, gradients=gradients))
        return None

    def _again(self, event: WalkEvent) -> Blocked | None:
        """A slot computes the block again, layer by layer, before its backward pass."""
        one = self._pass(event.attempt)
        blocked = self._begin_walk(event.attempt, one)
        if blocked is not None:
            return blocked
        assert one.walk is not None
        one.num_walks += 1
        self._pushes.pop(event.attempt, None)
        for layer, versions in zip(self.block.layers, event.reads, strict=True):
            wanted = dict(zip((layer.index, *self._owners.get(layer.index, ())), versions, strict=False))
            with self._past.reading(wanted):
                _next(one.walk)
        _next(one.walk)  # it says so
        return None

    def _detached(self, event: WalkEvent) -> Blocked | None:
        """A worker is given the task: all that it will compute is fixed, so it is computed now."""
        block, attempt = self.block, event.attempt
        one = self._pass(attempt)
        gradients = None
        if self._head is None:
            gradients = self._exchange.gradient(block.stop, attempt)
            if gradients is None:
                return Blocked(reason=f"{attempt} waits for the gradient of layer {block.stop}")
        one.num_walks += 1
        life = self.index.header.life
        versions = {layer.index: versions[0] for layer, versions in zip(block.layers, event.reads, strict=True)}
        pushes: dict[int, PushGradient] = {}
        boundary: Tensors | None = None
        with self._past.reading(versions):
            have = tuple(layer.revision() for layer in block.layers)
            precision = block.layers[0].compute.precision
            task = block.detach(BackwardTask(attempt=attempt, number=one.number, gradients=gradients), "", life, have)
            worker = DetachedBlock(
                [layer.compute for layer in block.layers],
                _held(block.layers, versions, life),
                head=self._head,
                transfers=transfers_in_order(precision.device),
                precision=precision,
            )
            for answer in worker.run(task):
                if isinstance(answer, PushGradient):
                    pushes[answer.layer] = PushGradient(
                        job=answer.job,
                        attempt=answer.attempt,
                        number=answer.number,
                        layer=answer.layer,
                        life=life,
                        revision=answer.revision,
                        read=answer.read,
                        gradients=travelled_by_name(answer.gradients),
                    )
                else:
                    assert isinstance(answer, TaskFinished)
                    boundary = answer.gradients
        index = self.index.header.plan.index(attempt.microbatch)
        self._pushes[attempt] = {
            layer.index: pushes[layer.index]
            for layer in block.layers
            if layer.index in pushes and layer.ledger.lacks(index)
        }
        if self._is_last(attempt, one) and one.input_gradient:
            self._exchange.put_gradient(block.start, attempt, NO_GRADIENT if boundary is None else travelled(boundary))
        self._release(attempt)
        return None

    def _is_last(self, attempt: Attempt, one: _Pass) -> bool:
        """Whether no other walk follows because the worker of this one was lost."""
        return one.num_walks == self.index.walks.get(attempt, 1)

    def _release(self, attempt: Attempt) -> None:
        one = self._passes.get(attempt)
        if one is not None and not self._pushes.get(attempt) and self._is_last(attempt, one):
            self.block.release(attempt)
            self._forget(attempt)

    def _finish(self, attempt: Attempt, one: _Pass, gradients: Tensors | None) -> None:
        if one.input_gradient:
            boundary = NO_GRADIENT if gradients is None else travelled(gradients)
            self._exchange.put_gradient(self.block.start, attempt, boundary)
        self._forget(attempt)

    def _forget(self, attempt: Attempt) -> None:
        one = self._passes.pop(attempt, None)
        self._pushes.pop(attempt, None)
        self._exchange.drop_gradient(self.block.stop, attempt)
        if one is not None and one.walk is not None:
            one.walk.close()

    def _end_forward(self, attempt: Attempt) -> None:
        """A forward pass that did not come to its end has closed its tickets itself."""
        one = self._passes.get(attempt)
        if one is not None and one.forward is not None:
            one.forward.close()
            one.forward = None

    def _pass(self, attempt: Attempt) -> _Pass:
        one = self._passes.get(attempt)
        if one is None:
            raise ValueError(f"no forward pass of {attempt} is under way in this block")
        return one

    def _layer(self, index: int) -> TrainedLayer:
        return self.block.layers[index - self.block.start]


def _next(steps: Steps[Result]) -> Result | None:
    """One step; what it returns if it was the last."""
    try:
        next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result
    return None


def _held(layers: tuple[TrainedLayer, ...], versions: Mapping[int, int], life: int) -> PulledStates:
    """What a worker holds when the layers themselves, as they are, stand for its copies."""
    states = PulledStates()
    for layer in layers:
        states.hold(
            LayerState(
                layer=layer.index,
                life=life,
                revision=layer.ledger.revision,
                version=versions[layer.index],
                parameters=NamedTensors((), ()),
            )
        )
    return states
