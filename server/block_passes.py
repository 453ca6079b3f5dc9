"""The attempts under way at one block: forward in, forward out, boundary gradient in, boundary gradient out, report.

upstream                       this block                             downstream
  Forward ─────────────────►   ForwardTask ────────────────────────►  Forward
                               (last block: loss, BackwardTask)
                               BackwardTask ◄───────────────────────  BoundaryGradient
  BoundaryGradient ◄────────   every lacking layer has its gradient
  BlockClosed ◄─────────────                          (relayed) ◄───  BlockClosed

A microbatch that is dropped goes the same ways: a `Forward` without tensors from where that was decided (or where a layer has its
tombstone) to the end of the route, a `BoundaryGradient` without gradients to its beginning. Each block drops it by a `DropTask`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from layerwise.ids import Attempt
from layerwise.messages import (
    Abort,
    BlockClosed,
    BoundaryGradient,
    DroppedAttempt,
    Forward,
    Metric,
    NotFinite,
    Outcome,
    Tensors,
)
from layerwise.roles import Effect, Send
from layerwise.server.admission import Decision
from layerwise.server.block_context import BlockContext
from layerwise.server.first_shard import FirstShard
from layerwise.tasks import BackwardTask, DropResult, DropTask, FindTask, ForwardResult, ForwardTask

TOMBSTONE = "dropped before"
"""Why an attempt is dropped where nobody told: some layer has a tombstone of an earlier one."""
NO_GRADIENT = Tensors((None,))
"""Stands for a boundary gradient where nothing below is trainable: the blocks there still have to close the attempt."""


@dataclass(slots=True)
class _Pass:
    """One open attempt between its arrival at this block and the block's report.

    ``needed_from`` is the lowest layer up to the end of this block that lacks the microbatch; ``keep``: some layer does; ``input_gradient``:
    one before this block does, and waits for it.
    """

    attempt: Attempt
    number: int
    targets: Tensors
    needed_from: int
    lacking: tuple[int, ...]
    keep: bool
    input_gradient: bool
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()


class BlockPasses:
    """At most ``window`` attempts. Called by `ShardRole` and its parts only; ``feed(now)`` hands waiting backward passes to detached workers."""

    def __init__(self, context: BlockContext, first: FirstShard | None, feed: Callable[[float], list[Effect]]) -> None:
        self._context = context
        self._first = first
        self._feed = feed
        self._passes: dict[int, _Pass] = {}
        self._drops: dict[int, DroppedAttempt] = {}

    @property
    def drops(self) -> tuple[DroppedAttempt, ...]:
        """What the block has dropped in this life, and why, in position order."""
        return tuple(self._drops[index] for index in sorted(self._drops))

    def __len__(self) -> int:
        return len(self._passes)

    def describe(self) -> str:
        """What is under way, in one line."""
        return ", ".join(f"{one.number}:{one.attempt} lacking {one.lacking}" for one in self._passes.values())

    # Forward ---------------------------------------------------------------------------------------------------------

    def on_forward(self, peer: str, message: Forward, now: float) -> list[Effect]:
        """A microbatch arrived whole: from its worker at the first block, from upstream at the others."""
        context = self._context
        decisions: list[Decision] = []
        needed_from = message.needed_from
        if self._first is not None:
            needed_from = context.num_layers
            arrived = self._first.on_tensors(peer, message.number, message.attempt, now)
            if arrived is None:
                return context.refuse(peer, message, f"number {message.number} does not wait for it")
            decisions = arrived
        elif not context.is_upstream(peer) or message.number in self._passes:
            return context.refuse(peer, message, f"number {message.number} is here already, or {peer} is not upstream")
        elif len(self._passes) >= context.window:
            return context.refuse(peer, message, f"{context.window} microbatches are here, which is the window")
        index = context.plan.index(message.attempt.microbatch)
        lacking = context.compute.lacking(index)
        below = needed_from < context.place.start
        one = _Pass(
            attempt=message.attempt,
            number=message.number,
            targets=message.targets,
            needed_from=min([needed_from, *lacking]),
            lacking=lacking,
            keep=below or bool(lacking),
            input_gradient=below,
        )
        self._passes[one.number] = one
        effects = self._begin(one, message, index)
        if self._first is not None:
            # Only now: what is admitted next may be here whole already, and must come behind this one.
            effects += self._first.carry_out(decisions, now)
        return effects

    def _begin(self, one: _Pass, message: Forward, index: int) -> list[Effect]:
        """Have a slot run the forward pass; or drop the microbatch, here and in the blocks behind."""
        context = self._context
        if message.dropped:
            return self._hand_on_drop(one, message.dropped) + self._push_drop(one, message.dropped)
        if context.compute.dropped(index):
            # Decided before, and lost with a crash on the way to the other blocks.
            known = self._drops.get(index)
            reason = TOMBSTONE if known is None else known.reason
            return self._hand_on_drop(one, reason) + self._drop(one, reason)
        context.queue.push(
            ForwardTask(
                attempt=one.attempt,
                number=one.number,
                inputs=message.inputs,
                targets=message.targets,
                keep=one.keep,
                input_gradient=one.input_gradient,
            )
        )
        return []

    def on_forward_done(self, task: ForwardTask, result: ForwardResult, now: float) -> list[Effect]:
        """A slot has run the forward pass."""
        context = self._context
        one = self._passes[task.number]
        effects: list[Effect] = []
        if context.downstream is not None:
            assert result.outputs is not None
            forward = Forward(
                job=context.job,
                attempt=one.attempt,
                number=one.number,
                life=context.downstream.life,
                needed_from=one.needed_from,
                inputs=result.outputs,
                targets=one.targets,
            )
            effects.append(Send(context.downstream.shard, forward))
        else:
            if one.keep and result.loss is not None and not math.isfinite(result.loss):
                if context.drops_bad_samples:
                    return self._drop(one, f"its loss is not finite ({result.loss})")
                return self.find_not_finite(one.number, result.loss)
            if one.lacking:  # a block that has the microbatch already has had its loss counted
                one.loss, one.metrics = result.loss, result.metrics
        if not one.keep:
            effects += self._report(one, now)
        elif context.downstream is None:
            effects += self._push(BackwardTask(attempt=one.attempt, number=one.number, gradients=None), now)
        one.targets = NO_GRADIENT
        return effects

    # Backward --------------------------------------------------------------------------------------------------------

    def on_boundary_gradient(self, peer: str, message: BoundaryGradient, now: float) -> list[Effect]:
        """The block after has walked its layers."""
        one = self._passes.get(message.number)
        if one is None or one.attempt != message.attempt or not one.keep:
            return self._context.refuse(peer, message, f"number {message.number} does not wait for it")
        if message.dropped:
            return self._drop(one, message.dropped)
        return self._push(BackwardTask(attempt=one.attempt, number=one.number, gradients=message.gradients), now)

    def hand_down(self, number: int, gradients: Tensors) -> list[Effect]:
        """The gradients of the block's input are known, its own updates are still to be made: the block before needs no more."""
        context, one = self._context, self._passes[number]
        if not one.input_gradient:
            return []
        assert context.upstream is not None
        one.input_gradient = False
        boundary = BoundaryGradient(
            job=context.job, attempt=one.attempt, number=number, life=context.upstream.life, gradients=gradients
        )
        return [Send(context.upstream.shard, boundary)]

    def finish(self, number: int, gradients: Tensors | None, now: float) -> list[Effect]:
        """Every layer of the block has the microbatch, visibly to all readers; ``gradients`` are those of the block's input."""
        effects = self.hand_down(number, NO_GRADIENT if gradients is None else gradients)
        return effects + self._report(self._passes[number], now)

    # Drops -----------------------------------------------------------------------------------------------------------

    def on_dropped(self, task: DropTask, result: DropResult, now: float) -> list[Effect]:
        """Every layer of the block has the microbatch or its tombstone."""
        if result.missing_from is not None:
            index = self._context.plan.index(task.attempt.microbatch)
            self._drops.setdefault(index, DroppedAttempt(attempt=task.attempt, reason=task.reason))
        return self._report(self._passes[task.number], now, dropped=result, reason=task.reason)

    def _hand_on_drop(self, one: _Pass, reason: str) -> list[Effect]:
        context = self._context
        if context.downstream is None:
            return []
        forward = Forward(
            job=context.job,
            attempt=one.attempt,
            number=one.number,
            life=context.downstream.life,
            needed_from=one.needed_from,
            inputs=Tensors.none(),
            targets=Tensors.none(),
            dropped=reason,
        )
        return [Send(context.downstream.shard, forward)]

    def _drop(self, one: _Pass, reason: str) -> list[Effect]:
        """Drop it here and, where they wait for its gradient, in the blocks before."""
        context = self._context
        effects = self._push_drop(one, reason)
        if one.input_gradient:
            assert context.upstream is not None
            boundary = BoundaryGradient(
                job=context.job,
                attempt=one.attempt,
                number=one.number,
                life=context.upstream.life,
                gradients=Tensors.none(),
                dropped=reason,
            )
            effects.append(Send(context.upstream.shard, boundary))
        return effects

    def _push_drop(self, one: _Pass, reason: str) -> list[Effect]:
        one.loss, one.metrics, one.targets = None, (), Tensors.none()
        self._context.queue.push(DropTask(attempt=one.attempt, number=one.number, reason=reason))
        return []

    # Reports ---------------------------------------------------------------------------------------------------------

    def close(self, report: BlockClosed, now: float) -> list[Effect]:
        """Hand a report on upstream, to the first shard's admission in the end."""
        if self._first is not None:
            return self._first.on_block_closed(report, now)
        upstream = self._context.upstream
        assert upstream is not None
        return [Send(upstream.shard, replace(report, life=upstream.life))]

    def on_abort(self, message: Abort, now: float) -> list[Effect]:
        """Free an attempt. Its tensors never reached the first shard, so there is no task of it here."""
        context = self._context
        context.compute.abort(message.attempt)
        self._passes.pop(message.number, None)
        effects: list[Effect] = []
        if context.downstream is not None:
            effects.append(Send(context.downstream.shard, replace(message, life=context.downstream.life)))
        report = BlockClosed(
            job=context.job,
            attempt=message.attempt,
            number=message.number,
            life=context.life,
            block=context.block,
            outcome=Outcome.ABORTED,
        )
        return effects + self.close(report, now)

    def abort_all(self) -> None:
        """Free everything that is under way; nobody is told. No slot may be computing."""
        for one in self._passes.values():
            self._context.compute.abort(one.attempt)
        self._passes.clear()

    # A loss that is not finite ---------------------------------------------------------------------------------------

    def find_not_finite(self, number: int, loss: float | None) -> list[Effect]:
        """Have a slot look for the first layer whose output is not finite."""
        one = self._passes.get(number)
        if one is not None:
            self._context.queue.push(FindTask(attempt=one.attempt, number=number, loss=loss))
        return []

    def on_found(self, task: FindTask, first: int | None) -> list[Effect]:
        """Name the first layer whose output is not finite, or ask the block before."""
        context, number, loss = self._context, task.number, task.loss
        one = self._passes.get(number)
        if one is None:
            return []
        if first == -1 and context.upstream is not None:
            asked = NotFinite(job=context.job, attempt=one.attempt, number=number, life=context.upstream.life)
            return [Send(context.upstream.shard, asked)]
        names = context.layer_names
        if first == -1:
            where = "its input samples are not finite already"
        elif first is not None:
            where = f"layer {first} ({names[first]}) is the first whose output is not finite"
        elif context.downstream is not None:
            last = context.downstream.start - 1
            where = f"the outputs are finite up to layer {last} ({names[last]}) and not after it"
        else:
            where = "all layers' outputs are finite, the loss function's result is not"
        said = "" if loss is None else f" ({loss})"
        return context.fail(
            f"the loss of microbatch {one.attempt.microbatch} is not finite{said}: {where} "
            f"(a lower learning rate or a smaller window may help)",
            diverged=True,
        )

    # Inside ----------------------------------------------------------------------------------------------------------

    def _push(self, task: BackwardTask, now: float) -> list[Effect]:
        self._context.queue.push(task)
        return self._feed(now)

    def _report(self, one: _Pass, now: float, *, dropped: DropResult | None = None, reason: str = "") -> list[Effect]:
        context = self._context
        del self._passes[one.number]
        tombstone = None if dropped is None else dropped.missing_from
        report = BlockClosed(
            job=context.job,
            attempt=one.attempt,
            number=one.number,
            life=context.life,
            block=context.block,
            outcome=Outcome.APPLIED if tombstone is None else Outcome.DROPPED,
            loss=one.loss,
            metrics=one.metrics,
            reason=reason,
            missing_from=tombstone,
            partial=dropped is not None and tombstone is not None and dropped.partial,
        )
        return self.close(report, now)
