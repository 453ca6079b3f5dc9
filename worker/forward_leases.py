"""The leases of one job that a forward worker holds, and whose turn it is to be loaded and offered.

Some are for now: their samples are loaded or on their way. The rest are for later, and nothing of them is loaded.

    leased ── loading ──► ready ── Offer ──► offered ── Grant ──► sent ── Closed ──► (gone)
                           ▲                   │
                           └── a lower index ──┴── Decline ──► LeaseReturn, (gone)
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum, auto

from layerwise.ids import Attempt
from layerwise.messages import Grant, Lease, Samples, Tensors

_Turn = tuple[bool, Attempt]
"""Whether it may wait for what is urgent, and which it is: the lowest comes first."""


class _State(Enum):
    LOADING = auto()
    READY = auto()
    OFFERED = auto()
    SENT = auto()


@dataclass(slots=True)
class _Lease:
    urgent: bool
    state: _State = _State.LOADING
    samples: Samples | None = None
    """There while it is ready or offered."""
    granted: Grant | None = None
    """Came while the samples were loading: they follow as soon as they are there."""


class ForwardLeases:
    """Says what to load, to offer and to send next: what is urgent first, then what is lower. Called by `ForwardJob` only.

    One offer at most waits at a time, and nothing is sent twice.
    """

    def __init__(self) -> None:
        self._leases: dict[Attempt, _Lease] = {}
        self._later: list[_Turn] = []
        """A heap."""
        self._drops: dict[Attempt, str] = {}
        """Leases of microbatches that are given up, and why: there is nothing to load."""

    def __len__(self) -> int:
        return len(self._leases) + len(self._later)

    @property
    def num_later(self) -> int:
        """Leases for later."""
        return len(self._later)

    def describe(self) -> str:
        """The leases for now and how many there are for later, in one line."""
        leases = ", ".join(f"{attempt} {lease.state.name.lower()}" for attempt, lease in self._leases.items())
        return f"[{leases}] and {len(self._later)} for later"

    # What comes and goes ---------------------------------------------------------------------------------------------

    def add(self, message: Lease) -> None:
        """The coordinator leases these microbatches; all are for later until `load`."""
        self._drops.update((one.attempt, one.reason) for one in message.drops)
        for attempt in (*message.attempts, *(one.attempt for one in message.drops)):
            if attempt not in self._leases:
                heapq.heappush(self._later, (not message.urgent, attempt))

    def end(self, attempt: Attempt) -> bool:
        """The lease is over; False when it is none for now."""
        if self._leases.pop(attempt, None) is None:
            return False
        self._drops.pop(attempt, None)
        return True

    def recall(self) -> list[Attempt]:
        """End all leases for later, and say which they were."""
        later, self._later = [attempt for _, attempt in sorted(self._later)], []
        for attempt in later:
            self._drops.pop(attempt, None)
        return later

    def lose_link(self) -> list[Attempt]:
        """What waited at the shard has to be offered again; what was sent is over, and returned."""
        sent = []
        for attempt, lease in list(self._leases.items()):
            lease.granted = None  # the number is aborted: it was given to this link
            if lease.state is _State.OFFERED:
                lease.state = _State.READY
            elif lease.state is _State.SENT:
                self.end(attempt)
                sent.append(attempt)
        return sent

    # Loading ---------------------------------------------------------------------------------------------------------

    def load(self, capacity: int) -> list[Attempt]:
        """Go on with the first leases for later, up to ``capacity`` for now; gives those whose samples have to be loaded.

        A loaded one that comes later makes room: in position order it might wait for ever for one that is not even loaded.
        """
        to_load = []
        while self._later:
            if len(self._leases) >= capacity:
                last = max(self._turns(_State.READY), default=self._later[0])
                if last <= self._later[0]:
                    break
                del self._leases[last[1]]
                heapq.heappush(self._later, last)
            turn = heapq.heappop(self._later)
            if self._begin(turn):
                to_load.append(turn[1])
        return to_load

    def _begin(self, turn: _Turn) -> bool:
        """Make it a lease for now; False when there is nothing to load."""
        late, attempt = turn
        if attempt not in self._drops:
            self._leases[attempt] = _Lease(not late)
            return True
        samples = Samples(inputs=Tensors.none(), targets=Tensors.none(), dropped=self._drops[attempt])
        self._leases[attempt] = _Lease(not late, _State.READY, samples)
        return False

    def loaded(self, attempt: Attempt, samples: Samples) -> bool:
        """The samples are there; False when they are not wanted any more."""
        lease = self._leases.get(attempt)
        if lease is None or lease.state is not _State.LOADING:
            return False
        lease.state, lease.samples = _State.READY, samples
        return True

    # Offers and grants -----------------------------------------------------------------------------------------------

    def offer(self) -> tuple[Attempt, Samples] | None:
        """Offer the first microbatch that is loaded; ``None`` when there is none, or its offer waits already.

        It replaces a later one whose offer waits: in position order the shard might wait for the first one for ever otherwise.
        """
        best = min(self._turns(_State.READY, _State.OFFERED), default=(False, None))[1]
        offered = next((attempt for attempt, lease in self._leases.items() if lease.state is _State.OFFERED), None)
        if best is None or best == offered:
            return None
        if offered is not None:
            self._leases[offered].state = _State.READY
        lease = self._leases[best]
        lease.state = _State.OFFERED
        assert lease.samples is not None
        return best, lease.samples

    def reclaim(self, attempt: Attempt) -> bool:
        """It is granted: a lease for later is one for now. True when its samples have to be loaded."""
        turn = self._take_later(attempt)
        return turn is not None and self._begin(turn)

    def await_samples(self, grant: Grant) -> bool:
        """Whether the samples that are granted are still loading: ``grant`` is kept for them."""
        lease = self._leases.get(grant.attempt)
        if lease is None or lease.state is not _State.LOADING:
            return False
        lease.granted = grant
        return True

    def grant_of(self, attempt: Attempt) -> Grant | None:
        """The grant that came while the samples were loading."""
        return self._leases[attempt].granted

    def send(self, attempt: Attempt) -> Samples | None:
        """The samples, to be sent now, once; ``None`` when there are none."""
        lease = self._leases.get(attempt)
        if lease is None or lease.samples is None:
            return None
        samples, lease.samples = lease.samples, None
        lease.state = _State.SENT
        return samples

    def arrive(self, attempt: Attempt) -> None:
        """The shard has the samples: they came with the offer. Nothing of them is loaded again, whatever became of the lease."""
        turn = self._take_later(attempt)
        if turn is not None:
            self._leases[attempt] = _Lease(not turn[0])
        lease = self._leases.get(attempt)
        if lease is not None:
            lease.state, lease.samples = _State.SENT, None

    def _take_later(self, attempt: Attempt) -> _Turn | None:
        """Remove it there: its offer was replaced, then it made room, and all the while its grant was on its way."""
        turn = next((turn for turn in self._later if turn[1] == attempt), None)
        if turn is not None:
            self._later.remove(turn)
            heapq.heapify(self._later)
        return turn

    def _turns(self, *states: _State) -> list[_Turn]:
        """Whose turn it is among the leases in these states; the first is the lowest."""
        return [(not lease.urgent, attempt) for attempt, lease in self._leases.items() if lease.state in states]
