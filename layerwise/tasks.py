"""The work that a shard gives to its compute slots, and the interface of the thing that does it.

`BlockCompute` is implemented twice: by `layerwise.block.Block` with torch, and by the simulated world with integers. Its methods that take
time are generators which yield between layers, so that a simulated slot can let other events happen there; a real slot thread
simply runs them to the end with `run_to_end`. They run on slot threads; a layer's own lock guards its state.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from layerwise.applied import AppliedSet
from layerwise.ids import Attempt
from layerwise.messages import DetachedTask, LayerReport, LayerRevision, Metric, PushGradient, Tensors

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardTask:
    """Run the block forward on ``inputs``. ``targets`` are used by the last block only.

    With ``keep`` false nobody in the whole route from the first layer up to the end of this block lacks the microbatch: run without
    gradients and keep nothing.
    """

    attempt: Attempt
    number: int
    inputs: Tensors
    targets: Tensors
    keep: bool
    input_gradient: bool
    """A layer before this block lacks the microbatch, so the backward pass must hand a gradient upstream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """``outputs`` go to the next block (``None`` from the last one, which gives ``loss`` as a mean over samples, and ``metrics``)."""

    outputs: Tensors | None
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardTask:
    """Walk the block's layers from last to first and take each gradient in. ``gradients`` is ``None`` in the last block (its loss is kept)."""

    attempt: Attempt
    number: int
    gradients: Tensors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardResult:
    """``gradients``: with respect to the block's input, for the block before (``None`` when nobody needs it)."""

    gradients: Tensors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGradient:
    """What a backward pass has for the block before while it still has updates to make; `BackwardResult` follows.

    Every layer of the block has written down that it takes its gradient in.
    """

    gradients: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachTask:
    """Make ``backward`` whole for the detached ``worker``, which holds ``have``: the result is a `DetachedTask`."""

    worker: str
    backward: BackwardTask
    job: str
    life: int
    have: tuple[LayerRevision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FindTask:
    """Find the first layer whose output for ``attempt`` is not finite. ``loss``: what the last block made of them."""

    attempt: Attempt
    number: int
    loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FindResult:
    """The layer; -1: the block's input already was not; ``None``: all are finite."""

    layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyTask:
    """Take in one gradient that a detached worker pushed."""

    worker: str
    push: PushGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class DropTask:
    """Give a microbatch up: tombstones take its place in every layer that lacks it, and what is kept of it goes."""

    attempt: Attempt
    number: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropResult:
    """How the block stands to a dropped microbatch, whenever it came to that.

    ``missing_from``: the lowest layer with a tombstone (``None``: all have applied it); ``partial``: some have applied it.
    """

    missing_from: int | None
    partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateTask:
    """Run the block's copy of cut ``version`` in evaluation mode."""

    version: int
    start: int
    stop: int
    inputs: Tensors
    targets: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """``outputs`` for the next block, or from the last one ``loss`` and ``metrics``."""

    outputs: Tensors | None
    loss: Metric | None = None
    metrics: tuple[Metric, ...] = ()


Steps = Generator[InputGradient | None, None, Result]
"""Yields between layers; what it yields is to be reported at once, before it goes on."""

Task = ForwardTask | BackwardTask | DetachTask | FindTask | ApplyTask | DropTask | EvaluateTask
TaskResult = (
    ForwardResult | BackwardResult | InputGradient | DetachedTask | FindResult | DropResult | EvaluateResult | None
)


class BlockCompute(Protocol):
    """A block's layers with their ledgers, kept activations and optimizers."""

    @property
    def start(self) -> int:
        """First layer of the block."""
        ...

    @property
    def stop(self) -> int:
        """One past the last layer."""
        ...

    def lacking(self, index: int) -> tuple[int, ...]:
        """The block's layers that have neither applied nor dropped microbatch ``index``."""
        ...

    def applied(self) -> tuple[AppliedSet, ...]:
        """A copy of each layer's set. No pass may be under way."""
        ...

    def forward(self, task: ForwardTask) -> Steps[ForwardResult]:
        """Open a ticket on every lacking layer, run, and keep what the backward pass needs."""
        ...

    def backward(self, task: BackwardTask) -> Steps[BackwardResult]:
        """Apply each layer's gradient as soon as it exists; free what was kept. Layers that have the microbatch only pass the gradient on."""
        ...

    def detach(self, task: BackwardTask, job: str, life: int, have: tuple[LayerRevision, ...]) -> DetachedTask:
        """The same task, made whole for a detached worker (layers are copied under their shared locks); what was kept stays until `release`."""
        ...

    def apply(self, task: ApplyTask) -> Steps[None]:
        """Take in a pushed gradient; a repeat changes nothing. ``WrongLifeError`` when it is from another life."""
        ...

    def release(self, attempt: Attempt) -> None:
        """Free what ``attempt`` keeps, once a detached worker has finished it."""
        ...

    def abort(self, attempt: Attempt) -> None:
        """Free what ``attempt`` keeps and abort its open tickets."""
        ...

    def drop(self, attempt: Attempt, reason: str) -> DropResult:
        """Put tombstones in every layer that still lacks the microbatch, and free what ``attempt`` keeps. Repeats change nothing."""
        ...

    def dropped(self, index: int) -> bool:
        """Whether a layer has a tombstone in the place of microbatch ``index``."""
        ...

    def evaluate(self, task: EvaluateTask) -> Steps[EvaluateResult]:
        """Run the cut's copy; ``NotFoundError`` when it is not held."""
        ...

    def first_not_finite(self, attempt: Attempt) -> int | None:
        """The first layer whose output for ``attempt`` is not finite (-1: the block's input already was not; ``None``: all finite)."""
        ...

    def cut_at(self, version: int) -> None:
        """Every layer copies itself at the update that reaches ``version`` (at once where it is there already)."""
        ...

    def hold_cut(self, version: int) -> None:
        """Keep the copy of ``version`` in memory after it is saved."""
        ...

    def release_cut(self, version: int) -> None:
        """Let copies of versions up to ``version`` go once they are saved."""
        ...

    def report(self) -> tuple[LayerReport, ...]:
        """Totals of each layer."""
        ...

    @property
    def store_bytes(self) -> int:
        """Bytes in the activation store."""
        ...


def run_to_end(steps: Steps[Result]) -> Result:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
