"""From modules to layers that train: who owns which parameter, and one optimizer a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from layerwise.errors import ConfigError
from layerwise.events import EventSink
from layerwise.layer import TrainedLayer
from layerwise.layer_compute import Destination, LayerCompute, Precision
from layerwise.layer_ledger import LayerLedger, LedgerState
from layerwise.layer_module import LayerModule
from layerwise.optimizers import alias_parameters, build_optimizer
from layerwise.plan import TrainingPlan
from layerwise.policies import DelayPolicy, constant
from layerwise.profile import LayerProfile
from layerwise.schedules import learning_rate_factor
from layerwise.sections import OptimizerSettings, ScheduleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How layers are trained: the parts of a job that every layer has in common.

    ``position_order``: gradients are summed in position order (synchronous mode). ``clip`` is the largest norm of one
    layer's gradient.
    """

    plan: TrainingPlan
    seed: int
    optimizer: OptimizerSettings
    schedule: ScheduleSpec
    clip: float | None = None
    policy: DelayPolicy = constant
    position_order: bool = False
    precision: Precision = field(default_factory=Precision)
    finite_buffers: bool = False
    finite_gradients: bool = False
    rate_factor: float = 1.0

    @property
    def rate(self) -> Callable[[int], float]:
        """The schedule's factor after so many samples, times ``rate_factor``."""
        schedule, total, factor = self.schedule, max(self.plan.total_samples, 1), self.rate_factor
        return lambda samples: factor * learning_rate_factor(schedule, samples, total)


def assemble(
    modules: Sequence[nn.Module],
    names: Sequence[str],
    training: Training,
    events: EventSink,
    *,
    start: int = 0,
    life: int = 1,
    states: Sequence[LedgerState] | None = None,
    profiles: Sequence[LayerProfile] | None = None,
) -> list[TrainedLayer]:
    """Trained layers of one block, whose first one is layer ``start`` of the model.

    ``modules`` are on their device. ``states`` are those of the cut that will be restored; ``profiles`` tell what the
    probe learned of each layer.
    """
    layers: list[TrainedLayer] = []
    for position, (module, foreign) in enumerate(zip(modules, foreign_parameters(modules, start), strict=True)):
        profile = profiles[position] if profiles is not None else None
        lower = sorted({owner for _, (owner, _) in foreign})
        ledger = LayerLedger(
            start + position,
            life,
            training.plan,
            events,
            position_order=training.position_order,
            restored=None if states is None else states[position],
        )
        compute = compute_layer(
            module,
            start + position,
            names[position],
            seed=training.seed,
            version=_version_of(ledger),
            precision=training.precision,
            clones_input=profile is not None and profile.clones_input,
            finite_buffers=training.finite_buffers,
            foreign=foreign,
            lower=[layers[owner - start].compute for owner in lower],
        )
        aliases = alias_parameters(compute.owned.items())
        layers.append(
            TrainedLayer(
                compute,
                ledger,
                training.plan,
                optimizer=build_optimizer(training.optimizer, aliases.items()) if aliases else None,
                aliases=aliases,
                rate=training.rate,
                policy=training.policy,
                clip=training.clip,
                recomputes=profile is not None and profile.derived_weights,
                finite_gradients=training.finite_gradients,
                activation_bytes=0 if profile is None else profile.activation_bytes,
            )
        )
    return layers


def compute_layer(
    module: nn.Module,
    index: int,
    name: str,
    *,
    seed: int,
    version: Callable[[], int],
    precision: Precision,
    clones_input: bool,
    finite_buffers: bool = False,
    foreign: Sequence[tuple[str, Destination]] = (),
    lower: Sequence[LayerCompute] = (),
) -> LayerCompute:
    """One layer in training mode; ``lower`` are the layers that own its foreign parameters, lowest first."""
    module.train()
    return LayerCompute(
        LayerModule(module, index, name),
        seed=seed,
        version=version,
        precision=precision,
        clones_input=clones_input,
        finite_buffers=finite_buffers,
        foreign=foreign,
        owners=lower,
    )


def foreign_parameters(modules: Sequence[nn.Module], start: int) -> list[list[tuple[str, Destination]]]:
    """For each layer the trainable parameters that a lower one owns: its own name, and the owner's layer and position.

    Raises:
        ConfigError: two layers hold views of the same memory, or the same buffer: neither could be updated alone.
    """
    owners: dict[int, Destination] = {}
    memory: dict[int, tuple[int, int]] = {}
    result: list[list[tuple[str, Destination]]] = []
    for position, module in enumerate(modules):
        index = start + position
        foreign: list[tuple[str, Destination]] = []
        trainable = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
        own_position = 0
        for name, parameter in trainable:
            if id(parameter) in owners:
                foreign.append((name, owners[id(parameter)]))
                continue
            owners[id(parameter)] = (index, own_position)
            own_position += 1
        for name, tensor in (*trainable, *module.named_buffers()):
            if tensor.numel() == 0:
                continue
            first, tensor_id = memory.setdefault(tensor.untyped_storage().data_ptr(), (index, id(tensor)))
            if first != index and (tensor_id != id(tensor) or id(tensor) not in owners):
                raise ConfigError(
                    f"layers {first} and {index} share memory ({name}) that is not one trainable parameter of both; "
                    f"give each layer its own tensor, or put the two in one layer"
                )
        result.append(foreign)
    return result


def _version_of(ledger: LayerLedger) -> Callable[[], int]:
    return lambda: ledger.version
