"""Everything about one layer except the numbers in its tensors.

`LayerLedger` decides; the layer that holds the tensors (or the simulated one that holds integers) does what it says::

    forward:   if ledger.lacks(index):  writes = ledger.open(attempt, number)     # writes: it writes the buffers
    backward:  intake = ledger.take(attempt, read=version_read, mode=mode)
               hold the gradient; for i in intake.ready: add the held gradient of microbatch i to the sum
               if intake.closes:  step with it;  ledger.updated(rate, digest)     # in the same hold of the lock
               if a cut is due:   ledger.cut()
"""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.applied import AppliedSet
from layerwise.errors import RejectedError
from layerwise.events import (
    AbortEvent,
    AccumulateEvent,
    BackwardEvent,
    CutEvent,
    DropEvent,
    EventSink,
    ForwardEvent,
    PassEvent,
    RestoreEvent,
    UpdateEvent,
    WalkEvent,
    WeightMode,
)
from layerwise.ids import Attempt
from layerwise.ledger_state import LedgerState as LedgerState
from layerwise.plan import TrainingPlan
from layerwise.staleness import StalenessLedger, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateDecision:
    """Make update ``update`` now, from the gradients summed so far.

    ``staleness`` is the largest of its gradients'. ``samples`` is what the sum is divided by, unless
    ``num_gradients`` is 1: then the one gradient is used as it is. ``samples_before`` is what the learning-rate
    schedule is asked with.
    """

    update: int
    staleness: int
    samples: int
    samples_before: int
    num_gradients: int

    @property
    def empty(self) -> bool:
        """Only tombstones: the version rises without a step."""
        return self.num_gradients == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """What became of a gradient (or tombstone) and what to do now.

    ``taken`` is false for one that the layer has already: nothing changed. ``ready`` lists the microbatch indices
    whose gradients are to be added to the sum now, in this order; in position order a gradient may first wait for
    those before it.
    """

    taken: bool
    ready: tuple[int, ...] = ()
    closes: UpdateDecision | None = None


_DUPLICATE = Intake(taken=False)


