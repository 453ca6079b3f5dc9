"""Simulated time, and a network between simulated processes that delays, loses, repeats and reorders."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from layerwise.link import Link, LinkLost, LinkTable, Packet
from layerwise.messages import Heartbeat, Hello, Hosting, Message
from layerwise.roles import Connect, Disconnect, Effect, End, Send
from layerwise.silence import LOOKS, Silence, Verdict

TICK_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
LOOK_SECONDS = 20.0 / LOOKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How bad the network is. Delays are seconds; the others are probabilities for each packet."""

    delay: float = 0.001
    jitter: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0


class World:
    """One clock, one random generator, one heap of events: everything repeats from the seed."""

    def __init__(self, seed: int, weather: Weather, *, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.on_end: Callable[[str], None] = lambda name: None
        """Called when a process has ended by itself."""
        self.now = 0.0
        self.weather = weather
        self.processes: dict[str, Process] = {}
        self.trace: list[str] | None = [] if trace else None
        self.num_events = 0
        self.num_silent = 0
        """Links given up because the other side gave no sign of life."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._incarnations = count(1)
        self._broken: dict[frozenset[str], float] = {}
        self._path_delays: dict[tuple[str, str], float] = {}

    def at(self, delay: float, event: Callable[[], None]) -> None:
        """Do ``event`` after ``delay`` seconds."""
        heapq.heappush(self._events, (self.now + delay, next(self._order), event))

    def step(self) -> None:
        """Do the next event."""
        self.now, _, event = heapq.heappop(self._events)
        self.num_events += 1
        event()

    def note(self, text: str) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now:9.4f} {text}")

    def incarnation(self) -> int:
        """A link incarnation that nobody had before."""
        return next(self._incarnations)

    def break_stream(self, one: str, other: str, seconds: float) -> None:
        """Nothing passes between the two for a while; then both sides open a new stream."""
        pair = frozenset((one, other))
        self._broken[pair] = self.now + seconds
        self.note(f"stream {one} - {other} breaks for {seconds:.2f} s")

        def heal() -> None:
            for here, there in ((one, other), (other, one)):
                process = self.processes.get(here)
                if process is not None:
                    process.on_stream(there)

        self.at(seconds, heal)

    def blackhole(self, one: str, other: str, seconds: float) -> None:
        """Nothing passes between the two for a while, and nobody is told."""
        pair = frozenset((one, other))
        self._broken[pair] = max(self._broken.get(pair, 0.0), self.now + seconds)
        self.note(f"what {one} and {other} send each other is swallowed for {seconds:.2f} s")

    def sever(self, one: str, other: str) -> None:
        """The link between the two is given up by both, though both live."""
        self.note(f"link {one} - {other} is severed")
        for here, there in ((one, other), (other, one)):
            process = self.processes.get(here)
            link = process.links.get(there) if process is not None else None
            if process is not None and link is not None:
                self.at(self.random.uniform(0.0, 0.3), _notice(process, there, link))

    def isolate(self, name: str, seconds: float) -> None:
        """A process is cut off by the network: its links are given up on both sides, and no new one passes for a while."""
        self.note(f"{name} is cut off for {seconds:.2f} s")
        for other in [one for one in self.processes if one != name]:
            self.break_stream(name, other, seconds)
            self.sever(name, other)

    def carry(self, sender: str, receiver: str, packet: Packet) -> None:
        """Put a packet on the network."""
        weather, rng = self.weather, self.random
        if self._broken.get(frozenset((sender, receiver)), -1.0) > self.now:
            return
        if weather.loss and rng.random() < weather.loss:
            return
        copies = 2 if weather.duplication and rng.random() < weather.duplication else 1
        delay = self._path_delays.get((sender, receiver))
        if delay is None:
            delay = self._path_delays[sender, receiver] = weather.delay * rng.uniform(0.5, 2.0)
        for _ in range(copies):
            self.at(delay + weather.jitter * rng.random() ** 3, lambda: self._deliver(sender, receiver, packet))

    def _deliver(self, sender: str, receiver: str, packet: Packet) -> None:
        process = self.processes.get(receiver)
        if process is not None:
            process.deferred(lambda: process.on_packet(sender, packet))

    def kill(self, name: str) -> None:
        """End a process between two instructions. Its peers notice when their streams end."""
        process = self.processes.pop(name)
        process.alive = False
        self.note(f"{name} is killed")
        process.on_killed()
        for peer in list(self.processes.values()):
            link = peer.links.get(name)
            if link is not None:
                self.at(self.random.uniform(0.001, 0.2), _notice(peer, name, link))


def _notice(peer: Process, name: str, link: Link) -> Callable[[], None]:
    return lambda: peer.deferred(lambda: peer.on_peer_gone(name, link))


@dataclass(slots=True, eq=False)
class Process:
    """What every simulated process has: links, heartbeats, ticks; a subclass adds its role."""

    world: World
    name: str
    hello: Hello | None = None
    alive: bool = True
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    links: LinkTable = field(init=False)
    _paused_until: float = 0.0
    _next_heartbeat: float = math.inf
    _greeted: float = 0.0
    _wakes: dict[str, float] = field(default_factory=dict)
    _silences: dict[str, Silence] = field(default_factory=dict)
    _next_look: float = 0.0

    def __post_init__(self) -> None:
        self.links = LinkTable(lambda: Link(self.world.incarnation(), resend_seconds=0.05))
        self.world.processes[self.name] = self
        self._say_hello()
        self.after(self.world.random.uniform(0, TICK_SECONDS), self._tick)

    # What a subclass gives

    def hosting(self) -> tuple[Hosting, ...]:
        """The jobs that it goes on with."""
        return ()

    def on_welcome(self) -> list[Effect]:
        """The coordinator knows the process now."""
        return []

    def on_message(self, peer: str, message: Message) -> list[Effect]:
        raise NotImplementedError

    def on_lost(self, peer: str) -> list[Effect]:
        raise NotImplementedError

    def on_tick(self) -> list[Effect]:
        raise NotImplementedError

    def on_killed(self) -> None:
        """The process is gone."""

    def before_send(self, peer: str, message: Message) -> None:
        """``message`` is about to leave the process."""

    def describe(self) -> str:
        return ""

    # What it can do

    def pause(self, seconds: float) -> None:
        """Do nothing for a while; what happens meanwhile happens afterwards."""
        self._paused_until = max(self._paused_until, self.world.now + seconds)
        self.world.note(f"{self.name} pauses for {seconds:.2f} s")

    def deferred(self, event: Callable[[], None]) -> None:
        """Do ``event`` now, or when the pause is over; never once the process is dead."""
        if not self.alive:
            return
        if self._paused_until > self.world.now:
            self.world.at(self._paused_until - self.world.now, lambda: self.deferred(event))
        else:
            event()

    def after(self, delay: float, event: Callable[[], None]) -> None:
        """Do ``event`` in this process after ``delay`` seconds."""
        self.world.at(delay, lambda: self.deferred(event))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(peer=peer, message=message):
                    self.send(peer, message)
                case Connect(peer=peer):
                    self._put(peer, self.links.open(peer).reconnect(self.world.now))
                case Disconnect(peer=peer):
                    link = self.links.drop(peer)
                    if link is not None:
                        self._put(peer, [link.farewell("closed")])
                case End(sentence=sentence):
                    self.world.note(f"{self.name} ends: {sentence}")
                    self.world.kill(self.name)
                    self.world.on_end(self.name)
                    return

    def send(self, peer: str, message: Message) -> None:
        self.before_send(peer, message)
        if self.world.trace is not None:
            self.world.note(f"{self.name} -> {peer}: {_short(message)}")
        link = self.links.open(peer)
        self._put(peer, link.send(message, self.world.now))
        self._wake(peer, link)

    # What the world calls

    def on_packet(self, peer: str, packet: Packet) -> None:
        admission = self.links.admit(peer, packet)
        if admission.lost:
            self._lose(peer)
        if admission.refusal is not None:
            self._put(peer, [admission.refusal])
        link = admission.link
        if link is None:
            return
        if (silence := self._silences.get(peer)) is not None:
            silence.hear()
        try:
            messages = link.receive(packet, self.world.now)
        except LinkLost as lost:
            self.on_peer_gone(peer, link, str(lost))
            return
        for message in messages:
            if self.alive:
                self._receive(peer, message)
        if self.links.get(peer) is link:
            self._put(peer, link.tick(self.world.now))
            self._wake(peer, link)

    def on_stream(self, peer: str) -> None:
        """The stream to ``peer`` is open again."""
        link = self.links.get(peer)
        if link is not None:
            self._put(peer, link.reconnect(self.world.now))

    def on_peer_gone(self, peer: str, link: Link, why: str = "its stream ended") -> None:
        if self.links.get(peer) is not link:
            return
        self.links.drop(peer)
        self.world.note(f"{self.name} lost {peer}: {why}")
        self._lose(peer)

    # Inside

    def _say_hello(self) -> None:
        if self.hello is not None and self.alive:
            self._next_heartbeat = math.inf
            self.send("coordinator", replace(self.hello, hosting=self.hosting()))
            self._greeted = self.world.now

    def _lose(self, peer: str) -> None:
        if peer == "coordinator":
            self._next_heartbeat = math.inf
            self.after(TICK_SECONDS, self._say_hello)
        self.perform(self.on_lost(peer))

    def _receive(self, peer: str, message: Message) -> None:
        if type(message).__name__ == "Dismissal":
            self.world.kill(self.name)
            return
        if type(message).__name__ == "Welcome":
            self._next_heartbeat = self.world.now
            self.perform(self.on_welcome())
            return
        self.perform(self.on_message(peer, message))

    def _tick(self) -> None:
        self.perform(self.on_tick())
        if self.hello is not None and math.isinf(self._next_heartbeat) and self.world.now - self._greeted > 5.0:
            # No answer: like a service that gives a link up when nobody answers, and tries again.
            link = self.links.get("coordinator")
            if link is not None:
                self.on_peer_gone("coordinator", link, "no answer")
        if self._next_heartbeat <= self.world.now:
            self._next_heartbeat = self.world.now + self.heartbeat_seconds
            self.send("coordinator", Heartbeat())
        if self._next_look <= self.world.now:
            self._next_look = self.world.now + LOOK_SECONDS
            self._look()
        self.after(TICK_SECONDS, self._tick)

    def _look(self) -> None:
        """Look at the links as the transport does; the coordinator goes by heartbeats."""
        before, self._silences = self._silences, {}
        for peer, link in self.links if self.hello is not None else ():
            silence = self._silences[peer] = before.get(peer) or Silence()
            if silence.look(waiting=not link.idle) is Verdict.GIVE_UP:
                self.world.num_silent += 1
                self.on_peer_gone(peer, link, "it gave no sign of life")

    def _put(self, peer: str, packets: list[Packet]) -> None:
        for packet in packets:
            self.world.carry(self.name, peer, packet)

    def _wake(self, peer: str, link: Link) -> None:
        due = link.due
        if due < self._wakes.get(peer, math.inf):
            self._wakes[peer] = due
            self.after(max(0.0, due - self.world.now), lambda: self._on_due(peer))

    def _on_due(self, peer: str) -> None:
        self._wakes.pop(peer, None)
        link = self.links.get(peer)
        if link is not None:
            self._put(peer, link.tick(self.world.now))
            self._wake(peer, link)


def _short(message: Any) -> str:
    text = repr(message)
    return text if len(text) < 300 else text[:300] + "..."
