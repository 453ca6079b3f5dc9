"""One job's run, from its first process to its last: measure, assign, train, recover, stop, let go.

::

    probing ── Probed ──► assigning ── all Ready ──► training ── finished ──► done
       │                   ▲      └─ a shard lost, a link down ─┘
       │                   └── every place filled again: a new route in a new generation
       │                   ▲                          ├── processes have to leave: Stop, drain, cut ──► others take their places
       │                   └──────────────────────────┼───────────────── all blocks at that cut ◄──┘
       └───────────────────────┴──────────────────────┴── cancel: Stop, drain, last cut ──► cancelled
                                                      └── a Failure, a time limit ──► failed
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import LayerwiseError
from layerwise.ids import first_attempt
from layerwise.job import JobSpec
from layerwise.messages import (
    AttemptsClosed,
    BlockPlace,
    BlockReport,
    CutCommitted,
    CutDurable,
    CutSaved,
    CutTaken,
    Dismissal,
    DismissalReason,
    Evaluated,
    Failure,
    Hosting,
    LayerFile,
    LeaseRequest,
    LeaseReturn,
    LinkDown,
    Message,
    Probe,
    Probed,
    Ready,
    Role,
    StandbyHeld,
    StartTraining,
    Stop,
    Stopping,
    Unassign,
)
from layerwise.profile import Profile
from layerwise.roles import Effect, Send
from layerwise.server.cut_manifest import manifest_json
from layerwise.server.divergence_guard import Divergence
from layerwise.server.divergence_policy import DivergencePolicy
from layerwise.server.evaluation_round import with_evaluations
from layerwise.server.job_record import CutRecord, JobEvent, JobRecord, JobState
from layerwise.server.membership import Process
from layerwise.server.placement import Places, Vacancy
from layerwise.server.preparation import Prepared, partial_drops, prepare, prepared_before, restored_sets
from layerwise.server.recovery import Recovery
from layerwise.server.rollback import course_after
from layerwise.server.routing import Routing
from layerwise.server.shard_places import ShardPlaces
from layerwise.server.standby_copies import HeldCopy, StandbyCopies, first_whole_cut, next_evaluation
from layerwise.server.training import LOAD_FAILED, Training
from layerwise.server.worker_places import WorkerPlaces

LINK_SECONDS = 1.0
"""How long after a broken link between two shards it is waited for one of them to be found lost."""
TOGETHER_SECONDS = 1.0
"""How long a restarted coordinator waits for the workers of a run whose shards are back and train on, before it interrupts them."""
MOST_RECOVERIES = 6
"""New routes without a new update in between, or losses of a block's shard before training began, after which the run is given up."""


