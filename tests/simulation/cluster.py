"""A simulated cluster under one coordinator, and the run of one scenario on it to its end."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from layerwise.audit import SampleLedgerSummary, StoredEvents, audit
from layerwise.dropped import DroppedMicrobatch
from layerwise.errors import NotAllowedError, NotFoundError
from layerwise.ids import Microbatch
from layerwise.messages import Hello, Message, Role
from layerwise.plan import TrainingPlan
from layerwise.profile import LayerProfile, Profile
from layerwise.roles import Effect
from layerwise.server.coordinator_role import CoordinatorRole
from layerwise.server.held_up import HeldUp
from layerwise.server.memory_store import MemoryJobStore
from layerwise.worker.forward_role import ForwardRole
from tests.simulation.disk import Disk
from tests.simulation.processes import SimulatedBackward, SimulatedForward, SimulatedShard, Work
from tests.simulation.scenario import Fault, Scenario
from tests.simulation.world import TICK_SECONDS, Process, World

LONGEST_SECONDS = 240.0
"""Simulated time after which a run counts as stalled."""
MOST_RESUMES = 8


class StalledError(AssertionError):
    """The run did not end; the message has the state of every role."""


@dataclass(slots=True, eq=False)
class SimulatedCoordinator(Process):
    """The coordinator's process."""

    role: CoordinatorRole = field(default_factory=lambda: CoordinatorRole(MemoryJobStore(), now=0.0))
    _held_up: HeldUp = field(default_factory=lambda: HeldUp(TICK_SECONDS))

    def on_message(self, peer: str, message: Message) -> list[Effect]:
        return self.role.on_message(peer, message, self._caught_up())

    def on_lost(self, peer: str) -> list[Effect]:
        return self.role.on_lost(peer, self._caught_up())

    def on_tick(self) -> list[Effect]:
        now = self._caught_up()
        self._held_up.ticked(now)
        return self.role.on_tick(now)

    def _caught_up(self) -> float:
        now = self.world.now
        missed = self._held_up.missed(now)
        if missed:
            self.role.excuse(missed, now)
        return now

    def describe(self) -> str:
        return "; ".join(f"{one['job']} {one['state']}: {one['message']} {one['ledger']}" for one in self.role.jobs())


