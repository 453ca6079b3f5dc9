"""Runs a job's model on real samples: what each layer costs, needs and does, and whether the layers fit together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from layerwise.assembly import compute_layer, foreign_parameters
from layerwise.build import build_modules, precision_of
from layerwise.data import TrainingData, load_dataset
from layerwise.derived_weights import derives_weights
from layerwise.device import HostTransfers, transfers
from layerwise.errors import ConfigError, LayerwiseError, OutOfMemoryError
from layerwise.head import JobHead, job_head, loss_gradients, run_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec
from layerwise.layer_compute import LayerCompute, LayerPass, Precision
from layerwise.memory import is_out_of_memory
from layerwise.messages import Tensors
from layerwise.models import layer_names, shared_tensors
from layerwise.optimizers import ADAM_MARK
from layerwise.profile import LayerProfile, Profile, TensorProfile
from layerwise.randomness import layer_randomness
from layerwise.sections import AdamW, OptimizerSettings, Sgd
from layerwise.settings import resolve

REPEATS = 8
BUDGET_SECONDS = 1.0
"""After so long no further repeat begins, once there are `FEWEST_REPEATS`: the job should start."""
FEWEST_REPEATS = 3
LONGEST_SECONDS = 10.0
"""After so long no further repeat begins, however few there are."""


@dataclass(slots=True)
class _Seen:
    """What the runs show of one layer."""

    clones_input: bool = False
    derived_weights: bool = False
    activation_bytes: int = 0
    outputs: Tensors = field(default_factory=lambda: Tensors(()))
    forward_seconds: list[float] = field(default_factory=list)
    backward_seconds: list[float] = field(default_factory=list)


def probe(spec: JobSpec, *, device: torch.device, allowed_imports: Sequence[str] = ()) -> Profile:
    """Build the job's model and data and run one microbatch through, a few times.

    Raises:
        ConfigError: model, data, loss or initial weights can't be used, or do not fit together; says which layers,
        and their shapes. NotAllowedError: the job imports code that ``allowed_imports`` does not cover.
        OutOfMemoryError: there is no memory for the model here, or for its largest layer on ``device``.
    """
    data = load_dataset(spec.data, allowed_imports)
    modules = build_modules(spec, data.info, allowed_imports)
    names = layer_names(modules)
    _refuse_lazy(modules, names)
    shares: dict[int, set[int]] = {}
    for shared in shared_tensors(modules):  # before they are moved, which may part them
        for index in shared.layers:
            shares.setdefault(index, set()).update(other for other in shared.layers if other != index)
    head = job_head(spec, allowed_imports)
    settings = resolve(spec, data.info.num_train, min(spec.cluster.shards, len(modules)))
    microbatch = settings.plan.microbatch(0)
    inputs, targets = _samples(spec, data, microbatch)
    moves = transfers(device)
    with _memory_explained(device):
        runner = _Runner(modules, names, spec, head, microbatch, moves, inputs, targets)
        runner.look()
        _measure(runner)
        single = Microbatch(microbatch.epoch, microbatch.start, microbatch.start + 1)
        lone, single_sample_error = _look_at(modules, names, spec, head, single, moves, data)
    moves.give_back()
    layers = tuple(
        replace(
            _profile(index, names[index], module, seen, spec.train.optimizer, tuple(sorted(shares.get(index, ())))),
            outputs=_outputs(seen.outputs, microbatch.num_samples, alone.outputs),
            single_output=seen.outputs.single,
        )
        for index, (module, seen, alone) in enumerate(zip(modules, runner.seen, lone, strict=True))
    )
    return Profile(
        layers=layers,
        num_train_samples=data.info.num_train,
        num_validation_samples=data.info.num_validation,
        microbatch_samples=microbatch.num_samples,
        input_bytes=inputs.num_bytes + targets.num_bytes,
        data_json=data.info.to_json(),
        single_sample_error=single_sample_error,
        notes=_notes(layers),
    )


def _outputs(seen: Tensors, num_samples: int, alone: Tensors) -> tuple[TensorProfile | None, ...]:
    """What a layer puts out: by ``num_samples`` samples, and by a single one (nothing, where that could not be run)."""
    found: list[TensorProfile | None] = []
    for position, one in enumerate(seen.items):
        if one is None:
            found.append(None)
            continue
        other = alone.items[position] if position < len(alone.items) else None
        sizes: list[tuple[int, int] | None] = [None] * one.ndim
        if other is not None and other.ndim == one.ndim and num_samples > 1:
            for dimension, (size, with_one) in enumerate(zip(one.shape, other.shape, strict=True)):
                if size == with_one:
                    sizes[dimension] = (size, 0)
                elif size == with_one * num_samples:
                    sizes[dimension] = (0, with_one)
        found.append(TensorProfile(dtype=str(one.dtype).removeprefix("torch."), sizes=tuple(sizes)))
    return tuple(found)


def _look_at(
    modules: list[nn.Module],
    names: list[str],
    spec: JobSpec,
    head: JobHead,
    microbatch: Microbatch,
    moves: HostTransfers,
    data: TrainingData,
) -> tuple[list[_Seen], str]:
    """What each layer does with ``microbatch`` in training, and what goes wrong, if anything does."""
    inputs, targets = _samples(spec, data, microbatch)
    runner = _Runner(modules, names, spec, head, microbatch, moves, inputs, targets)
    try:
        runner.look()
    except ConfigError as error:
        return runner.seen, str(error)
    return runner.seen, ""


def _measure(runner: _Runner) -> None:
    """Time the layers until the shortest times can be trusted. The first pass only warms up: it loads code and memory.

    All layers take turns, so that what disturbs the machine for a moment is not taken for one layer's cost. The time that they take
    to an accelerator and back counts in the limits, so that a large model is timed less often.
    """
    runner.time()
    runner.forget_times()
    begun = time.perf_counter()
    for repeat in range(1, REPEATS + 1):
        runner.time()
        spent = time.perf_counter() - begun
        if spent > LONGEST_SECONDS or (spent > BUDGET_SECONDS and repeat >= FEWEST_REPEATS):
            return


class _Runner:
    def __init__(
        self,
        modules: list[nn.Module],
        names: list[str],
        spec: JobSpec,
        head: JobHead,
        microbatch: Microbatch,
        moves: HostTransfers,
        inputs: Tensors,
        targets: Tensors,
    ) -> None:
        self.seen = [_Seen() for _ in modules]
        self._modules, self._names, self._spec, self._head = modules, names, spec, head
        self._microbatch, self._transfers = microbatch, moves
        self._precision: Precision = precision_of(spec, moves.device)
        self._inputs = self._transfers.load(inputs)
        self._targets = self._transfers.load(targets)
        self._tickets = frozenset(range(len(modules)))
        self._foreign = foreign_parameters(modules, 0)
        self._layers: list[LayerCompute] = []

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

    def time(self) -> None:
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

    def forget_times(self) -> None:
        """What was timed so far does not count."""
        for seen in self.seen:
            seen.forward_seconds.clear()
            seen.backward_seconds.clear()

    def _now(self) -> float:
        self._transfers.finish()
        return time.perf_counter()

    def _explained(self, index: int, values: Tensors) -> _Explained:
        return _Explained(index, self._names, values)


def _detached(values: Tensors) -> Tensors:
    """``values`` without their graph; what was one tensor stays one."""
    found = {id(one): None if one is None else one.detach() for one in values.items}
    return Tensors(tuple(found[id(one)] for one in values.items), values.single)


@contextmanager
def _memory_explained(device: torch.device) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"model: memory ran out when a microbatch was run through it on {device}, a layer at a time, to measure it; make data.batch "
            f"smaller or async.accumulation larger, divide the largest layer, or take a larger device: {_first_line(error)}"
        ) from error


class _Explained:
    """Turns whatever a layer raises into a sentence about the layers."""

    def __init__(self, index: int, names: list[str], values: Tensors) -> None:
        self._index, self._names, self._values = index, names, values

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, LayerwiseError) or not isinstance(error, Exception):
            return
        if is_out_of_memory(error):
            return  # see `_memory_explained`
        index, names = self._index, self._names
        if index == 0:
            what = f"model: layer 0 ({names[0]}) does not take the data's samples, {_shapes(self._values)}"
        else:
            what = (
                f"model: layers {index - 1} ({names[index - 1]}) and {index} ({names[index]}) do not fit together: "
                f"layer {index - 1} puts out {_shapes(self._values)}, and layer {index} fails on it"
            )
        raise ConfigError(f"{what}: {_first_line(error)}") from error


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


def _samples(spec: JobSpec, data: TrainingData, microbatch: Microbatch) -> tuple[Tensors, Tensors]:
    inputs, targets = data.training_batch(spec.train.seed, microbatch)
    return Tensors(tuple(inputs), len(inputs) == 1), Tensors(tuple(targets), len(targets) == 1)


def _refuse_lazy(modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    for index, module in enumerate(modules):
        if any(nn.parameter.is_lazy(one) for one in (*module.parameters(), *module.buffers())):
            raise ConfigError(
                f"model: layer {index} ({names[index]}) has lazy parameters, whose shapes every process would have to find "
                f"out; give the layer its sizes"
            )


def _profile(
    index: int, name: str, module: nn.Module, seen: _Seen, optimizer: OptimizerSettings, shares_with: tuple[int, ...]
) -> LayerProfile:
    parameters = list(module.parameters())
    trainable = [one for one in parameters if one.requires_grad]
    parameter_bytes = sum(_num_bytes(one) for one in parameters)
    moments = sum(_moments(optimizer, one) * _num_bytes(one) for one in trainable)
    return LayerProfile(
        index=index,
        name=name,
        parameters=sum(one.numel() for one in parameters),
        trainable=sum(one.numel() for one in trainable),
        parameter_bytes=parameter_bytes,
        state_bytes=parameter_bytes + moments + sum(_num_bytes(one) for one in module.buffers()),
        forward_seconds=min(seen.forward_seconds),
        backward_seconds=min(seen.backward_seconds),
        activation_bytes=seen.activation_bytes,
        output_bytes=seen.outputs.num_bytes,
        output_shapes=tuple(() if one is None else tuple(one.shape) for one in seen.outputs.items),
        shares_with=shares_with,
        derived_weights=seen.derived_weights,
        clones_input=seen.clones_input,
        batch_statistics=any(_normalises_batches(one) for one in module.modules()),
    )


def _normalises_batches(module: nn.Module) -> bool:
    # The common class of all BatchNorms has no public name.
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _moments(optimizer: OptimizerSettings, parameter: torch.Tensor) -> int:
    """How many tensors of the parameter's size the optimizer keeps."""
    if isinstance(optimizer, Sgd):
        return 1 if optimizer.momentum else 0
    if isinstance(optimizer, AdamW):
        return 2
    return 1 if parameter.ndim >= 2 and not getattr(parameter, ADAM_MARK, False) else 2


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _notes(layers: Sequence[LayerProfile]) -> tuple[str, ...]:
    notes = []
    derived = [layer.index for layer in layers if layer.derived_weights]
    if derived:
        notes.append(
            f"layers {', '.join(map(str, derived))} compute with weights derived from their parameters: with backward "
            f"weights `latest` their forward pass is run again"
        )
    writing = [layer.index for layer in layers if layer.clones_input]
    if writing:
        notes.append(f"layers {', '.join(map(str, writing))} write into their input and are given a copy")
    return tuple(notes)


def _shapes(values: Tensors) -> str:
    return ", ".join(
        "nothing" if one is None else f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}"
        for one in values.items
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
