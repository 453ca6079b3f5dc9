"""What follows for a run from what its training has decided: cuts, drops and evaluations to note, a new route, the end."""

from __future__ import annotations

from dataclasses import replace

from layerwise.roles import Effect
from layerwise.server.assembly import Assembly
from layerwise.server.ending import Ending
from layerwise.server.evaluation_round import with_evaluations
from layerwise.server.job_record import JobState
from layerwise.server.run_account import RunAccount
from layerwise.server.training import Training


class Settlement:
    """Takes over what training has decided since the last time. Not thread-safe."""

    def __init__(self, account: RunAccount, ending: Ending, assembly: Assembly) -> None:
        self._account = account
        self._ending = ending
        self._assembly = assembly
        self._training: Training | None = None
        self._num_decisions = 0

    def settle(self) -> list[Effect]:
        """Note what is new, then go back, change places or end, if it is time for that."""
        account, training = self._account, self._account.training
        if training is None or account.over:
            return []
        self._take_over(training)
        found, training.divergence = training.divergence, None
        if found is not None and not account.stopping:
            return self._assembly.on_divergence(found)
        if training.moved:
            return []
        final, num_updates = training.final, training.plan.num_updates
        moving = account.record.moving and not account.stopping and final < num_updates
        if moving and training.ledger.complete and (reason := training.cuts.given_up(final)) is not None:
            return self._assembly.change_places(f"the cut at version {final} can't be saved: {reason}")
        if training.failure is not None:
            return self._ending.fail(training.failure)
        if not training.finished:
            return []
        if moving:
            return self._assembly.change_places()
        if final < num_updates:
            return self._ending.cancel(f"cancelled at version {final}")
        message = f"done: {final} updates of every layer"
        if training.wants_evaluation and all(one["version"] != final for one in account.record.evaluations):
            # It was resumed at its very end, where the shards have no copy to evaluate.
            message += "; the last cut was not evaluated: `layerwise evaluate` does it"
        return self._ending.end(JobState.DONE, message)

    def _take_over(self, training: Training) -> None:
        """Note durable cuts, what was given up, and evaluations."""
        account = self._account
        if training is not self._training:  # it counts its decisions anew
            self._training, self._num_decisions = training, 0
        # What a commit under way deletes is forgotten before it is gone: its answer may find another coordinator.
        durable = training.commits.records
        cuts = tuple(durable[version] for version in sorted(durable) if training.cuts.stays(version))
        if cuts != account.record.cuts:
            account.record = replace(account.record, cuts=cuts)
        if training.ledger.num_decisions != self._num_decisions:
            self._num_decisions = training.ledger.num_decisions
            drops = training.ledger.drops
            account.record = replace(account.record, drops=tuple(drops[index].to_json() for index in sorted(drops)))
        if training.evaluations:
            listed = with_evaluations(account.record.evaluations, training.evaluations)
            account.record = replace(account.record, evaluations=listed)
            training.evaluations.clear()
