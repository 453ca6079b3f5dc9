"""The plain PyTorch loop: one graph over all layers, one optimizer over all parameters, nothing asynchronous.

What a run at window 1 and in synchronous mode must equal bit for bit, and what asynchronous runs are compared with.
It shares with them what defines the job (model, data, sampling, loss, optimizer, schedule, seeds) and none of the
machinery that is to be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layerwise.assembly import Training
from layerwise.build import build_modules, training_of
from layerwise.data import Batch, Dataset, load_dataset
from layerwise.head import Head, job_head
from layerwise.ids import Microbatch
from layerwise.job import JobSpec
from layerwise.messages import Tensors
from layerwise.optimizers import build_optimizer, optimizer_state, set_learning_rate
from layerwise.randomness import layer_randomness, layer_seed
from layerwise.schedules import learning_rate_factor
from layerwise.settings import ResolvedSettings

Batches = Callable[[Microbatch], Batch]
"""The samples of a microbatch: inputs and targets."""


class PlainLoop:
    """Trains ``modules``, one update a `step`, in one thread.

    Gradients of an update's microbatches are summed in position order, each times its samples, and divided by the
    samples; a single one is used as it is. They are clipped layer by layer. The learning rate follows the samples
    before the update. A layer's randomness is seeded from the microbatch and the layer.
    """

    def __init__(self, modules: Sequence[nn.Module], training: Training, head: Head, batches: Batches) -> None:
        """``training.policy`` does not matter here: nothing is ever stale."""
        self.modules = list(modules)
        self.version = 0
        self.losses: list[float] = []
        """The microbatches' mean losses, in order."""
        self._training, self._head, self._batches = training, head, batches
        self._device = training.precision.device
        for module in self.modules:
            module.to(self._device).train()
        named = [(name, one) for name, one in nn.Sequential(*self.modules).named_parameters() if one.requires_grad]
        self._parameters = [one for _, one in named]
        self._by_layer: dict[str, list[nn.Parameter]] = {}
        for name, one in named:
            self._by_layer.setdefault(name.partition(".")[0], []).append(one)
        self.optimizer = build_optimizer(training.optimizer, named) if named else None

    def step(self) -> None:
        """One update from the next ``plan.count(version)`` microbatches."""
        plan, update = self._training.plan, self.version
        first = plan.gradients_before(update)
        microbatches = [plan.microbatch(index) for index in range(first, first + plan.count(update))]
        if len(microbatches) == 1:
            self._backward(microbatches[0])
        else:
            self._accumulate(microbatches)
        if self.optimizer is not None:
            if self._training.clip is not None:
                for parameters in self._by_layer.values():
                    nn.utils.clip_grad_norm_(parameters, self._training.clip)
            samples, run = plan.samples_before(update), max(plan.total_samples, 1)
            set_learning_rate(self.optimizer, learning_rate_factor(self._training.schedule, samples, run))
            self.optimizer.step()
        self.version += 1

    def _accumulate(self, microbatches: Sequence[Microbatch]) -> None:
        total: list[torch.Tensor | None] = [None] * len(self._parameters)
        for microbatch in microbatches:
            self._backward(microbatch)
            for position, parameter in enumerate(self._parameters):
                gradient, before = parameter.grad, total[position]
                if gradient is None:
                    continue
                if before is None:
                    total[position] = gradient * microbatch.num_samples
                else:
                    before.add_(gradient, alpha=microbatch.num_samples)
        samples = sum(one.num_samples for one in microbatches)
        for parameter, one in zip(self._parameters, total, strict=True):
            parameter.grad = None if one is None else one.div_(samples)

    def _backward(self, microbatch: Microbatch) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self.loss(microbatch)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self.losses.append(float(loss.detach()))

    def loss(self, microbatch: Microbatch) -> torch.Tensor:
        """The mean loss of one microbatch in training mode, with its graph."""
        inputs, targets = self._batches(microbatch)
        value = self._load(inputs)
        for index, module in enumerate(self.modules):
            seed = layer_seed(self._training.seed, microbatch, index)
            with layer_randomness(seed, self._device), self._training.precision.context():
                value = module(value)
        with self._training.precision.context():
            return self._head.loss(_tensors(value), _tensors(self._load(targets)))

    @torch.no_grad()
    def evaluate(self, data: Dataset, samples: int = 64) -> dict[str, float]:
        """Mean ``loss`` and metrics over ``data``, ``samples`` at a time, in evaluation mode."""
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for module in self.modules:
            module.eval()
        for start in range(0, len(data), samples):
            stop = min(start + samples, len(data))
            inputs, targets = data.batch(range(start, stop))
            value = self._load(inputs)
            wanted = _tensors(self._load(targets))
            with self._training.precision.context():
                for module in self.modules:
                    value = module(value)
                loss = float(self._head.loss(_tensors(value), wanted))
            found = [("loss", loss * (stop - start), float(stop - start))]
            found += [(one.name, one.total, one.count) for one in self._head.metrics(_tensors(value), wanted)]
            for name, total, count in found:
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
        for module in self.modules:
            module.train()
        return {name: total / counts[name] for name, total in totals.items() if counts[name]}

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors, not copied, as ``parameter:<layer>.<name>``, ``buffer:...``, ``moment:...``."""
        model = nn.Sequential(*self.modules)
        found: dict[str, torch.Tensor] = {f"parameter:{name}": one.detach() for name, one in model.named_parameters()}
        found.update({f"buffer:{name}": one for name, one in model.named_buffers()})
        if self.optimizer is not None:
            found.update({f"moment:{name}": one for name, one in optimizer_state(self.optimizer).items()})
        return found

    def _load(self, tensors: Sequence[torch.Tensor]) -> Any:
        moved = tuple(one.to(self._device) for one in tensors)
        return moved[0] if len(moved) == 1 else moved


def train_reference(
    spec: JobSpec,
    settings: ResolvedSettings,
    *,
    updates: int | None = None,
    device: torch.device | None = None,
    allowed_imports: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> PlainLoop:
    """Run the plain loop for ``updates`` updates (all of the plan's by default) from the job's initial weights.

    ``progress(version)`` is called after each.

    Raises:
        ConfigError, NotAllowedError: the job's model or data can't be used here.
    """
    data = load_dataset(spec.data, allowed_imports)
    plan, seed = settings.plan, spec.train.seed
    loop = PlainLoop(
        build_modules(spec, data.info, allowed_imports),
        training_of(spec, settings, device if device is not None else torch.device("cpu")),
        job_head(spec, allowed_imports),
        lambda microbatch: data.training_batch(seed, microbatch),
    )
    for _ in range(plan.num_updates if updates is None else updates):
        loop.step()
        if progress is not None:
            progress(loop.version)
    return loop


def _tensors(value: Any) -> Tensors:
    return Tensors((value,)) if isinstance(value, torch.Tensor) else Tensors(tuple(value), single=False)
