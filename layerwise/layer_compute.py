"""One layer's forward and backward pass, whoever owns the weights.

A shard runs its own layers with it, a detached backward worker the ones it has pulled, the probe those it measures.
Each layer has a graph of its own, on detached inputs, so that its gradient exists before the layer below begins and
an update of one layer can't spoil another's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from layerwise.ids import Microbatch
from layerwise.layer_module import LayerModule
from layerwise.messages import Tensors
from layerwise.randomness import layer_randomness, layer_seed
from layerwise.shared_lock import SharedLock

_NOTHING = nullcontext()

Destination = tuple[int, int]
"""Whose gradient it is: a layer, and the position among its own trainable parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In which arithmetic layers run: ``autocast`` is torch.autocast's dtype, ``None`` leaves every dtype as it is."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: torch.dtype | None = None

    def context(self) -> AbstractContextManager[object]:
        """The context that a layer or the loss runs in."""
        if self.autocast is None:
            return _NOTHING
        return torch.autocast(self.device.type, dtype=self.autocast)


@dataclass(slots=True)
class LayerPass:
    """What one layer's forward pass leaves for its backward pass.

    ``outputs`` carry the graph; ``None`` where the backward pass must build it again from ``inputs`` and the
    ``buffers`` as they were read. ``reads`` is `LayerCompute.reads` then. ``parameters`` are differentiated, each for its ``destination``; ``stashed`` ones
    are copies that only this version's passes use. ``ticket``: the layer lacks the microbatch, so it takes a gradient
    in, be it empty.
    """

    compute: LayerCompute
    microbatch: Microbatch
    ticket: bool
    inputs: Tensors
    outputs: Tensors | None
    buffers: tuple[torch.Tensor, ...]
    reads: tuple[int, ...]
    parameters: tuple[torch.Tensor, ...] = ()
    destinations: tuple[Destination, ...] = ()
    stashed: tuple[torch.Tensor, ...] | None = None

    @property
    def index(self) -> int:
        """The layer's index in the model."""
        return self.compute.index

    @property
    def read(self) -> int:
        """The layer's version as read."""
        return self.reads[0]

    @property
    def needs_graph(self) -> bool:
        """Whether anything asks for a gradient here."""
        return bool(self.parameters) or any(one is not None and one.requires_grad for one in self.inputs.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGradients:
    """``inputs`` go to the layer below, ``parameters`` to their destinations; ``reads`` is what the backward pass read."""

    inputs: tuple[torch.Tensor | None, ...]
    parameters: tuple[torch.Tensor | None, ...]
    reads: tuple[int, ...]


class LayerCompute:
    """Runs one layer; any thread may call.

    ``lock`` is held shared while weights are read and alone while tensors are exchanged.

    ``version`` tells the layer's version and is asked under that lock. ``clones_input``: the layer writes into what
    it is given, so it is given a copy.
    """

    def __init__(
        self,
        module: LayerModule,
        *,
        seed: int,
        version: Callable[[], int],
        precision: Precision | None = None,
        clones_input: bool = False,
        finite_buffers: bool = False,
        foreign: Sequence[tuple[str, Destination]] = (),
        owners: Sequence[LayerCompute] = (),
    ) -> None:
        """``foreign`` names parameters that belong to lower layers, which are ``owners`` (lowest first).

        ``finite_buffers``: a forward pass never leaves a buffer with a value that is not finite.
        """
        self.module = module
        self.index = module.index
        self.lock = SharedLock()
        self.precision = precision if precision is not None else Precision()
        self.version = version
        self._seed = seed
        self._clones_input = clones_input
        self._owners = tuple(owners)
        self._outer_locks = tuple(one.lock for one in owners)
        self._finite_buffers = finite_buffers
        foreign_names = {name for name, _ in foreign}
        self.owned = {
            name: parameter
            for name, parameter in module.parameters.items()
            if parameter.requires_grad and name not in foreign_names
        }
        self.foreign = tuple(
            (module.parameters[name], where) for name, where in foreign if module.parameters[name].requires_grad
        )
        self._own_parameters = tuple(self.owned.values())
        self._own_destinations = tuple((self.index, position) for position in range(len(self.owned)))
        self._positions = {id(parameter): position for position, parameter in enumerate(module.parameters.values())}

    def differentiated(
        self, tickets: frozenset[int] | set[int]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[Destination, ...]]:
        """The parameters here whose owner is among the layers ``tickets``, and where their gradients go."""
        own = self.index in tickets
        if not self.foreign:
            return (self._own_parameters, self._own_destinations) if own else ((), ())
        parameters = self._own_parameters if own else ()
        destinations = self._own_destinations if own else ()
        for parameter, where in self.foreign:
            if where[0] in tickets:
                parameters, destinations = (*parameters, parameter), (*destinations, where)
        return parameters, destinations

    @property
    def owners(self) -> tuple[int, ...]:
        """The lower layers that own parameters of this one."""
        return tuple(owner.index for owner in self._owners)

    def reads(self) -> tuple[int, ...]:
        """The layer's version and those of the layers that own parameters of its. Under `guard`."""
        if not self._owners:
            return (self.version(),)
        return (self.version(), *(owner.version() for owner in self._owners))

    def again(
        self,
        inputs: Tensors,
        buffers: tuple[torch.Tensor, ...] | None,
        microbatch: Microbatch,
        tickets: frozenset[int],
    ) -> LayerPass:
        """The forward pass once more for its graph, with the weights of now and the buffers as first read.

        ``buffers`` ``None``: the layer's own, which no pass writes.
        """
        parameters, destinations = self.differentiated(tickets)
        with self.guard(exchanges=self.module.may_write_buffers):
            outputs = self.run(inputs, microbatch, graph=True, buffers=buffers)
            reads = self.reads()
        return LayerPass(
            compute=self,
            microbatch=microbatch,
            ticket=self.index in tickets,
            inputs=inputs,
            outputs=outputs,
            buffers=buffers or (),
            reads=reads,
            parameters=parameters,
            destinations=destinations,
        )

    def prepare(self, inputs: Tensors, *, gradient: bool, flows: Sequence[bool] | None = None) -> Tensors:
        """``inputs`` cut off from the graph that made them, one leaf for each distinct tensor.

        With ``gradient`` they require one wherever they can have one and ``flows`` says that something below wants it.
        """
        items = inputs.items
        if len(items) == 1:
            return Tensors((_leaf(items[0], gradient and (flows is None or flows[0])),), inputs.single)
        leaves: dict[int, torch.Tensor | None] = {}
        for position, item in enumerate(items):
            if id(item) not in leaves:
                leaves[id(item)] = _leaf(item, gradient and (flows is None or flows[position]))
        return Tensors(tuple(leaves[id(item)] for item in items), inputs.single)

    def guard(self, *, exchanges: bool) -> AbstractContextManager[object]:
        """The layer's lock: alone if tensors are exchanged in the module, else shared."""
        inner: AbstractContextManager[object] = self.lock.exclusive() if exchanges else self.lock.shared()
        return _Nested(self._outer_locks, inner) if self._outer_locks else inner

    def run(
        self,
        inputs: Tensors,
        microbatch: Microbatch,
        *,
        graph: bool,
        commit: bool = False,
        buffers: tuple[torch.Tensor, ...] | None = None,
        parameters: Sequence[torch.Tensor] | None = None,
    ) -> Tensors:
        """The training-mode forward pass, under `guard`.

        ``buffers`` are read instead of the layer's own; ``commit`` lets the layer's own change. ``parameters`` take
        the place of the layer's own (all of them, in order); giving them, or a layer that writes buffers, needs the
        lock alone.
        """
        module = self.module
        if not module.may_write_buffers and parameters is None:
            return self._call(inputs, microbatch, graph)
        before = module.buffers
        given = module.copies_for_writing(before if buffers is None else buffers)
        after = before
        try:
            with module.exchanged(parameters=parameters, buffers=given):
                outputs = self._call(inputs, microbatch, graph)
                left = module.learn_written(before if buffers is None else buffers, given)
                if commit:
                    after = _finite_or_before(left, before) if self._finite_buffers else left
        finally:
            module.set_buffers(after)
        return outputs

    def _call(self, inputs: Tensors, microbatch: Microbatch, graph: bool) -> Tensors:
        with (
            torch.set_grad_enabled(graph),
            self.precision.context(),
            layer_randomness(layer_seed(self._seed, microbatch, self.index), self.precision.device),
        ):
            items = inputs.items
            if self._clones_input:
                items = tuple(None if item is None else item.clone() for item in items)
            return self.module(items, inputs.single)

    def evaluate(
        self,
        inputs: Tensors,
        microbatch: Microbatch,
        parameters: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
    ) -> Tensors:
        """The evaluation-mode forward pass with other tensors (all of the module's, in order); changes nothing."""
        module = self.module
        with (
            self.guard(exchanges=True),
            # Some modules write their buffers in evaluation as well, and a cut's may be the layer's own.
            module.exchanged(parameters=parameters, buffers=module.copies_for_writing(buffers), training=False),
        ):
            return self._call(inputs, microbatch, graph=False)

    def gradients(self, forward: LayerPass, outputs: Sequence[torch.Tensor | None]) -> LayerGradients:
        """Differentiate ``forward``, given the gradients of its ``outputs``; builds its graph where it has none."""
        inputs = forward.inputs.items
        if not forward.needs_graph or all(one is None for one in outputs):
            with self.lock.shared():
                reads = forward.reads if forward.stashed is not None else self.reads()
            nothing = (None,) * len(forward.parameters)
            return LayerGradients(inputs=(None,) * len(inputs), parameters=nothing, reads=reads)
        rebuild = forward.outputs is None
        with self.guard(exchanges=rebuild and self.module.may_write_buffers):
            made = forward.outputs
            if made is None:
                made = self.run(forward.inputs, forward.microbatch, graph=True, buffers=forward.buffers)
            reads = forward.reads if forward.stashed is not None else self.reads()
            pairs = [
                (output, gradient)
                for output, gradient in zip(made.items, outputs, strict=True)
                if gradient is not None and output is not None and output.requires_grad
            ]
            leaves: dict[int, torch.Tensor] = {
                id(item): item for item in inputs if item is not None and item.requires_grad
            }
            if not pairs:
                found: tuple[torch.Tensor | None, ...] = (None,) * (len(leaves) + len(forward.parameters))
            else:
                found = torch.autograd.grad(
                    [output for output, _ in pairs],
                    [*leaves.values(), *forward.parameters],
                    [gradient for _, gradient in pairs],
                    allow_unused=True,
                )
        by_leaf: dict[int, torch.Tensor | None] = dict(zip(leaves, found, strict=False))
        return LayerGradients(
            # A tensor that was given twice has one gradient: it goes with its first place.
            inputs=tuple(by_leaf.pop(id(item), None) for item in inputs),
            parameters=tuple(found[len(leaves) :]),
            reads=reads,
        )


class _Nested(AbstractContextManager[None]):
    """A layer's lock inside the shared locks of the layers that own some of its parameters."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, outer: tuple[SharedLock, ...], inner: AbstractContextManager[object]) -> None:
        self._outer = outer
        self._inner = inner

    def __enter__(self) -> None:
        taken: list[SharedLock] = []
        try:
            for lock in self._outer:
                lock.acquire_shared()
                taken.append(lock)
            self._inner.__enter__()
        except BaseException:
            for lock in reversed(taken):
                lock.release_shared()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._inner.__exit__(None, None, None)
        finally:
            for lock in reversed(self._outer):
                lock.release_shared()


@torch.no_grad()
def _finite_or_before(left: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The buffers that a pass has ``left``; as they were ``before`` where they are not finite. Asks no device to answer."""
    return tuple(
        torch.where(torch.isfinite(new).all(), new, old) if new is not old and new.is_floating_point() else new
        for new, old in zip(left, before, strict=True)
    )


def _leaf(item: torch.Tensor | None, gradient: bool) -> torch.Tensor | None:
    if item is None:
        return None
    leaf = item.detach()
    if gradient and (leaf.is_floating_point() or leaf.is_complex()):
        leaf.requires_grad_()
    return leaf
