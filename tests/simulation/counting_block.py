"""A block whose parameters are exact: each layer's is the multiset of the samples that were applied to it.

It keeps the real `LayerLedger`s and writes the real records, in integers instead of tensors. Activations and gradients are tokens that name the
microbatch and the layer, so that one which arrives at the wrong place is noticed at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from layerwise.applied import AppliedSet
from layerwise.errors import NotFoundError, NotOwnerError, WrongLifeError
from layerwise.events import Event, MemoryEventLog, WeightMode
from layerwise.ids import Attempt
from layerwise.layer_ledger import LayerLedger, LedgerState, UpdateDecision
from layerwise.messages import (
    DetachedTask,
    LayerReport,
    LayerRevision,
    LayerState,
    Metric,
    NamedTensors,
    Tensors,
)
from layerwise.plan import TrainingPlan
from layerwise.tasks import (
    ApplyTask,
    BackwardResult,
    BackwardTask,
    DropResult,
    EvaluateResult,
    EvaluateTask,
    ForwardResult,
    ForwardTask,
    InputGradient,
    Steps,
)


def activation(index: int, layer: int) -> Tensors:
    """What ``layer`` puts out for the microbatch (-1: the samples)."""
    return Tensors((("activation", index, layer),))


def target(index: int) -> Tensors:
    return Tensors((("target", index),))


def gradient(index: int, layer: int) -> Tensors:
    """The loss's gradient with respect to what ``layer`` puts out."""
    return Tensors((("gradient", index, layer),))


def expect(received: Tensors | None, wanted: Tensors) -> None:
    assert received == wanted, f"received {received} where {wanted} belongs"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCopy:
    """A layer at a cut: what is saved, and restored."""

    state: LedgerState
    parameter: Counter[int]


@dataclass(slots=True)
class FlushedLog:
    """An event log that knows how much of it would survive its process."""

    log: MemoryEventLog = field(default_factory=MemoryEventLog)
    num_flushed: int = 0
    accumulated: set[tuple[int, int]] = field(default_factory=set)
    """(layer, microbatch index) of flushed records."""

    def append(self, event: Event) -> None:
        self.log.append(event)

    def flush(self, plan: TrainingPlan) -> None:
        for record in self.log.records[self.num_flushed :]:
            if record.event.event in ("accumulate", "drop"):
                self.accumulated.add((record.event.layer, plan.index(record.event.attempt.microbatch)))
        self.num_flushed = len(self.log.records)


@dataclass(slots=True)
class _Layer:
    ledger: LayerLedger
    parameter: Counter[int]
    held: dict[int, int] = field(default_factory=dict)
    gathered: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Kept:
    """What a forward pass leaves for the backward pass."""

    index: int
    inputs: Tensors
    targets: Tensors
    lacking: tuple[int, ...]
    input_gradient: bool


