"""One layer of a shard: weights that move, an optimizer, a ledger, and copies at the cuts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import nn

from layerwise.errors import NotFiniteError
from layerwise.events import WeightMode
from layerwise.gradient_sum import Gradients, GradientSum, first_not_finite
from layerwise.ids import Attempt
from layerwise.layer_compute import LayerCompute, LayerPass
from layerwise.layer_ledger import Intake, LayerLedger, LedgerState, UpdateDecision
from layerwise.messages import LayerReport, LayerRevision, LayerState, NamedTensors, Tensors
from layerwise.optimizers import BASE_LR, load_optimizer_state, optimizer_state
from layerwise.plan import TrainingPlan
from layerwise.policies import DelayPolicy
from layerwise.state_hash import state_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCopy:
    """A layer at one version, whole: nothing in it changes any more.

    ``parameters`` and ``buffers`` are by name in the module's order, ``parameters`` without those that a lower layer
    owns; ``moments`` are the optimizer's tensors as ``parameter/key``.
    """

    layer: int
    life: int
    state: LedgerState
    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]

    def to(self, device: torch.device) -> LayerCopy:
        """The same on ``device``; what is there already is shared."""

        def moved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: one.to(device) for name, one in tensors.items()}

        return replace(
            self, parameters=moved(self.parameters), buffers=moved(self.buffers), moments=moved(self.moments)
        )


@dataclass(slots=True)
class _Stash:
    """Copies of a layer's parameters at one version, and how many passes still need them."""

    copies: tuple[torch.Tensor, ...]
    by_parameter: dict[int, torch.Tensor]
    passes: int = 0


