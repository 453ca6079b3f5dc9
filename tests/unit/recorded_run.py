"""A job that is driven by hand in a random order, with real blocks, real logs and real cuts, and no processes.

What slot threads, detached workers and links do, `RecordedRun` does step by step in one thread: it lets other steps come
between the layers of a pass, between a worker's task and its gradients, between a forward and its backward pass.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from layerwise.build import BuiltBlock, build_block, build_detached
from layerwise.cuts import commit_manifest
from layerwise.data import load_dataset, microbatch_indices
from layerwise.detached import DetachedBlock
from layerwise.ids import Attempt
from layerwise.job import JobSpec, parse_job
from layerwise.messages import Assignment, BlockPlace, LayerFile, PushGradient, StandbySource, TaskFinished, Tensors
from layerwise.probe import probe
from layerwise.profile import Profile
from layerwise.settings import ResolvedSettings, resolve
from layerwise.standby_bytes import LayerBytes
from layerwise.tasks import ApplyTask, BackwardResult, BackwardTask, ForwardTask, InputGradient, Steps

CPU = torch.device("cpu")
NO_GRADIENT = Tensors((None,))
ALLOWED = ("tests.integration.own_code",)
MLP = {"name": "mlp", "hidden": [12, 12, 8], "batchnorm": True, "dropout": 0.2}
Journey = Generator[None, None, None]


def recorded_spec(**sections: Any) -> JobSpec:
    """Batch normalisation, dropout, momentum, accumulation 2, window 3; ``sections`` replace what it says."""
    return parse_job(
        {
            "name": "recorded",
            "model": MLP,
            "data": {"name": "digits", "batch": 8},
            "train": {"steps": 10, "seed": 5, "optimizer": {"name": "muon"}},
            "async": {"window": 3, "accumulation": 2},
            "checkpoint": {"every": 3},
            **sections,
        }
    )


class Saved:
    """What the cut writers tell."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.files: dict[int, tuple[LayerFile, ...]] = {}

    def cut_taken(self, version: int) -> None:
        """See `layerwise.cut_shelf.CutEvents`."""

    def cut_saved(self, version: int, files: tuple[LayerFile, ...], error: str) -> None:
        """See `layerwise.cut_shelf.CutEvents`."""
        assert error == ""
        with self._changed:
            self.files[version] = files
            self._changed.notify_all()

    def wait(self, version: int) -> tuple[LayerFile, ...]:
        """The files of a cut that was taken."""
        with self._changed:
            assert self._changed.wait_for(lambda: version in self.files, 30)
            return self.files[version]


