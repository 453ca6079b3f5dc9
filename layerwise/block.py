"""A block of layers on one device: forward, backward, cuts and evaluation, in the calling thread.

forward   x ─► layer 4 ─► layer 5 ─► layer 6 ─► outputs (or, in the last block, the loss)
               ticket      ticket     ticket        each layer with a graph of its own, kept in the activation store
backward  dx ◄─ layer 4 ◄─ layer 5 ◄─ layer 6 ◄─ gradient of the outputs
               update?     update?    update?       each gradient is taken in before the layer below begins
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from layerwise.applied import AppliedSet
from layerwise.backward import forward_again, walk_backward
from layerwise.block_evaluation import evaluate_copies, first_not_finite
from layerwise.cut_shelf import CutShelf
from layerwise.detached_task import check_pushed, detached_task
from layerwise.device import HostTransfers
from layerwise.errors import NotOwnerError, RejectedError, WrongLifeError
from layerwise.events import WeightMode
from layerwise.gradient_sum import Gradients
from layerwise.head import Head, loss_gradients, run_head
from layerwise.ids import Attempt
from layerwise.kept_pass import ActivationStore, KeptPass
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.layer_compute import LayerPass, Precision
from layerwise.messages import DetachedTask, LayerReport, LayerRevision, Tensors
from layerwise.plan import TrainingPlan
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    DropResult,
    EvaluateResult,
    EvaluateTask,
    ForwardResult,
    ForwardTask,
    InputGradient,
    Steps,
)

log = logging.getLogger(__name__)


class Block:
    """Implements `layerwise.tasks.BlockCompute` with torch.

    Methods may run on several slot threads at once; the layers' locks and the activation store's guard what they share.

    ``mode`` is how backward passes get their weights. ``head`` is there in the last block only. ``trainable_below``:
    some layer of an earlier block has trainable parameters, so an input gradient is of use.

    ``updates_last``: a backward pass hands its input gradient on before it makes the updates that fall due, so that the
    block before computes meanwhile. The layers stay locked until they are made, so one thread must run all passes.
    """

    def __init__(
        self,
        layers: Sequence[TrainedLayer],
        plan: TrainingPlan,
        shelf: CutShelf,
        *,
        mode: WeightMode,
        head: Head | None,
        trainable_below: bool,
        transfers: HostTransfers | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.shelf = shelf
        self.mode = mode
        self.updates_last = False
        self._plan = plan
        self._head = head
        self._trainable_below = trainable_below
        self._transfers = transfers if transfers is not None else HostTransfers()
        self._precision = precision if precision is not None else Precision()
        self._store = ActivationStore()
        self._cuts: set[int] = set()
        for layer in self.layers:
            if layer.recomputes and mode is WeightMode.LATEST:
                log.info(
                    "layer %d (%s) computes with weights derived from its parameters, so its forward pass is run again",
                    layer.index,
                    layer.module.name,
                )

    @property
    def start(self) -> int:
        """First layer of the block."""
        return self.layers[0].index

    @property
    def stop(self) -> int:
        """One past the last layer."""
        return self.layers[-1].index + 1

    @property
    def store_bytes(self) -> int:
        """Bytes in the activation store."""
        return self._store.num_bytes

    def lacking(self, index: int) -> tuple[int, ...]:
        """The block's layers that have neither applied nor dropped microbatch ``index``."""
        return tuple(layer.index for layer in self.layers if layer.ledger.lacks(index))

    def applied(self) -> tuple[AppliedSet, ...]:
        """A copy of each layer's set. No pass may be under way."""
        return tuple(layer.ledger.applied.copy() for layer in self.layers)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, task: ForwardTask) -> Steps[ForwardResult]:
        """Open a ticket on every lacking layer, run, and keep what the backward pass needs.

        On an error the tickets opened are aborted and nothing is kept.
        """
        inputs = self._transfers.load(task.inputs)
        targets = task.targets if self._head is None else self._transfers.load(task.targets)
        lacking = self.lacking(self._plan.index(task.attempt.microbatch)) if task.keep else ()
        kept = KeptPass(
            attempt=task.attempt,
            number=task.number,
            inputs=inputs,
            targets=targets,
            input_gradient=task.input_gradient and self._trainable_below,
            tickets=frozenset(lacking),
        )
        try:
            outputs = yield from self._forward_layers(kept, keep=task.keep)
            result = self._finish_forward(kept, outputs)
        except BaseException:
            # Only what this run opened: a repeat of an attempt that is under way must not end it.
            for layer, _ in zip(self.layers, kept.buffers, strict=False):
                if layer.index in kept.tickets:
                    layer.abort(task.attempt)
            self._unstash(kept)
            raise
        if task.keep:
            kept.num_bytes = self._kept_bytes(kept)
            self._store.put(kept)
        return result

    def _forward_layers(self, kept: KeptPass, *, keep: bool) -> Steps[Tensors]:
        attempt, tickets = kept.attempt, kept.tickets
        again = self.mode is WeightMode.RECOMPUTE
        stash = self.mode is WeightMode.STASHED
        flowing = kept.input_gradient
        flows: list[bool] | None = None
        values = kept.inputs
        for layer in self.layers:
            with self._transfers.computing():
                compute = layer.compute
                leaves = compute.prepare(values, gradient=flowing and not again, flows=flows)
                wanted = bool(compute.differentiated(tickets)[0])
                derived = layer.recomputes and self.mode is WeightMode.LATEST
                graph = (wanted or flowing) and not again and not derived
                one = layer.forward(leaves, attempt, kept.number, tickets=tickets, graph=graph, stash=stash)
                assert one.outputs is not None
                kept.buffers.append(one.buffers)
                if one.stashed is not None:
                    kept.stashed.append(one)
                values = one.outputs
                flowing = flowing or wanted
                if derived:
                    flows = None
                    one.outputs = None
                elif not again:
                    flows = [item is not None and item.requires_grad for item in values.items]
                    if not graph:
                        one.outputs = None
                if keep and not again:
                    kept.passes.append(one)
            yield None
        return values

    def _finish_forward(self, kept: KeptPass, outputs: Tensors) -> ForwardResult:
        with self._transfers.computing():
            if self._head is None:
                detached = Tensors(
                    tuple(None if one is None else one.detach() for one in outputs.items), outputs.single
                )
                return ForwardResult(outputs=self._transfers.unload(detached))
            loss, head = run_head(self._head, outputs, kept.targets, self._precision, graph=bool(kept.passes))
            if kept.passes:
                kept.head, kept.loss = head, loss
            with torch.no_grad():
                metrics = self._head.metrics(head, kept.targets)
            return ForwardResult(outputs=None, loss=float(loss.detach()), metrics=metrics)

    def _kept_bytes(self, kept: KeptPass) -> int:
        num_bytes = kept.inputs.num_bytes + kept.targets.num_bytes
        share = kept.attempt.microbatch.num_samples / self._plan.microbatch_samples
        for one, layer in zip(kept.passes, self.layers, strict=False):
            num_bytes += int(layer.activation_bytes * share) if one.outputs is not None else 0
        if kept.head is not None:
            num_bytes += kept.head.num_bytes
        return num_bytes

    # --- backward -----------------------------------------------------------------------------------------------------

    def backward(self, task: BackwardTask) -> Steps[BackwardResult]:
        """Apply each layer's gradient as soon as it exists; free what was kept.

        Raises:
            RejectedError: nothing is kept of the attempt, or a layer's ticket was closed meanwhile.
        """
        kept = self._store.pop(task.attempt)
        if kept is None:
            raise RejectedError(f"nothing is kept of {task.attempt} here: it was aborted, finished, or never came")
        try:
            if not kept.passes:
                yield from self._forward_again(kept)
            with self._transfers.computing():
                gradients = self._output_gradients(kept, task.gradients)

            def sink(forward: LayerPass, found: Gradients, reads: tuple[int, ...]) -> None:
                self._take(kept, forward, found, reads)

            walk = walk_backward(kept.passes, gradients, sink)
            while True:
                with self._transfers.computing():
                    try:
                        next(walk)
                    except StopIteration as end:
                        flowing: tuple[torch.Tensor | None, ...] = end.value
                        break
                yield None
            result = BackwardResult(gradients=None)
            if kept.input_gradient:
                with self._transfers.computing():
                    boundary = self._transfers.unload(Tensors(flowing, kept.inputs.single))
                if kept.updates:
                    yield InputGradient(gradients=boundary)
                else:
                    result = BackwardResult(gradients=boundary)
        finally:
            with ExitStack() as ending:
                ending.callback(self._unstash, kept)
                ending.enter_context(self._transfers.computing())
                for one in reversed(kept.updates):
                    ending.push(one)
        return result

    def _take(self, kept: KeptPass, forward: LayerPass, found: Gradients, reads: tuple[int, ...]) -> None:
        """A layer's gradient exists: take it in. A layer that has the microbatch already only notes what was read."""
        layer = self.layers[forward.index - self.start]
        attempt, (read, *owners) = kept.attempt, reads
        mode = WeightMode.RECOMPUTE if layer.recomputes and self.mode is WeightMode.LATEST else self.mode
        taken = False
        if forward.ticket:
            base = forward.read if mode is WeightMode.STASHED else read  # without parameters nothing was stashed
            later = kept.updates if self.updates_last and kept.input_gradient else None
            taken = layer.take(attempt, found, read=base, mode=mode, owners=tuple(owners), later=later)
        if not taken:
            if mode is WeightMode.STASHED and forward.stashed is None:
                mode = WeightMode.LATEST
            layer.hand_down(attempt, kept.number, read=read, mode=mode, owners=tuple(owners))

    def _forward_again(self, kept: KeptPass) -> Steps[None]:
        """Build the graphs that were not kept, with the weights of now and the buffers as they were read."""
        steps = forward_again(
            [layer.compute for layer in self.layers],
            kept.inputs,
            kept.buffers,
            kept.attempt.microbatch,
            tickets=kept.tickets,
            gradient=kept.input_gradient,
            passes=kept.passes,
        )
        outputs: Tensors | None = None
        while outputs is None:
            with self._transfers.computing():
                try:
                    next(steps)
                except StopIteration as end:
                    outputs = end.value
                    continue
            yield None
        reads = tuple(one.reads for one in kept.passes)
        self.layers[0].begin_walk(kept.attempt, kept.number, detached=False, reads=reads)
        if self._head is not None:
            with self._transfers.computing():
                kept.loss, kept.head = run_head(self._head, outputs, kept.targets, self._precision, graph=True)
        yield None

    def _output_gradients(self, kept: KeptPass, gradients: Tensors | None) -> Sequence[torch.Tensor | None]:
        if kept.loss is not None and kept.head is not None:
            items = kept.head.items
            loss, kept.loss, kept.head = kept.loss, None, None
            return loss_gradients(loss, items)
        if gradients is None:
            raise RejectedError(f"backward of {kept.attempt} refused: the gradient of the block's outputs is missing")
        last = kept.passes[-1]
        if all(one is None for one in gradients.items):
            # Nobody below may be told how many outputs there were: nothing flows.
            return (None,) * (len(gradients.items) if last.outputs is None else len(last.outputs.items))
        return self._transfers.load(gradients).items

    def _unstash(self, kept: KeptPass) -> None:
        for forward in kept.stashed:
            self._layer(forward.index).unstash(forward)
        kept.stashed.clear()

    # --- detached workers ---------------------------------------------------------------------------------------------

    def detach(self, task: BackwardTask, job: str, life: int, have: tuple[LayerRevision, ...]) -> DetachedTask:
        """The task, made whole for a worker that holds ``have``; what was kept stays until `release`."""
        kept = self._store.get(task.attempt)
        held = {one.layer: one.revision for one in have if one.life == life}
        host = self._transfers
        with host.computing():
            pulled = [layer.pull(held.get(layer.index)) for layer in self.layers]
            host.finish()
        self._begin_detached(kept, [version for version, _ in pulled])
        states = tuple(state for _, state in pulled if state is not None)
        targets = kept.targets if self._head is not None else None
        return detached_task(task, job, life, kept, self.layers, states, targets, host)

    def _begin_detached(self, kept: KeptPass, versions: Sequence[int]) -> None:
        reads = tuple(
            (versions[layer.index - self.start], *(versions[owner - self.start] for owner in layer.compute.owners))
            for layer in self.layers
        )
        self.layers[0].begin_walk(kept.attempt, kept.number, detached=True, reads=reads)

    def apply(self, task: ApplyTask) -> Steps[None]:
        """Take in a pushed gradient; a repeat changes nothing.

        Raises:
            WrongLifeError: it is from another life of the layer; nothing was changed.
            NotOwnerError: the layer is in another block.
            RejectedError: its ticket is not open, or its tensors are not the layer's.
        """
        push = task.push
        layer = self._layer(push.layer)
        if push.life != layer.ledger.life:
            raise WrongLifeError(
                f"gradient for layer {push.layer} refused: it is from life {push.life}, the layer is in life "
                f"{layer.ledger.life}; fetch the layer again"
            )
        check_pushed(layer, push.gradients)
        gradients = self._transfers.load(Tensors(push.gradients.items, single=False)).items
        with self._transfers.computing():
            layer.take(push.attempt, gradients, read=push.read, mode=WeightMode.RECOMPUTE)
        yield from ()

    def release(self, attempt: Attempt) -> None:
        """Free what ``attempt`` keeps, once a detached worker has finished it."""
        kept = self._store.pop(attempt)
        if kept is not None:
            self._unstash(kept)

    # --- abort, drop --------------------------------------------------------------------------------------------------

    def abort(self, attempt: Attempt) -> None:
        """Free what ``attempt`` keeps and abort its open tickets."""
        self.release(attempt)
        for layer in self.layers:
            layer.abort(attempt)

    def drop(self, attempt: Attempt, reason: str) -> DropResult:
        """Put tombstones in every layer that still lacks the microbatch; gives how all of them stand to it then.

        What its forward pass wrote into buffers stays.
        """
        self.release(attempt)
        with self._transfers.computing():
            for layer in self.layers:
                layer.drop(attempt, reason)
        index = self._plan.index(attempt.microbatch)
        missing = [layer.index for layer in self.layers if index in layer.ledger.applied.dropped]
        return DropResult(missing_from=min(missing, default=None), partial=len(missing) < len(self.layers))

    def dropped(self, index: int) -> bool:
        """Whether a layer has a tombstone in the place of microbatch ``index``."""
        return any(index in layer.ledger.applied.dropped for layer in self.layers)

    # --- evaluation and cuts ------------------------------------------------------------------------------------------

    def evaluate(self, task: EvaluateTask) -> Steps[EvaluateResult]:
        """Run the cut's copy in evaluation mode; ``NotFoundError`` when it is not held."""
        copies = self.shelf.get(task.version)
        return (yield from evaluate_copies(task, copies, self.layers, self._head, self._transfers, self._precision))

    def cut_at(self, version: int) -> None:
        """Every layer copies itself at the update that reaches ``version`` (at once where it is there already).

        Repeats do nothing.
        """
        if version in self._cuts:
            return
        self._cuts.add(version)
        with self._transfers.computing():
            for layer in self.layers:
                layer.cut_at(version, self._shelve)

    def copy_every(self, interval: int, taker: Callable[[LayerCopy], None]) -> None:
        """Give ``taker`` a copy of each layer at every multiple of ``interval``. Called before the first pass.

        ``taker`` runs under the layer's lock: it must only note the copy.
        """

        def take(copy: LayerCopy) -> None:
            self._transfers.finish()
            taker(copy)

        for layer in self.layers:
            layer.copy_every(interval, take)

    def _shelve(self, copy: LayerCopy) -> None:
        self._transfers.finish()  # the writer's thread reads the copy from another stream
        self.shelf.put(copy)

    def hold_cut(self, version: int) -> None:
        """Keep the copy of ``version`` in memory after it is saved."""
        self.shelf.hold(version)

    def release_cut(self, version: int) -> None:
        """Let copies of versions up to ``version`` go once they are saved."""
        self.shelf.release(version)

    # --- reports ------------------------------------------------------------------------------------------------------

    def report(self) -> tuple[LayerReport, ...]:
        """Totals of each layer."""
        return tuple(layer.report() for layer in self.layers)

    def first_not_finite(self, attempt: Attempt) -> int | None:
        """The first layer whose output for ``attempt`` is not finite.

        -1: the block's input already was not; ``None``: all finite. Outputs that were not kept are computed again,
        with the weights that are there now.
        """
        with self._transfers.computing():
            return first_not_finite(self._store.get(attempt), self.layers)

    def _layer(self, index: int) -> TrainedLayer:
        if not self.start <= index < self.stop:
            raise NotOwnerError(f"layer {index} is not in the block of layers {self.start} to {self.stop - 1}")
        return self.layers[index - self.start]
