"""Validation samples on their way through one block's copies of a cut."""

from __future__ import annotations

from dataclasses import replace

from layerwise.messages import Evaluated, EvaluateForward
from layerwise.roles import Effect, Send
from layerwise.server.block_context import BlockContext
from layerwise.tasks import EvaluateResult, EvaluateTask


class BlockEvaluations:
    """Forward through the block, the answer back to the worker that asked. Called by `ShardRole` and its parts only."""

    def __init__(self, context: BlockContext) -> None:
        self._context = context
        self._workers: dict[tuple[int, int, int], str] = {}

    def on_forward(self, peer: str, message: EvaluateForward) -> list[Effect]:
        """Samples (or what the block before made of them) arrived."""
        context = self._context
        if context.upstream is not None and not context.is_upstream(peer):
            return context.refuse(peer, message, f"{peer} is not upstream")
        context.queue.push(
            EvaluateTask(
                version=message.version,
                start=message.start,
                stop=message.stop,
                inputs=message.inputs,
                targets=message.targets,
            )
        )
        if context.upstream is None:
            self._workers[message.version, message.start, message.stop] = peer
        return []

    def on_done(self, task: EvaluateTask, result: EvaluateResult) -> list[Effect]:
        """A slot has run the pass."""
        context = self._context
        if context.downstream is not None:
            assert result.outputs is not None
            forward = EvaluateForward(
                job=context.job,
                version=task.version,
                start=task.start,
                stop=task.stop,
                life=context.downstream.life,
                inputs=result.outputs,
                targets=task.targets,
            )
            return [Send(context.downstream.shard, forward)]
        assert result.loss is not None
        answer = Evaluated(
            job=context.job,
            version=task.version,
            start=task.start,
            stop=task.stop,
            life=context.life,
            loss=result.loss,
            metrics=result.metrics,
        )
        return self.relay(answer)

    def on_failed(self, task: EvaluateTask) -> None:
        """There will be no answer; nobody need be remembered who waits for it."""
        self._workers.pop((task.version, task.start, task.stop), None)

    def relay(self, answer: Evaluated) -> list[Effect]:
        """Hand an answer on upstream, to the worker in the end."""
        upstream = self._context.upstream
        if upstream is not None:
            return [Send(upstream.shard, replace(answer, life=upstream.life))]
        worker = self._workers.pop((answer.version, answer.start, answer.stop), None)
        return [Send(worker, answer)] if worker is not None else []

    def on_lost(self, peer: str) -> None:
        """A worker is gone; nobody waits for its answers."""
        self._workers = {key: worker for key, worker in self._workers.items() if worker != peer}

    def forget_all(self) -> None:
        """What is on its way is given up; the coordinator asks again."""
        self._workers.clear()
