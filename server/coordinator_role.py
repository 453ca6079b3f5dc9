"""The coordinator's role: jobs in, processes found for them, runs driven, answers for clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from layerwise.errors import BusyError, NotAllowedError, NotFoundError
from layerwise.job import JobSpec, parse_job
from layerwise.messages import Dismissal, Heartbeat, Hello, Hosting, Message, Role, Unassign, Unassigned, Welcome
from layerwise.roles import Disconnect, Effect, Send
from layerwise.server.arrivals import arrivals, destination
from layerwise.server.departures import departures
from layerwise.server.job_document import job_document
from layerwise.server.job_record import JobEvent, JobRecord, JobState
from layerwise.server.membership import Membership, node_of
from layerwise.server.memory_store import JobStore
from layerwise.server.node_document import node_document
from layerwise.server.placement import Places, Shortage, place, places_before, replacement
from layerwise.server.resharding import with_shards
from layerwise.server.run import Run

HEARTBEAT_SECONDS = 1.0
STORE_SECONDS = 2.0
"""How old the stored document of a running job may be."""
EVENTS_AT_ONCE = 1000
MAX_QUEUED = 1000
"""Jobs that may wait at the same time: a script that submits without end must not fill the store."""


class CoordinatorRole:
    """Knows the processes and the jobs; gives each job its processes in the order of submission.

    ``now`` is always unix seconds, and never goes back. Not thread-safe. Jobs that the store knows as active belonged
    to a coordinator that ended: their processes, which go on, come back with what they hold.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        now: float,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        heartbeat_timeout: float = 30.0,
    ) -> None:
        self.members = Membership(heartbeat_timeout=heartbeat_timeout)
        self.runs: dict[str, Run] = {}
        self._store = store
        self._heartbeat_seconds = heartbeat_seconds
        self.members.drained.update(store.drained())
        self._jobs: dict[str, JobRecord] = {record.job: record for record in store.load()}
        self._specs: dict[str, JobSpec] = {}
        self._next_number = max((record.number for record in self._jobs.values()), default=0) + 1
        self._waiting_for: dict[str, str] = {}
        self._lacking_since: tuple[str, float] | None = None
        self._stored_at = now
        for record in list(self._jobs.values()):
            if record.state.active:
                self._take_over(record, now)

    # Processes -------------------------------------------------------------------------------------------------------

    def on_message(self, peer: str, message: Message, now: float) -> list[Effect]:
        """A message from a process."""
        if isinstance(message, Hello):
            return self._on_hello(peer, message, now)
        process = self.members.get(peer)
        if process is None:
            return []
        self.members.heard(peer, now, message if isinstance(message, Heartbeat) else None)
        effects: list[Effect] = []
        if isinstance(message, Unassigned):
            if process.leaving:
                self.members.release(peer, message.job)
                effects = self._fill_vacancies(now) + self._schedule(now)
        elif process.job is not None and process.job == getattr(message, "job", None) and not process.leaving:
            run = self.runs[process.job]
            effects = run.on_message(peer, message, now)
            effects += self._after(run, now)
        return effects

    def on_lost(self, peer: str, now: float) -> list[Effect]:
        """The link to a process is gone for good."""
        return self._lose(peer, "its link broke and did not come back", now)

    def excuse(self, seconds: float, now: float) -> None:
        """This process was stopped or held up for so long: what the others did meanwhile is still to be read, and counts against nobody."""
        self.members.excuse(seconds, now)
        for run in self.runs.values():
            run.excuse(seconds, now)
        if self._lacking_since is not None:
            job, since = self._lacking_since
            self._lacking_since = (job, min(since + seconds, now))

    def on_tick(self, now: float) -> list[Effect]:
        """Time limits of processes and runs, and of the job that waits first."""
        effects: list[Effect] = []
        for process in self.members.overdue(now):
            silent = now - process.seen
            effects += self._lose(process.name, f"no sign of life for {silent:.0f} s", now)
            effects.append(Disconnect(process.name))
        for run in list(self.runs.values()):
            effects += run.on_tick(now)
            effects += self._after(run, now)
        effects += self._schedule(now)
        if now - self._stored_at >= STORE_SECONDS:
            self._stored_at = now
            for run in self.runs.values():
                run.record = replace(run.record, document=self._document(run.record, run))
                self._put(run.record)
        return effects

    # Clients ---------------------------------------------------------------------------------------------------------

    def submit(self, spec_json: str, now: float, *, directory: str = "") -> tuple[dict[str, Any], list[Effect]]:
        """Queue a job; gives its document.

        Its cuts and event logs go to ``directory``, by default where the job says. No directory serves two jobs: the
        second one's gets a number.

        Raises:
            ConfigError: the job can't be meant.
            BusyError: too many jobs wait already.
        """
        spec = parse_job(spec_json)
        self._check_queue()
        number = self._next_number
        self._next_number += 1
        record = JobRecord(
            job=self._new_id(spec.name),
            number=number,
            name=spec.name,
            state=JobState.QUEUED,
            spec_json=spec.to_json(),
            directory=self._unused(directory or spec.checkpoint_path),
            created=now,
        )
        return self._enqueue(record, spec, f"submitted as {record.job}", now)

    def adopt(self, record: JobRecord, now: float, *, shards: int = 0) -> tuple[dict[str, Any], list[Effect]]:
        """Queue a job that only its directory remembers (`read_job` reads it); one that is known here is resumed.

        What the directory holds stands: a coordinator that was killed may not have noted the last cuts.
        """
        for known in list(self._jobs.values()):
            if known.directory == record.directory:
                if known.state.final:
                    fresh = tuple(one for one in record.warnings if one not in known.warnings)
                    next_life = max(known.next_life, record.next_life)
                    warnings = (*known.warnings, *fresh)
                    rollbacks = max(known.rollbacks, record.rollbacks, key=len)
                    self._put(
                        replace(known, cuts=record.cuts, next_life=next_life, warnings=warnings, rollbacks=rollbacks)
                    )
                    for warning in fresh:
                        self._note(known.job, "warning", warning, now)
                return self.resume(known.job, now, shards=shards)
        if record.job in self._jobs:
            record = replace(record, job=self._new_id(record.name))
        self._put(record)
        return self.resume(record.job, now, shards=shards)

    def resume(self, job: str, now: float, *, shards: int = 0) -> tuple[dict[str, Any], list[Effect]]:
        """Queue a failed or cancelled job again, from its newest durable cut; on so many ``shards`` (0: as many as before).

        Raises:
            NotFoundError: there is no such job.
            NotAllowedError: it is not over, or it is done.
            ConfigError: it can't be split among so many shards.
            BusyError: too many jobs wait already.
        """
        self._check_queue()
        record = self._record(job)
        if not record.state.final:
            raise NotAllowedError(f"job {job} is {record.state}; only a failed or cancelled job can be resumed")
        if record.state is JobState.DONE:
            raise NotAllowedError(f"job {job} is done; submit it again, with more steps, to train on")
        record = replace(
            record,
            number=self._next_number,
            state=JobState.QUEUED,
            message="",
            finished=None,
            resume_count=record.resume_count + 1,
        )
        self._next_number += 1
        notes: list[str] = []
        if shards:
            record, notes = with_shards(record, shards)
            self._specs.pop(job, None)
        cut = record.durable_cut
        what = f"from the cut at version {cut.version}" if cut is not None else "from the beginning"
        return self._enqueue(record, self._spec(record), "; ".join((f"resumed {what}", *notes)), now)

    def cancel(self, job: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Stop a job; one that is over stays as it is.

        Raises:
            NotFoundError: there is no such job.
        """
        record = self._record(job)
        effects: list[Effect] = []
        run = self.runs.get(job)
        if run is not None:
            effects = run.cancel(now)
            effects += self._after(run, now)
        elif not record.state.final:
            self._close(record, JobState.CANCELLED, "cancelled while it was queued", "info", now)
            effects = self._schedule(now)
        return self.job(job), effects

    def drain(self, node: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Send all jobs away from the processes of ``node`` at their next update, and give those no new work.

        Raises:
            NotFoundError: there is no such node.
            NotAllowedError: too few other processes are free; nothing was changed.
        """
        leaving = self.members.of_node(node)
        if not leaving:
            known = ", ".join(sorted({node_of(one.hello) for one in self.members})) or "none"
            raise NotFoundError(f"no process is of node {node!r}; the nodes are: {known}")
        found = departures(node, leaving, self.runs.values(), self.members)
        self.members.drain(node)
        self._store.put_drained(frozenset(self.members.drained))
        effects: list[Effect] = []
        for one in found:
            self.members.reserve(one.successors, one.run.job)
            effects += one.run.move(one.leaving, now)
            effects += self._after(one.run, now)
        for run in list(self.runs.values()):
            for process in [one for one in leaving if one.name in run.workers.joined]:
                effects += run.part(process.name, f"{node} is drained", now)
                effects += self._after(run, now)
        return self._drain_document(node, now), effects

    def undrain(self, node: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Give the processes of ``node`` work again.

        Raises:
            NotFoundError: it was not drained.
        """
        if node not in self.members.drained:
            known = ", ".join(sorted(self.members.drained)) or "none"
            raise NotFoundError(f"{node!r} is not drained; drained are: {known}")
        self.members.undrain(node)
        self._store.put_drained(frozenset(self.members.drained))
        staying = {one.name for one in self.members if not one.draining}
        for run in self.runs.values():
            run.leaving -= staying
        effects = self._fill_vacancies(now) + self._schedule(now)
        return self._drain_document(node, now), effects

    def jobs(self, offset: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        """The documents of at most ``limit`` jobs, oldest first, without the ``offset`` oldest."""
        chosen = list(self._jobs.values())[offset : None if limit is None else offset + limit]
        queue = {one.job: position for position, one in enumerate(self._queue())}
        return [self._document(one, self.runs.get(one.job), queue) for one in chosen]

    def job(self, job: str) -> dict[str, Any]:
        """The document of one job; ``NotFoundError`` when there is none."""
        record = self._record(job)
        queue = {one.job: position for position, one in enumerate(self._queue())}
        return self._document(record, self.runs.get(job), queue)

    def record(self, job: str) -> JobRecord:
        """What is stored of a job; ``NotFoundError`` when there is none."""
        return self._record(job)

    def states(self) -> list[JobState]:
        """The states of all jobs."""
        return [record.state for record in self._jobs.values()]

    def nodes(self, now: float) -> list[dict[str, Any]]:
        """The processes of the cluster, by role and name."""
        return [node_document(process, now) for process in self.members]

    def events(self, job: str, offset: int, limit: int = EVENTS_AT_ONCE) -> tuple[JobEvent, ...]:
        """At most ``limit`` events of a job from ``offset`` on; ``NotFoundError`` when there is no such job."""
        self._record(job)
        return self._store.events(job, offset, limit)

    # Inside: processes -----------------------------------------------------------------------------------------------

    def _on_hello(self, peer: str, hello: Hello, now: float) -> list[Effect]:
        if self.members.get(peer) is not None:
            # One that was started again has a new link, and was lost with the one before. This is the same process.
            return []
        if hello.name != peer or hello.role not in (Role.SHARD, Role.FORWARD, Role.BACKWARD):
            return [Disconnect(peer)]
        self.members.join(hello, now)
        effects: list[Effect] = [Send(peer, Welcome(heartbeat_seconds=self._heartbeat_seconds))]
        for hosting in hello.hosting:
            effects += self._take_back(peer, hosting, now)
        for run in [one for one in self.runs.values() if peer in one.expected]:
            effects += run.go_without(peer, now) + self._after(run, now)
        return effects + self._fill_vacancies(now) + self._schedule(now)

    def _take_back(self, name: str, hosting: Hosting, now: float) -> list[Effect]:
        """A process still works for a job: it has its place again, or is told to leave."""
        run = self.runs.get(hosting.job)
        process = self.members.get(name)
        assert process is not None
        leaves = process.draining and process.role is not Role.SHARD
        taken = run.take_back(process, hosting, now) if run is not None and process.free and not leaves else None
        if run is None or taken is None:
            return [Send(name, Unassign(job=hosting.job))]
        self.members.assign([name], run.job, run.spec.timeouts.heartbeat)
        if process.draining:
            taken += run.move([name], now)
        return taken + self._after(run, now)

    def _lose(self, name: str, why: str, now: float) -> list[Effect]:
        process = self.members.lose(name)
        if process is None or process.job is None:
            return []
        run = self.runs.get(process.job)
        if run is None or name not in run.names:
            return self._schedule(now)
        effects = run.lose(name, why, now)
        return effects + self._after(run, now)

    def _fill_vacancies(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for run in list(self.runs.values()):
            for vacancy in run.vacancies():
                process = replacement(vacancy, run.spec, self.members, now, job=run.job)
                if process is None:
                    continue
                self.members.assign([process.name], run.job, run.spec.timeouts.heartbeat)
                effects += run.join(process, vacancy.role, vacancy.block, now)
                effects += run.tell_workers()
                self._take_events(run)
                if run.over:
                    break
            if run.over:
                effects += self._after(run, now)
        return effects

    # Inside: jobs ----------------------------------------------------------------------------------------------------

    def _enqueue(
        self, record: JobRecord, spec: JobSpec, message: str, now: float
    ) -> tuple[dict[str, Any], list[Effect]]:
        self._specs[record.job] = spec
        self._put(record)
        self._note(record.job, "info", message, now)
        effects = self._schedule(now)
        return self.job(record.job), effects

    def _schedule(self, now: float) -> list[Effect]:
        """Start what can start, and let those join that came for that."""
        return self._start_jobs(now) + self._let_join(now)

    def _let_join(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for process in arrivals(self.members):
            found = destination(process, self.runs, self._jobs, self._spec)
            if isinstance(found, Dismissal):
                self.members.lose(process.name)
                effects += [Send(process.name, found), Disconnect(process.name)]
            elif found is not None:
                self.members.assign([process.name], found.job, found.spec.timeouts.heartbeat)
                effects += found.admit(process, now)
                effects += self._after(found, now)
        return effects

    def _start_jobs(self, now: float) -> list[Effect]:
        """Start what can start: strictly in the order of submission, so that a large job is not passed for ever."""
        effects: list[Effect] = []
        queue = self._queue()
        while queue:
            record = queue[0]
            spec = self._spec(record)
            places = place(spec, self.members)
            if isinstance(places, Shortage):
                self._waiting_for = {record.job: places.reason}
                return effects + self._wait(record, spec, places, now)
            queue.pop(0)
            effects += self._start(record, spec, places, now)
        self._waiting_for, self._lacking_since = {}, None
        return effects

    def _start(self, record: JobRecord, spec: JobSpec, places: Places, now: float) -> list[Effect]:
        processes = {one.name: one for one in self.members}
        run = Run(record, spec, places, processes, now)
        self.runs[record.job] = run
        self.members.assign(places.names, record.job, spec.timeouts.heartbeat)
        effects = run.start(now)
        return effects + self._after(run, now)

    def _wait(self, record: JobRecord, spec: JobSpec, shortage: Shortage, now: float) -> list[Effect]:
        """The first job in the queue lacks processes; if not even a whole cluster would do, only for so long."""
        if not shortage.lacking:
            self._lacking_since = None
            return []
        if self._lacking_since is None or self._lacking_since[0] != record.job:
            self._lacking_since = (record.job, now)
            self._note(record.job, "info", f"waiting: {shortage.reason}", now)
        if now - self._lacking_since[1] <= spec.timeouts.start:
            return []
        self._lacking_since = None
        limit = spec.timeouts.start
        message = f"{shortage.reason}, and no more came within {limit:g} s: start them, or ask for fewer in cluster:"
        self._close(record, JobState.FAILED, message, "error", now)
        return self._start_jobs(now)

    def _after(self, run: Run, now: float) -> list[Effect]:
        """Take over what a run has decided; let its processes go when it is over."""
        self._take_events(run)
        for name in run.take_dismissed():
            self.members.leave(name)
        vacancies = run.vacancies()
        if not vacancies and not run.record.moving:
            self.members.unreserve(run.job)
        if not run.over:
            return run.tell_workers() + (self._fill_vacancies(now) if vacancies else [])
        if run.job not in self.runs:
            return []
        del self.runs[run.job]
        self._put(replace(run.record, document=self._document(run.record, run)))
        for name in run.names:
            if self.members.get(name) is not None:
                self.members.leave(name)
        return []

    def _take_events(self, run: Run) -> None:
        for event in run.events:
            self._store.add_event(run.job, event)
        run.events.clear()
        if self._jobs[run.job] is not run.record:
            known = self._jobs[run.job]
            self._jobs[run.job] = run.record
            if (
                known.state != run.record.state
                or known.cuts != run.record.cuts
                or known.next_life != run.record.next_life
                or known.placement != run.record.placement
                or known.drops != run.record.drops
                or known.rollbacks != run.record.rollbacks
                or known.evaluations != run.record.evaluations
                or known.moving != run.record.moving
            ):
                self._store.put(run.record)

    def _take_over(self, record: JobRecord, now: float) -> None:
        """Go on with a job of the coordinator before; one that had not begun to train waits in the queue again."""
        if record.state is JobState.PREPARING or not record.placement or not record.settings_json:
            self._put(replace(record, state=JobState.QUEUED, placement=(), message=""))
            self._note(record.job, "warning", "the coordinator was started again; the job begins anew", now)
            return
        run = Run(record, self._spec(record), places_before(record), {}, now)
        self.runs[record.job] = run
        run.revive(now)
        self._take_events(run)

    def _close(self, record: JobRecord, state: JobState, message: str, level: str, now: float) -> None:
        self._put(replace(record, state=state, message=message, finished=now))
        self._note(record.job, level, message, now)

    def _note(self, job: str, level: str, message: str, now: float) -> None:
        record = self._jobs[job]
        self._store.add_event(job, JobEvent(sequence=record.num_events, time=now, level=level, message=message))
        self._put(replace(record, num_events=record.num_events + 1))

    def _put(self, record: JobRecord) -> None:
        self._jobs[record.job] = record
        self._store.put(record)

    def _check_queue(self) -> None:
        waiting = sum(record.state is JobState.QUEUED for record in self._jobs.values())
        if waiting >= MAX_QUEUED:
            raise BusyError(
                f"{waiting} jobs wait already, and at most {MAX_QUEUED} may; submit again when some have ended, or "
                f"cancel some"
            )

    def _queue(self) -> list[JobRecord]:
        waiting = (record for record in self._jobs.values() if record.state is JobState.QUEUED)
        return sorted(waiting, key=lambda record: record.number)

    def _record(self, job: str) -> JobRecord:
        record = self._jobs.get(job)
        if record is None:
            known = ", ".join(list(self._jobs)[-5:]) or "none"
            raise NotFoundError(f"no job {job!r} here; the newest are: {known}")
        return record

    def _spec(self, record: JobRecord) -> JobSpec:
        if record.job not in self._specs:
            self._specs[record.job] = parse_job(record.spec_json, source=f"job {record.job}")
        return self._specs[record.job]

    def _new_id(self, name: str) -> str:
        number = 1
        while f"{name}-{number}" in self._jobs:
            number += 1
        return f"{name}-{number}"

    def _unused(self, directory: str) -> str:
        used = {record.directory for record in self._jobs.values()}
        candidates = (directory if number == 1 else f"{directory}-{number}" for number in count(1))
        return next(one for one in candidates if one not in used)

    def _drain_document(self, node: str, now: float) -> dict[str, Any]:
        processes = [node_document(one, now) for one in self.members.of_node(node)]
        return {
            "node": node,
            "drained": node in self.members.drained,
            "jobs": sorted({one["job"] for one in processes if one["job"] is not None}),
            "processes": processes,
        }

    def _document(self, record: JobRecord, run: Run | None, queue: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The document of a job; ``queue`` has the places of those that wait."""
        if record.state is not JobState.QUEUED or queue is None:
            return job_document(record, run)
        position = queue[record.job]
        reason = self._waiting_for.get(record.job, "")
        if position:
            reason = f"{position} {'job is' if position == 1 else 'jobs are'} before it"
        return job_document(record, run, queue_position=position + 1, waiting_for=reason)
