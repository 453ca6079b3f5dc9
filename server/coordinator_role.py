"""The coordinator's role: jobs in, processes found for them, runs driven, answers for clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from layerwise.job import JobSpec, parse_job
from layerwise.messages import Dismissal, Heartbeat, Hello, Hosting, Message, Role, Unassign, Unassigned, Welcome
from layerwise.roles import Disconnect, Effect, Send
from layerwise.server.arrivals import arrivals, destination
from layerwise.server.drained_nodes import DrainedNodes
from layerwise.server.job_book import JobBook
from layerwise.server.job_document import job_document
from layerwise.server.job_queue import JobQueue
from layerwise.server.job_record import JobEvent, JobRecord, JobState
from layerwise.server.membership import Membership
from layerwise.server.memory_store import JobStore
from layerwise.server.node_document import node_document
from layerwise.server.placement import Places, Shortage, place, places_before, replacement
from layerwise.server.run import Run

HEARTBEAT_SECONDS = 1.0
STORE_SECONDS = 2.0
"""How old the stored document of a running job may be."""
EVENTS_AT_ONCE = 1000


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
        self._heartbeat_seconds = heartbeat_seconds
        self._drained = DrainedNodes(self.members, store)
        self._book = JobBook(store)
        self._queue = JobQueue(self._book)
        self._stored_at = now
        for record in list(self._book.records.values()):
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
        self._queue.excuse(seconds, now)

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
                run.record = replace(run.record, document=job_document(run.record, run))
                self._book.put(run.record)
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
        return self._queued(self._queue.submit(spec, directory or spec.checkpoint_path, now), now)

    def adopt(self, record: JobRecord, now: float, *, shards: int = 0) -> tuple[dict[str, Any], list[Effect]]:
        """Queue a job that only its directory remembers (`read_job` reads it); one that is known here is resumed.

        What the directory holds stands: a coordinator that was killed may not have noted the last cuts.
        """
        self._queue.check_room()  # before anything of it is written down
        return self.resume(self._book.adopt(record, now), now, shards=shards)

    def resume(self, job: str, now: float, *, shards: int = 0) -> tuple[dict[str, Any], list[Effect]]:
        """Queue a failed or cancelled job again, from its newest durable cut; on so many ``shards`` (0: as many as before).

        Raises:
            NotFoundError: there is no such job.
            NotAllowedError: it is not over, or it is done.
            ConfigError: it can't be split among so many shards.
            BusyError: too many jobs wait already.
        """
        self._queue.resume(job, now, shards=shards)
        return self._queued(job, now)

    def cancel(self, job: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Stop a job; one that is over stays as it is.

        Raises:
            NotFoundError: there is no such job.
        """
        record = self._book.record(job)
        effects: list[Effect] = []
        run = self.runs.get(job)
        if run is not None:
            effects = run.cancel(now)
            effects += self._after(run, now)
        elif not record.state.final:
            self._book.close(record, JobState.CANCELLED, "cancelled while it was queued", "info", now)
            effects = self._schedule(now)
        return self.job(job), effects

    def drain(self, node: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Send all jobs away from the processes of ``node`` at their next update, and give those no new work.

        Raises:
            NotFoundError: there is no such node.
            NotAllowedError: too few other processes are free; nothing was changed.
        """
        leaving = self._drained.leaving(node)
        effects: list[Effect] = []
        for one in self._drained.drain(node, leaving, self.runs.values()):
            self.members.reserve(one.successors, one.run.job)
            effects += one.run.move(one.leaving, now)
            effects += self._after(one.run, now)
        for run in list(self.runs.values()):
            for process in [one for one in leaving if one.name in run.workers.joined]:
                effects += run.part(process.name, f"{node} is drained", now)
                effects += self._after(run, now)
        return self._drained.document(node, now), effects

    def undrain(self, node: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        """Give the processes of ``node`` work again.

        Raises:
            NotFoundError: it was not drained.
        """
        staying = self._drained.undrain(node)
        for run in self.runs.values():
            run.leaving -= staying
        effects = self._fill_vacancies(now) + self._schedule(now)
        return self._drained.document(node, now), effects

    def jobs(self, offset: int = 0, limit: int | None = None) -> list[dict[str, Any]]:
        """The documents of at most ``limit`` jobs, oldest first, without the ``offset`` oldest."""
        chosen = list(self._book.records.values())[offset : None if limit is None else offset + limit]
        places = self._queue.places()
        return [self._document(one, places) for one in chosen]

    def job(self, job: str) -> dict[str, Any]:
        """The document of one job; ``NotFoundError`` when there is none."""
        return self._document(self._book.record(job), self._queue.places())

    def record(self, job: str) -> JobRecord:
        """What is stored of a job; ``NotFoundError`` when there is none."""
        return self._book.record(job)

    def states(self) -> list[JobState]:
        """The states of all jobs."""
        return [record.state for record in self._book.records.values()]

    def nodes(self, now: float) -> list[dict[str, Any]]:
        """The processes of the cluster, by role and name."""
        return [node_document(process, now) for process in self.members]

    def events(self, job: str, offset: int, limit: int = EVENTS_AT_ONCE) -> tuple[JobEvent, ...]:
        """At most ``limit`` events of a job from ``offset`` on; ``NotFoundError`` when there is no such job."""
        return self._book.events(job, offset, limit)

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
                self._book.follow(run)
                if run.over:
                    break
            if run.over:
                effects += self._after(run, now)
        return effects

    # Inside: jobs ----------------------------------------------------------------------------------------------------

    def _queued(self, job: str, now: float) -> tuple[dict[str, Any], list[Effect]]:
        effects = self._schedule(now)
        return self.job(job), effects

    def _schedule(self, now: float) -> list[Effect]:
        """Start what can start, and let those join that came for that."""
        return self._start_jobs(now) + self._let_join(now)

    def _let_join(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for process in arrivals(self.members):
            found = destination(process, self.runs, self._book.records, self._book.spec)
            if isinstance(found, Dismissal):
                self.members.lose(process.name)
                effects += [Send(process.name, found), Disconnect(process.name)]
            elif found is not None:
                self.members.assign([process.name], found.job, found.spec.timeouts.heartbeat)
                effects += found.admit(process, now)
                effects += self._after(found, now)
        return effects

    def _start_jobs(self, now: float) -> list[Effect]:
        """Start what can start, one after the other."""
        effects: list[Effect] = []
        while (record := self._queue.first) is not None:
            spec = self._book.spec(record)
            places = place(spec, self.members)
            if not isinstance(places, Shortage):
                effects += self._start(record, spec, places, now)
            elif self._queue.wait(record, spec, places, now):
                return effects
        self._queue.end_waiting()
        return effects

    def _start(self, record: JobRecord, spec: JobSpec, places: Places, now: float) -> list[Effect]:
        processes = {one.name: one for one in self.members}
        run = Run(record, spec, places, processes, now)
        self.runs[record.job] = run
        self.members.assign(places.names, record.job, spec.timeouts.heartbeat)
        effects = run.start(now)
        return effects + self._after(run, now)

    def _after(self, run: Run, now: float) -> list[Effect]:
        """Take over what a run has decided; let its processes go when it is over."""
        self._book.follow(run)
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
        self._book.put(replace(run.record, document=job_document(run.record, run)))
        for name in run.names:
            if self.members.get(name) is not None:
                self.members.leave(name)
        return []

    def _take_over(self, record: JobRecord, now: float) -> None:
        """Go on with a job of the coordinator before; one that had not begun to train waits in the queue again."""
        if record.state is JobState.PREPARING or not record.placement or not record.settings_json:
            self._book.put(replace(record, state=JobState.QUEUED, placement=(), message=""))
            self._book.note(record.job, "warning", "the coordinator was started again; the job begins anew", now)
            return
        run = Run(record, self._book.spec(record), places_before(record), {}, now)
        self.runs[record.job] = run
        run.revive(now)
        self._book.follow(run)

    def _document(self, record: JobRecord, places: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
        """The document of a job; ``places`` are those in the queue."""
        position, reason = places.get(record.job, (None, ""))
        return job_document(record, self.runs.get(record.job), queue_position=position, waiting_for=reason)
