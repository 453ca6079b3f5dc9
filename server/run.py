"""One job's run, from its first process to its last: measure, assign, train, stop, let go.

::

    probing ── Probed ──► assigning ── all Ready ──► training ── finished ──► done
       └───────────────────────┴──────────────────────┴── cancel: Stop, drain, last cut ──► cancelled
                                                      └── a shard lost, a Failure, a time limit ──► failed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from layerwise.applied import AppliedSet
from layerwise.errors import LayerwiseError
from layerwise.job import JobSpec
from layerwise.messages import (
    Assignment,
    AttemptsClosed,
    BlockPlace,
    BlockReport,
    CutCommitted,
    CutSaved,
    CutTaken,
    Evaluated,
    Failure,
    LayerFile,
    LeaseRequest,
    LeaseReturn,
    Message,
    Probe,
    Probed,
    Ready,
    Role,
    StartTraining,
    Stop,
    Stopping,
    Unassign,
)
from layerwise.profile import Profile
from layerwise.roles import Effect, Send
from layerwise.server.cut_manifest import manifest_json
from layerwise.server.job_record import JobEvent, JobRecord, JobState, PlacementRecord
from layerwise.server.membership import Process
from layerwise.server.placement import Places
from layerwise.server.preparation import Prepared, prepare, prepared_before, restored_sets
from layerwise.server.training import Training
from layerwise.server.worker_places import WorkerPlaces


class Run:
    """Drives one job on the processes of ``places``. Messages of other processes, or of other runs, do not come here.

    ``record`` is the job as it now should be stored; ``events`` what was written to its log since it was last emptied.
    The run is over when ``record.state`` is final. Not thread-safe.
    """

    def __init__(
        self, record: JobRecord, spec: JobSpec, places: Places, processes: Mapping[str, Process], now: float
    ) -> None:
        self.record = record
        self.spec = spec
        self.events: list[JobEvent] = []
        self.prepared: Prepared | None = prepared_before(record)
        self.training: Training | None = None
        self.shards = places.shards
        self.workers = WorkerPlaces(spec, places)
        self._addresses = {name: processes[name].hello.address for name in places.shards}
        self._devices = {name: processes[name].hello.device for name in places.shards}
        self._cut = record.durable_cut.version if record.durable_cut is not None else 0
        self._route: tuple[BlockPlace, ...] = ()
        self._ready: dict[str, Ready] = {}
        self._room: dict[str, int] = {}
        self._began = now
        self._starved_since: float | None = None
        self._cancelled = False
        self._now = now

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def job(self) -> str:
        """The job's id."""
        return self.record.job

    @property
    def over(self) -> bool:
        """The run has ended, and `record` says how."""
        return self.record.state.final

    @property
    def names(self) -> tuple[str, ...]:
        """Every process that works for the run."""
        return (*self.shards, *self.workers.names)

    @property
    def route(self) -> tuple[BlockPlace, ...]:
        """Where each block is; empty until the processes are assigned."""
        return self._route

    def device(self, shard: str) -> str:
        """The device of one of the run's shards."""
        return self._devices[shard]

    def vacancies(self) -> list[tuple[Role, int]]:
        """Workers that were lost and not replaced, with the block they are for (-1: all)."""
        return [] if self.over else self.workers.vacancies()

    # From outside ----------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Begin: measure the model and the data on one shard, or go straight on when an earlier run did."""
        self._now = now
        self.record = replace(self.record, state=JobState.PREPARING, message="", started=self.record.started or now)
        if self.prepared is not None:
            return self._assign()
        self._note("info", f"measuring the model and the data on {self.shards[0]}", shard=self.shards[0])
        second = self.shards[1] if len(self.shards) > 1 else ""
        address = self._addresses[second] if second else ""
        probe = Probe(job=self.job, spec_json=self.record.spec_json, peer=second, address=address)
        return [Send(self.shards[0], probe)]

    def cancel(self, now: float) -> list[Effect]:
        """Stop at the next update boundary, with a cut there; a run that does not train yet ends at once."""
        self._now = now
        if self.over or self._cancelled:
            return []
        self._cancelled = True
        if self.training is None:
            return self._end(JobState.CANCELLED, "cancelled before training began")
        self.training.stop_asked(now)
        self.record = replace(self.record, state=JobState.STOPPING)
        self._note("info", "stopping at the next update")
        return [Send(self.shards[0], Stop(job=self.job))]

    def join(self, process: Process, role: Role, block: int, now: float) -> list[Effect]:
        """A free process takes the place of a lost worker."""
        self._now = now
        self.workers.fill(process.name, role, block)
        self._place()
        self._note("info", f"{role} worker {process.name} takes a free place", worker=process.name)
        return [Send(process.name, self._assignment(block))] if self._route else []

    def lose(self, name: str, why: str, now: float) -> list[Effect]:
        """A process of the run is gone."""
        self._now = now
        if self.over:
            return []
        if name in self.shards:
            block = self.shards.index(name)
            return self.fail(f"shard {name} (block {block}) was lost ({why})", now)
        place = self.workers.empty(name)
        self._ready.pop(name, None)
        self._room.pop(name, None)
        self._place()
        self._note("warning", f"{place.role} worker {name} was lost ({why})", worker=name)
        if self.training is None:
            return []
        effects = self.training.lose_worker(name, now) if place.role is Role.FORWARD else []
        return effects + self._settle()

    def fail(self, sentence: str, now: float) -> list[Effect]:
        """The run can't go on; everybody is let go."""
        self._now = now
        if self.over:
            return []
        durable = self.record.durable_cut
        if self.training is not None:
            sentence += f" at version {self.training.version}"
        if durable is not None:
            remedy = f"go on from it with `layerwise resume {self.job}`"
            sentence += f"; the newest durable cut is version {durable.version}: {remedy}"
        elif self.training is not None:
            sentence += f"; no cut was durable yet: begin again with `layerwise resume {self.job}`"
        return self._end(JobState.FAILED, sentence)

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message about this job from one of its processes."""
        self._now = now
        if self.over:
            return []
        try:
            effects = self._dispatch(peer, message)
        except (LayerwiseError, ValueError) as error:
            return self.fail(f"{type(message).__name__} of {peer} can't be acted on: {error}", now)
        return effects + self._settle()

    def on_tick(self, now: float) -> list[Effect]:
        """Time limits."""
        self._now = now
        if self.over:
            return []
        limits = self.spec.timeouts
        if self.training is None:
            if now - self._began > limits.start:
                return self.fail(self._why_not_ready(limits.start), now)
            # A worker that was not ready may have been lost, so that nobody is waited for any more.
            return self._start_if_ready()
        if self._cancelled and now - self.training.progressed > limits.drain:
            return self._end_undrained(limits.drain)
        starved = "" if self._cancelled else self.workers.missing()
        self._starved_since = (self._starved_since or now) if starved else None
        if self._starved_since is not None and now - self._starved_since > limits.start:
            return self.fail(f"{starved}, and none came within {limits.start:g} s", now)
        return self.training.tick(now) + self._settle()

    # Messages --------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: str, message: Message) -> list[Effect]:
        now, training = self._now, self.training
        match message:
            case Failure():
                return self.fail(message.message.rstrip("."), now)
            case Probed() if self.prepared is None and peer == self.shards[0]:
                return self._on_probed(message)
            case Ready() if self._route:
                self._check_sets(peer, message)
                self._ready[peer] = message
                return self._start_if_ready()
            case LeaseRequest() if peer in self.workers:
                self._room[peer] = message.count
                return training.offer_room(peer, message.count, now) if training is not None else []
        if training is None:
            return []
        if peer in self.workers:
            match message:
                case LeaseReturn():
                    return training.take_back(peer, message, now)
                case Evaluated():
                    return training.evaluated(message, now)
            return []
        block = getattr(message, "block", self.shards.index(peer))
        if block != self.shards.index(peer):
            raise ValueError(f"it speaks for block {block}, which {peer} does not hold")
        match message:
            case AttemptsClosed() if block == 0:
                return training.close(message, now)
            case CutTaken():
                return training.take_cut(message, now)
            case CutSaved():
                return training.save_cut(message, now)
            case CutCommitted() if block == 0:
                return training.commit_cut(message, now)
            case BlockReport():
                training.report(message)
            case Stopping() if block == 0:
                return training.stop_at(message.version, now)
        return []

    def _check_sets(self, peer: str, ready: Ready) -> None:
        """Refuse sets that are none, or not those of the peer's layers."""
        assert self.prepared is not None
        place = next((one for one in self._route if one.shard == peer), None)
        expected = place.stop - place.start if place is not None else 0
        if len(ready.applied_json) != expected:
            raise ValueError(f"it brings the sets of {len(ready.applied_json)} layers, {peer} holds {expected}")
        for text in ready.applied_json:
            AppliedSet.parse(text, stop=self.prepared.settings.plan.num_microbatches)

    def _on_probed(self, message: Probed) -> list[Effect]:
        if message.error:
            return self._end(JobState.FAILED, message.error)
        try:
            self.prepared = prepare(self.spec, Profile.from_json(message.profile_json))
        except LayerwiseError as error:
            return self._end(JobState.FAILED, str(error))
        settings = self.prepared.settings
        self.record = replace(
            self.record,
            settings_json=settings.to_json(),
            profile_json=message.profile_json,
            blocks=self.prepared.blocks,
            warnings=(*self.record.warnings, *settings.warnings),
        )
        for warning in settings.warnings:
            self._note("warning", warning)
        return self._assign()

    # Assigning -------------------------------------------------------------------------------------------------------

    def _assign(self) -> list[Effect]:
        assert self.prepared is not None
        life = self.record.next_life
        self._route = tuple(
            BlockPlace(start=start, stop=stop, shard=shard, address=self._addresses[shard], life=life + block)
            for block, ((start, stop), shard) in enumerate(zip(self.prepared.blocks, self.shards, strict=True))
        )
        self.record = replace(self.record, next_life=life + len(self._route))
        self._place()
        self._note("info", f"assigning {len(self.names)} processes", version=self._cut)
        effects: list[Effect] = [Send(place.shard, self._assignment(block)) for block, place in enumerate(self._route)]
        return effects + [Send(one.process, self._assignment(one.block)) for one in self.workers.records]

    def _assignment(self, block: int) -> Assignment:
        return Assignment(
            job=self.job,
            spec_json=self.record.spec_json,
            settings_json=self.record.settings_json,
            profile_json=self.record.profile_json,
            route=self._route,
            block=block,
            cut=self._cut,
            directory=self.record.directory,
        )

    def _place(self) -> None:
        shards = tuple(
            PlacementRecord(
                process=one.shard, role=Role.SHARD, block=block, start=one.start, stop=one.stop, life=one.life
            )
            for block, one in enumerate(self._route)
        )
        self.record = replace(self.record, placement=(*shards, *self.workers.records))

    def _start_if_ready(self) -> list[Effect]:
        if self.training is not None or self.over or not self._route:
            return []
        if not self.workers.of_role(Role.FORWARD) or any(name not in self._ready for name in self.names):
            return []
        assert self.prepared is not None
        sets = [
            AppliedSet.from_json(json.loads(text)) for shard in self.shards for text in self._ready[shard].applied_json
        ]
        versions = sorted({self._ready[shard].version for shard in self.shards})
        if versions != [self._cut] or len(sets) != len(self.prepared.layer_names):
            return self.fail(
                f"the shards restored version {versions}, and version {self._cut} was asked for", self._now
            )
        done, held = restored_sets(sets)
        self.training = Training(
            job=self.job,
            prepared=self.prepared,
            shards=self.shards,
            restored=self._cut,
            durable=self.record.cuts,
            done=done,
            held=held,
            journal=self._note,
            manifest=self._manifest,
            now=self._now,
        )
        evaluations = tuple(one for one in self.record.evaluations if one["version"] <= self._cut)
        self.record = replace(self.record, state=JobState.RUNNING, evaluations=evaluations)
        self._note("info", f"training begins at version {self._cut}", version=self._cut)
        effects: list[Effect] = [
            Send(
                self.shards[0],
                StartTraining(job=self.job, done_json=json.dumps(done.to_json()), held_json=json.dumps(held.to_json())),
            )
        ]
        for worker, room in self._room.items():
            effects += self.training.offer_room(worker, room, self._now)
        return effects

    def _why_not_ready(self, limit: float) -> str:
        if not self._route:
            return f"shard {self.shards[0]} did not measure the model within {limit:g} s"
        missing = [name for name in self.names if name not in self._ready]
        return f"{', '.join(missing) or 'a forward worker'} did not get ready within {limit:g} s"

    # Ending ----------------------------------------------------------------------------------------------------------

    def _settle(self) -> list[Effect]:
        """Take over what training has decided: durable cuts, evaluations, its end."""
        training = self.training
        if training is None or self.over:
            return []
        cuts = tuple(training.durable[version] for version in sorted(training.durable))
        if cuts != self.record.cuts:
            self.record = replace(self.record, cuts=cuts)
        if training.evaluations:
            made = tuple(one.to_json() for one in training.evaluations)
            self.record = replace(self.record, evaluations=(*self.record.evaluations, *made))
            training.evaluations.clear()
        if training.failure is not None:
            return self.fail(training.failure, self._now)
        if not training.finished:
            return []
        if training.final < training.plan.num_updates:
            return self._end(
                JobState.CANCELLED, f"cancelled at version {training.final}; go on with `layerwise resume {self.job}`"
            )
        message = f"done: {training.final} updates of every layer"
        if training.wants_evaluation and all(one["version"] != training.final for one in self.record.evaluations):
            # It was resumed at its very end, where the shards have no copy to evaluate.
            message += "; the last cut was not evaluated: `layerwise evaluate` does it"
        return self._end(JobState.DONE, message)

    def _end_undrained(self, limit: float) -> list[Effect]:
        durable = self.record.durable_cut
        stands = f"the cut at version {durable.version} stands" if durable is not None else "no cut was durable yet"
        reason = f"what was open did not drain within {limit:g} s, so {stands}"
        return self._end(JobState.CANCELLED, f"cancelled; {reason}; go on with `layerwise resume {self.job}`")

    def _end(self, state: JobState, message: str) -> list[Effect]:
        if self.training is not None:
            self.training.ledger.recall()
        level = {JobState.FAILED: "error"}.get(state, "info")
        self._note(level, message)
        self.record = replace(self.record, state=state, message=message, finished=self._now, placement=())
        return [Send(name, Unassign(job=self.job)) for name in self.names]

    def _manifest(self, version: int, files: tuple[LayerFile, ...]) -> str:
        assert self.training is not None, "only a run that trains has cuts"
        return manifest_json(self.record, self._route, version, files, self.training.ledger_summary())

    def _note(self, level: str, message: str, **fields: object) -> None:
        sequence = self.record.num_events
        self.events.append(JobEvent(sequence=sequence, time=self._now, level=level, message=message, fields=fields))
        self.record = replace(self.record, num_events=sequence + 1)
