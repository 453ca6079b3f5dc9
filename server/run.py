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

from collections.abc import Iterable, Mapping
from dataclasses import replace

from layerwise.errors import LayerwiseError
from layerwise.job import JobSpec
from layerwise.messages import (
    AttemptsClosed,
    BlockPlace,
    CutCommitted,
    Failure,
    Hosting,
    LeaseRequest,
    LeaseReturn,
    LinkDown,
    Message,
    Probed,
    Ready,
    Role,
    StandbyHeld,
    Stop,
)
from layerwise.roles import Effect, Send
from layerwise.server.assembly import Assembly
from layerwise.server.attendance import Attendance
from layerwise.server.crew import Crew
from layerwise.server.divergence_policy import DivergencePolicy
from layerwise.server.ending import Ending
from layerwise.server.job_record import JobRecord, JobState
from layerwise.server.membership import Process
from layerwise.server.placement import Places, Vacancy
from layerwise.server.preparation import Prepared
from layerwise.server.rollback import course_after
from layerwise.server.run_account import RunAccount
from layerwise.server.setbacks import Setbacks
from layerwise.server.settlement import Settlement
from layerwise.server.training import LOAD_FAILED, Training
from layerwise.server.training_messages import hear_shard, hear_worker
from layerwise.server.training_start import TrainingStart