class Copied:
    """The newest standby copies of a block."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._versions: dict[int, tuple[tuple[LayerFile, ...], dict[int, LayerBytes]]] = {}

    def written(self, version: int, files: tuple[LayerFile, ...], layers: dict[int, LayerBytes]) -> None:
        """See `layerwise.standby_writer.Written`."""
        with self._changed:
            self._versions[version] = files, layers
            self._changed.notify_all()

    def wait(self, version: int) -> tuple[tuple[LayerFile, ...], dict[int, LayerBytes]]:
        """The copy of ``version``."""
        with self._changed:
            assert self._changed.wait_for(lambda: version in self._versions, 30)
            return self._versions[version]


@dataclass
class RecordedRun:
    """A job over blocks that end at ``splits``. Everything random follows from ``seed``.

    ``detached`` of the backward passes go to workers; ``lost`` of these tasks are lost on the way, ``aborted`` and
    ``dropped`` of the attempts end so.
    """

    spec: JobSpec
    directory: Path
    splits: tuple[int, ...] = (2,)
    seed: int = 1
    detached: float = 0.0
    lost: float = 0.0
    aborted: float = 0.0
    dropped: float = 0.0
    interleaved: bool = False
    attempts: dict[int, int] = field(default_factory=dict)
    next_life: int = 1

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.profile: Profile = probe(self.spec, device=CPU, allowed_imports=ALLOWED)
        bounds = [0, *self.splits, len(self.profile.layers)]
        self.settings: ResolvedSettings = resolve(self.spec, self.profile.num_train_samples, len(bounds) - 1)
        self.plan = self.settings.plan
        self.data = load_dataset(self.spec.data, ALLOWED)
        self.bounds = list(pairwise(bounds))
        self.lives = [0] * len(self.bounds)
        self.blocks: list[BuiltBlock | None] = [None] * len(self.bounds)
        self.saved = [Saved() for _ in self.bounds]
        self.copied = [Copied() for _ in self.bounds]
        self.workers: dict[int, DetachedBlock] = {}
        self.flying: dict[int, Journey] = {}
        self.number = 0

    # --- lives --------------------------------------------------------------------------------------------------------

    def begin(self, blocks: Sequence[int] | None = None, cut: int = 0, *, standby: bool = False) -> None:
        """New lives of ``blocks`` (of all) at ``cut``; what was in flight is aborted by those that stay.

        ``standby``: from their standby copies of that version.
        """
        chosen = list(range(len(self.bounds)) if blocks is None else blocks)
        copies = {position: self.copied[position].wait(cut) for position in chosen if standby}
        for journey in self.flying.values():
            journey.close()
        for position, one in enumerate(self.blocks):
            if one is None:
                continue
            if position in chosen:
                one.close()
                continue
            for index in self.flying:
                one.block.abort(Attempt(self.plan.microbatch(index), self.attempts[index]))
        self.flying.clear()
        for position in chosen:
            self.lives[position] = self.next_life
            self.next_life += 1
        for position in chosen:
            assignment = self._assignment(position, cut)
            files, layers = copies.get(position, ((), None))
            if standby:
                assignment = replace(assignment, standby=StandbySource(holder="other", life=1, files=files))
            self.saved[position] = Saved()
            self.copied[position] = Copied()
            self.blocks[position] = build_block(
                assignment,
                device=CPU,
                cut_events=self.saved[position],
                allowed_imports=ALLOWED,
                standby=layers,
                standby_written=self.copied[position].written,
            )
            self.built(position).block.updates_last = not self.interleaved
            self.workers.pop(position, None)
            for version in (*range(0, self.plan.num_updates, *self.settings.cut_intervals[:1]), self.plan.num_updates):
                if version > cut:
                    self.built(position).block.cut_at(version)

    def built(self, position: int) -> BuiltBlock:
        """The block as it lives now."""
        one = self.blocks[position]
        assert one is not None
        return one

    def close(self) -> None:
        """End every block."""
        for one in self.blocks:
            if one is not None:
                one.close()
        self.blocks = [None] * len(self.bounds)

    def commit(self, version: int) -> None:
        """What the coordinator and the first shard do once all blocks have saved."""
        files = [file for saved in self.saved for file in saved.wait(version)]
        manifest = {
            "job": "job",
            "version": version,
            "spec": json.loads(self.spec.to_json()),
            "settings": json.loads(self.settings.to_json()),
            "profile": json.loads(self.profile.to_json()),
            "files": [
                {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
                for one in files
            ],
        }
        commit_manifest(self.directory, version, json.dumps(manifest), [0], life=max(self.lives))

    def _assignment(self, position: int, cut: int) -> Assignment:
        route = tuple(
            BlockPlace(start=start, stop=stop, shard=f"shard-{start}", address="", life=life)
            for (start, stop), life in zip(self.bounds, self.lives, strict=True)
        )
        return Assignment(
            job="job",
            spec_json=self.spec.to_json(),
            settings_json=self.settings.to_json(),
            profile_json=self.profile.to_json(),
            route=route,
            block=position,
            cut=cut,
            directory=str(self.directory),
            generation=max(self.lives),
        )

    # --- training -----------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version that all layers have reached."""
        return min(layer.ledger.version for position in range(len(self.bounds)) for layer in self.layers(position))

    def layers(self, position: int) -> Sequence[Any]:
        """A block's layers."""
        return self.built(position).block.layers

    def train(self, updates: int | None = None) -> None:
        """Until all layers have made ``updates`` updates (with others in flight), or until the end."""
        window = self.settings.window
        while updates is None or self.version < updates:
            waiting = [
                index
                for index in range(self.plan.num_microbatches)
                if index not in self.flying
                and any(layer.ledger.lacks(index) for at in range(len(self.bounds)) for layer in self.layers(at))
            ]
            if not waiting and not self.flying:
                return
            if waiting and len(self.flying) < window and self.chance.random() < 0.5:
                index = waiting[0]
                self.attempts[index] = self.attempts.get(index, 0) + 1
                self.flying[index] = self._journey(index, Attempt(self.plan.microbatch(index), self.attempts[index]))
            elif self.flying:
                index = self.chance.choice(sorted(self.flying))
                if next(self.flying[index], self) is self:
                    del self.flying[index]

    def _journey(self, index: int, attempt: Attempt) -> Iterator[None]:  # type: ignore[return]
        number, self.number = self.number, self.number + 1
        inputs, targets = self.data.train.batch(
            microbatch_indices(self.spec.train.seed, attempt.microbatch, self.plan.num_samples)
        )
        values = Tensors(tuple(inputs), len(inputs) == 1)
        goals = Tensors(tuple(targets), len(targets) == 1)
        below, keeps = False, []
        for position in range(len(self.bounds)):
            block = self.built(position).block
            lacking = block.lacking(index)
            keeps.append((below or bool(lacking), below))
            steps = block.forward(
                ForwardTask(
                    attempt=attempt,
                    number=number,
                    inputs=values,
                    targets=goals,
                    keep=below or bool(lacking),
                    input_gradient=below,
                )
            )
            result = yield from self._run(steps)
            below = below or bool(lacking)
            values = result.outputs if result.outputs is not None else values
            yield
        fate = self.chance.random()
        if fate < self.aborted:
            for position in range(len(self.bounds)):
                self.built(position).block.abort(attempt)
            return
        if fate < self.aborted + self.dropped:
            for position in range(len(self.bounds)):
                self.built(position).block.drop(attempt, "bad sample")
            return
        gradients: Tensors | None = None
        for position in reversed(range(len(self.bounds))):
            keep, hands_on = keeps[position]
            if not keep:
                continue
            task = BackwardTask(attempt=attempt, number=number, gradients=gradients)
            done = yield from self._backward(position, task)
            gradients = (done or NO_GRADIENT) if hands_on else None
            yield

    def _backward(self, position: int, task: BackwardTask) -> Generator[None, None, Tensors | None]:
        block = self.built(position).block
        while self.chance.random() < self.detached:
            found = yield from self._give(position, task)
            if isinstance(found, TaskFinished):
                block.release(task.attempt)
                return found.gradients
        early: list[InputGradient] = []
        result: BackwardResult = yield from self._run(block.backward(task), early)
        return early[0].gradients if early else result.gradients

    def _give(self, position: int, task: BackwardTask) -> Generator[None, None, TaskFinished | None]:
        """A worker computes the task; ``None``: it was lost on the way."""
        block, life = self.built(position).block, self.lives[position]
        if position not in self.workers:
            self.workers[position] = build_detached(self._assignment(position, 0), device=CPU, allowed_imports=ALLOWED)
        worker = self.workers[position]
        answers = list(worker.run(block.detach(task, "job", life, worker.have)))
        yield
        for answer in answers:
            if self.chance.random() < self.lost:
                return None
            if isinstance(answer, TaskFinished):
                return answer
            assert isinstance(answer, PushGradient)
            yield from self._run(block.apply(ApplyTask(worker="b", push=answer)))
            yield
        raise AssertionError("a worker's task has an end")

    def _run(self, steps: Steps[Any], early: list[InputGradient] | None = None) -> Generator[None, None, Any]:
        """To the end; between its steps others may come, where several slots are played."""
        while True:
            try:
                step = next(steps)
                if step is not None and early is not None:
                    early.append(step)
            except StopIteration as end:
                return end.value
            if self.interleaved:
                yield
