"""How a run comes to train: all that its processes bring when they are ready makes one training."""

from __future__ import annotations

import json
from dataclasses import replace

from layerwise.applied import AppliedSet
from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import LayerwiseError
from layerwise.ids import first_attempt
from layerwise.messages import CutDurable, LayerFile, Role, StartTraining, Stop
from layerwise.roles import Effect, Send
from layerwise.server.crew import Crew
from layerwise.server.cut_manifest import manifest_json
from layerwise.server.divergence_policy import DivergencePolicy
from layerwise.server.ending import Ending
from layerwise.server.job_record import JobState
from layerwise.server.preparation import partial_drops, restored_sets
from layerwise.server.run_account import RunAccount
from layerwise.server.standby_copies import first_whole_cut
from layerwise.server.training import Training
from layerwise.server.training_messages import hear_shard


class TrainingStart:
    """Begins training, and has it go on after each change of the route. Not thread-safe."""

    def __init__(self, account: RunAccount, crew: Crew, ending: Ending, divergence: DivergencePolicy) -> None:
        self._account = account
        self._crew = crew
        self._ending = ending
        self._divergence = divergence

    def if_ready(self) -> list[Effect]:
        """Train, if it does not yet, and nobody is waited for any more."""
        account, crew, routing = self._account, self._crew, self._crew.routing
        if account.over or not routing.generation or crew.shards.empty:
            return []
        if account.training is not None and not account.training.suspended:
            return []
        if not crew.workers.of_role(Role.FORWARD) or routing.missing(crew.needed):
            return []
        if mismatch := routing.mismatch():
            return self._ending.fail(mismatch)
        try:
            return self._begin()
        except (LayerwiseError, ValueError) as error:
            # What processes have said of their layers is put together here, at whatever made the last of them ready.
            return self._ending.fail(f"training can't begin: {error}")

    def why_not(self, limit: float) -> str:
        """Who has been waited for, for ``limit`` seconds, in one sentence."""
        routing = self._crew.routing
        if not routing.generation:
            return f"shard {self._crew.shards[0].process} did not measure the model within {limit:g} s"
        missing = routing.missing(self._crew.needed)
        return f"{', '.join(missing) or 'a forward worker'} did not get ready within {limit:g} s"

    def _begin(self) -> list[Effect]:
        account, crew, routing = self._account, self._crew, self._crew.routing
        prepared, before = account.prepared, account.training
        assert prepared is not None
        sets = routing.applied_sets()
        done, held = restored_sets(sets)
        restored = crew.shards.lacking
        everything = len(restored) == len(crew.shards)
        evaluations = account.record.evaluations
        if everything:
            evaluations = tuple(one for one in evaluations if one["version"] <= routing.cut)
        first_whole = first_whole_cut(routing.begun, account.durable)
        self._divergence.begin(prepared, account.record, cut=routing.cut, some=bool(restored), all_layers=everything)
        training = account.training = Training(
            job=account.job,
            prepared=prepared,
            shards=crew.shards.names,
            restored=routing.cut,
            durable=account.record.cuts,
            done=done,
            held=held,
            first_whole=first_whole,
            evaluated=max((one["version"] for one in evaluations), default=0),
            first_attempt=first_attempt(routing.generation),
            drops=self._drops(),
            missing_from=partial_drops(sets, done),
            guard=self._divergence.guard,
            journal=account.note,
            manifest=self._manifest,
            now=account.now,
        )
        if before is not None:
            training.carry_on(before, restored, account.now)
        self._note_recoveries(training, before, restored)
        for block in restored:
            crew.shards[block].holds = True
        state = JobState.STOPPING if account.stopping else JobState.RUNNING
        account.record = replace(account.record, state=state, evaluations=evaluations)
        verb = "goes on" if before is not None else "begins"
        account.note("info", f"training {verb} at version {training.version}", version=training.version)
        return self._first_effects(training, done, held, first_whole)

    def _note_recoveries(self, training: Training, before: Training | None, restored: tuple[int, ...]) -> None:
        account = self._account
        redone = max(training.samples_to_redo, before.samples_closed - training.samples_closed if before else 0)
        versions = {block: self._crew.routing.version_of(block) for block in restored}
        for line, fields in account.recovery.end(versions, redone, account.now):
            account.note("info", line, **fields)

    def _first_effects(self, training: Training, done: AppliedSet, held: AppliedSet, first_whole: int) -> list[Effect]:
        """Have the first shard begin; then what came too early for it, from shards and workers, is acted on."""
        account, crew = self._account, self._crew
        first = crew.shards[0].process
        start = StartTraining(
            job=account.job, done_json=json.dumps(done.to_json()), held_json=json.dumps(held.to_json())
        )
        effects: list[Effect] = [Send(first, start)]
        if first_whole > account.durable:
            effects.append(Send(first, CutDurable(job=account.job, version=first_whole - 1)))
        if account.stopping or account.record.moving:
            effects += training.stop_asked(account.now)
            effects.append(Send(first, Stop(job=account.job)))
        for peer, message in crew.routing.take_early():
            effects += hear_shard(training, crew.shards.of(peer), message, account.now)
        for worker, room in crew.room.items():
            effects += training.offer_room(worker, room, account.now)
        return effects

    def _drops(self) -> list[DroppedMicrobatch]:
        """All that is given up: what was noted, and what the blocks have dropped while nobody noted it."""
        noted = {one.microbatch: one for one in map(DroppedMicrobatch.from_json, self._account.record.drops)}
        for microbatch, reason in self._crew.routing.drops().items():
            noted.setdefault(microbatch, DroppedMicrobatch(microbatch=microbatch, reason=reason))
        return list(noted.values())

    def _manifest(self, version: int, files: tuple[LayerFile, ...]) -> str:
        account = self._account
        assert account.training is not None, "only a run that trains has cuts"
        summary = account.training.ledger.summary()
        return manifest_json(account.record, self._crew.routing.route, version, files, summary)
