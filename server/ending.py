"""How one run ends: in which state, with which sentence, and with everybody let go."""

from __future__ import annotations

from dataclasses import replace

from layerwise.messages import Unassign
from layerwise.roles import Effect, Send
from layerwise.server.crew import Crew
from layerwise.server.job_record import JobState
from layerwise.server.run_account import RunAccount


class Ending:
    """Ends a run, once. Not thread-safe."""

    def __init__(self, account: RunAccount, crew: Crew) -> None:
        self._account = account
        self._crew = crew

    def fail(self, sentence: str, *, damaged: bool = False) -> list[Effect]:
        """The run can't go on; ``damaged``: because no cut is left that can be read."""
        account = self._account
        if account.over:
            return []
        durable = account.record.durable_cut
        if account.training is not None:
            sentence += f" (at version {account.training.version})"
        if durable is not None:
            remedy = f"go on from it with `layerwise resume {account.job}`"
            sentence += f"; the newest durable cut is version {durable.version}: {remedy}"
        elif damaged:
            sentence += "; put the damaged file back and resume the job, or submit it again"
        elif account.training is not None or account.record.placement:
            sentence += f"; no cut was durable yet: begin again with `layerwise resume {account.job}`"
        return self.end(JobState.FAILED, sentence)

    def cancel(self, sentence: str) -> list[Effect]:
        """It was cancelled, as ``sentence`` says, and can be resumed."""
        return self.end(JobState.CANCELLED, f"{sentence}; go on with `layerwise resume {self._account.job}`")

    def give_up_draining(self, limit: float) -> list[Effect]:
        """It was cancelled, and what was open has not drained within ``limit`` seconds."""
        durable = self._account.record.durable_cut
        stands = f"the cut at version {durable.version} stands" if durable is not None else "no cut was durable yet"
        return self.cancel(f"cancelled; what was open did not drain within {limit:g} s, so {stands}")

    def end(self, state: JobState, message: str) -> list[Effect]:
        """It ends in ``state``, because of what ``message`` says."""
        account = self._account
        if account.training is not None:
            account.training.ledger.recall()
        account.note("error" if state is JobState.FAILED else "info", message)
        account.record = replace(
            account.record, state=state, message=message, finished=account.now, placement=(), moving=False
        )
        return [Send(name, Unassign(job=account.job)) for name in self._crew.names]
