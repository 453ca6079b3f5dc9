"""What happens in one simulated run, drawn from its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.simulation.world import Weather


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong at ``at`` seconds.

    "kill" a process (a new one takes its name after ``seconds``), "pause" it, "break" the stream to ``other`` (the link survives), or
    "sever" the link to ``other`` (both live on, and each hears that the other is lost), let what it and ``other`` send
    each other be swallowed by a "blackhole", of which nobody is told, or "isolate" it from all others for a while, or a
    shard has no "memory" for its next pass and ends (a new one takes its name).
    """

    at: float
    kind: str
    target: str
    seconds: float
    other: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSamples:
    """Microbatches whose samples can't be loaded (``torn``), or whose loss is not finite (``spoilt``): always, or ``often``."""

    torn: frozenset[int] = frozenset()
    spoilt: frozenset[int] = frozenset()
    often: float = 1.0

    def tears(self, index: int, rng: random.Random) -> bool:
        """Whether loading fails this time."""
        return index in self.torn and rng.random() < self.often

    def spoils(self, index: int, rng: random.Random) -> bool:
        """Whether the loss is not finite this time."""
        return index in self.spoilt and rng.random() < self.often


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeDivergence:
    """From microbatch ``index`` on the loss is ``bad``, as long as the learning rate is above ``rate_factor`` of the job's."""

    index: int
    bad: float
    rate_factor: float = 0.5

    def loss(self, rate_factor: float) -> Callable[[int], float]:
        """The loss by microbatch in a life with ``rate_factor``."""
        return lambda index: self.bad if index >= self.index and rate_factor > self.rate_factor else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """``target`` is drained at ``at`` seconds, and gets work again at ``until``."""

    at: float
    until: float
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A worker that joins: it is started at ``at`` seconds, and killed after ``stay`` seconds at the latest. ``join`` as in its `Hello`."""

    at: float
    stay: float
    name: str
    join: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One cluster, one job, what goes wrong.

    ``stops`` are times at which the job is cancelled, and ``stop_after_resume`` how long after a resume it is cancelled once more; a job
    that has ended before its last update is resumed. ``hiccups`` is the probability that a step takes ten times as long as it should.
    """

    seed: int
    layers: int
    num_samples: int
    num_validation: int
    spec: dict[str, Any]
    shards: int
    forward: int
    detached: int
    slots: int
    step_seconds: float
    hiccups: float
    load_seconds: float
    frozen_below: int
    weather: Weather
    disk_delay: float
    disk_failure: float
    disk_damage: float
    faults: tuple[Fault, ...]
    stops: tuple[float, ...]
    stop_after_resume: float | None
    bad: BadSamples
    divergence: FakeDivergence | None = None
    drains: tuple[Drain, ...] = ()
    spare_shards: int = 0
    """Shards, and as many forward workers, that the job does not need."""
    guests: tuple[Guest, ...] = ()

    @property
    def stops_at_all(self) -> bool:
        """Whether the job is cancelled at some time."""
        return bool(self.stops) or self.stop_after_resume is not None


def draw(seed: int) -> Scenario:
    """The scenario of ``seed``."""
    standby = random.Random(f"standby {seed}")
    scenario = with_little_memory(with_guests(_draw(seed)))
    return with_standby(scenario, standby.choice((1, 2, 3, 5))) if standby.random() < 0.3 else scenario


