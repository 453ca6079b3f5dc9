"""Blocks chained by hand, in one thread: what the shards' processes do with messages, tests do with calls."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from layerwise.assembly import Training, assemble
from layerwise.block import Block
from layerwise.cut_shelf import CutShelf
from layerwise.detached import DetachedBlock, PulledStates
from layerwise.events import MemoryEventLog, WeightMode
from layerwise.head import JobHead
from layerwise.ids import Attempt, Microbatch
from layerwise.layer import LayerCopy
from layerwise.layer_compute import LayerCompute
from layerwise.layer_module import LayerModule
from layerwise.losses import BuiltMetric
from layerwise.messages import DetachedTask, LayerFile, PushGradient, TaskFinished, Tensors
from layerwise.plan import TrainingPlan
from layerwise.profile import LayerProfile
from layerwise.reference import PlainLoop
from layerwise.sections import AdamW, Constant, Muon, OptimizerSettings, ScheduleSpec, Sgd
from layerwise.tasks import ApplyTask, BackwardTask, ForwardResult, ForwardTask, run_to_end
from layerwise.verify import first_difference

OPTIMIZERS: dict[str, OptimizerSettings] = {
    "sgd": Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": AdamW(lr=1e-2),
    "muon": Muon(lr=2e-2),
}


def cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(output, targets)


def hits(output: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    return float((output.argmax(-1) == targets).sum()), float(targets.numel())


HEAD = JobHead(cross_entropy, [BuiltMetric("accuracy", hits)])


@dataclass
class Noted:
    """What the cut shelf told."""

    taken: list[int] = field(default_factory=list)
    saved: list[tuple[int, tuple[LayerFile, ...], str]] = field(default_factory=list)

    def cut_taken(self, version: int) -> None:
        self.taken.append(version)

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        self.saved.append((version, files, error))


def profile_of(index: int, **flags: bool) -> LayerProfile:
    return LayerProfile(
        index=index,
        name=str(index),
        parameters=0,
        trainable=0,
        parameter_bytes=0,
        state_bytes=0,
        forward_seconds=1.0,
        backward_seconds=2.0,
        activation_bytes=100,
        output_bytes=10,
        output_shapes=(),
        **flags,  # type: ignore[arg-type]
    )


class Pipeline:
    """``modules`` (copied) cut into blocks at ``splits``, over samples held in memory."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        inputs: Sequence[torch.Tensor],
        targets: torch.Tensor,
        *,
        accumulation: int = 1,
        batch: int = 8,
        num_updates: int = 4,
        optimizer: OptimizerSettings | None = None,
        schedule: ScheduleSpec | None = None,
        clip: float | None = None,
        splits: Sequence[int] = (),
        mode: WeightMode = WeightMode.LATEST,
        position_order: bool = False,
        flags: dict[int, dict[str, bool]] | None = None,
        restored: Sequence[LayerCopy] | None = None,
        life: int = 1,
        head: JobHead = HEAD,
        finite_buffers: bool = False,
        finite_gradients: bool = False,
    ) -> None:
        self.modules = copy.deepcopy(list(modules))
        self.inputs, self.targets = list(inputs), targets
        self.plan = TrainingPlan(
            num_samples=len(targets), batch=batch, accumulation=accumulation, num_updates=num_updates
        )
        self.training = Training(
            plan=self.plan,
            seed=7,
            optimizer=optimizer if optimizer is not None else Sgd(lr=0.1),
            schedule=schedule if schedule is not None else Constant(),
            clip=clip,
            position_order=position_order,
            finite_buffers=finite_buffers,
            finite_gradients=finite_gradients,
        )
        self.head = head
        self.events = MemoryEventLog()
        self.noted = Noted()
        self.blocks: list[Block] = []
        bounds = [0, *splits, len(self.modules)]
        for start, stop in pairwise(bounds):
            layers = assemble(
                self.modules[start:stop],
                [str(index) for index in range(start, stop)],
                self.training,
                self.events,
                start=start,
                life=life,
                states=None if restored is None else [one.state for one in restored[start:stop]],
                profiles=[profile_of(index, **(flags or {}).get(index, {})) for index in range(start, stop)],
            )
            for layer, saved in zip(layers, restored[start:stop] if restored else (), strict=False):
                layer.restore(saved)
            below = any(one.requires_grad for module in self.modules[:start] for one in module.parameters())
            self.blocks.append(
                Block(
                    layers,
                    self.plan,
                    CutShelf(len(layers), self.noted, None),
                    mode=mode,
                    head=head if stop == len(self.modules) else None,
                    trainable_below=below,
                )
            )

    @property
    def layers(self) -> list[object]:
        return [layer for block in self.blocks for layer in block.layers]

    def attempt(self, index: int, number: int = 1) -> Attempt:
        return Attempt(self.plan.microbatch(index), number)

    def samples(self, index: int) -> tuple[Tensors, Tensors]:
        one = self.plan.microbatch(index)
        inputs = tuple(tensor[one.start : one.stop].clone() for tensor in self.inputs)
        return Tensors(inputs, len(inputs) == 1), Tensors((self.targets[one.start : one.stop].clone(),))

    def forward(self, index: int, attempt: int = 1) -> ForwardResult:
        """One microbatch through all blocks; the last one's result."""
        values, targets = self.samples(index)
        below = False
        for block in self.blocks:
            lacking = block.lacking(index)
            task = ForwardTask(
                attempt=self.attempt(index, attempt),
                number=index,
                inputs=values,
                targets=targets,
                keep=below or bool(lacking),
                input_gradient=below,
            )
            result = run_to_end(block.forward(task))
            below = below or bool(lacking)
            if result.outputs is not None:
                values = result.outputs
        return result

    def backward(self, index: int, attempt: int = 1) -> None:
        gradients: Tensors | None = None
        for block in reversed(self.blocks):
            task = BackwardTask(attempt=self.attempt(index, attempt), number=index, gradients=gradients)
            result = run_to_end(block.backward(task))
            gradients = result.gradients if result.gradients is not None else Tensors((None,))

    def detached_backward(self, index: int, workers: Sequence[DetachedBlock]) -> list[DetachedTask]:
        """The same by detached workers, one a block; gives the tasks."""
        gradients: Tensors | None = None
        tasks = []
        for block, worker in zip(reversed(self.blocks), reversed(workers), strict=True):
            attempt = self.attempt(index)
            task = block.detach(
                BackwardTask(attempt=attempt, number=index, gradients=gradients),
                "job",
                block.layers[0].ledger.life,
                worker.have,
            )
            tasks.append(task)
            for answer in worker.run(task):
                if isinstance(answer, PushGradient):
                    run_to_end(block.apply(ApplyTask(worker="b", push=answer)))
                else:
                    assert isinstance(answer, TaskFinished)
                    gradients = answer.gradients if answer.gradients is not None else Tensors((None,))
            block.release(attempt)
        return tasks

    def detached_workers(self) -> list[DetachedBlock]:
        workers = []
        for block in self.blocks:
            states = PulledStates()
            layers = [
                LayerCompute(
                    LayerModule(copy.deepcopy(layer.module.module), layer.index, str(layer.index)),
                    seed=self.training.seed,
                    version=lambda index=layer.index, states=states: states.version(index),  # type: ignore[misc]
                )
                for layer in block.layers
            ]
            workers.append(DetachedBlock(layers, states, head=self.head if block is self.blocks[-1] else None))
        return workers

    def train(self, start: int = 0, stop: int | None = None) -> list[float]:
        """Window 1: every microbatch forward and backward before the next."""
        losses = []
        for index in range(start, self.plan.num_microbatches if stop is None else stop):
            result = self.forward(index)
            assert result.loss is not None
            losses.append(result.loss)
            self.backward(index)
        return losses

    def copies(self, version: int) -> list[LayerCopy]:
        return [one for block in self.blocks for one in block.shelf.get(version)]

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor as `layerwise.reference` names it, copied."""
        found: dict[str, torch.Tensor] = {}
        for block in self.blocks:
            for layer in block.layers:
                foreign = {id(one) for one, _ in layer.compute.foreign}
                for name, parameter in layer.module.parameters.items():
                    if id(parameter) not in foreign:
                        found[f"parameter:{layer.index}.{name}"] = parameter.detach().clone()
                for name, buffer in zip(layer.module.buffer_names, layer.module.buffers, strict=True):
                    found[f"buffer:{layer.index}.{name}"] = buffer.clone()
                for name, moment in layer.moments().items():
                    found[f"moment:{layer.index}.{name}"] = moment.clone()
        return found


def plain_loop(pipeline: Pipeline, modules: Sequence[nn.Module]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The whole run of ``pipeline`` by a plain loop over copies of ``modules``; its state and losses."""

    def batches(microbatch: Microbatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inputs, targets = pipeline.samples(pipeline.plan.index(microbatch))
        return list(inputs.items), list(targets.items)

    loop = PlainLoop(copy.deepcopy(list(modules)), pipeline.training, pipeline.head, batches)
    for _ in range(pipeline.plan.num_updates):
        loop.step()
    return loop.state(), loop.losses


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    difference = first_difference(found, expected)
    assert difference is None, str(difference)