class Run:
    """Drives one job on the processes of ``places``. Messages of other processes, or of other runs, do not come here.

    ``record`` is the job as it now should be stored; ``events`` what was written to its log since it was last emptied.
    The run is over when ``record.state`` is final. A run whose coordinator was started again begins with its places
    empty; its processes come back into them (`take_back`), with what they hold. Not thread-safe.
    """

    def __init__(
        self, record: JobRecord, spec: JobSpec, places: Places, processes: Mapping[str, Process], now: float
    ) -> None:
        self.record = record
        self.spec = spec
        self.events: list[JobEvent] = []
        self.prepared: Prepared | None = prepared_before(record)
        self.training: Training | None = None
        self.shards = ShardPlaces(places.shards, processes, now)
        self.workers = WorkerPlaces(spec, places, processes)
        self.recovery = Recovery()
        self.leaving: set[str] = set()
        """Processes that have to leave at the next update (see `move`)."""
        self._routing = Routing(self.shards)
        self._standby = StandbyCopies()
        self._room: dict[str, int] = {}
        self._num_decisions = 0
        self._run_out_at, self._num_run_out = -1, 0
        self._divergence = DivergencePolicy(spec)
        self._cuts_damaged = False
        self._began = now
        self._probing = ""
        self._not_back: set[str] = set()
        """Workers that the coordinator before knew of, while those that are back train on without this one."""
        self._link_down: tuple[str, float] | None = None
        self._lost_early: Counter[int] = Counter()
        self._starved_since: float | None = None
        self._cancelled = record.state is JobState.STOPPING
        self._cancelled_at = now
        self._moved = False
        self._dismissed: list[str] = []
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
        return (*self.shards.names, *self.workers.names)

    @property
    def _needed(self) -> tuple[str, ...]:
        """Those that training waits for: what joined gets ready in its own time."""
        return (*self.shards.names, *self.workers.placed)

    @property
    def route(self) -> tuple[BlockPlace, ...]:
        """Where each block is, or was last; empty until the processes are assigned."""
        return self._routing.route

    @property
    def recovering(self) -> bool:
        """It has trained, and does not now: a place is empty, or the processes are getting ready for a new route."""
        return self.training is not None and self.training.suspended

    @property
    def stopping(self) -> bool:
        """It ends at the next update."""
        return self._cancelled

    @property
    def loss_at_start(self) -> float | None:
        """What the training loss was in the job's first updates."""
        return None if self._divergence.guard is None else self._divergence.guard.first

    @property
    def phase(self) -> str:
        """What is going on, in a few words."""
        if self.shards.empty and (self.training is not None or self.route):
            return f"waiting for a shard to take the place of {', '.join(one.process for one in self.shards.empty)}"
        if self.training is None:
            return "preparing"
        if self.training.suspended:
            return "getting ready to go on"
        if self.record.moving:
            return "stopping, to go on with other processes"
        if missing := self.workers.missing():
            return f"waiting: {missing}"
        until = course_after(self.record.rollbacks).synchronous_until
        synchronous = f", synchronously until version {until}" if self.training.version < until else ""
        return self.training.phase + synchronous

    def device(self, block: int) -> str:
        """The device of a block's shard."""
        return self.shards[block].device

    def standby_version(self, block: int) -> int:
        """The newest version of a block that another shard has in its memory (0: none)."""
        return self._standby.newest(block)

    def vacancies(self) -> list[Vacancy]:
        """Places that nobody fills."""
        if self.over:
            return []
        shards = [
            Vacancy(
                role=Role.SHARD,
                block=one.block,
                expected="" if one.sent_away else one.process,
                since=one.empty_since or 0.0,
            )
            for one in self.shards.empty
        ]
        return [*shards, *(Vacancy(role=role, block=block) for role, block in self.workers.vacancies())]

    # From outside ----------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Begin: measure the model and the data on one shard, or go straight on when an earlier run did."""
        self._now = now
        self.record = replace(self.record, state=JobState.PREPARING, message="", started=self.record.started or now)
        return self._proceed()

    def revive(self, now: float) -> list[Effect]:
        """Go on with a run of a coordinator that ended: the record says who works for it and in which lives."""
        self._now = now
        shards = sorted((one for one in self.record.placement if one.role is Role.SHARD), key=lambda one: one.block)
        self.shards.remember(shards)
        self._not_back = {one.process for one in self.record.placement if one.role is not Role.SHARD}
        self._routing.recall(self.record)
        self._note("warning", "the coordinator was started again; waiting for the processes of the run")
        return []

    def cancel(self, now: float) -> list[Effect]:
        """Stop at the next update boundary, with a cut there; a run that does not train yet ends at once."""
        self._now = now
        if self.over or self._cancelled:
            return []
        self._cancelled, self._cancelled_at = True, now
        if self.record.state is JobState.PREPARING:
            return self._end(JobState.CANCELLED, "cancelled before training began")
        self.record = replace(self.record, state=JobState.STOPPING)
        self._note("info", "stopping at the next update")
        return self._stop_training()

    def move(self, names: Iterable[str], now: float) -> list[Effect]:
        """Stop at the next update boundary, with a cut there, and go on from it with others in the places of ``names``."""
        self._now = now
        self.leaving.update(names)
        if self.over or self._cancelled or self.record.moving:
            return []
        self.record = replace(self.record, moving=True)
        self._note("info", f"{', '.join(sorted(self.leaving))} must leave; stopping at the next update")
        return self._stop_training()

    def _stop_training(self) -> list[Effect]:
        """Have the first shard stop; where training does not go on at present, it is told when it does."""
        if self.training is None:
            return []
        recalls = self.training.stop_asked(self._now)
        return [] if self.training.suspended else [*recalls, Send(self.shards[0].process, Stop(job=self.job))]

    def tell_workers(self) -> list[Effect]:
        """Let every shard know whose work it may take."""
        return [] if self.over else self._routing.tell_workers(self.job, self.workers.records)

    def take_dismissed(self) -> list[str]:
        """Who was told to leave since the last call."""
        dismissed, self._dismissed = self._dismissed, []
        return dismissed

    def join(self, process: Process, role: Role, block: int, now: float) -> list[Effect]:
        """A free process takes the place of a lost one."""
        self._now = now
        if role is Role.SHARD:
            self.shards.fill(block, process)
            self._note("info", f"shard {process.name} takes the place of block {block}", shard=process.name)
            return self._proceed()
        self.workers.fill(process.name, role, block)
        self._place()
        self._note("info", f"{role} worker {process.name} takes a free place", worker=process.name)
        return [self._routing.inform(process.name, block, self.record)] if self._routing.generation else []

    def admit(self, process: Process, now: float) -> list[Effect]:
        """A free worker takes part beyond the places that the job needs."""
        self._now = now
        block = self.workers.join(process.name, process.role)
        self._place()
        where = f" for block {block}" if block >= 0 else ""
        settings = self.prepared.settings if self.prepared is not None else None
        ordered = settings is not None and (settings.mode == "synchronous" or settings.window == 1)
        useless = "; microbatches of this job go in position order, which it does not make faster" if ordered else ""
        self._note("info", f"{process.role} worker {process.name} joins{where}{useless}", worker=process.name)
        return [self._routing.inform(process.name, block, self.record)] if self._routing.generation else []

    def part(self, name: str, why: str, now: float) -> list[Effect]:
        """Send a worker away that joined; it may join another job, or this one again."""
        effects = self.lose(name, why, now)
        self._dismissed.append(name)
        return [*effects, Send(name, Unassign(job=self.job))]

    def _turn_away(self, name: str, why: str) -> list[Effect]:
        """A worker that joined can't do its work. No job ends by that: those that it needs will find what is wrong with itself."""
        effects = self.lose(name, why, self._now)
        self._dismissed.append(name)
        message = f"{name} can't take part in job {self.job}: {why}"
        return [*effects, Send(name, Dismissal(reason=DismissalReason.NOT_ALLOWED, message=message))]

    def take_back(self, process: Process, hosting: Hosting, now: float) -> list[Effect] | None:
        """A process that still works for the job presents itself again; None: its place is not there any more."""
        self._now = now
        if self.over:
            return None
        if process.role is Role.SHARD:
            place = self.shards[hosting.block] if 0 <= hosting.block < len(self.shards) else None
            if place is None or place.empty_since is None or place.life != hosting.life or not place.life:
                return None
            self.shards.fill(place.block, process, holds=True)
            self._routing.knows(process.name)
            self._note("info", f"shard {process.name} is back, with block {place.block}", shard=process.name)
            return self._proceed_together()
        oldest = self.shards.oldest_life
        has_room = self.workers.has_room(process.role, hosting.block, joins=process.joins)
        if not has_room or not oldest or hosting.generation < oldest:
            # What it knows may be of an earlier run of the job, on other shards: it is to be told everything anew.
            return None
        (self.workers.join if process.joins else self.workers.fill)(process.name, process.role, hosting.block)
        self._routing.knows(process.name)
        self._place()
        self._note("info", f"{process.role} worker {process.name} is back", worker=process.name)
        self._not_back.discard(process.name)
        generation = self._routing.generation
        if not generation:
            return self._proceed_together()
        if hosting.generation != generation:
            return [self._routing.inform(process.name, hosting.block, self.record)]
        self._routing.take_ready(process.name, Ready(job=self.job, block=hosting.block, generation=generation), stop=0)
        return self._start_if_ready()

    def go_without(self, name: str, now: float) -> list[Effect]:
        """A process that worked for the job presents itself again, but has to leave."""
        self._now = now
        if name not in self._not_back:
            return []
        self._not_back.discard(name)
        return self._proceed_together()

    def lose(self, name: str, why: str, now: float) -> list[Effect]:
        """A process of the run is gone."""
        self._now = now
        if self.over:
            return []
        self._routing.forget(name)
        self._standby.lose(name)
        if name in self.shards:
            return self._lose_shard(name, why)
        joined = name in self.workers.joined
        place = self.workers.empty(name)
        self._room.pop(name, None)
        self._place()
        if joined:
            self._note("info", f"{place.role} worker {name}, which had joined, left ({why})", worker=name)
        else:
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
        durable, damaged = self.record.durable_cut, self._cuts_damaged
        if self.training is not None:
            sentence += f" (at version {self.training.version})"
        if durable is not None:
            remedy = f"go on from it with `layerwise resume {self.job}`"
            sentence += f"; the newest durable cut is version {durable.version}: {remedy}"
        elif damaged:
            sentence += "; put the damaged file back and resume the job, or submit it again"
        elif self.training is not None or self.record.placement:
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
        moved_at = self.training.progressed if self.training is not None else self._cancelled_at
        if self._cancelled and now - moved_at > limits.drain:
            return self._end_undrained(limits.drain)
        for place in self.shards.empty:
            if place.empty_since is not None and now - place.empty_since > limits.start:
                return self.fail(
                    f"shard {place.process} (block {place.block}) was lost ({place.why}), and no other took its place "
                    f"within {limits.start:g} s",
                    now,
                )
        if self.training is None or self.training.suspended:
            if not self.shards.empty and now - self._began > limits.start:
                return self.fail(self._why_not_ready(limits.start), now)
            if self._not_back:
                return self._proceed_together()
            # A worker that was not ready may have been lost, so that nobody is waited for any more.
            return self._start_if_ready()
        if self._link_down is not None and now - self._link_down[1] > LINK_SECONDS:
            return self._mend_link()
        starved = "" if self._cancelled else self.workers.missing()
        self._starved_since = (self._starved_since or now) if starved else None
        if self._starved_since is not None and now - self._starved_since > limits.start:
            return self.fail(f"{starved}, and none came within {limits.start:g} s", now)
        return self.training.tick(now) + self._settle()

    # Messages --------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: str, message: Message) -> list[Effect]:
        now, training = self._now, self.training
        if peer in self.workers.joined:
            match message:
                case Failure():
                    return self._turn_away(peer, message.message)
                case LeaseReturn() if message.reason.startswith(LOAD_FAILED):
                    return self._turn_away(peer, message.reason.removeprefix(LOAD_FAILED).lstrip(": "))
        match message:
            case Failure():
                return self._on_failure(peer, message)
            case Probed() if self.prepared is None and peer == self._probing:
                return self._on_probed(message)
            case Ready() if self._routing.generation:
                assert self.prepared is not None
                stop = self.prepared.settings.plan.num_microbatches
                return self._start_if_ready() if self._routing.take_ready(peer, message, stop=stop) else []
            case LeaseRequest() if peer in self.workers:
                self._room[peer] = message.count
                return training.offer_room(peer, message.count, now) if training is not None else []
            case LinkDown():
                return self._on_link_down(peer, message)
            case StandbyHeld() if peer in self.shards:
                self._standby.hold(peer, message, self.shards)
                return []
        if training is None or training.suspended:
            if peer not in self.shards:
                return []
            place = self.shards.of(peer)
            if training is not None and place.block == 0:
                match message:
                    case CutCommitted() if self.shards.empty:
                        # No new route yet: the newer the cut, the less is to be done again.
                        return training.commit_cut(message, now)
                    case AttemptsClosed() if place.holds and self._divergence.found is None:
                        # The last ones of the route before; what the layers keep of them is told with `Ready`.
                        return training.close(message, now)
            self._routing.keep(peer, message)
            return []
        if peer in self.workers:
            match message:
                case LeaseReturn():
                    return training.take_back(peer, message, now)
                case Evaluated():
                    return training.evaluated(message, now)
            return []
        return self._on_shard_message(peer, message, training)

    def _on_shard_message(self, peer: str, message: Message, training: Training) -> list[Effect]:
        now, here = self._now, self.shards.of(peer).block
        block = getattr(message, "block", here)
        if block != here:
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
        return self._proceed()

    def _on_failure(self, peer: str, message: Failure) -> list[Effect]:
        """A role can't go on. If that is because a cut is damaged, the cut before it is used; if training is, that may go back."""
        if message.memory:
            return self._on_memory(peer, message.message)
        if message.diverged and self._divergence.rolls_back and not self._cancelled:
            return self._on_diverged(peer, message)
        if message.standby:
            if peer not in self.shards or not self._standby.refuse(self.shards.of(peer).block, message.standby):
                return []  # known, and another one or a cut has been told of
            self._note("warning", f"{message.message.rstrip('.')}; going on from what else there is")
            return self._route_anew()
        if not message.cut:
            return self.fail(self.workers.call(peer) + message.message.rstrip("."), self._now)
        if message.cut != self._routing.cut or peer not in self.shards:
            return []  # the others that found it damaged have been told of another one already
        older = self._keep_cuts(lambda version: version < message.cut)
        said = f"{message.message.rstrip('.')}"
        if not older:
            self._cuts_damaged = True
            return self.fail(f"{said}, and there is no cut before it", self._now)
        self._note("warning", f"{said}; going on from the cut at version {older[-1].version}", version=message.cut)
        return self._route_anew()

    def _on_memory(self, peer: str, sentence: str) -> list[Effect]:
        """A process ran out of memory and ends: it is lost as by any other death, until it is clear that this goes on for ever."""
        if peer not in self.names:
            return []
        version = self.training.version if self.training is not None else -1
        self._num_run_out = self._num_run_out + 1 if version == self._run_out_at else 1
        self._run_out_at = version
        if self._num_run_out > MOST_RECOVERIES:
            return self.fail(
                f"memory ran out {self._num_run_out} times before the next update, the last time in {peer}: {sentence}; "
                f"use a smaller data.batch or async.window, more shards, or machines with more memory",
                self._now,
            )
        self._dismissed.append(peer)
        return self.lose(peer, sentence, self._now)

    # Divergence ------------------------------------------------------------------------------------------------------

    def _on_diverged(self, peer: str, message: Failure) -> list[Effect]:
        """A block of this or an earlier life met a loss that is not finite."""
        if peer not in self.shards or self.shards.of(peer).life != message.diverged:
            return []
        why = message.message.partition("; ")[0]
        return self._diverge(self._divergence.judge(self.record, self._reached, why))

    @property
    def _reached(self) -> int:
        """About the highest version that a layer has reached."""
        versions = [cut.version for cut in self.record.cuts]
        if self.training is not None:
            versions += [self.training.version, *(layer.version for layer in self.training.layers())]
        return max(versions, default=0)

    def _diverge(self, found: Divergence) -> list[Effect]:
        """Training does not do what it should: stop, or go back as soon as every shard is there."""
        if refusal := self._divergence.refusal(self.record, found):
            return self.fail(refusal, self._now)
        if self.training is not None:
            self.training.suspended = True
        self._divergence.found = self._divergence.found or found
        return self._route_anew()

    def _go_back(self) -> None:
        assert self.prepared is not None
        num_updates = self.prepared.settings.plan.num_updates
        record, line, fields = self._divergence.go_back(self.record, self._reached, num_updates, self._now)
        self.record = record
        self._keep_cuts(lambda version: True)
        self.recovery.go_back(record.cuts[-1].version if record.cuts else 0)
        self._note("warning", line, **fields)

    def _keep_cuts(self, wanted: Callable[[int], bool]) -> tuple[CutRecord, ...]:
        """Forget the durable cuts of other versions; gives those that are left."""
        cuts = tuple(cut for cut in self.record.cuts if wanted(cut.version))
        self.record = replace(self.record, cuts=cuts)
        if self.training is not None:
            self.training.durable = {cut.version: cut for cut in cuts}
        return cuts

    # Losing and finding shards ---------------------------------------------------------------------------------------

    def _lose_shard(self, name: str, why: str) -> list[Effect]:
        place = self.shards.vacate(name, why, self._now)
        self._note("warning", f"shard {name} (block {place.block}) was lost ({why})", shard=name)
        if name == self._probing:
            self._probing = ""
        if self.training is not None:
            reached = [layer.version for layer in self.training.layers_of(place.block)]
            self.recovery.lose(place.block, name, max(reached, default=self.training.restored), self._now)
            self.training.suspended = True
        self._link_down = None
        return self._give_up_early(place.block, name, why) if self.training is None else []

    def _give_up_early(self, block: int, name: str, why: str) -> list[Effect]:
        """Whatever it is that ends shards of ``block`` before training begins, it need not end with the next one."""
        self._lost_early[block] += 1
        if (lost := self._lost_early[block]) <= MOST_RECOVERIES:
            return []
        times = f"block {block} lost its shard {lost} times before training began"
        return self.fail(f"{times}, the last time {name} ({why})", self._now)

    def _on_link_down(self, peer: str, message: LinkDown) -> list[Effect]:
        if message.generation == self._routing.generation and self._link_down is None and not self.recovering:
            self._link_down = (f"the link between {peer} and {message.peer} broke", self._now)
        return []

    def _mend_link(self) -> list[Effect]:
        """Both shards live, so nothing is lost but what was under way: connect them anew."""
        assert self._link_down is not None
        assert self.training is not None
        self._note("warning", f"{self._link_down[0]}; what was under way is begun again")
        self._link_down = None
        self.training.suspended = True
        return self._route_anew()

    def _proceed_together(self) -> list[Effect]:
        """As `_proceed`, but while the processes train on as they did before this coordinator, not before the last is back.

        A new route interrupts them for as long as one of them is missing.
        """
        if self._not_back and not self.shards.lacking and self._now - self._began < TOGETHER_SECONDS:
            return []
        return self._proceed()

    def _proceed(self) -> list[Effect]:
        """All places are filled: measure, or assign. Else wait for those that are not."""
        if self.shards.empty or self.over:
            return []
        if self.prepared is not None:
            return self._route_anew()
        first, second = self.shards[0], self.shards[1] if len(self.shards) > 1 else None
        if self._probing:
            return []
        self._probing = first.process
        self._began = self._now
        self._note("info", f"measuring the model and the data on {first.process}", shard=first.process)
        peer, address = (second.process, second.address) if second is not None else ("", "")
        return [Send(first.process, Probe(job=self.job, spec_json=self.record.spec_json, peer=peer, address=address))]

    # Assigning -------------------------------------------------------------------------------------------------------

    def _route_anew(self) -> list[Effect]:
        """A new generation: blocks without their layers are restored in a new life, the others only connect anew."""
        assert self.prepared is not None
        if self.shards.empty:
            return []
        if self.training is not None:
            # The answer to a commit under way may never come, and what that deletes is gone all the same.
            self._keep_cuts(self.training.cuts.stays)
        settings = self.prepared.settings
        restored = self.shards.lacking
        copies = self._copies_for(restored)
        if self._divergence.found is not None:
            self._go_back()
            restored, copies = tuple(range(len(self.shards))), {}
        if self._moved or settings.mode == "synchronous" or settings.window == 1:
            # What equals plain training has no layer ahead of another: all of them go back to the cut.
            restored, copies = tuple(range(len(self.shards))), {}
        version = self.training.version if self.training is not None else -1
        if self.training is not None and self.recovery.begin(version) > MOST_RECOVERIES:
            return self.fail(
                f"the run did not get on: {MOST_RECOVERIES} times in a row processes or links failed before an update "
                f"beyond those made before",
                self._now,
            )
        if self.training is not None:
            self.training.suspended = True
        next_life = self._routing.begin(self.record, restored, copies)
        for block in restored:
            self._standby.begin(block, self._routing.version_of(block))
        moving = bool(self.leaving) if self._moved else self.record.moving
        self.record = replace(self.record, next_life=next_life, moving=moving)
        self._place()
        self._room.clear()
        self._not_back.clear()
        self._began = self._now
        self._link_down = None
        for block, copy in copies.items():
            line = f"assigning block {block} at version {copy.version}, from its copy in the memory of {copy.holder}"
            self._note("info", line, version=copy.version, standby=copy.holder)
        if from_cut := [block for block in restored if block not in copies]:
            cut = self._routing.cut
            blocks = "all blocks" if len(from_cut) == len(self.shards) else f"block {', '.join(map(str, from_cut))}"
            self._note("info", f"assigning {blocks} at version {cut}", version=cut)
        effects = self._routing.inform_shards(self.record)
        return effects + [self._routing.inform(one.process, one.block, self.record) for one in self.workers.records]

    def _copies_for(self, blocks: Iterable[int]) -> dict[int, HeldCopy]:
        """The standby copies with which less of these blocks is lost than with the newest durable cut."""
        assert self.prepared is not None
        until = next_evaluation(self.record, self.prepared)
        return self._standby.choose(blocks, self.shards, above=self._durable, until=until)

    def _change_places(self, lost_cut: str = "") -> list[Effect]:
        """Training rests: let go who has to leave. All layers begin anew, for those of today end here.

        ``lost_cut`` says why they have to go back to an older cut; otherwise that of the stop is the newest.
        """
        assert self.training is not None
        if lost_cut:
            self._note("warning", f"{lost_cut}; all layers go back to the newest durable cut", version=self._durable)
            for place in self.shards.filled:
                self.recovery.lose(place.block, place.process, self.training.final, self._now)
        self._moved = True
        self.training.suspended = True
        away = [name for name in self.names if name in self.leaving]
        for name in away:
            self._routing.forget(name)
            if name in self.shards:
                self.shards.send_away(name, self._now)
            else:
                self.workers.empty(name)
                self._room.pop(name, None)
        self.leaving.clear()
        self._dismissed += away
        self._note("info", f"at version {self._durable} {', '.join(away) or 'nobody'} left", version=self._durable)
        return [*(Send(name, Unassign(job=self.job)) for name in away), *self._proceed()]

    @property
    def _durable(self) -> int:
        durable = self.record.durable_cut
        return durable.version if durable is not None else 0

    def _place(self) -> None:
        shards = self.shards.records(self.route)
        self.record = replace(self.record, placement=(*shards, *self.workers.records))

    def _start_if_ready(self) -> list[Effect]:
        if self.over or not self._routing.generation or self.shards.empty:
            return []
        if self.training is not None and not self.training.suspended:
            return []
        if not self.workers.of_role(Role.FORWARD) or self._routing.missing(self._needed):
            return []
        if mismatch := self._routing.mismatch():
            return self.fail(mismatch, self._now)
        try:
            return self._begin_training()
        except (LayerwiseError, ValueError) as error:
            # What processes have said of their layers is put together here, at whatever made the last of them ready.
            return self.fail(f"training can't begin: {error}", self._now)

    def _begin_training(self) -> list[Effect]:
        assert self.prepared is not None
        sets = self._routing.applied_sets()
        done, held = restored_sets(sets)
        cut = self._routing.cut
        first_whole = first_whole_cut(self._routing.begun, self._durable)
        restored = self.shards.lacking
        evaluations = self.record.evaluations
        everything = len(restored) == len(self.shards)
        if everything:
            evaluations = tuple(one for one in evaluations if one["version"] <= cut)
        self._divergence.begin(self.prepared, self.record, cut=cut, some=bool(restored), all_layers=everything)
        before, self.training = (
            self.training,
            Training(
                job=self.job,
                prepared=self.prepared,
                shards=self.shards.names,
                restored=cut,
                durable=self.record.cuts,
                done=done,
                held=held,
                first_whole=first_whole,
                evaluated=max((one["version"] for one in evaluations), default=0),
                first_attempt=first_attempt(self._routing.generation),
                drops=self._drops(),
                missing_from=partial_drops(sets, done),
                guard=self._divergence.guard,
                journal=self._note,
                manifest=self._manifest,
                now=self._now,
            ),
        )
        self._num_decisions = 0
        if before is not None:
            self.training.carry_on(before, restored, self._now)
        redone = max(
            self.training.samples_to_redo, before.samples_closed - self.training.samples_closed if before else 0
        )
        versions = {block: self._routing.version_of(block) for block in restored}
        for line, fields in self.recovery.end(versions, redone, self._now):
            self._note("info", line, **fields)
        for block in restored:
            self.shards[block].holds = True
        state = JobState.STOPPING if self._cancelled else JobState.RUNNING
        self.record = replace(self.record, state=state, evaluations=evaluations)
        verb = "goes on" if before is not None else "begins"
        self._note("info", f"training {verb} at version {self.training.version}", version=self.training.version)
        first = self.shards[0].process
        start = StartTraining(job=self.job, done_json=json.dumps(done.to_json()), held_json=json.dumps(held.to_json()))
        effects: list[Effect] = [Send(first, start)]
        if first_whole > self._durable:
            effects.append(Send(first, CutDurable(job=self.job, version=first_whole - 1)))
        self._moved = False
        if self._cancelled or self.record.moving:
            effects += self.training.stop_asked(self._now)
            effects.append(Send(first, Stop(job=self.job)))
        for peer, message in self._routing.take_early():
            effects += self._on_shard_message(peer, message, self.training)
        for worker, room in self._room.items():
            effects += self.training.offer_room(worker, room, self._now)
        return effects

    def _drops(self) -> list[DroppedMicrobatch]:
        """All that is given up: what was noted, and what the blocks have dropped while nobody noted it."""
        noted = {one.microbatch: one for one in map(DroppedMicrobatch.from_json, self.record.drops)}
        for microbatch, reason in self._routing.drops().items():
            noted.setdefault(microbatch, DroppedMicrobatch(microbatch=microbatch, reason=reason))
        return list(noted.values())

    def _why_not_ready(self, limit: float) -> str:
        if not self._routing.generation:
            return f"shard {self.shards[0].process} did not measure the model within {limit:g} s"
        missing = self._routing.missing(self._needed)
        return f"{', '.join(missing) or 'a forward worker'} did not get ready within {limit:g} s"

    # Ending ----------------------------------------------------------------------------------------------------------

    def _settle(self) -> list[Effect]:
        """Take over what training has decided: durable cuts, evaluations, its end."""
        training = self.training
        if training is None or self.over:
            return []
        # What a commit under way deletes is forgotten before it is gone: its answer may find another coordinator.
        cuts = tuple(training.durable[version] for version in sorted(training.durable) if training.cuts.stays(version))
        if cuts != self.record.cuts:
            self.record = replace(self.record, cuts=cuts)
        if training.ledger.num_decisions != self._num_decisions:
            self._num_decisions = training.ledger.num_decisions
            drops = training.ledger.drops
            self.record = replace(self.record, drops=tuple(drops[index].to_json() for index in sorted(drops)))
        if training.evaluations:
            listed = with_evaluations(self.record.evaluations, training.evaluations)
            self.record = replace(self.record, evaluations=listed)
            training.evaluations.clear()
        found, training.divergence = training.divergence, None
        if found is not None and not training.suspended and not self._cancelled:
            return self._diverge(found)
        if self._moved:
            return []
        moving = self.record.moving and not self._cancelled and training.final < training.plan.num_updates
        if moving and training.ledger.complete and (reason := training.cuts.given_up(training.final)) is not None:
            return self._change_places(f"the cut at version {training.final} can't be saved: {reason}")
        if training.failure is not None:
            return self.fail(training.failure, self._now)
        if not training.finished:
            return []
        if moving:
            return self._change_places()
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
        self.record = replace(self.record, state=state, message=message, finished=self._now, placement=(), moving=False)
        return [Send(name, Unassign(job=self.job)) for name in self.names]

    def _manifest(self, version: int, files: tuple[LayerFile, ...]) -> str:
        assert self.training is not None, "only a run that trains has cuts"
        return manifest_json(self.record, self.route, version, files, self.training.ledger_summary())

    def _note(self, level: str, message: str, **fields: object) -> None:
        sequence = self.record.num_events
        self.events.append(JobEvent(sequence=sequence, time=self._now, level=level, message=message, fields=fields))
        self.record = replace(self.record, num_events=sequence + 1)
