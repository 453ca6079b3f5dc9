"""One synchronous peer, measured in a process of its own: ``python -m benchmarks.baselines PEER --spec JOB.yaml``.

Peers: ``plain`` (one process; ``--threads``), ``ddp`` (gloo, 2 ranks, one thread each), ``gpipe``, ``1f1b`` and ``zero-bubble`` (torch's pipelining, 2
stages, one thread each). All train the job file's model on its data with its optimizer, ``batch`` samples an update, and print one
JSON object with samples a second. The layers are split between the stages where the job's own partition would split them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble

from layerwise.data import load_dataset, microbatch_indices
from layerwise.ids import Microbatch
from layerwise.job import JobSpec
from layerwise.losses import build_loss
from layerwise.memory import keep_freed_memory
from layerwise.models import build_model
from layerwise.optimizers import build_optimizer
from layerwise.overrides import read_job

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "zero-bubble": ScheduleInterleavedZeroBubble}


class Training:
    """What every peer shares: the model's layers, a stream of batches, the loss."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.data = load_dataset(spec.data)
        self.layers = build_model(spec.model, spec.train.seed, self.data.info)
        self.loss = build_loss(spec.loss)
        self.batch = spec.data.batch

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """A few whole batches, loaded before the clock starts."""
        size = len(self.data.train)
        found = []
        for index in range(min(8, size // self.batch)):
            microbatch = Microbatch(0, index * self.batch, (index + 1) * self.batch)
            inputs, targets = self.data.train.batch(microbatch_indices(self.spec.train.seed, microbatch, size))
            found.append((inputs[0], targets[0]))
        return found

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The job's optimizer over ``module``'s parameters."""
        return build_optimizer(self.spec.train.optimizer, module.named_parameters())


def timed(
    step: Callable[[Tensor, Tensor], None],
    batches: Sequence[tuple[Tensor, Tensor]],
    warmup: int,
    updates: int,
    batch: int,
    barrier: Callable[[], object],
) -> float:
    """Samples a second over ``updates`` calls of ``step`` after ``warmup`` ones."""
    for index in range(warmup):
        step(*batches[index % len(batches)])
    barrier()
    start = time.perf_counter()
    for index in range(updates):
        step(*batches[index % len(batches)])
    barrier()
    return updates * batch / (time.perf_counter() - start)


def plain(spec: JobSpec, arguments: argparse.Namespace) -> float:
    """One process: forward, backward, step; in microbatches when asked to."""
    training = Training(spec)
    model = nn.Sequential(*training.layers)
    optimizer = training.optimizer(model)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        for part, wanted in zip(
            inputs.chunk(arguments.microbatches), targets.chunk(arguments.microbatches), strict=True
        ):
            (training.loss(model(part), wanted) / arguments.microbatches).backward()
        optimizer.step()

    return timed(step, training.batches(), arguments.warmup, arguments.updates, training.batch, lambda: None)


def ddp(rank: int, spec: JobSpec, arguments: argparse.Namespace) -> float:
    """Two replicas, half of the batch each, gradients averaged by DistributedDataParallel."""
    training = Training(spec)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*training.layers))
    optimizer = training.optimizer(model.module)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        training.loss(model(inputs.chunk(2)[rank]), targets.chunk(2)[rank]).backward()
        optimizer.step()

    return timed(step, training.batches(), arguments.warmup, arguments.updates, training.batch, dist.barrier)


def pipeline(rank: int, spec: JobSpec, arguments: argparse.Namespace) -> float:
    """Two stages of torch's pipelining, one step of the schedule and of the optimizer for each batch."""
    training = Training(spec)
    split = arguments.split or len(training.layers) // 2
    module = nn.Sequential(*(training.layers[:split] if rank == 0 else training.layers[split:]))
    batches = training.batches()
    optimizer = training.optimizer(module)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    make = SCHEDULES[arguments.peer]
    stages = [stage] if make is ScheduleInterleavedZeroBubble else stage
    schedule = make(stages, arguments.microbatches, loss_fn=training.loss)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)
        optimizer.step()

    return timed(step, batches, arguments.warmup, arguments.updates, training.batch, dist.barrier)


def member(rank: int, arguments: argparse.Namespace, store: str) -> None:
    """One of two ranks in a process of its own; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    spec = read_job(arguments.spec)
    speed = ddp(rank, spec, arguments) if arguments.peer == "ddp" else pipeline(rank, spec, arguments)
    if rank == 0:
        print(json.dumps({"peer": arguments.peer, "samples_per_second": speed}))
    dist.destroy_process_group()


def main() -> None:
    """Measure one peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["plain", "ddp", *SCHEDULES])
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument(
        "--keep-memory", action="store_true", help="let the allocator keep what is freed, as layerwise does"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--split", type=int, default=0, help="first layer of the second stage")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--updates", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory:
        keep_freed_memory()
    if arguments.peer == "plain":
        speed = plain(read_job(arguments.spec), arguments)
        print(json.dumps({"peer": "plain", "threads": arguments.threads, "samples_per_second": speed}))
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(member, args=(arguments, f"{folder}/store"), nprocs=2)


if __name__ == "__main__":
    main()