class Run:
    """Drives one job on the processes of ``places``. Messages of other processes, or of other runs, do not come here.

    ``record`` is the job as it now should be stored; ``events`` what was written to its log since it was last emptied.
    ``leaving`` are the processes that have to leave at the next update (see `move`).
    The run is over when ``record.state`` is final. A run whose coordinator was started again begins with its places
    empty; its processes come back into them (`take_back`), with what they hold. Not thread-safe.
    """

    def __init__(
        self, record: JobRecord, spec: JobSpec, places: Places, processes: Mapping[str, Process], now: float
    ) -> None:
        self._account = RunAccount(record, spec, now)
        self._crew = Crew(spec, places, processes, now)
        self._divergence = DivergencePolicy(spec)
        self._ending = Ending(self._account, self._crew)
        self._assembly = Assembly(self._account, self._crew, self._ending, self._divergence)
        self._training_start = TrainingStart(self._account, self._crew, self._ending, self._divergence)
        self._settlement = Settlement(self._account, self._ending, self._assembly)
        self._attendance = Attendance(
            self._account, self._crew, self._ending, self._assembly, self._training_start, self._settlement
        )
        self._setbacks = Setbacks(
            self._account, self._crew, self._ending, self._assembly, self._attendance, self._divergence
        )
        self._starved_since: float | None = None
        self._cancelled_at = now
        self.spec = spec
        self.events = self._account.events
        self.recovery = self._account.recovery
        self.shards = self._crew.shards
        self.workers = self._crew.workers
        self.leaving = self._crew.leaving

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def record(self) -> JobRecord:
        """The job as it now should be stored."""
        return self._account.record

    @record.setter
    def record(self, record: JobRecord) -> None:
        self._account.record = record

    @property
    def job(self) -> str:
        """The job's id."""
        return self._account.job

    @property
    def over(self) -> bool:
        """The run has ended, and `record` says how."""
        return self._account.over

    @property
    def prepared(self) -> Prepared | None:
        """The job, once its model is measured."""
        return self._account.prepared

    @property
    def training(self) -> Training | None:
        """What it trains, or trained until the route changed; None before the first time."""
        return self._account.training

    @property
    def names(self) -> tuple[str, ...]:
        """Every process that works for the run."""
        return self._crew.names

    @property
    def route(self) -> tuple[BlockPlace, ...]:
        """Where each block is, or was last; empty until the processes are assigned."""
        return self._crew.routing.route

    @property
    def recovering(self) -> bool:
        """It has trained, and does not now: a place is empty, or the processes are getting ready for a new route."""
        return self._account.recovering

    @property
    def expected(self) -> frozenset[str]:
        """Workers of the coordinator before that are waited for."""
        return self._assembly.expected

    @property
    def stopping(self) -> bool:
        """It ends at the next update."""
        return self._account.stopping

    @property
    def loss_at_start(self) -> float | None:
        """What the training loss was in the job's first updates."""
        return None if self._divergence.guard is None else self._divergence.guard.first

    @property
    def phase(self) -> str:
        """What is going on, in a few words."""
        training = self.training
        if self.shards.empty and (training is not None or self.route):
            return f"waiting for a shard to take the place of {', '.join(one.process for one in self.shards.empty)}"
        if training is None:
            return "preparing"
        if training.suspended:
            return "getting ready to go on"
        if self.record.moving:
            return "stopping, to go on with other processes"
        if missing := self.workers.missing():
            return f"waiting: {missing}"
        until = course_after(self.record.rollbacks).synchronous_until
        synchronous = f", synchronously until version {until}" if training.version < until else ""
        return training.phase + synchronous

    def device(self, block: int) -> str:
        """The device of a block's shard."""
        return self.shards[block].device

    def standby_version(self, block: int) -> int:
        """The newest version of a block that another shard has in its memory (0: none)."""
        return self._crew.standby.newest(block)

    def vacancies(self) -> list[Vacancy]:
        """Places that nobody fills."""
        return [] if self.over else self._crew.vacancies(without_workers=bool(self.expected))

    # From outside ----------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """Begin: measure the model and the data on one shard, or go straight on when an earlier run did."""
        self._account.now = now
        self.record = replace(self.record, state=JobState.PREPARING, message="", started=self.record.started or now)
        return self._assembly.proceed()

    def revive(self, now: float) -> list[Effect]:
        """Go on with a run of a coordinator that ended: the record says who works for it and in which lives."""
        self._account.now = now
        shards = sorted((one for one in self.record.placement if one.role is Role.SHARD), key=lambda one: one.block)
        self.shards.remember(shards)
        self._assembly.expect(one.process for one in self.record.placement if one.role is not Role.SHARD)
        self._crew.routing.recall(self.record)
        self._account.note("warning", "the coordinator was started again; waiting for the processes of the run")
        return []

    def cancel(self, now: float) -> list[Effect]:
        """Stop at the next update boundary, with a cut there; a run that does not train yet ends at once."""
        self._account.now = now
        if self.over or self.stopping:
            return []
        self._cancelled_at = now
        if self.record.state is JobState.PREPARING:
            return self._ending.end(JobState.CANCELLED, "cancelled before training began")
        self.record = replace(self.record, state=JobState.STOPPING)
        self._account.note("info", "stopping at the next update")
        return self._stop_training()

    def move(self, names: Iterable[str], now: float) -> list[Effect]:
        """Stop at the next update boundary, with a cut there, and go on from it with others in the places of ``names``."""
        self._account.now = now
        self.leaving.update(names)
        if self.over or self.stopping or self.record.moving:
            return []
        self.record = replace(self.record, moving=True)
        leaving = ", ".join(sorted(self.leaving))
        self._account.note("info", f"{leaving} must leave; stopping at the next update")
        return self._stop_training()

    def _stop_training(self) -> list[Effect]:
        """Have the first shard stop; where training does not go on at present, it is told when it does."""
        if self.training is None:
            return []
        recalls = self.training.stop_asked(self._account.now)
        return [] if self.training.suspended else [*recalls, Send(self.shards[0].process, Stop(job=self.job))]

    def tell_workers(self) -> list[Effect]:
        """Let every shard know whose work it may take."""
        return [] if self.over else self._crew.routing.tell_workers(self.job, self.workers.records)

    def take_dismissed(self) -> list[str]:
        """Who was told to leave since the last call."""
        return self._crew.take_dismissed()

    def join(self, process: Process, role: Role, block: int, now: float) -> list[Effect]:
        """A free process takes the place of a lost one."""
        self._account.now = now
        return self._attendance.join(process, role, block)

    def admit(self, process: Process, now: float) -> list[Effect]:
        """A free worker takes part beyond the places that the job needs."""
        self._account.now = now
        return self._attendance.admit(process)

    def part(self, name: str, why: str, now: float) -> list[Effect]:
        """Send a worker away that joined; it may join another job, or this one again."""
        self._account.now = now
        return self._attendance.part(name, why)

    def take_back(self, process: Process, hosting: Hosting, now: float) -> list[Effect] | None:
        """A process that still works for the job presents itself again; None: its place is not there any more."""
        self._account.now = now
        return None if self.over else self._attendance.take_back(process, hosting)

    def go_without(self, name: str, now: float) -> list[Effect]:
        """One of the `expected` workers is here, and does not work for the job any more."""
        self._account.now = now
        return self._attendance.go_without(name)

    def excuse(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard: no time limit counts that."""
        self._cancelled_at = min(self._cancelled_at + seconds, now)
        self._assembly.excuse(seconds, now)
        self._setbacks.excuse(seconds, now)
        if self._starved_since is not None:
            self._starved_since = min(self._starved_since + seconds, now)
        self.shards.excuse(seconds, now)
        if self.training is not None:
            self.training.excuse(seconds, now)

    def lose(self, name: str, why: str, now: float) -> list[Effect]:
        """A process of the run is gone."""
        self._account.now = now
        return self._attendance.lose(name, why)

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message about this job from one of its processes."""
        self._account.now = now
        if self.over:
            return []
        try:
            effects = self._dispatch(peer, message)
        except (LayerwiseError, ValueError) as error:
            return self._ending.fail(f"{type(message).__name__} of {peer} can't be acted on: {error}")
        return effects + self._settlement.settle()

    def on_tick(self, now: float) -> list[Effect]:
        """Time limits."""
        self._account.now = now
        if self.over:
            return []
        limits, training = self.spec.timeouts, self.training
        moved_at = training.watch.moved_at if training is not None else self._cancelled_at
        if self.stopping and now - moved_at > limits.drain:
            return self._ending.give_up_draining(limits.drain)
        for place in self.shards.empty:
            if place.empty_since is not None and now - place.empty_since > limits.start:
                return self._ending.fail(
                    f"shard {place.process} (block {place.block}) was lost ({place.why}), and no other took its place "
                    f"within {limits.start:g} s"
                )
        if training is None or training.suspended:
            if self.expected:
                return self._assembly.proceed_together()
            if not self.shards.empty and now - self._assembly.began > limits.start:
                return self._ending.fail(self._training_start.why_not(limits.start))
            # A worker that was not ready may have been lost, so that nobody is waited for any more.
            return self._training_start.if_ready()
        if self._setbacks.link_is_to_mend:
            return self._setbacks.mend_link()
        starved = "" if self.stopping else self.workers.missing()
        self._starved_since = (self._starved_since or now) if starved else None
        if self._starved_since is not None and now - self._starved_since > limits.start:
            return self._ending.fail(f"{starved}, and none came within {limits.start:g} s")
        return training.tick(now) + self._settlement.settle()

    # Messages --------------------------------------------------------------------------------------------------------

    def _dispatch(self, peer: str, message: Message) -> list[Effect]:
        now, training, crew = self._account.now, self.training, self._crew
        if peer in crew.workers.joined:
            match message:
                case Failure():
                    return self._attendance.turn_away(peer, message.message)
                case LeaseReturn() if message.reason.startswith(LOAD_FAILED):
                    return self._attendance.turn_away(peer, message.reason.removeprefix(LOAD_FAILED).lstrip(": "))
        match message:
            case Failure():
                return self._setbacks.on_failure(peer, message)
            case Probed():
                return self._assembly.on_probed(peer, message)
            case Ready() if crew.routing.generation:
                assert self.prepared is not None
                stop = self.prepared.settings.plan.num_microbatches
                return self._training_start.if_ready() if crew.routing.take_ready(peer, message, stop=stop) else []
            case LeaseRequest() if peer in crew.workers:
                crew.room[peer] = message.count
                return training.offer_room(peer, message.count, now) if training is not None else []
            case LinkDown():
                self._setbacks.on_link_down(peer, message)
                return []
            case StandbyHeld() if peer in crew.shards:
                crew.standby.hold(peer, message, crew.shards)
                return []
        if training is None or training.suspended:
            if peer not in crew.shards:
                return []
            place = crew.shards.of(peer)
            if training is not None and place.block == 0:
                match message:
                    case CutCommitted() if crew.shards.empty:
                        # No new route yet: the newer the cut, the less is to be done again.
                        return training.commit_cut(message, now)
                    case AttemptsClosed() if place.holds and self._divergence.found is None:
                        # The last ones of the route before; what the layers have of them is told with `Ready`.
                        return training.close(message, now)
            crew.routing.keep(peer, message)
            return []
        if peer in crew.workers:
            return hear_worker(training, peer, message, now)
        return hear_shard(training, crew.shards.of(peer), message, now)
