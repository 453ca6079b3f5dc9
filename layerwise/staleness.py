"""How old gradients are: tickets, and a count of staleness that must come out exactly.

A *ticket* is open on a layer from a microbatch's forward read until its gradient is taken in, dropped or aborted.
Every update of the layer ages each ticket that stays open by one, so at any moment, for any delays and any order of
arrival (integers, no rounding)::

    sum(age when applied) + sum(age when dropped) + sum(age when aborted) + sum(age of those still open)
        == sum over updates of (tickets left open just after the update)

The left side is counted ticket by ticket, the right side update by update; `StalenessLedger.check` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.errors import AuditError
from layerwise.ids import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """``attempt``'s forward pass read this layer at version ``base``, under admission number ``number``."""

    attempt: Attempt
    number: int
    base: int


def _count(histogram: list[int], value: int) -> None:
    if value >= len(histogram):
        histogram.extend([0] * (value + 1 - len(histogram)))
    histogram[value] += 1


class StalenessLedger:
    """Tickets of one layer in one life, and what became of them; the histograms go on from those of the lives before.

    Keys are microbatch indices: a layer never has two open tickets for one microbatch. Not thread-safe: its layer's
    lock guards it.
    """

    __slots__ = (
        "_aborted_age",
        "_applied_age",
        "_dropped_age",
        "_left_open",
        "_misalignment",
        "_open_bases",
        "_staleness",
        "_tickets",
        "version",
    )

    def __init__(self, version: int = 0, *, staleness: Sequence[int] = (), misalignment: Sequence[int] = ()) -> None:
        self.version = version
        self._tickets: dict[int, Ticket] = {}
        self._open_bases = 0  # sum of the base versions of open tickets, so that ages need no loop
        self._applied_age = self._dropped_age = self._aborted_age = 0
        self._left_open = 0
        self._staleness = list(staleness)
        self._misalignment = list(misalignment)

    def get(self, index: int) -> Ticket | None:
        """The open ticket of microbatch ``index``."""
        return self._tickets.get(index)

    @property
    def num_open(self) -> int:
        """Tickets open now."""
        return len(self._tickets)

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """The open tickets, oldest first."""
        return tuple(self._tickets.values())

    @property
    def staleness(self) -> tuple[int, ...]:
        """``staleness[t]``: gradients applied so far whose staleness was ``t`` updates."""
        return tuple(self._staleness)

    @property
    def misalignment(self) -> tuple[int, ...]:
        """``misalignment[d]``: gradients whose backward pass read weights ``d`` updates after the forward's."""
        return tuple(self._misalignment)

    def open(self, index: int, ticket: Ticket) -> None:
        """Open ``ticket``, whose base must be the current version."""
        if index in self._tickets:
            raise AuditError(f"ticket {ticket.attempt} opened while {self._tickets[index].attempt} is still open")
        if ticket.base != self.version:
            raise AuditError(f"ticket {ticket.attempt} opened with base {ticket.base} at version {self.version}")
        self._tickets[index] = ticket
        self._open_bases += ticket.base

    def apply(self, index: int, *, read: int) -> int:
        """Close the ticket: its gradient, computed with weights of version ``read``, is taken in.

        Gives its staleness.
        """
        ticket = self._close(index)
        staleness = self.version - ticket.base
        _count(self._staleness, staleness)
        _count(self._misalignment, read - ticket.base)
        self._applied_age += staleness
        return staleness

    def drop(self, index: int) -> int:
        """Close the ticket: the microbatch is dropped. Gives its age."""
        age = self.version - self._close(index).base
        self._dropped_age += age
        return age

    def abort(self, index: int) -> int:
        """Close the ticket: the attempt is aborted, the microbatch may come again. Gives its age."""
        age = self.version - self._close(index).base
        self._aborted_age += age
        return age

    def advance(self) -> int:
        """The layer made an update: the version rises by one. Gives how many tickets are left open."""
        self.version += 1
        self._left_open += len(self._tickets)
        return len(self._tickets)

    @property
    def open_age(self) -> int:
        """Sum of the ages of open tickets."""
        return len(self._tickets) * self.version - self._open_bases

    @property
    def residual(self) -> int:
        """Left side of the identity minus the right side: 0 unless there is a bug."""
        return self._applied_age + self._dropped_age + self._aborted_age + self.open_age - self._left_open

    def check(self) -> None:
        """Raise `AuditError` unless the identity holds exactly."""
        if self.residual:
            raise AuditError(
                f"staleness does not add up: applied {self._applied_age} + dropped {self._dropped_age} + aborted "
                f"{self._aborted_age} + open {self.open_age} is not {self._left_open}, the tickets left open over all "
                f"updates"
            )

    def _close(self, index: int) -> Ticket:
        ticket = self._tickets.pop(index, None)
        if ticket is None:
            raise AuditError(f"no open ticket for microbatch index {index}")
        self._open_bases -= ticket.base
        return ticket
