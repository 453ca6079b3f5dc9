"""Which faults a chaos run has: drawn from a scenario and a seed, before anything is started.

The same scenario, seed and shape of job give the same plan everywhere. Faults of processes are addressed by versions,
those of frames by the frames of a link, so that a run can be repeated, as far as a run on real clocks can.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from layerwise.chaos.faults import EVERYBODY, ProcessFault, ProcessFaultKind
from layerwise.errors import ConfigError
from layerwise.faults import FrameFault, FrameFaultKind
from layerwise.ids import COORDINATOR
from layerwise.server.placement import RETURN_SECONDS

if TYPE_CHECKING:
    from layerwise.job import JobSpec, ResolvedSettings

FEWEST_UPDATES = 10
EARLIEST, LATEST = 0.1, 0.6
"""Where in a run, as parts of its updates, processes are hit: training has to go on for a while after the last fault."""
LONGEST_LAG_SECONDS = 0.05
SHORT_PAUSE_SECONDS = (0.2, 1.5)
LONG_PAUSE_SECONDS = (1.0, 2.5)
"""Beyond `replaced_after`: a spare takes the process's place, and then it comes back."""
LONGEST_TIMEOUT = 10.0
"""Above this no pause lasts longer than the time-out."""
DELAY_SECONDS = (0.02, 0.4)
FRAME_FAULTS = 6
FEWEST_CUTS = 3
CUT_POINTS = ("cut.create", "cut.write", "cut.sync", "cut.rename")
MANIFEST_POINTS = ("manifest.create", "manifest.write", "manifest.rename")
DISK_ACTIONS = ("enospc", "erofs", "eio")


class Scenario(StrEnum):
    """What a chaos run is about."""

    KILL_SHARD = "kill-shard"
    KILL_FORWARD = "kill-forward"
    KILL_BACKWARD = "kill-backward"
    KILL_COORDINATOR = "kill-coordinator"
    KILL_ALL = "kill-all"
    PAUSE = "pause"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DROP = "drop"
    DISK_FULL = "disk-full"
    MIXED = "mixed"