class SimulatedCluster:
    """Builds the processes of a scenario and runs its job until it is done."""

    def __init__(self, scenario: Scenario, *, trace: bool = False) -> None:
        self.scenario = scenario
        self.world = World(scenario.seed, scenario.weather, trace=trace)
        self.disk = Disk(
            self.world.random, delay=scenario.disk_delay, failure=scenario.disk_failure, damage=scenario.disk_damage
        )
        self.store = MemoryJobStore()
        self.world.on_end = lambda name: self.world.at(0.1, lambda: self._start(name))
        self._start("coordinator")
        self.works: list[list[Work]] = []
        self.job = ""
        self._profile = _profile(scenario)
        self.num_drained = 0
        self.happened: Counter[str] = Counter()
        """Faults that hit something while the job ran, by kind."""
        self.replaced: Counter[str] = Counter()
        """Faults at whose end another shard had the block of the one that they had silenced, by kind."""
        for index in range(scenario.shards + scenario.spare_shards):
            self._start(f"shard-{index}")
        for index in range(scenario.forward + scenario.spare_shards):
            self._start(f"forward-{index}")
        for index in range(scenario.detached):
            self._start(f"backward-{index}")

    def run(self) -> None:
        """Run to the end and check everything. ``AssertionError`` says what is wrong."""
        with _quiet():
            self._run()

    def _run(self) -> None:
        scenario, world = self.scenario, self.world
        self.world.at(0.05, self._submit)
        for fault in scenario.faults:
            world.at(fault.at, self._fault(fault))
        for drain in scenario.drains:
            world.at(drain.at, lambda target=drain.target: self._drain(target))
            world.at(drain.until, lambda target=drain.target: self._undrain(target))
        for guest in scenario.guests:
            world.at(guest.at, lambda guest=guest: self._start(guest.name, join=guest.join))
            world.at(guest.at + guest.stay, lambda guest=guest: self._end(guest.name))
        for at in scenario.stops:
            world.at(at, self._cancel)
        resumes = 0
        while True:
            self._run_until(self._over)
            document = self.coordinator.role.job(self.job)
            if document["state"] == "done":
                break
            allowed = document["state"] == "cancelled" or self._may_fail(document["message"])
            assert allowed, f"the job {document['state']}: {document['message']}"
            self._check_resting()
            if document["message"].startswith("cancelled at version"):
                self._check_end(document)
            resumes += 1
            assert resumes <= MOST_RESUMES, f"still not done after {MOST_RESUMES} resumes: {document['message']}"
            self._perform(lambda: self.coordinator.role.resume(self.job, world.now))
            if resumes == 1 and scenario.stop_after_resume is not None:
                world.at(scenario.stop_after_resume, self._cancel)
        self._run_until(
            lambda: (
                self.coordinator.alive
                and all(one["state"] in ("free", "drained") for one in self.coordinator.role.nodes(world.now))
            )
        )
        self._check_resting()
        self._check_end(self.coordinator.role.job(self.job))
        self._check_pace()

    # What happens ----------------------------------------------------------------------------------------------------

    def _end(self, name: str) -> None:
        if name in self.world.processes:
            self.world.kill(name)

    def _start(self, name: str, *, join: str | None = None) -> None:
        scenario, world = self.scenario, self.world
        if name == "coordinator":
            role = CoordinatorRole(self.store, now=world.now)
            self.coordinator = SimulatedCoordinator(world, name, role=role)
            return
        hello = Hello(
            role=Role(name.partition("-")[0]),
            name=name,
            address=f"simulated:{name}",
            device="cpu",
            host="simulated",
            pid=1,
            version="0",
            join=join,
        )
        match hello.role:
            case Role.SHARD:
                shard = SimulatedShard(
                    world,
                    name,
                    hello,
                    disk=self.disk,
                    profile_json=self._profile.to_json(),
                    slots=scenario.slots,
                    step_seconds=scenario.step_seconds,
                    hiccups=scenario.hiccups,
                    frozen_below=scenario.frozen_below,
                    bad=scenario.bad,
                    divergence=scenario.divergence,
                )
                self.works.append(shard.history)
            case Role.FORWARD:
                # Half of the workers send samples along with their offers, the others after the grant.
                whole = random.Random(f"offers {scenario.seed} {name}").random() < 0.5
                role = ForwardRole(prefetch=3, offered_bytes=0 if whole else -1)
                SimulatedForward(world, name, hello, load_seconds=scenario.load_seconds, bad=scenario.bad, role=role)
            case _:
                SimulatedBackward(
                    world, name, hello, step_seconds=scenario.step_seconds, frozen_below=scenario.frozen_below
                )

    def _submit(self) -> None:
        if not self.coordinator.alive:
            self.world.at(0.1, self._submit)
            return

        def submit() -> tuple[dict[str, Any], list[Effect]]:
            return self.coordinator.role.submit(json.dumps(self.scenario.spec), self.world.now)

        self.job = self._perform(submit)["job"]

    def _cancel(self) -> None:
        if not self.coordinator.alive:
            self.world.at(0.1, self._cancel)
        elif self.job:
            self._perform(lambda: self.coordinator.role.cancel(self.job, self.world.now))

    def _drain(self, target: str) -> None:
        if not self.coordinator.alive:
            return
        # There may be no other process free just now, or the target is not there.
        with suppress(NotAllowedError, NotFoundError):
            self._perform(lambda: self.coordinator.role.drain(target, self.world.now))
            self.num_drained += 1

    def _undrain(self, target: str) -> None:
        if not self.coordinator.alive:
            self.world.at(0.1, lambda: self._undrain(target))
            return
        with suppress(NotFoundError):
            self._perform(lambda: self.coordinator.role.undrain(target, self.world.now))

    def _perform(self, act: Callable[[], tuple[dict[str, Any], list[Effect]]]) -> dict[str, Any]:
        document, effects = act()
        self.coordinator.perform(effects)
        return document

    def _fault(self, fault: Fault) -> Callable[[], None]:
        def happen() -> None:
            if self._hits(fault):
                self.happened[fault.kind] += 1
                if fault.kind in ("pause", "isolate"):
                    self._watch_place(fault)
            if fault.kind == "break":
                self.world.break_stream(fault.target, fault.other, fault.seconds)
            elif fault.kind == "blackhole":
                self.world.blackhole(fault.target, fault.other, fault.seconds)
            elif fault.kind == "isolate":
                self.world.isolate(fault.target, fault.seconds)
            elif fault.kind == "sever":
                self.world.sever(fault.target, fault.other)
            elif fault.target not in self.world.processes:
                return
            elif fault.kind == "memory":
                shard = self.world.processes[fault.target]
                assert isinstance(shard, SimulatedShard)
                shard.memory_ends = True
            elif fault.kind == "pause":
                self.world.processes[fault.target].pause(fault.seconds)
            else:
                self.world.kill(fault.target)
                self.world.at(fault.seconds, lambda: self._start(fault.target))

        return happen

    def _hits(self, fault: Fault) -> bool:
        """Whether the job is there, and what the fault is about: a process, or a link between two."""
        process = self.world.processes.get(fault.target)
        if not self.job or self._over() or process is None:
            return False
        if fault.kind == "isolate":
            return any(other is not process for other in self.world.processes.values())
        return not fault.other or (fault.other in self.world.processes and process.links.get(fault.other) is not None)

    def _watch_place(self, fault: Fault) -> None:
        """See at the end of the fault whether somebody else has the block of its target."""
        process, before = self.world.processes[fault.target], self._owners()
        if fault.target not in before:
            return

        def look() -> None:
            owners = self._owners()
            lives = self.world.processes.get(fault.target) is process
            if lives and len(owners) == len(before) and owners[before.index(fault.target)] != fault.target:
                self.replaced[fault.kind] += 1

        self.world.at(fault.seconds, look)

    def _owners(self) -> list[str]:
        """The shards of the job's blocks, as far as the coordinator knows."""
        return [one["shard"] for one in self.coordinator.role.job(self.job)["blocks"]] if self.job else []

    # Watching --------------------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        if not self.job or not self.coordinator.alive:
            return False
        return self.coordinator.role.record(self.job).state.final

    def _run_until(self, reached: Callable[[], bool]) -> None:
        limit = self.world.now + LONGEST_SECONDS
        while not reached():
            self.world.step()
            if self.world.now > limit:
                raise StalledError(f"stalled after {LONGEST_SECONDS:g} simulated seconds:\n{self.describe()}")

    def describe(self) -> str:
        """The state of every role."""
        states = (f"{process.name}: {process.describe()}" for process in self.world.processes.values())
        return "\n".join(states)

    def _may_fail(self, message: str) -> bool:
        if self.scenario.disk_damage > 0 and "there is no cut before it" in message:
            return True
        # Who diverges while it is being stopped has no training left that could go back.
        diverged = self.scenario.divergence is not None and "is not finite" in message
        return (self.scenario.disk_failure > 0 and "simulated disk" in message) or (
            diverged and self.scenario.stops_at_all
        )

    # Checking --------------------------------------------------------------------------------------------------------

    def _check_pace(self) -> None:
        """Only a process that is silent for long may hold the run up for long."""
        if any(fault.seconds > 3 for fault in self.scenario.faults):
            return
        for event in self.coordinator.role.events(self.job, 0):
            assert "nothing has moved" not in event.message, f"{event.message} at {event.time:.1f}"

    def _all_works(self) -> list[Work]:
        return [work for history in self.works for work in history]

    def _check_resting(self) -> None:
        """Bounds that hold at any moment, for every block that ever was."""
        for work in self._all_works():
            window = work.header.window
            who = f"block {work.header.start}-{work.header.stop} in life {work.header.life}"
            assert work.block.max_kept <= window, (
                f"{who} kept {work.block.max_kept} microbatches, the window is {window}"
            )
            if work.role.first is not None:
                span = work.role.first.max_span
                assert span <= window, f"{who} admitted a span of {span}, the window is {window}"
            for layer, (ledger, _) in work.block.layers.items():
                ledger.staleness.check()
                worst = len(ledger.staleness.staleness) - 1
                promise = work.header.max_staleness
                assert worst <= promise, f"layer {layer} took a gradient {worst} updates old, {promise} were promised"

    def _may_drop(self, plan: TrainingPlan) -> set[int]:
        bad, divergence = self.scenario.bad, self.scenario.divergence
        diverged = range(divergence.index, plan.num_microbatches) if divergence is not None else ()
        return {*bad.torn, *bad.spoilt, *diverged}

    def _check_end(self, document: dict[str, Any]) -> None:
        """Everything that must hold when a job has come to a boundary."""
        final = document["steps"]
        works = self._all_works()
        by_life = sorted(works, key=lambda work: work.header.life)
        last = list({work.header.start: work for work in by_life}.values())  # the newest life of each block
        plan = last[0].plan
        wanted: set[int] | None = None
        for work in last:
            assert work.block.store_bytes == 0, f"{work.role.describe()} still keeps activations"
            for layer, (ledger, parameter) in work.block.layers.items():
                assert ledger.version == final, f"layer {layer} is at version {ledger.version}, the job at {final}"
                assert ledger.staleness.num_open == 0, f"layer {layer} has open tickets: {ledger.staleness.tickets}"
                assert max(parameter.values(), default=1) == 1, f"layer {layer} took a microbatch twice: {parameter}"
                dropped = ledger.applied.dropped
                taken = set(parameter) | dropped
                assert not set(parameter) & dropped, (
                    f"layer {layer} applied what it dropped: {set(parameter) & dropped}"
                )
                assert dropped <= self._may_drop(plan), f"dropped without need: {dropped - self._may_drop(plan)}"
                assert len(taken) == plan.gradients_before(final)
                assert taken == {index for index in range(plan.num_microbatches) if not ledger.lacks(index)}
                wanted = taken if wanted is None else wanted
                assert taken == wanted, f"layers differ: {sorted(taken ^ wanted)}"
        if document["state"] == "done":
            assert final == plan.num_updates
            counts = document["ledger"]
            assert counts["samples_applied"] + counts["samples_dropped"] == plan.total_samples
            if self.scenario.bad.often == 1.0 and self.scenario.divergence is None:
                # What is on the validation of a whole run: no bad sample was ever applied.
                bad = self.scenario.bad.torn | self.scenario.bad.spoilt
                wrong = {plan.index(Microbatch(one["epoch"], one["start"], one["stop"])) for one in counts["dropped"]}
                assert wrong == {index for index in bad if index < plan.num_microbatches}
            # A run that only finds out that nothing is left to train does not evaluate again.
            if all(work.assignment.cut < final for work in last):
                assert (document["validation"] is not None) == bool(self.scenario.num_validation)
        ledger = document["ledger"]
        if final:
            told = self.disk.manifest(works[0].assignment.directory, final)["ledger"]
            complete = told == ledger
            if document["state"] != "done":
                # It may be from before the wish to stop there, when more had been leased, and closed.
                counts = ("samples_leased", "samples_applied", "samples_dropped")
                complete = all(told[count] >= ledger[count] for count in counts)
                complete = complete and all(one in told["dropped"] for one in ledger["dropped"])
            assert complete, f"the manifest of version {final} says {told}, the job {ledger}"
        summary = SampleLedgerSummary(
            job=self.job,
            version=final,
            samples_leased=ledger["samples_leased"],
            samples_applied=ledger["samples_applied"],
            samples_dropped=ledger["samples_dropped"],
            dropped=tuple(
                DroppedMicrobatch(
                    microbatch=Microbatch(one["epoch"], one["start"], one["stop"]),
                    reason=one["reason"],
                    missing_from=one["missing_from"],
                )
                for one in ledger["dropped"]
            ),
        )
        logs = [StoredEvents(header=work.header, records=work.log.log.records) for work in works]
        report = audit(logs, ledger=summary, plan=plan, cuts=self.disk.cuts(works[0].assignment.directory))
        assert report.passed, "the audit failed: " + "; ".join(line for one in report.checks for line in one.failures)


def _profile(scenario: Scenario) -> Profile:
    return Profile(
        layers=tuple(
            LayerProfile(
                index=index,
                name=f"layer-{index}",
                parameters=10,
                trainable=10,
                parameter_bytes=40,
                state_bytes=80,
                forward_seconds=0.001,
                backward_seconds=0.002,
                activation_bytes=100,
                output_bytes=100,
                output_shapes=((1, 10),),
            )
            for index in range(scenario.layers)
        ),
        num_train_samples=scenario.num_samples,
        num_validation_samples=scenario.num_validation,
        microbatch_samples=1,
        input_bytes=100,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Whatever fails in a simulated world is meant to; warnings of it are of no use."""
    logger = logging.getLogger("layerwise")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
