"""Runs a job's model on real samples: what each layer costs, needs and does, and whether the layers fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from layerwise.build import build_modules
from layerwise.data import load_dataset
from layerwise.device import transfers
from layerwise.errors import ConfigError
from layerwise.head import job_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec
from layerwise.messages import Tensors
from layerwise.models import layer_names, shared_tensors
from layerwise.optimizers import ADAM_MARK
from layerwise.profile import LayerProfile, Profile, TensorProfile
from layerwise.sections import AdamW, OptimizerSettings, Sgd
from layerwise.settings import resolve
from layerwise.trial_run import SeenLayer, TrialRun, memory_explained


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
    moves = transfers(device)
    with memory_explained(device):
        trial = TrialRun(modules, names, spec, head, moves, data, microbatch)
        trial.look()
        trial.measure()
        single = Microbatch(microbatch.epoch, microbatch.start, microbatch.start + 1)
        alone = TrialRun(modules, names, spec, head, moves, data, single)
        single_sample_error = ""
        try:
            alone.look()
        except ConfigError as error:
            single_sample_error = str(error)
    moves.give_back()
    layers = tuple(
        replace(
            _profile(index, names[index], module, seen, spec.train.optimizer, tuple(sorted(shares.get(index, ())))),
            outputs=_outputs(seen.outputs, microbatch.num_samples, one.outputs),
            single_output=seen.outputs.single,
        )
        for index, (module, seen, one) in enumerate(zip(modules, trial.seen, alone.seen, strict=True))
    )
    return Profile(
        layers=layers,
        num_train_samples=data.info.num_train,
        num_validation_samples=data.info.num_validation,
        microbatch_samples=microbatch.num_samples,
        input_bytes=trial.input_bytes,
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


def _refuse_lazy(modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    for index, module in enumerate(modules):
        if any(nn.parameter.is_lazy(one) for one in (*module.parameters(), *module.buffers())):
            raise ConfigError(
                f"model: layer {index} ({names[index]}) has lazy parameters, whose shapes every process would have to find "
                f"out; give the layer its sizes"
            )


def _profile(
    index: int,
    name: str,
    module: nn.Module,
    seen: SeenLayer,
    optimizer: OptimizerSettings,
    shares_with: tuple[int, ...],
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