class TrainedLayer:
    """A layer that takes gradients in. Every method may be called from any thread.

    ``compute.lock`` guards the tensors: shared while a pass reads them, alone while they change. The ledger is
    touched under the lock held alone, or under it held shared together with a small mutex of its own.

    The optimizer steps on aliases of the parameters (same memory, no shared version counter), so a graph that is
    still waiting for its backward pass is not refused: it reads the weights that are there then.
    """

    def __init__(
        self,
        compute: LayerCompute,
        ledger: LayerLedger,
        plan: TrainingPlan,
        *,
        optimizer: torch.optim.Optimizer | None,
        aliases: Mapping[str, nn.Parameter],
        rate: Callable[[int], float],
        policy: DelayPolicy,
        clip: float | None = None,
        recomputes: bool = False,
        finite_gradients: bool = False,
        activation_bytes: int = 0,
    ) -> None:
        """Put a layer together.

        ``aliases`` are those of ``compute.owned``, which ``optimizer`` steps on; ``rate(samples)`` is the schedule's
        factor. ``recomputes``: autograd can't keep `latest` here, so the layer's forward pass is done again.
        ``finite_gradients``: no update is made with a gradient that is not finite; no gradient is taken in after that.
        """
        self.compute = compute
        self.module = compute.module
        self.index = compute.index
        self.ledger = ledger
        self.recomputes = recomputes
        self.activation_bytes = activation_bytes
        self._plan = plan
        self._optimizer = optimizer
        self._aliases = dict(aliases)
        self._rate = rate
        self._policy = policy
        self._clip = clip
        self._finite_gradients = finite_gradients
        self._not_finite = ""
        self._mutex = threading.Lock()
        self._sum = GradientSum(len(self._aliases))
        self._waiting: dict[int, tuple[Gradients, int]] = {}
        self._cuts: dict[int, Callable[[LayerCopy], None]] = {}
        self._copied_every = 0
        self._copy_taker: Callable[[LayerCopy], None] | None = None
        self._stashes: dict[tuple[int, ...], _Stash] = {}

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        inputs: Tensors,
        attempt: Attempt,
        number: int,
        *,
        tickets: frozenset[int],
        graph: bool,
        stash: bool = False,
        keep_inputs: bool = False,
    ) -> LayerPass:
        """Open a ticket (if the layer is among ``tickets``, those of the block that lack the microbatch) and run.

        Without ``graph`` the pass has outputs that are not differentiable; ``keep_inputs`` says they will be computed
        again.
        """
        compute, ticket = self.compute, self.index in tickets
        parameters, destinations = compute.differentiated(tickets)
        stash = stash and graph and bool(parameters)
        with compute.guard(exchanges=stash or self.module.may_write_buffers):
            with self._mutex:
                writes = self.ledger.open(attempt, number) if ticket else False
                if not ticket:
                    self.ledger.hand_on(attempt, number)
                reads = compute.reads()
            try:
                buffers = self.module.buffers
                stashed = self._stash() if stash else None
                outputs = compute.run(
                    inputs,
                    attempt.microbatch,
                    graph=graph,
                    commit=writes,
                    parameters=None if stashed is None else stashed.copies,
                )
            except BaseException:
                with self._mutex:
                    self.ledger.abort(attempt)
                raise
            if stashed is not None:
                stashed.passes += 1
                parameters = tuple(stashed.by_parameter[id(parameter)] for parameter in parameters)
        return LayerPass(
            compute=compute,
            microbatch=attempt.microbatch,
            ticket=ticket,
            inputs=inputs,
            outputs=outputs,
            buffers=buffers,
            reads=reads,
            parameters=parameters,
            destinations=destinations,
            stashed=None if stashed is None else stashed.copies,
        )

    def _stash(self) -> _Stash:
        """The copies of the current version; made by the first pass that reads it. Under the lock held alone."""
        key = self.compute.reads()
        found = self._stashes.get(key)
        if found is None:
            copies: list[torch.Tensor] = []
            for parameter in self.module.parameters.values():
                copies.append(parameter.detach().clone().requires_grad_() if parameter.requires_grad else parameter)
            found = _Stash(tuple(copies), dict(zip(map(id, self.module.parameters.values()), copies, strict=True)))
            self._stashes = {one: stash for one, stash in self._stashes.items() if stash.passes > 0}
            self._stashes[key] = found
        return found

    def unstash(self, forward: LayerPass) -> None:
        """``forward`` needs its stashed weights no more; the last one frees them."""
        if forward.stashed is None:
            return
        with self.compute.lock.exclusive():
            for key, stash in list(self._stashes.items()):
                if stash.copies is forward.stashed:
                    stash.passes -= 1
                    if stash.passes == 0:
                        del self._stashes[key]
        forward.stashed = None

    @property
    def num_stashes(self) -> int:
        """Weight versions kept for passes in flight."""
        return len(self._stashes)

    # --- gradients ----------------------------------------------------------------------------------------------------

    def take(
        self,
        attempt: Attempt,
        gradients: Gradients,
        *,
        read: int,
        mode: WeightMode,
        owners: tuple[int, ...] = (),
        later: list[ExitStack] | None = None,
    ) -> bool:
        """Take one gradient in; the one that completes an update makes it, visible to readers before this returns.

        ``gradients`` are in the order of ``compute.owned`` with the parameters' shapes. ``read`` and ``owners`` are
        the `LayerCompute.reads` of the backward pass. False (and no change) for a repeat.

        With ``later`` the update is made when what is appended to it is closed, which must happen in any case: until
        then the layer stays locked. Who keeps several layers locked so has to be their only user.

        Raises:
            RejectedError: the attempt's ticket is not open any more.
            NotFiniteError: the update's gradient is not finite; the layer stays as it was and takes nothing more in.
        """
        with ExitStack() as lock:
            lock.enter_context(self.compute.lock.exclusive())
            self._refuse_not_finite()
            intake = self.ledger.take(attempt, read=read, mode=mode, owners=owners)
            if intake.taken:
                laid_out = [
                    None if gradient is None else _laid_out(gradient, alias)
                    for gradient, alias in zip(gradients, self._aliases.values(), strict=True)
                ]
                microbatch = attempt.microbatch
                self._waiting[self._plan.index(microbatch)] = laid_out, microbatch.num_samples
                self._gather(intake)
                if intake.closes is not None and later is not None:
                    lock.callback(self._update, intake.closes)
                    later.append(lock.pop_all())
                elif intake.closes is not None:
                    self._update(intake.closes)
            return intake.taken

    def hand_down(
        self, attempt: Attempt, number: int, *, read: int, mode: WeightMode, owners: tuple[int, ...] = ()
    ) -> None:
        """Note a backward pass that had nothing for this layer itself."""
        with self.compute.lock.shared():  # so that no update is half-way made when it is written down
            self.ledger.hand_down(attempt, number, read=read, mode=mode, owners=owners)

    def begin_walk(self, attempt: Attempt, number: int, *, detached: bool, reads: tuple[tuple[int, ...], ...]) -> None:
        """Note that the block that begins here was computed again; see `WalkEvent`."""
        with self.compute.lock.shared():
            self.ledger.begin_walk(attempt, number, detached=detached, reads=reads)

    def drop(self, attempt: Attempt, reason: str) -> bool:
        """Put a tombstone in the microbatch's place; False when the layer has the microbatch.

        Raises:
            NotFiniteError: as `take`.
        """
        with self.compute.lock.exclusive():
            self._refuse_not_finite()
            intake = self.ledger.drop(attempt, reason)
            if intake.taken:
                self._gather(intake)
                if intake.closes is not None:
                    self._update(intake.closes)
            return intake.taken

    def abort(self, attempt: Attempt) -> bool:
        """Close the attempt's ticket; False when it is not open."""
        if self.ledger.staleness.get(self._plan.index(attempt.microbatch)) is None:
            return False
        with self.compute.lock.exclusive():
            return self.ledger.abort(attempt)

    def _gather(self, intake: Intake) -> None:
        for index in intake.ready:
            self._sum.add(*self._waiting.pop(index))

    def _update(self, decision: UpdateDecision) -> None:
        rate = None
        if not decision.empty and self._optimizer is not None:
            gradients = self._sum.mean(decision.samples)
            if any(gradient is not None for gradient in gradients):
                self._check_finite(gradients)
                rate = self._step(self._optimizer, gradients, decision)
        self._sum.clear()
        version = self.ledger.updated(rate, self.digest())
        takers = [self._cuts.pop(version, None), self._copy_taker_at(version)]
        if any(taker is not None for taker in takers):
            copy = self._copy(self.ledger.cut())
            for taker in takers:
                if taker is not None:
                    taker(copy)

    def _check_finite(self, gradients: Sequence[torch.Tensor | None]) -> None:
        if not self._finite_gradients:
            return
        name = first_not_finite(dict(zip(self._aliases, gradients, strict=True)))
        if name is not None:
            self._not_finite = (
                f"the gradient of layer {self.index} ({self.module.name}) for the update to version "
                f"{self.ledger.version + 1} is not finite (in {name}): the update was not made (a lower learning rate or "
                f"a smaller window may help)"
            )
            self._refuse_not_finite()

    def _refuse_not_finite(self) -> None:
        if self._not_finite:
            raise NotFiniteError(self._not_finite)

    def _step(
        self, optimizer: torch.optim.Optimizer, gradients: Sequence[torch.Tensor | None], decision: UpdateDecision
    ) -> float:
        aliases = self._aliases.values()
        if self._clip is not None:
            gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        for alias, gradient in zip(aliases, gradients, strict=True):
            alias.grad = gradient
        if self._clip is not None:
            nn.utils.clip_grad_norm_(aliases, self._clip)
        factor = self._rate(decision.samples_before)
        for group in optimizer.param_groups:
            group["lr"] = self._policy(decision.staleness, group[BASE_LR] * factor)
        optimizer.step()
        for alias in aliases:
            alias.grad = None
        return float(optimizer.param_groups[0]["lr"])

    # --- state --------------------------------------------------------------------------------------------------------

    def moments(self) -> dict[str, torch.Tensor]:
        """What the optimizer keeps, by name in a fixed order; not copies. Under the lock."""
        return {} if self._optimizer is None else optimizer_state(self._optimizer)

    def digest(self) -> str:
        """The hash of parameters, buffers and moments as they are. Under the lock."""
        return state_hash(self.owned_parameters().values(), self.module.buffers, self.moments().values())

    def owned_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that no lower layer owns, by name in the module's order."""
        foreign = {id(parameter) for parameter, _ in self.compute.foreign}
        return {name: one for name, one in self.module.parameters.items() if id(one) not in foreign}

    def cut_at(self, version: int, taker: Callable[[LayerCopy], None]) -> None:
        """Give ``taker`` a copy at the update that reaches ``version``.

        At once, if the layer is there and nothing was taken in since.

        ``taker`` runs under the layer's lock: it must only note the copy.
        """
        # Noted before looking at the version, so that an update in between finds it; no lock unless a copy is due now.
        self._cuts[version] = taker
        if self.ledger.version < version:
            return
        with self.compute.lock.exclusive():
            waiting = self._cuts.pop(version, None)
            if waiting is not None and self.ledger.version == version and self.ledger.accumulated == 0:
                waiting(self._copy(self.ledger.cut()))

    def copy_every(self, interval: int, taker: Callable[[LayerCopy], None]) -> None:
        """Give ``taker`` a copy at every update that reaches a multiple of ``interval``, as `cut_at` does at one.

        Called before the first pass.
        """
        self._copied_every, self._copy_taker = interval, taker

    def _copy_taker_at(self, version: int) -> Callable[[LayerCopy], None] | None:
        return self._copy_taker if self._copied_every and version % self._copied_every == 0 else None

    def copy(self) -> LayerCopy:
        """The layer as it is, right after an update: a cut of it that nobody hears of. Under the lock, or alone."""
        return self._copy(self.ledger.state())

    def _copy(self, state: LedgerState) -> LayerCopy:
        return LayerCopy(
            layer=self.index,
            life=self.ledger.life,
            state=state,
            parameters={name: one.detach().clone() for name, one in self.owned_parameters().items()},
            # A buffer tensor is never written once somebody may hold it (`LayerModule`): no copy is needed.
            buffers=dict(zip(self.module.buffer_names, self.module.buffers, strict=True)),
            moments={name: one.clone() for name, one in self.moments().items()},
        )

    @torch.no_grad()
    def restore(self, saved: LayerCopy) -> None:
        """Put a cut's tensors in place, bit for bit; the ledger was made from its state.

        Raises:
            ValueError: they do not fit the model.
        """
        with self.compute.lock.exclusive():
            own = self.owned_parameters()
            _check_names(self.index, "parameters", own, saved.parameters)
            _check_names(self.index, "buffers", self.module.buffer_names, saved.buffers)
            for name, parameter in own.items():
                _check_fits(self.index, name, parameter, saved.parameters[name])
                parameter.data.copy_(saved.parameters[name])
            before = self.module.buffers
            placed = []
            for name, buffer in zip(self.module.buffer_names, before, strict=True):
                _check_fits(self.index, name, buffer, saved.buffers[name])
                placed.append(torch.empty_like(buffer).copy_(saved.buffers[name]))
            self.module.set_buffers(placed)
            if self._optimizer is not None:
                load_optimizer_state(self._optimizer, saved.moments)
            elif saved.moments:
                raise ValueError(
                    f"layer {self.index}: the cut has {sorted(saved.moments)}, but nothing is trained here"
                )

    def forget_moments(self) -> None:
        """Let the optimizer begin anew, as if it had made no step."""
        with self.compute.lock.exclusive():
            if self._optimizer is not None:
                self._optimizer.state.clear()

    def revision(self) -> LayerRevision:
        """Which state the layer is in."""
        return LayerRevision(layer=self.index, life=self.ledger.life, revision=self.ledger.revision)

    def pull(self, have: int | None) -> tuple[int, LayerState | None]:
        """The version, and the parameters, whole, for a worker that holds revision ``have``.

        ``None`` instead of the state when that is the current one.
        """
        with self.compute.lock.shared():
            version = self.compute.version()
            if have == self.ledger.revision:
                return version, None
            own = self.owned_parameters()
            return version, LayerState(
                layer=self.index,
                life=self.ledger.life,
                revision=self.ledger.revision,
                version=version,
                parameters=NamedTensors(tuple(own), tuple(one.detach().clone() for one in own.values())),
            )

    def report(self) -> LayerReport:
        """Totals of all lives that led here. Takes no lock: a report never waits for a pass, and may miss what happens now."""
        ledger = self.ledger
        return LayerReport(
            layer=self.index,
            life=ledger.life,
            version=ledger.version,
            revision=ledger.revision,
            staleness=ledger.staleness.staleness,
            misalignment=ledger.staleness.misalignment,
            learning_rate=ledger.learning_rate or 0.0,
        )


def _laid_out(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """``gradient`` with its parameter's strides and dtype, as autograd gives it to an optimizer."""
    if gradient.stride() == parameter.stride() and gradient.dtype == parameter.dtype:
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _check_names(layer: int, what: str, own: Sequence[str] | Mapping[str, object], saved: Mapping[str, object]) -> None:
    if set(own) != set(saved):
        raise ValueError(f"layer {layer}: the cut holds {what} {sorted(saved)}, the model has {sorted(own)}")


def _check_fits(layer: int, name: str, own: torch.Tensor, saved: torch.Tensor) -> None:
    if own.shape != saved.shape or own.dtype != saved.dtype:
        raise ValueError(
            f"layer {layer}: {name} is {tuple(saved.shape)} of {saved.dtype} in the cut, "
            f"{tuple(own.shape)} of {own.dtype} in the model"
        )
