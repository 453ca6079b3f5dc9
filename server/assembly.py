"""What comes before a run trains, and each time its route changes: the model is measured, the processes are told of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from layerwise.errors import LayerwiseError
from layerwise.messages import Probe, Probed, Unassign
from layerwise.profile import Profile
from layerwise.roles import Effect, Send
from layerwise.server.crew import Crew
from layerwise.server.divergence_guard import Divergence
from layerwise.server.divergence_policy import DivergencePolicy
from layerwise.server.ending import Ending
from layerwise.server.job_record import JobState
from layerwise.server.preparation import prepare
from layerwise.server.run_account import RunAccount
from layerwise.server.standby_copies import HeldCopy, next_evaluation

TOGETHER_SECONDS = 1.0
"""How long a restarted coordinator waits for the workers of a run whose shards are back and train on, before it interrupts them."""


class Assembly:
    """Measures the model once, then begins one generation of the route after the other. Not thread-safe.

    ``began`` (unix seconds): since when it has been waited for an answer of the processes.
    """

    def __init__(self, account: RunAccount, crew: Crew, ending: Ending, divergence: DivergencePolicy) -> None:
        self.began = account.now
        self._account = account
        self._crew = crew
        self._ending = ending
        self._divergence = divergence
        self._probing = ""
        self._expected: set[str] = set()
        self._interrupts_at: float | None = None

    @property
    def expected(self) -> frozenset[str]:
        """Workers that may come back, while they are waited for (see `proceed_together`)."""
        return frozenset(self._expected)

    def expect(self, workers: Iterable[str]) -> None:
        """The coordinator before knew of these ``workers``: they may come back."""
        account = self._account
        if account.prepared is not None and not account.prepared.settings.plain:
            # Else nothing is leased ahead, and nobody trains on without a coordinator.
            self._expected.update(workers)

    def expect_no_more(self, worker: str) -> None:
        """A worker is back, or known not to come back."""
        self._expected.discard(worker)

    def proceed_together(self) -> list[Effect]:
        """As `proceed`, but while the processes train on as they did before this coordinator, not before the last is back.

        A new route interrupts them for as long as one of them is missing.
        """
        if self._expected and not self._crew.shards.lacking:
            if self._interrupts_at is None:
                self._interrupts_at = self._account.now + TOGETHER_SECONDS
            if self._account.now < self._interrupts_at:
                return []
        return self.proceed()

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard."""
        self.began = min(self.began + seconds, now)
        if self._interrupts_at is not None:
            self._interrupts_at += seconds

    def proceed(self) -> list[Effect]:
        """Measure, or assign, if all places are filled. Else it is waited for those that are not."""
        account, shards = self._account, self._crew.shards
        if shards.empty or account.over:
            return []
        if account.prepared is not None:
            return self.route_anew()
        first, second = shards[0], shards[1] if len(shards) > 1 else None
        if self._probing:
            return []
        self._probing = first.process
        self.began = account.now
        account.note("info", f"measuring the model and the data on {first.process}", shard=first.process)
        peer, address = (second.process, second.address) if second is not None else ("", "")
        probe = Probe(job=account.job, spec_json=account.record.spec_json, peer=peer, address=address)
        return [Send(first.process, probe)]

    def on_probed(self, peer: str, message: Probed) -> list[Effect]:
        """The model is measured, or can't be."""
        account = self._account
        if account.prepared is not None or peer != self._probing:
            return []
        if message.error:
            return self._ending.end(JobState.FAILED, message.error)
        try:
            account.prepared = prepare(account.spec, Profile.from_json(message.profile_json))
        except LayerwiseError as error:
            return self._ending.end(JobState.FAILED, str(error))
        settings = account.prepared.settings
        account.record = replace(
            account.record,
            settings_json=settings.to_json(),
            profile_json=message.profile_json,
            blocks=account.prepared.blocks,
            warnings=(*account.record.warnings, *settings.warnings),
        )
        for warning in settings.warnings:
            account.note("warning", warning)
        return self.proceed()

    def forget_probe(self, name: str) -> None:
        """If ``name`` measured the model, that has to be done again."""
        if name == self._probing:
            self._probing = ""

    def route_anew(self) -> list[Effect]:
        """A new generation: blocks without their layers are restored in a new life, the others only connect anew."""
        account, crew, routing = self._account, self._crew, self._crew.routing
        assert account.prepared is not None
        if crew.shards.empty:
            return []
        training = account.training
        if training is not None:
            # The answer to a commit under way may never come, and what that deletes is gone all the same.
            account.keep_cuts(training.cuts.stays)
        settings = account.prepared.settings
        restored = crew.shards.lacking
        copies = self._copies_for(restored)
        if self._divergence.found is not None:
            self._go_back()
            restored, copies = tuple(range(len(crew.shards))), {}
        moved = training is not None and training.moved
        if moved or settings.plain:
            # What equals plain training has no layer ahead of another: all of them go back to the cut.
            restored, copies = tuple(range(len(crew.shards))), {}
        if training is not None:
            account.recovery.begin(training.version, account.now)
            in_a_row = account.recovery.in_a_row
            if in_a_row.goes_on:
                return self._ending.fail(
                    f"the run did not get on: {in_a_row.times - 1} times in a row processes or links failed before an "
                    f"update beyond those made before"
                )
            training.suspended = True
        next_life = routing.begin(account.record, restored, copies)
        for block in restored:
            crew.standby.begin(block, routing.version_of(block))
        moving = bool(crew.leaving) if moved else account.record.moving
        account.record = replace(account.record, next_life=next_life, moving=moving, placement=crew.placement)
        crew.room.clear()
        self._expected.clear()
        self.began = account.now
        for block, copy in copies.items():
            line = f"assigning block {block} at version {copy.version}, from its copy in the memory of {copy.holder}"
            account.note("info", line, version=copy.version, standby=copy.holder)
        if from_cut := [block for block in restored if block not in copies]:
            cut = routing.cut
            blocks = "all blocks" if len(from_cut) == len(crew.shards) else f"block {', '.join(map(str, from_cut))}"
            account.note("info", f"assigning {blocks} at version {cut}", version=cut)
        effects = routing.inform_shards(account.record)
        return effects + [routing.inform(one.process, one.block, account.record) for one in crew.workers.records]

    def on_divergence(self, found: Divergence) -> list[Effect]:
        """Training does not do what it should: stop, or go back as soon as every shard is there."""
        account = self._account
        if refusal := self._divergence.refusal(account.record, found):
            return self._ending.fail(refusal)
        if account.training is not None:
            account.training.suspended = True
        self._divergence.found = self._divergence.found or found
        return self.route_anew()

    def change_places(self, lost_cut: str = "") -> list[Effect]:
        """Training rests: let go who has to leave. All layers begin anew, for those of today end here.

        ``lost_cut`` says why they have to go back to an older cut; otherwise that of the stop is the newest.
        """
        account, crew, durable = self._account, self._crew, self._account.durable
        training = account.training
        assert training is not None
        if lost_cut:
            account.note("warning", f"{lost_cut}; all layers go back to the newest durable cut", version=durable)
            for place in crew.shards.filled:
                account.recovery.lose(place.block, place.process, training.final, account.now)
        training.moved = True
        training.suspended = True
        away = [name for name in crew.names if name in crew.leaving]
        for name in away:
            crew.routing.forget(name)
            if name in crew.shards:
                crew.shards.send_away(name, account.now)
            else:
                crew.remove_worker(name)
        crew.leaving.clear()
        crew.dismiss(away)
        account.note("info", f"at version {durable} {', '.join(away) or 'nobody'} left", version=durable)
        return [*(Send(name, Unassign(job=account.job)) for name in away), *self.proceed()]

    def _copies_for(self, blocks: Iterable[int]) -> dict[int, HeldCopy]:
        """The standby copies with which less of these blocks is lost than with the newest durable cut."""
        account, crew = self._account, self._crew
        assert account.prepared is not None
        until = next_evaluation(account.record, account.prepared)
        return crew.standby.choose(blocks, crew.shards, above=account.durable, until=until)

    def _go_back(self) -> None:
        """Forget the cuts from the divergence on, and write down how training goes on from the newest one before."""
        account = self._account
        assert account.prepared is not None
        num_updates = account.prepared.settings.plan.num_updates
        account.record, line, fields = self._divergence.go_back(
            account.record, account.reached, num_updates, account.now
        )
        account.keep_cuts(lambda version: True)
        account.recovery.go_back(account.durable)
        account.note("warning", line, **fields)