class CountingBlock:
    """`BlockCompute` with integers. ``on_cut(version, copies)`` is called when every layer is copied at ``version``."""

    def __init__(
        self,
        *,
        start: int,
        stop: int,
        num_layers: int,
        life: int,
        plan: TrainingPlan,
        log: FlushedLog,
        position_order: bool,
        frozen_below: int,
        restored: dict[int, LayerCopy],
        on_cut: Callable[[int, dict[int, LayerCopy]], None],
        in_order: bool = False,
        updates_last: bool = False,
        learning_rate: float = 0.1,
        from_cut: bool = True,
        copied_every: int = 0,
        on_copy: Callable[[int, dict[int, LayerCopy]], None] = lambda version, copies: None,
    ) -> None:
        """``in_order``: forward passes must come in position order on every layer. ``updates_last``: see `Block`.

        ``from_cut``: what is ``restored`` is on disk. ``on_copy`` is called when every layer is copied at a multiple of ``copied_every``.
        """
        self._start, self._stop = start, stop
        self._num_layers = num_layers
        self._life = life
        self._plan = plan
        self._frozen_below = frozen_below
        self._on_cut = on_cut
        self._in_order = in_order
        self._updates_last = updates_last
        self._learning_rate = learning_rate
        self._newest = dict.fromkeys(range(start, stop), -1)
        self._layers: dict[int, _Layer] = {}
        for layer in range(start, stop):
            copy = restored.get(layer)
            ledger = LayerLedger(
                layer, life, plan, log, position_order=position_order, restored=copy.state if copy else None
            )
            self._layers[layer] = _Layer(ledger, Counter(copy.parameter) if copy else Counter())
        self._kept: dict[Attempt, _Kept] = {}
        self._due: set[int] = set()
        self._copies: dict[int, dict[int, LayerCopy]] = {}
        self._copied_every = copied_every
        self._on_copy = on_copy
        self._standby: dict[int, dict[int, LayerCopy]] = {}
        for copy in restored.values() if from_cut else ():
            self._copies.setdefault(copy.state.version, {})[copy.state.layer] = copy
        self._holds: set[int] = set(self._copies)
        self._saved: set[int] = set(self._copies)
        self.max_kept = 0
        self.max_copies = 0
        self.not_finite: tuple[int, int] | None = None
        """(microbatch index, layer): that layer's output is not finite there."""
        self.spoilt: Callable[[int], bool] = lambda index: False
        """Whether the loss of a microbatch is not finite this time."""
        self.loss: Callable[[int], float] = lambda index: 1.0 + index % 3

    @property
    def start(self) -> int:
        return self._start

    @property
    def stop(self) -> int:
        return self._stop

    @property
    def store_bytes(self) -> int:
        return len(self._kept)

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    @property
    def layers(self) -> dict[int, tuple[LayerLedger, Counter[int]]]:
        return {number: (layer.ledger, layer.parameter) for number, layer in self._layers.items()}

    def applied(self) -> tuple[AppliedSet, ...]:
        return tuple(layer.ledger.applied.copy() for layer in self._layers.values())

    def lacking(self, index: int) -> tuple[int, ...]:
        return tuple(number for number, layer in self._layers.items() if layer.ledger.lacks(index))

    def forward(self, task: ForwardTask) -> Steps[ForwardResult]:
        index = self._plan.index(task.attempt.microbatch)
        expect(task.inputs, activation(index, self._start - 1))
        expect(task.targets, target(index))
        lacking = self.lacking(index)
        assert task.attempt not in self._kept
        if task.keep:
            self._kept[task.attempt] = _Kept(index, task.inputs, task.targets, lacking, task.input_gradient)
            self.max_kept = max(self.max_kept, len(self._kept))
        else:
            assert not lacking
        for number in range(self._start, self._stop):
            if number in lacking:
                self._layers[number].ledger.open(task.attempt, task.number)
                assert not self._in_order or index > self._newest[number], f"{task.attempt} is out of order"
                self._newest[number] = index
            yield
        if self._stop < self._num_layers:
            return ForwardResult(outputs=activation(index, self._stop - 1))
        return ForwardResult(
            outputs=None,
            loss=float("nan") if self._spoils(index) else self.loss(index),
            metrics=(Metric(name="accuracy", total=1.0, count=float(task.attempt.microbatch.num_samples)),),
        )

    def _spoils(self, index: int) -> bool:
        return (self.not_finite is not None and self.not_finite[0] == index) or self.spoilt(index)

    def backward(self, task: BackwardTask) -> Steps[BackwardResult]:
        kept = self._kept[task.attempt]
        self._expect_boundary(kept.index, task.gradients)
        lacking = self.lacking(kept.index)
        lowest = self._start if kept.input_gradient else min(lacking, default=self._stop)
        updates: list[tuple[int, UpdateDecision]] = []
        for number in range(self._stop - 1, lowest - 1, -1):
            layer = self._layers[number]
            read = layer.ledger.version
            yield
            if number in lacking:
                closes = self._gather(number, task.attempt, read, WeightMode.LATEST)
                if closes is not None and self._updates_last:
                    updates.append((number, closes))
                elif closes is not None:
                    self._update(number, closes)
        del self._kept[task.attempt]
        boundary = self._input_gradient(kept)
        if updates and boundary is not None:
            yield InputGradient(gradients=boundary)
            boundary = None
        for number, closes in updates:
            self._update(number, closes)
            yield
        return BackwardResult(gradients=boundary)

    def detach(self, task: BackwardTask, job: str, life: int, have: tuple[LayerRevision, ...]) -> DetachedTask:
        kept = self._kept[task.attempt]
        self._expect_boundary(kept.index, task.gradients)
        states = tuple(
            LayerState(
                layer=number,
                life=self._life,
                revision=layer.ledger.revision,
                version=layer.ledger.version,
                parameters=NamedTensors((), ()),
            )
            for number, layer in self._layers.items()
            if LayerRevision(layer=number, life=self._life, revision=layer.ledger.revision) not in have
        )
        return DetachedTask(
            job=job,
            attempt=task.attempt,
            number=task.number,
            life=life,
            inputs=kept.inputs,
            targets=kept.targets if self._stop == self._num_layers else None,
            gradients=task.gradients,
            buffers=(),
            lacking=self.lacking(kept.index),
            input_gradient=kept.input_gradient,
            states=states,
        )

    def apply(self, task: ApplyTask) -> Steps[None]:
        push = task.push
        if push.layer not in self._layers:
            raise NotOwnerError(f"layer {push.layer} is not in block {self._start}-{self._stop}")
        if push.life != self._life:
            raise WrongLifeError(f"gradient of layer {push.layer} is from life {push.life}, not {self._life}")
        yield
        self._take(push.layer, push.attempt, push.read, WeightMode.RECOMPUTE)

    def release(self, attempt: Attempt) -> None:
        del self._kept[attempt]

    def abort(self, attempt: Attempt) -> None:
        for layer in self._layers.values():
            layer.ledger.abort(attempt)
        self._kept.pop(attempt, None)

    def drop(self, attempt: Attempt, reason: str) -> DropResult:
        assert reason, f"{attempt} is dropped and nobody says why"
        index = self._plan.index(attempt.microbatch)
        for number in self.lacking(index):
            layer = self._layers[number]
            intake = layer.ledger.drop(attempt, reason)
            layer.gathered += [layer.held.pop(index) for index in intake.ready]
            if intake.closes is not None:
                self._update(number, intake.closes)
        self._kept.pop(attempt, None)
        missing = [number for number, layer in self._layers.items() if index in layer.ledger.applied.dropped]
        return DropResult(missing_from=min(missing, default=None), partial=len(missing) < len(self._layers))

    def dropped(self, index: int) -> bool:
        return any(index in layer.ledger.applied.dropped for layer in self._layers.values())

    def evaluate(self, task: EvaluateTask) -> Steps[EvaluateResult]:
        if task.version not in self._copies:
            raise NotFoundError(f"no copy of version {task.version} is held")
        expect(task.inputs, activation(task.start, self._start - 1))
        copies = self._copies[task.version]
        for number in range(self._start, self._stop):
            assert copies[number].state.version == task.version
            yield
        count = float(task.stop - task.start)
        if self._stop < self._num_layers:
            return EvaluateResult(outputs=activation(task.start, self._stop - 1))
        return EvaluateResult(outputs=None, loss=Metric(name="loss", total=count, count=count))

    def first_not_finite(self, attempt: Attempt) -> int | None:
        assert attempt in self._kept
        if self.not_finite is None:
            return None
        layer = self.not_finite[1]
        return -1 if layer < self._start else layer if layer < self._stop else None

    def cut_at(self, version: int) -> None:
        if version in self._due or version in self._copies or version in self._saved:
            return
        self._due.add(version)
        for number, layer in self._layers.items():
            assert layer.ledger.version <= version, f"layer {number} is past version {version} and was not copied"
            if layer.ledger.version == version and layer.ledger.accumulated == 0:
                self._copy(number, version)

    def hold_cut(self, version: int) -> None:
        self._holds.add(version)

    def release_cut(self, version: int) -> None:
        self._holds = {held for held in self._holds if held > version}
        self._free()

    def cut_saved(self, version: int) -> None:
        """The copy is on disk (or given up)."""
        self._saved.add(version)
        self._free()

    def report(self) -> tuple[LayerReport, ...]:
        return tuple(
            LayerReport(
                layer=number,
                life=self._life,
                version=layer.ledger.version,
                revision=layer.ledger.revision,
                staleness=layer.ledger.staleness.staleness,
                misalignment=layer.ledger.staleness.misalignment,
                learning_rate=layer.ledger.learning_rate or 0.0,
            )
            for number, layer in self._layers.items()
        )

    def _take(self, number: int, attempt: Attempt, read: int, mode: WeightMode) -> None:
        closes = self._gather(number, attempt, read, mode)
        if closes is not None:
            self._update(number, closes)

    def _gather(self, number: int, attempt: Attempt, read: int, mode: WeightMode) -> UpdateDecision | None:
        layer = self._layers[number]
        index = self._plan.index(attempt.microbatch)
        intake = layer.ledger.take(attempt, read=read, mode=mode)
        if intake.taken:
            layer.held[index] = index
        layer.gathered += [layer.held.pop(index) for index in intake.ready]
        return intake.closes

    def _update(self, number: int, closes: UpdateDecision) -> None:
        layer = self._layers[number]
        layer.parameter.update(layer.gathered)
        layer.gathered.clear()
        rate = None if closes.empty else self._learning_rate
        version = layer.ledger.updated(rate, f"{hash(tuple(sorted(layer.parameter.items()))):x}")
        layer.ledger.staleness.check()
        stands_by = self._copied_every > 0 and version % self._copied_every == 0
        if version in self._due or stands_by:
            copy = LayerCopy(state=layer.ledger.cut(), parameter=Counter(layer.parameter))
            if version in self._due:
                self._shelve(number, version, copy)
            if stands_by:
                self._stand_by(number, version, copy)

    def _copy(self, number: int, version: int) -> None:
        layer = self._layers[number]
        self._shelve(number, version, LayerCopy(state=layer.ledger.cut(), parameter=Counter(layer.parameter)))

    def _stand_by(self, number: int, version: int, copy: LayerCopy) -> None:
        copies = self._standby.setdefault(version, {})
        copies[number] = copy
        if len(copies) == len(self._layers):
            self._on_copy(version, self._standby.pop(version))

    def _shelve(self, number: int, version: int, copy: LayerCopy) -> None:
        copies = self._copies.setdefault(version, {})
        copies[number] = copy
        self.max_copies = max(self.max_copies, len(self._copies))
        if len(copies) == len(self._layers):
            self._due.discard(version)
            self._on_cut(version, copies)

    def _free(self) -> None:
        for version in [one for one in self._copies if one in self._saved and one not in self._holds]:
            del self._copies[version]

    def _expect_boundary(self, index: int, gradients: Tensors | None) -> None:
        if self._stop == self._num_layers:
            assert gradients is None
        elif self._stop - 1 < self._frozen_below:
            expect(gradients, Tensors((None,)))
        else:
            expect(gradients, gradient(index, self._stop - 1))

    def _input_gradient(self, kept: _Kept) -> Tensors | None:
        if not kept.input_gradient or self._start - 1 < self._frozen_below:
            return None
        return gradient(kept.index, self._start - 1)