def replaced_after(timeout_seconds: float) -> float:
    """After how many seconds of silence any process's place is a free one's: a shard's is kept for a while."""
    return timeout_seconds + RETURN_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """What a plan must know of a job: its length, its roles, and after how many seconds silence counts as death."""

    num_updates: int
    num_microbatches: int
    num_cuts: int
    window: int
    shards: int
    forward: int
    detached: int
    timeout_seconds: float

    @classmethod
    def of(cls, spec: JobSpec, settings: ResolvedSettings) -> JobShape:
        """The shape of a job whose settings are known."""
        return cls(
            num_updates=settings.plan.num_updates,
            num_microbatches=settings.plan.num_microbatches,
            num_cuts=_num_cuts(settings.cut_intervals, settings.plan.num_updates),
            window=settings.window,
            shards=spec.cluster.shards,
            forward=spec.cluster.forward,
            detached=spec.cluster.num_detached,
            timeout_seconds=spec.timeouts.heartbeat,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Every place that one fault can hit."""
        counts = (("shard", self.shards), ("forward", self.forward), ("backward", self.detached))
        return (COORDINATOR, *(f"{role}:{index}" for role, count in counts for index in range(count)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """The faults of one run. ``disk_faults`` are in the form that `layerwise.fault_points` reads."""

    scenario: Scenario
    seed: int
    process_faults: tuple[ProcessFault, ...] = ()
    frame_faults: tuple[FrameFault, ...] = ()
    disk_faults: tuple[str, ...] = ()

    @property
    def num_faults(self) -> int:
        """All of them."""
        return len(self.process_faults) + len(self.frame_faults) + len(self.disk_faults)

    def needs_spares(self, timeout_seconds: float) -> bool:
        """Whether a process is to be replaced while it is paused, for which another one of its role has to be free."""
        return outlast(self.process_faults, timeout_seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scenario": str(self.scenario),
            "seed": self.seed,
            "process_faults": [fault.to_json() for fault in self.process_faults],
            "frame_faults": [fault.to_json() for fault in self.frame_faults],
            "disk_faults": list(self.disk_faults),
        }


def outlast(faults: Sequence[ProcessFault], timeout_seconds: float) -> bool:
    """Whether a process that others can replace is paused for so long that they do."""
    limit = replaced_after(timeout_seconds)
    return any(fault.seconds > limit and fault.target != COORDINATOR for fault in faults)


def draw_plan(scenario: Scenario, seed: int, shape: JobShape) -> ChaosPlan:
    """The plan of ``seed``.

    Raises:
        ConfigError: the job is too short, or has nobody of the role that the scenario is about.
    """
    if shape.num_updates < FEWEST_UPDATES:
        raise ConfigError(
            f"train.steps: {shape.num_updates} updates are too few for planned faults, expected at least "
            f"{FEWEST_UPDATES}; raise it with --set train.steps=..."
        )
    draw = _Draw(random.Random(f"chaos {scenario} {seed}"), shape)
    process_faults: list[ProcessFault] = []
    frame_faults: list[FrameFault] = []
    match scenario:
        case Scenario.KILL_SHARD | Scenario.KILL_FORWARD | Scenario.KILL_BACKWARD | Scenario.KILL_COORDINATOR:
            role = scenario.removeprefix("kill-")
            process_faults = [draw.kill(role, version) for version in draw.versions(2)]
        case Scenario.KILL_ALL:
            process_faults = [draw.kill(EVERYBODY, version) for version in draw.versions(1)]
        case Scenario.PAUSE:
            process_faults = draw.pauses()
        case Scenario.DELAY | Scenario.DUPLICATE | Scenario.REORDER | Scenario.DROP:
            frame_faults = [draw.frame(FrameFaultKind(str(scenario)), LATEST) for _ in range(FRAME_FAULTS)]
        case Scenario.DISK_FULL:
            return ChaosPlan(scenario=scenario, seed=seed, disk_faults=draw.full_disk())
        case Scenario.MIXED:
            process_faults = [draw.any_process_fault(version) for version in draw.versions(3)]
            # A process that has lost its place receives nothing any more, so what is planned for frames comes before.
            replaced = outlast(process_faults, shape.timeout_seconds)
            until = process_faults[0].at_version / shape.num_updates if replaced else LATEST
            frame_faults = [draw.frame(kind, until) for kind in FrameFaultKind]
    return ChaosPlan(
        scenario=scenario,
        seed=seed,
        process_faults=tuple(process_faults),
        frame_faults=tuple(dict.fromkeys(frame_faults)),
    )


def _num_cuts(intervals: tuple[int, ...], num_updates: int) -> int:
    return len({num_updates, *(version for every in intervals for version in range(every, num_updates, every))})


class _Draw:
    def __init__(self, rng: random.Random, shape: JobShape) -> None:
        self._rng = rng
        self._shape = shape

    def versions(self, count: int) -> list[int]:
        """Versions in order, one in each of ``count`` equal parts of the time in which faults may fall."""
        first, last = EARLIEST * self._shape.num_updates, LATEST * self._shape.num_updates
        part = (last - first) / count
        return [int(first + (place + self._rng.random()) * part) for place in range(count)]

    def kill(self, role: str, version: int) -> ProcessFault:
        return ProcessFault(
            kind=ProcessFaultKind.KILL, target=self._target(role), at_version=version, after=self._lag()
        )

    def pause(self, target: str, version: int) -> ProcessFault:
        timeout = self._shape.timeout_seconds
        seconds = self._rng.uniform(*SHORT_PAUSE_SECONDS)
        if timeout <= LONGEST_TIMEOUT and self._rng.random() < 0.5:
            seconds = replaced_after(timeout) + self._rng.uniform(*LONG_PAUSE_SECONDS)
        return ProcessFault(
            kind=ProcessFaultKind.PAUSE,
            target=target,
            at_version=version,
            after=self._lag(),
            seconds=round(seconds, 2),
        )

    def pauses(self) -> list[ProcessFault]:
        """One pause for each role."""
        roles = [COORDINATOR, "shard", "forward", *(["backward"] if self._shape.detached else [])]
        self._rng.shuffle(roles)
        versions = self.versions(len(roles))
        return [self.pause(self._target(role), version) for role, version in zip(roles, versions, strict=True)]

    def any_process_fault(self, version: int) -> ProcessFault:
        # A role first: else what there is most of would be hit most often.
        role = self._rng.choice(sorted({target.partition(":")[0] for target in self._shape.targets}))
        return self.kill(role, version) if self._rng.random() < 0.7 else self.pause(self._target(role), version)

    def frame(self, kind: FrameFaultKind, until: float) -> FrameFault:
        """A fault of a frame that is sure to come before this part of the run is over."""
        links = self._links(until)
        if kind is FrameFaultKind.REORDER:
            # Only there it is sure that a frame comes before the one ahead of it was answered, and can overtake it.
            links = [link for link in links if link[0].startswith("shard") and link[1].startswith("shard")] or links
        receiver, sender, most = self._rng.choice(links)
        return FrameFault(
            kind=kind,
            receiver=receiver,
            sender=sender,
            frame=self._rng.randint(1, max(most, 3)),
            seconds=round(self._rng.uniform(*DELAY_SECONDS), 3) if kind is FrameFaultKind.DELAY else 0.0,
        )

    def full_disk(self) -> tuple[str, ...]:
        """What each shard meets while it writes cuts: one or two of them fail, the last one does not.

        Every cut reaches such a point at least once in every shard, and the manifest's in the first one, unless the cut
        has failed by then.
        """
        num_cuts = self._shape.num_cuts
        if num_cuts < FEWEST_CUTS:
            raise ConfigError(
                f"checkpoint.every: {num_cuts} cuts are too few for a disk that is full for a while, expected at least "
                f"{FEWEST_CUTS}; lower it with --set checkpoint.every=..."
            )
        first = self._rng.randint(1, num_cuts - 2)
        when = self._rng.choice((f"{first}", f"{first}-{first + 1}"))
        faults = [f"{self._rng.choice(CUT_POINTS)}:{when}:{self._rng.choice(DISK_ACTIONS)}"]
        if num_cuts >= 2 * self._shape.shards + 2:
            faults.append(f"{self._rng.choice(MANIFEST_POINTS)}:1:{self._rng.choice(DISK_ACTIONS)}")
        return tuple(faults)

    def _links(self, until: float) -> list[tuple[str, str, int]]:
        """Receiver, sender, and how many frames are sure to come ``until`` a part of the run is over.

        Messages that wait for room on a stream share a frame, but never more than a window of microbatches. Nothing
        paces the links to the coordinator: a few frames come at the start.
        """
        shape = self._shape
        sure = int(until * shape.num_microbatches / shape.window)
        links = [("shard-0", "forward", sure), (COORDINATOR, "shard-0", 5), ("forward-0", COORDINATOR, 3)]
        for index in range(1, shape.shards):
            below, above = f"shard-{index - 1}", f"shard-{index}"
            links += [(above, below, sure), (below, above, sure)]
        return links

    def _target(self, role: str) -> str:
        if role in (EVERYBODY, COORDINATOR):
            return role
        shape = self._shape
        count = {"shard": shape.shards, "forward": shape.forward, "backward": shape.detached}[role]
        if not count:
            raise ConfigError(
                f"the job has no {role} workers of its own process; give it some with "
                f"--set cluster.backward.detached={shape.shards}"
            )
        return f"{role}:{self._rng.randrange(count)}"

    def _lag(self) -> float:
        return round(self._rng.uniform(0.0, LONGEST_LAG_SECONDS), 3)
