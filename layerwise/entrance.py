"""Who may come in, and how much those who do can make a process hold.

Nothing tells a peer from a stranger that says its name, so what strangers can do is bounded, and never at the cost of
the peers that are there:

    a stream that says nothing          ends after a while, and earlier when too many of them wait
    a name that this process dials      is refused: that peer does not call here
    a name whose link is up             is refused, unless the one that has it does not answer
    streams, names, bytes on their way  have limits
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from layerwise.errors import BusyError, DeadlineError, MalformedMessageError, NotAllowedError
from layerwise.refusals import Refusals, Refused
from layerwise.streams import Stream

LONGEST_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process holds for others at most.

    ``answer_seconds``: how long the one that has a name may take to answer when somebody else says it.
    """

    peers: int = 1024
    streams_of_a_peer: int = 8
    silent_streams: int = 64
    receiving_bytes: int = 4 << 30
    """Announced bytes of messages that have not arrived whole."""
    answer_seconds: float = 2.0


class Entrance:
    """Keeps the limits on streams that others open to process ``name``. Event loop's thread only.

    ``dialed_only`` are the names of peers that never call.
    """

    def __init__(self, name: str, limits: Limits, refusals: Refusals, *, dialed_only: Collection[str] = ()) -> None:
        self.limits = limits
        self._name = name
        self._refusals = refusals
        self._dialed_only = frozenset(dialed_only)
        self._silent: dict[asyncio.Task[bytes | None], None] = {}
        self._streams: Counter[str] = Counter()

    async def first_frame(self, stream: Stream, seconds: float) -> bytes | None:
        """The first frame of a stream (``None``: it ended before).

        Raises:
            DeadlineError: nothing came in ``seconds``.
            BusyError: so many streams said nothing that this one, the oldest of them, had to go.
            BrokenStreamError: it broke.
        """
        reading = asyncio.create_task(stream.read(), name=f"layerwise first frame {self._name}")
        self._silent[reading] = None
        if len(self._silent) > self.limits.silent_streams:
            next(iter(self._silent)).cancel()
        try:
            done, _ = await asyncio.wait((reading,), timeout=seconds)
        finally:
            del self._silent[reading]
            if not reading.done():
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        if not done:
            sentence = f"nothing was said on this stream for {seconds:g} s, so {self._name} ends it"
            self._refusals.add(Refused.SILENT, sentence)
            raise DeadlineError(sentence)
        if reading.cancelled():
            sentence = f"more than {self.limits.silent_streams} streams to {self._name} say nothing; the oldest end"
            self._refusals.add(Refused.SILENT, sentence)
            raise BusyError(sentence)
        return reading.result()

    @contextmanager
    def stream_of(self, name: str) -> Iterator[None]:
        """Hold one of the streams that a peer of that name may have.

        Raises:
            MalformedMessageError: it is no name.
            NotAllowedError: that peer does not call here.
            BusyError: it has too many streams.
        """
        if not name or len(name) > LONGEST_NAME or not name.isprintable():
            raise MalformedMessageError(
                f"the first frame of a stream must say its sender's name, of 1 to {LONGEST_NAME} printable characters"
            )
        if name == self._name or name in self._dialed_only:
            sentence = f"{self._name} takes no stream from one that calls itself {name}: it opens that link itself"
            self._refusals.add(Refused.NAME, sentence)
            raise NotAllowedError(sentence)
        if self._streams[name] >= self.limits.streams_of_a_peer:
            sentence = f"{name} has {self._streams[name]} streams to {self._name} already; close some first"
            self._refusals.add(Refused.STREAMS, sentence)
            raise BusyError(sentence)
        self._streams[name] += 1
        try:
            yield
        finally:
            self._streams[name] -= 1
            if not self._streams[name]:
                del self._streams[name]

    def check_room(self, num_peers: int) -> None:
        """``BusyError`` when another peer would be one too many."""
        if num_peers >= self.limits.peers:
            sentence = f"{self._name} has links to {num_peers} peers, which is its limit"
            self._refusals.add(Refused.PEERS, sentence)
            raise BusyError(sentence)

    def check_receiving(self, name: str, num_bytes: int) -> None:
        """``BusyError`` when so many announced bytes are too many."""
        if num_bytes > self.limits.receiving_bytes:
            sentence = (
                f"{num_bytes} bytes of messages are on their way to {self._name}, the limit is "
                f"{self.limits.receiving_bytes}; the stream of {name} ends"
            )
            self._refusals.add(Refused.MEMORY, sentence)
            raise BusyError(sentence)
