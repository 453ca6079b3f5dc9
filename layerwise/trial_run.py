"""A trial run of a job's layers on one microbatch: what each does, needs and takes, and whether they fit together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import nn

from layerwise.assembly import compute_layer, foreign_parameters
from layerwise.build import precision_of
from layerwise.data import TrainingData
from layerwise.derived_weights import derives_weights
from layerwise.device import HostTransfers
from layerwise.errors import ConfigError, LayerwiseError, OutOfMemoryError
from layerwise.head import JobHead, loss_gradients, run_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec
from layerwise.layer_compute import LayerCompute, LayerPass, Precision
from layerwise.memory import is_out_of_memory
from layerwise.messages import Tensors
from layerwise.randomness import layer_randomness

REPEATS = 8
BUDGET_SECONDS = 1.0
"""After so long no further repeat begins, once there are `FEWEST_REPEATS`: the job should start."""
FEWEST_REPEATS = 3
LONGEST_SECONDS = 10.0
"""After so long no further repeat begins, however few there are."""


@dataclass(slots=True)
class SeenLayer:
    """What the runs show of one layer."""

    clones_input: bool = False
    derived_weights: bool = False
    activation_bytes: int = 0
    outputs: Tensors = field(default_factory=lambda: Tensors(()))
    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)


class TrialRun:
    """One microbatch through all layers, forward and backward, each layer on the device only while it is run."""

    def __init__(
        self,
        modules: list[nn.Module],
        names: list[str],
        spec: JobSpec,
        head: JobHead,
        moves: HostTransfers,
        data: TrainingData,
        microbatch: Microbatch,
    ) -> None:
        self.seen = [SeenLayer() for _ in modules]
        self._modules, self._names, self._spec, self._head = modules, names, spec, head
        self._microbatch, self._transfers = microbatch, moves
        self._precision: Precision = precision_of(spec, moves.device)
        inputs, targets = data.training_batch(spec.train.seed, microbatch)
        self._inputs = moves.load(Tensors(tuple(inputs), len(inputs) == 1))
        self._targets = moves.load(Tensors(tuple(targets), len(targets) == 1))
        self._tickets = frozenset(range(len(modules)))
        self._foreign = foreign_parameters(modules, 0)
        self._layers: list[LayerCompute] = []

    @property
    def input_bytes(self) -> int:
        """Of the microbatch's samples and targets."""
        return self._inputs.num_bytes + self._targets.num_bytes

    def look(self) -> None:
        """First run: errors, layers that write into their input, derived weights, bytes that autograd keeps."""
        values = self._inputs
        for index, module in enumerate(self._modules):
            with self._transfers.computing(), self._placed(index), self._explained(index, values):
                seen = self.seen[index]
                seen.clones_input = self._writes_input(module, values)
                layer = compute_layer(
                    module,
                    index,
                    self._names[index],
                    seed=self._spec.train.seed,
                    version=lambda: 0,
                    precision=self._precision,
                    clones_input=seen.clones_input,
                    foreign=self._foreign[index],
                )
                self._layers.append(layer)
                leaves = layer.prepare(values, gradient=True)
                kept = _KeptBytes(module)
                with kept:
                    values = layer.run(leaves, self._microbatch, graph=True)
                seen.activation_bytes = kept.num_bytes
                seen.derived_weights = derives_weights(values.items, leaves.items)
                # Without the graph, which would keep the layer's weights on the device.
                values = _detached(values)
                seen.outputs = Tensors(
                    tuple(None if one is None else one.to("meta") for one in values.items), values.single
                )
        self._look_at_loss(values)

    def _look_at_loss(self, values: Tensors) -> None:
        """Whether loss and metrics take ``values``, the last layer's, and the loss is finite."""
        last = len(self._modules) - 1
        try:
            with self._transfers.computing():
                loss, head = run_head(self._head, values, self._targets, self._precision, graph=False)
                self._head.metrics(head, self._targets)
                found = float(loss.detach())
        except LayerwiseError:
            raise
        except Exception as error:  # whatever a loss of the user's own raises
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"loss: it does not take what the last layer, {last} ({self._names[last]}), puts out, {_shapes(values)}, "
                f"with targets {_shapes(self._targets)}: {_first_line(error)}"
            ) from error
        if not math.isfinite(found):
            raise ConfigError(f"model: the loss of the first microbatch is {found} with the initial weights")

    def _writes_input(self, module: nn.Module, values: Tensors) -> bool:
        made = {id(one): None if one is None else one.detach().clone() for one in values.items}
        copies = tuple(made[id(one)] for one in values.items)
        before = [0 if one is None else one._version for one in copies]
        module.train()
        with torch.no_grad(), self._precision.context(), layer_randomness(0, self._transfers.device):
            module(copies[0] if values.single else copies)
        return before != [0 if one is None else one._version for one in copies]

    def measure(self) -> None:
        """Time the layers until the shortest times can be trusted. The first pass only warms up: it loads code and memory.

        All layers take turns, so that what disturbs the machine for a moment is not taken for one layer's cost. The time that they take
        to an accelerator and back counts in the limits, so that a large model is timed less often.
        """
        self._time()
        self._forget_times()
        begun = time.perf_counter()
        for repeat in range(1, REPEATS + 1):
            self._time()
            spent = time.perf_counter() - begun
            if spent > LONGEST_SECONDS or (spent > BUDGET_SECONDS and repeat >= FEWEST_REPEATS):
                return

    def _time(self) -> None:
        """One timed forward and backward pass of every layer, a layer's both at once."""
        values, flowing = self._inputs, False
        for index in range(len(self._layers)):
            with self._transfers.computing(), self._placed(index):
                values, flowing = self._time_layer(index, values, flowing)

    def _time_layer(self, index: int, values: Tensors, flowing: bool) -> tuple[Tensors, bool]:
        """What the layer puts out, and whether something below or in it is trained."""
        layer, seen = self._layers[index], self.seen[index]
        leaves = layer.prepare(values, gradient=flowing)
        parameters, destinations = layer.differentiated(self._tickets)
        flowing = flowing or bool(parameters)
        begun = self._now()
        outputs = layer.run(leaves, self._microbatch, graph=flowing)
        seen.forward_seconds.append(self._now() - begun)
        forward = LayerPass(
            compute=layer,
            microbatch=self._microbatch,
            ticket=True,
            inputs=leaves,
            outputs=outputs,
            buffers=(),
            reads=(0,),
            parameters=parameters,
            destinations=destinations,
        )
        if index < len(self._layers) - 1:
            gradients = tuple(
                torch.ones_like(one) if one is not None and one.requires_grad else None for one in outputs.items
            )
            begun = self._now()
        else:
            begun = self._now()
            loss, head = run_head(self._head, outputs, self._targets, self._precision, graph=True)
            gradients = loss_gradients(loss, head.items)
        layer.gradients(forward, gradients)
        seen.backward_seconds.append(self._now() - begun)
        return _detached(outputs), flowing

    @contextmanager
    def _placed(self, index: int) -> Iterator[None]:
        """Within it the layer's tensors are on the device: all layers together may be too large for one."""
        module, device = self._modules[index], self._transfers.device
        try:
            module.to(device)
        except Exception as error:
            with suppress(Exception):
                module.to("cpu")
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"model: layer {index} ({self._names[index]}) can't be moved to {device}: {_first_line(error)}"
            ) from error
        try:
            yield
        finally:
            module.to("cpu")

    def _forget_times(self) -> None:
        """What was timed so far does not count."""
        for seen in self.seen:
            seen.forward_seconds.clear()
            seen.backward_seconds.clear()

    def _now(self) -> float:
        self._transfers.finish()
        return time.perf_counter()

    @contextmanager
    def _explained(self, index: int, values: Tensors) -> Iterator[None]:
        """Turns whatever the layer raises into a sentence about the layers; what is about memory, `memory_explained` does."""
        try:
            yield
        except LayerwiseError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            names = self._names
            if index == 0:
                what = f"model: layer 0 ({names[0]}) does not take the data's samples, {_shapes(values)}"
            else:
                what = (
                    f"model: layers {index - 1} ({names[index - 1]}) and {index} ({names[index]}) do not fit together: "
                    f"layer {index - 1} puts out {_shapes(values)}, and layer {index} fails on it"
                )
            raise ConfigError(f"{what}: {_first_line(error)}") from error


def _detached(values: Tensors) -> Tensors:
    """``values`` without their graph; what was one tensor stays one."""
    found = {id(one): None if one is None else one.detach() for one in values.items}
    return Tensors(tuple(found[id(one)] for one in values.items), values.single)


@contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Turns every way in which memory runs out within it into one `OutOfMemoryError` that says what to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"model: memory ran out when a microbatch was run through it on {device}, a layer at a time, to measure it; make data.batch "
            f"smaller or async.accumulation larger, divide the largest layer, or take a larger device: {_first_line(error)}"
        ) from error


class _KeptBytes:
    """Counts what autograd keeps beside the parameters, each piece of memory once."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {one.untyped_storage().data_ptr() for one in module.parameters()}
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def num_bytes(self) -> int:
        return sum(self._kept.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._kept[storage.data_ptr()] = storage.nbytes()
        # An operation's own output, kept as it is, would hold the graph that holds it: neither would ever be freed.
        return tensor.detach()

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def _shapes(values: Tensors) -> str:
    return ", ".join(
        "nothing" if one is None else f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}"
        for one in values.items
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
