"""What a block tells the coordinator of itself, for metrics and documents."""

from __future__ import annotations

import math

from layerwise.messages import BlockReport
from layerwise.roles import Effect, Send
from layerwise.server.block_context import BlockContext

REPORT_SECONDS = 1.0
"""A report is made at most so often; only that of the last cut does not wait."""


class BlockReports:
    """Totals of one block. Called by `ShardRole`; what only the shell knows, it sets before each tick."""

    def __init__(self, context: BlockContext) -> None:
        self.compute_seconds = 0.0
        """How long the slots were busy in this life."""
        self.log_bytes = 0
        """How large the block's event log is."""
        self.shortage = ""
        """Why the disk gives the event log no more room; empty when it does."""
        self._context = context
        self._reported_at = -math.inf

    def on_tick(self, num_open: int, now: float) -> list[Effect]:
        """Report when it is time. ``num_open``: attempts that hold a place at the block."""
        return self.report(num_open, now) if now - self._reported_at >= REPORT_SECONDS else []

    def report(self, num_open: int, now: float) -> list[Effect]:
        """Report now."""
        self._reported_at = now
        context = self._context
        report = BlockReport(
            job=context.job,
            block=context.block,
            layers=context.compute.report(),
            open_attempts=num_open,
            store_bytes=context.compute.store_bytes,
            forward_queue=context.queue.forward_depth,
            backward_queue=context.queue.backward_depth,
            compute_seconds=self.compute_seconds,
            log_bytes=self.log_bytes,
            shortage=self.shortage,
        )
        return [Send(context.coordinator, report)]