class LayerLedger:
    """Versions, applied sets, tickets and the progress of the current update of one layer in one life.

    Update ``u`` closes after ``plan.count(u)`` gradients or tombstones of any identity. Not thread-safe: every call
    is made under the layer's exclusive lock (or under a mutex that all its callers hold). Calls that raise change
    nothing.
    """

    def __init__(
        self,
        layer: int,
        life: int,
        plan: TrainingPlan,
        events: EventSink,
        *,
        position_order: bool,
        restored: LedgerState | None = None,
    ) -> None:
        state = restored if restored is not None else LedgerState(layer=layer)
        state.check(layer, plan)
        self.layer = layer
        self.life = life
        self._plan = plan
        self._events = events
        self._position_order = position_order
        self._applied = state.applied.copy()
        self._buffers = state.buffers.copy()
        self._staleness = StalenessLedger(state.version, staleness=state.staleness, misalignment=state.misalignment)
        self._revision = state.revision + (restored is not None)
        self._samples = state.samples
        self._digest = state.digest
        self._learning_rate: float | None = None
        self._held: set[int] = set()
        self._pending: UpdateDecision | None = None
        # Of the update that gathers now:
        self._gradients = 0
        self._gradient_samples = 0
        self._update_samples = 0
        self._largest_staleness = 0
        events.append(
            RestoreEvent(
                layer=layer,
                version=state.version,
                revision=self._revision,
                samples=state.samples,
                digest=state.digest,
                applied=state.applied.copy(),
                buffers=state.buffers.copy(),
            )
        )

    @property
    def version(self) -> int:
        """Updates in the layer's state."""
        return self._staleness.version

    @property
    def revision(self) -> int:
        """Changes of the layer's state, restores included."""
        return self._revision

    @property
    def samples(self) -> int:
        """Samples that earlier updates applied or dropped."""
        return self._samples

    @property
    def digest(self) -> str:
        """The hash of the layer's state after its last update; "" before the first."""
        return self._digest

    @property
    def learning_rate(self) -> float | None:
        """What the last update of this life used; ``None`` before the first step."""
        return self._learning_rate

    @property
    def staleness(self) -> StalenessLedger:
        """Tickets since the restore; histograms of all lives that led here."""
        return self._staleness

    @property
    def applied(self) -> AppliedSet:
        """The microbatches taken in or dropped; not to be changed."""
        return self._applied

    @property
    def accumulated(self) -> int:
        """Gradients and tombstones that wait for the current update."""
        return len(self._applied) - self._plan.gradients_before(self.version)

    def lacks(self, index: int) -> bool:
        """Whether microbatch ``index`` has been neither taken in nor dropped."""
        return index not in self._applied

    def writes_buffers(self, index: int) -> bool:
        """Whether the next forward pass of microbatch ``index`` is the one that writes the buffers."""
        return index not in self._buffers

    def open(self, attempt: Attempt, number: int) -> bool:
        """A forward pass reads the layer now. Gives whether it is the one that writes the buffers for this microbatch.

        Raises:
            RejectedError: the layer has the microbatch already, or a ticket for it is open.
        """
        index = self._index(attempt)
        if index in self._applied:
            raise RejectedError(f"forward of {attempt} refused: layer {self.layer} has applied or dropped it already")
        ticket = self._staleness.get(index)
        if ticket is not None:
            raise RejectedError(
                f"forward of {attempt} refused: {ticket.attempt} is still open on layer {self.layer}; abort it first"
            )
        version = self.version
        self._staleness.open(index, Ticket(attempt=attempt, number=number, base=version))
        writes = self._buffers.add(index)
        self._events.append(
            ForwardEvent(layer=self.layer, attempt=attempt, number=number, read=version, buffers=writes)
        )
        return writes

    def hand_on(self, attempt: Attempt, number: int) -> int:
        """A forward pass reads the layer, which has the microbatch already, for others. Gives the version read."""
        version = self.version
        self._events.append(PassEvent(layer=self.layer, attempt=attempt, number=number, read=version))
        return version

    def hand_down(
        self, attempt: Attempt, number: int, *, read: int, mode: WeightMode, owners: tuple[int, ...] = ()
    ) -> None:
        """A backward pass read the layer at ``read`` without a gradient for it: for what it hands down only."""
        self._events.append(
            BackwardEvent(layer=self.layer, attempt=attempt, number=number, read=read, mode=mode, owners=owners)
        )

    def begin_walk(self, attempt: Attempt, number: int, *, detached: bool, reads: tuple[tuple[int, ...], ...]) -> None:
        """The block that begins with this layer was computed again for a backward pass; see `WalkEvent`."""
        self._events.append(WalkEvent(layer=self.layer, attempt=attempt, number=number, detached=detached, reads=reads))

    def take(self, attempt: Attempt, *, read: int, mode: WeightMode, owners: tuple[int, ...] = ()) -> Intake:
        """Take in ``attempt``'s gradient, computed with weights of version ``read``. A repeat changes nothing.

        ``owners`` are the versions read of the layers that own parameters of this one.

        Layers without trainable parameters take in their empty gradients the same way, so that every layer counts
        alike.

        Raises:
            RejectedError: no ticket of this attempt is open, or ``read`` is not between the forward's read and now.
        """
        self._settled()
        index = self._index(attempt)
        if index in self._applied:
            return _DUPLICATE
        ticket = self._staleness.get(index)
        if ticket is None or ticket.attempt != attempt:
            other = "none is" if ticket is None else f"only {ticket.attempt} is"
            raise RejectedError(
                f"gradient of {attempt} refused: its ticket on layer {self.layer} is not open ({other}); it was aborted"
            )
        version = self.version
        if not ticket.base <= read <= version or (mode is WeightMode.STASHED and read != ticket.base):
            raise RejectedError(
                f"gradient of {attempt} refused: its backward pass says it read version {read} of layer {self.layer} "
                f"({mode}), the forward pass read version {ticket.base} and the layer is at version {version}"
            )
        staleness = self._staleness.apply(index, read=read)
        self._events.append(
            AccumulateEvent(
                layer=self.layer,
                attempt=attempt,
                number=ticket.number,
                base=ticket.base,
                read=read,
                mode=mode,
                update=version,
                owners=owners,
            )
        )
        self._held.add(index)
        self._gradients += 1
        self._gradient_samples += attempt.microbatch.num_samples
        self._largest_staleness = max(self._largest_staleness, staleness)
        return self._fill(index, attempt, dropped=False)

    def drop(self, attempt: Attempt, reason: str) -> Intake:
        """Give the microbatch up: a tombstone fills its place and closes its ticket. A repeat changes nothing.

        Raises:
            RejectedError: another attempt's ticket is open.
        """
        self._settled()
        index = self._index(attempt)
        if index in self._applied:
            return _DUPLICATE
        ticket = self._staleness.get(index)
        if ticket is not None and ticket.attempt != attempt:
            raise RejectedError(
                f"drop of {attempt} refused: {ticket.attempt} is still open on layer {self.layer}; abort it first"
            )
        if ticket is not None:
            self._staleness.drop(index)
        self._events.append(
            DropEvent(
                layer=self.layer,
                attempt=attempt,
                number=None if ticket is None else ticket.number,
                base=None if ticket is None else ticket.base,
                update=self.version,
                reason=reason,
            )
        )
        return self._fill(index, attempt, dropped=True)

    def abort(self, attempt: Attempt) -> bool:
        """Close ``attempt``'s ticket without a gradient; False (and no change) when it is not open."""
        index = self._index(attempt)
        ticket = self._staleness.get(index)
        if ticket is None or ticket.attempt != attempt:
            return False
        self._staleness.abort(index)
        self._events.append(
            AbortEvent(layer=self.layer, attempt=attempt, number=ticket.number, base=ticket.base, version=self.version)
        )
        return True

    def updated(self, learning_rate: float | None, digest: str) -> int:
        """The update that `take` or `drop` asked for is made. Gives the new version.

        ``learning_rate`` is what the optimizer used (``None``: no step was made); ``digest`` the hash of the layer's
        state now.
        """
        decision = self._pending
        assert decision is not None, f"layer {self.layer}: no update is due"
        open_tickets = self._staleness.advance()
        self._revision += 1
        self._samples += self._update_samples
        self._digest = digest
        if learning_rate is not None:
            self._learning_rate = learning_rate
        self._clear()
        self._events.append(
            UpdateEvent(
                layer=self.layer,
                version=self.version,
                revision=self._revision,
                gradients=decision.num_gradients,
                samples=decision.samples,
                samples_before=decision.samples_before,
                staleness=decision.staleness,
                open_tickets=open_tickets,
                learning_rate=learning_rate,
                digest=digest,
            )
        )
        return self.version

    def state(self) -> LedgerState:
        """An independent copy of what a cut must save.

        Only right after an update or restore, before the next gradient.
        """
        self._settled()
        assert self.accumulated == 0, f"layer {self.layer}: {self.accumulated} gradients wait for update {self.version}"
        return LedgerState(
            layer=self.layer,
            version=self.version,
            revision=self._revision,
            samples=self._samples,
            digest=self._digest,
            applied=self._applied.copy(),
            buffers=self._buffers.copy(),
            staleness=self._staleness.staleness,
            misalignment=self._staleness.misalignment,
        )

    def cut(self) -> LedgerState:
        """`state`, and a record of it: a later life may start here."""
        state = self.state()
        self._events.append(CutEvent(layer=self.layer, version=state.version, digest=state.digest))
        return state

    def _index(self, attempt: Attempt) -> int:
        try:
            return self._plan.index(attempt.microbatch)
        except ValueError as error:
            raise RejectedError(f"attempt {attempt} refused by layer {self.layer}: {error}") from error

    def _fill(self, index: int, attempt: Attempt, *, dropped: bool) -> Intake:
        """Count ``index`` in, and say which gradients to sum and whether the update is complete."""
        self._applied.add(index, dropped=dropped)
        self._update_samples += attempt.microbatch.num_samples
        closes = self.accumulated == self._plan.count(self.version)
        if self._position_order and not closes:
            ready = tuple(sorted(one for one in self._held if one < self._applied.watermark))
        else:
            ready = tuple(sorted(self._held))
        self._held.difference_update(ready)
        if not closes:
            return Intake(taken=True, ready=ready)
        self._pending = UpdateDecision(
            update=self.version,
            staleness=self._largest_staleness,
            samples=self._gradient_samples,
            samples_before=self._samples,
            num_gradients=self._gradients,
        )
        return Intake(taken=True, ready=ready, closes=self._pending)

    def _clear(self) -> None:
        self._pending = None
        self._gradients = 0
        self._gradient_samples = 0
        self._update_samples = 0
        self._largest_staleness = 0

    def _settled(self) -> None:
        assert self._pending is None, f"layer {self.layer}: update {self.version} is due and was not made"