def _draw(seed: int) -> Scenario:
    rng = random.Random(f"scenario {seed}")
    # One seed in four is about what a crash leaves behind: layers that overtook each other, cut at every update or two.
    crash = seed % 4 == 3
    shards = rng.choice((2, 3, 4)) if crash else rng.choice((1, 2, 2, 3, 4))
    layers = shards + rng.randrange(0, 4)
    forward = rng.choice((1, 1, 2, 3))
    attached = rng.random() < 0.7
    detached = shards * rng.choice((1, 1, 2)) if not attached else rng.choice((0, 0, 0, 1, shards))
    synchronous = rng.random() < (0.0 if crash else 0.2)
    accumulation = rng.choice((1, 2, 3) if crash else (1, 1, 2, 3, 4, 8))
    window = rng.randint(1, min(2 * shards, accumulation) if synchronous else 2 * shards)
    if crash:
        window = 2 * shards
    microbatch = rng.randint(1, 3)
    batch = accumulation * microbatch
    microbatches = rng.randint(12, 40)
    num_samples = max(batch, rng.randint(batch, batch + 3 * microbatch * accumulation))
    steps = max(2, microbatches // accumulation)
    evaluate = rng.random() < 0.3
    every = rng.choice((1, 2) if crash else (None, 1, 2, 3, 5))
    names = [f"shard-{index}" for index in range(shards)]
    workers = [f"forward-{index}" for index in range(forward)] + [f"backward-{index}" for index in range(detached)]
    # How long the work will take, roughly, so that faults fall into it.
    step_seconds = rng.choice((0.0005, 0.001, 0.003))
    length = 0.15 + microbatches * step_seconds * 3 * layers / min(shards, window)
    faults = []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        at = 0.1 + rng.uniform(0, length)
        kind = rng.choice(("kill", "kill", "pause", "freeze", "break", "sever"))
        if kind == "kill":
            faults.append(Fault(at=at, kind=kind, target=rng.choice(workers), seconds=rng.uniform(0.01, 0.5)))
        elif kind == "pause":
            faults.append(Fault(at=at, kind=kind, target=rng.choice(names + workers), seconds=rng.expovariate(4)))
        elif kind == "freeze":
            faults.append(Fault(at=at, kind="pause", target=rng.choice(workers), seconds=rng.uniform(3.5, 10.0)))
        elif kind == "break":
            one, other = rng.sample([*names, *workers, "coordinator"], 2)
            faults.append(Fault(at=at, kind=kind, target=one, other=other, seconds=rng.expovariate(8)))
        else:
            worker = rng.choice(workers)
            place = int(worker.partition("-")[2]) % shards if worker.startswith("backward") else 0
            faults.append(Fault(at=at, kind=kind, target=worker, other=names[place], seconds=0.0))
    if crash or rng.random() < 0.1:
        at = 0.1 + rng.uniform(0, length)
        index = rng.randrange(shards)
        if index and rng.random() < 0.3:
            faults.append(Fault(at=at, kind="sever", target=names[index], other=names[index - 1], seconds=0.0))
        else:
            faults.append(Fault(at=at, kind="kill", target=names[index], seconds=rng.uniform(0.01, 0.5)))
    # Drawn apart from the rest: what only recovery survives.
    worse = random.Random(f"recovery {seed}")
    for _ in range(worse.choice((0, 0, 1, 2, 4) if crash else (0, 0, 0, 1, 2))):
        at = 0.1 + worse.uniform(0, 1.5 * length)
        target = worse.choice((*names, *names, "coordinator"))
        kind = worse.choice(("kill", "kill", "kill", "sever", "freeze", "isolate"))
        seconds = worse.choice((worse.uniform(0.01, 0.5), worse.uniform(0.5, 6.0)))
        if kind in ("kill", "isolate"):
            faults.append(Fault(at=at, kind=kind, target=target, seconds=seconds))
        elif target != "coordinator":
            other = "coordinator" if kind == "sever" else ""
            # A shard that is silent for 15 s is lost, and 3 s later a spare has its place: some come back just then.
            silent = 3 * seconds if seconds < 3 else 18.0 + seconds / 10
            faults.append(Fault(at=at, kind="sever" if other else "pause", target=target, other=other, seconds=silent))
    swallows = random.Random(f"blackholes {seed}")
    if swallows.random() < 0.12:
        one, other = swallows.sample([*names, *names, *workers, "coordinator"], 2)
        if one != other:
            at = 0.1 + swallows.uniform(0, length)
            # Between shards longer than a run may rest; elsewhere as long as there need be nobody in the other's place.
            longest = 70.0 if {one, other} <= set(names) else 25.0
            seconds = swallows.choice((swallows.uniform(0.1, 5.0), swallows.uniform(21.0, longest)))
            faults.append(Fault(at=at, kind="blackhole", target=one, other=other, seconds=seconds))
    stopped = random.Random(f"stopped coordinators {seed}")
    if stopped.random() < 0.04:
        # Longer than anybody may be silent, and than a run may rest: neither is counted.
        at, seconds = (
            0.1 + stopped.uniform(0, length),
            stopped.choice((stopped.uniform(0.5, 6.0), stopped.uniform(16.0, 30.0))),
        )
        faults.append(Fault(at=at, kind="pause", target="coordinator", seconds=seconds))
    drops = worse.random() < 0.4
    moves = random.Random(f"drains {seed}")
    spare = moves.choice((0, 0, 0, 1, 2))
    drains = []
    for _ in range(moves.choice((1, 1, 2, 3)) if spare else 0):
        at = 0.1 + moves.uniform(0, 1.2 * length)
        target = moves.choice((*names, *names, *workers))
        drains.append(Drain(at=at, until=at + moves.choice((0.01, 1.0, 12.0)), target=target))
    stops = (0.1 + rng.uniform(0, length),) if rng.random() < 0.25 else ()
    calm = rng.random() < 0.3
    weather = Weather(
        delay=rng.choice((0.0002, 0.001, 0.005)),
        jitter=0.0 if calm else rng.choice((0.001, 0.01, 0.05)),
        loss=0.0 if calm else rng.choice((0.0, 0.02, 0.1)),
        duplication=0.0 if calm else rng.choice((0.0, 0.05, 0.2)),
    )
    spec: dict[str, Any] = {
        "name": f"seed-{seed}",
        "model": {"name": "mlp"},
        "data": {"name": "digits", "batch": batch},
        "train": {"steps": steps, "optimizer": "sgd", "evaluate_every": rng.choice((1, 2, 4)) if evaluate else None},
        "cluster": {
            "shards": shards,
            "forward": forward,
            "backward": {"attached": attached, "detached": detached},
        },
        "mode": "synchronous" if synchronous else "asynchronous",
        "async": {
            "window": window,
            "accumulation": accumulation,
            "max_staleness": "auto",
        },
        "checkpoint": {"every": every, "keep": rng.randint(1, 3)},
        "timeouts": {"start": 30.0, "lease": 20.0, "task": 4.0, "heartbeat": 15.0, "drain": 30.0},
    }
    diverges = random.Random(f"divergence {seed}")
    divergence = None
    if diverges.random() < 0.15:
        spec["train"]["on_divergence"] = "rollback"
        divergence = FakeDivergence(
            index=int(diverges.uniform(0.2, 0.7) * steps * accumulation),
            bad=diverges.choice((float("nan"), 50.0)),
            rate_factor=diverges.choice((0.5, 0.5, 0.25)),
        )
    if drops:
        spec["train"] |= {"on_bad_sample": "drop", "max_dropped": 1.0}
    return Scenario(
        seed=seed,
        layers=layers,
        num_samples=num_samples,
        num_validation=rng.randint(1, 3 * batch) if evaluate else 0,
        spec=spec,
        shards=shards,
        forward=forward,
        detached=detached,
        slots=rng.choice((2, 3) if crash else (1, 1, 2)),
        step_seconds=step_seconds,
        hiccups=0.3 if crash else rng.choice((0.0, 0.15)),
        load_seconds=rng.choice((0.0002, 0.002, 0.01)),
        frozen_below=rng.choice((0, 0, 0, 1, 2)) if layers > 2 else 0,
        weather=weather,
        disk_delay=0.001 if crash else rng.choice((0.001, 0.01, 0.1)),
        disk_failure=rng.choice((0.0, 0.0, 0.0, 0.02)),
        disk_damage=worse.choice((0.0, 0.0, 0.1)),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        stops=stops,
        stop_after_resume=rng.uniform(0.05, 0.3) if rng.random() < 0.3 else None,
        bad=_bad_samples(seed, steps * accumulation) if drops else BadSamples(),
        drains=tuple(drains),
        spare_shards=spare,
        divergence=divergence,
    )


def with_little_memory(scenario: Scenario) -> Scenario:
    """The same, in one of ten cases with shards that run out of memory."""
    rng = random.Random(f"memory {scenario.seed}")
    if rng.random() >= 0.1:
        return scenario
    faults = list(scenario.faults)
    for _ in range(rng.choice((1, 2))):
        target = f"shard-{rng.randrange(scenario.shards)}"
        faults.append(Fault(at=rng.uniform(0.1, 1.0), kind="memory", target=target, seconds=0.0))
    return replace(scenario, faults=tuple(sorted(faults, key=lambda fault: fault.at)))


def with_guests(scenario: Scenario, often: float = 0.25) -> Scenario:
    """The same, in one of ``1 / often`` cases with workers that join and leave, and that are drained at times."""
    rng = random.Random(f"guests {scenario.seed}")
    if rng.random() >= often:
        return scenario
    roles = ("forward", "forward", "backward") if scenario.detached else ("forward",)
    guests, drains = [], list(scenario.drains)
    for index in range(rng.choice((1, 2, 4))):
        at = rng.uniform(0.0, 1.0)
        name = f"{rng.choice(roles)}-guest-{index}"
        join = rng.choice(("", f"seed-{scenario.seed}-1")) if at > 0.2 else ""
        guests.append(Guest(at=at, stay=rng.choice((0.1, 0.5, 3.0, 1000.0)), name=name, join=join))
        if rng.random() < 0.2:
            away = at + rng.uniform(0.0, 1.0)
            drains.append(Drain(at=away, until=away + rng.choice((0.01, 1.0)), target=name))
    return replace(scenario, guests=tuple(guests), drains=tuple(drains))


def with_standby(scenario: Scenario, every: int) -> Scenario:
    """The same, with standby copies every so many updates, if the job can have any."""
    if scenario.shards < 2:
        return scenario
    checkpoint = scenario.spec["checkpoint"] | {"standby": True, "standby_every": every}
    return replace(scenario, spec=scenario.spec | {"checkpoint": checkpoint})


def lose_shards(seed: int) -> Scenario:
    """The scenario of ``seed`` with standby copies, rare cuts and two to four shards that are killed: what copies are for."""
    rng = random.Random(f"standby copies {seed}")
    scenario = _draw(seed)
    while scenario.shards < 2:
        seed += 100_000
        scenario = _draw(seed)
    spec = scenario.spec
    steps = 3 * spec["train"]["steps"]
    spec = spec | {
        "mode": "asynchronous",
        "train": spec["train"] | {"steps": steps},
        "async": spec["async"] | {"window": max(spec["async"]["window"], 2)},
        "checkpoint": spec["checkpoint"] | {"every": rng.choice((None, max(steps // 2, 1), max(steps // 4, 1)))},
    }
    at = 0.3
    kills = []
    for _ in range(rng.randint(2, 4)):
        at += 0.3 + rng.expovariate(1.2)
        target = f"shard-{rng.randrange(scenario.shards)}"
        kills.append(Fault(at=at, kind="kill", target=target, seconds=rng.choice((0.01, 0.1, 0.5))))
    faults = tuple(sorted((*scenario.faults, *kills), key=lambda fault: fault.at))
    return with_standby(replace(scenario, spec=spec, faults=faults), rng.choice((1, 2, 3)))


def _bad_samples(seed: int, num_microbatches: int) -> BadSamples:
    rng = random.Random(f"bad samples {seed}")
    indices = range(num_microbatches)
    return BadSamples(
        torn=frozenset(rng.sample(indices, rng.choice((0, 1, 2, num_microbatches // 4)))),
        spoilt=frozenset(rng.sample(indices, rng.choice((0, 1, 2, num_microbatches // 4)))),
        often=rng.choice((1.0, 1.0, 0.5)),
    )
