"""Blocks built from assignments, trained, saved, verified and resumed: no processes, real files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.build import BuiltBlock, build_block, build_detached, build_modules
from layerwise.cuts import commit_manifest, cut_folder
from layerwise.data import load_dataset, microbatch_indices
from layerwise.errors import ConfigError, CorruptError, NotAllowedError, RejectedError
from layerwise.evaluation import evaluate_cut, export_cut
from layerwise.event_log import LogReader, find_logs
from layerwise.events import CutEvent, RestoreEvent
from layerwise.ids import Attempt
from layerwise.job import JobSpec, parse_job
from layerwise.messages import Assignment, BlockPlace, Course, LayerFile, PushGradient, TaskFinished, Tensors
from layerwise.models.weights import model_tensors
from layerwise.probe import probe
from layerwise.profile import Profile
from layerwise.rollbacks import rollbacks_in
from layerwise.server.hosted_block import HostedBlock
from layerwise.settings import ResolvedSettings, resolve
from layerwise.tasks import ApplyTask, BackwardTask, ForwardTask, run_to_end
from layerwise.verify import Difference, cut_state, first_difference, verify
from tests.unit.pipeline import Noted

CPU = torch.device("cpu")
TEXT = Path(__file__).read_text()


def job(folder: Path, model: dict[str, Any], **changes: Any) -> JobSpec:
    (folder / "text").write_text(TEXT)
    lm = model["name"] == "transformer-lm"
    data = {"name": "text", "path": str(folder / "text"), "batch": 8} if lm else {"name": "digits", "batch": 8}
    train = {"steps": 6, "seed": 5, "optimizer": changes.pop("optimizer", "sgd"), **changes.pop("train", {})}
    return parse_job(
        {
            "name": "built",
            "model": model,
            "data": data,
            "train": train,
            "async": {"window": 1, "accumulation": changes.pop("accumulation", 4)},
            **changes,
        }
    )


class Run:
    """One run of a job over two blocks (or one), driven by hand at window 1."""

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        *,
        num_blocks: int = 2,
        life: int = 1,
        cut: int = 0,
        course: Course | None = None,
    ) -> None:
        self.spec, self.directory = spec, directory
        self.course = course if course is not None else Course()
        self.rollbacks_json = ""
        self.profile: Profile = probe(spec, device=CPU)
        self.settings: ResolvedSettings = resolve(spec, self.profile.num_train_samples, num_blocks)
        half = len(self.profile.layers) // 2
        bounds = [0, half, len(self.profile.layers)] if num_blocks == 2 else [0, len(self.profile.layers)]
        self.route = tuple(
            BlockPlace(start=start, stop=stop, shard=f"shard-{start}", address="", life=life)
            for start, stop in pairwise(bounds)
        )
        self.noted = [Noted() for _ in self.route]
        self.cut = cut
        self.data = load_dataset(spec.data)

    def assignment(self, block: int) -> Assignment:
        return Assignment(
            job="job",
            spec_json=self.spec.to_json(),
            settings_json=self.settings.to_json(),
            profile_json=self.profile.to_json(),
            route=self.route,
            block=block,
            cut=self.cut,
            directory=str(self.directory),
            generation=1,
            course=self.course,
            rollbacks_json=self.rollbacks_json,
        )

    @contextmanager
    def blocks(self) -> Iterator[list[BuiltBlock]]:
        built: list[BuiltBlock] = []
        try:
            for block, noted in enumerate(self.noted):
                built.append(build_block(self.assignment(block), device=CPU, cut_events=noted))
            yield built
        finally:
            for one in built:
                one.close()

    def samples(self, index: int) -> tuple[Tensors, Tensors]:
        plan = self.settings.plan
        indices = microbatch_indices(self.spec.train.seed, plan.microbatch(index), plan.num_samples)
        inputs, targets = self.data.train.batch(indices)
        return Tensors(tuple(inputs), len(inputs) == 1), Tensors(tuple(targets), len(targets) == 1)

    def train(self, built: list[BuiltBlock], start: int, stop: int) -> None:
        """Microbatches [start, stop), each whole before the next."""
        for index in range(start, stop):
            attempt = Attempt(self.settings.plan.microbatch(index))
            values, targets = self.samples(index)
            for position, one in enumerate(built):
                result = run_to_end(
                    one.block.forward(
                        ForwardTask(
                            attempt=attempt,
                            number=index,
                            inputs=values,
                            targets=targets,
                            keep=True,
                            input_gradient=position > 0,
                        )
                    )
                )
                values = result.outputs if result.outputs is not None else values
            gradients: Tensors | None = None
            for one in reversed(built):
                task = BackwardTask(attempt=attempt, number=index, gradients=gradients)
                gradients = run_to_end(one.block.backward(task)).gradients

    def commit(self, version: int) -> None:
        """What the coordinator and the first shard do once all blocks have saved."""
        files: list[LayerFile] = []
        for noted in self.noted:
            ((saved, some, error),) = [one for one in noted.saved if one[0] == version]
            assert saved == version
            assert error == ""
            files += some
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
        commit_manifest(self.directory, version, json.dumps(manifest), life=1)


def trained(spec: JobSpec, directory: Path, num_blocks: int = 2) -> Run:
    run = Run(spec, directory, num_blocks=num_blocks)
    final = run.settings.plan.num_updates
    with run.blocks() as built:
        for one in built:
            one.block.cut_at(final)
        run.train(built, 0, run.settings.plan.num_microbatches)
    run.commit(final)
    return run


MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "hidden": [24, 16], "batchnorm": True, "dropout": 0.2},
    "cnn": {"name": "cnn", "channels": [4, 6], "dropout": 0.1},
    "resnet": {"name": "resnet", "depth": 18, "width": 4, "stem": "cifar"},
    "transformer-lm": {"name": "transformer-lm", "layers": 2, "width": 16, "heads": 2, "context": 12, "dropout": 0.1},
}


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer-lm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_verifies_bit_for_bit(tmp_path: Path, model: str, optimizer: str) -> None:
    settings = {"name": optimizer, "momentum": 0.9} if optimizer == "sgd" else optimizer
    run = trained(job(tmp_path, MODELS[model], optimizer=settings), tmp_path / "run")
    found = verify(run.spec, run.settings, run.directory, 6)
    assert found.equal, str(found.difference)
    assert found.num_tensors == len(cut_state(run.directory, 6))


def test_blocks_begin_with_the_weights_that_init_names(tmp_path: Path) -> None:
    mlp = {"name": "mlp", "hidden": [8]}
    info = load_dataset(job(tmp_path, mlp).data).info
    given = model_tensors(build_modules(job(tmp_path, mlp, train={"seed": 6}), info))
    assert not torch.equal(
        given["0.linear.weight"], model_tensors(build_modules(job(tmp_path, mlp), info))["0.linear.weight"]
    )
    save_file(given, tmp_path / "model.safetensors")
    with Run(job(tmp_path, mlp, init=str(tmp_path / "model.safetensors")), tmp_path / "run").blocks() as built:
        layers = [layer.module.module for one in built for layer in one.block.layers]
        assert all(torch.equal(tensor, given[name]) for name, tensor in model_tensors(layers).items())


def test_the_file_of_init_is_needed_only_where_training_begins(tmp_path: Path) -> None:
    """A cut holds every tensor, but once the file was gone nothing could be resumed, exported or evaluated."""
    model = {"name": "mlp", "hidden": [8, 8]}
    plain = job(tmp_path, model)
    weights = tmp_path / "model.safetensors"
    save_file(model_tensors(build_modules(plain, load_dataset(plain.data).info)), weights)
    spec = job(tmp_path, model, init=str(weights))
    run = Run(spec, tmp_path / "run")
    with run.blocks() as built:
        for one in built:
            one.block.cut_at(3)
        run.train(built, 0, run.settings.plan.gradients_before(3))
        trained = {name: one.clone() for block in built for name, one in run_tensors(block).items()}
    run.commit(3)
    resumed = Run(spec, tmp_path / "run", life=2, cut=3)
    weights.unlink()
    with resumed.blocks() as built:
        found = {name: one for block in built for name, one in run_tensors(block).items()}
        assert first_difference(found, trained) is None
    build_detached(resumed.assignment(1), device=CPU)
    assert evaluate_cut(run.directory, 3, device=CPU)["samples"] > 0
    assert load_file(export_cut(run.directory, 3, tmp_path / "out")).keys() == trained.keys()
    resumed.cut = 0
    with pytest.raises(ConfigError, match="init: no file at"), resumed.blocks():
        pass


def run_tensors(one: BuiltBlock) -> dict[str, torch.Tensor]:
    return {
        f"{layer.index}.{name}": tensor.detach()
        for layer in one.block.layers
        for name, tensor in layer.module.parameters.items()
    }


def test_a_bf16_run_with_clipping_verifies(tmp_path: Path) -> None:
    spec = job(tmp_path, MODELS["mlp"], optimizer="muon", train={"precision": "bf16", "clip": 0.5})
    run = trained(spec, tmp_path / "run")
    found = verify(spec, run.settings, run.directory, 6)
    assert found.equal, str(found.difference)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_stopped_in_mid_epoch_and_resumed_a_run_verifies(tmp_path: Path, accumulation: int) -> None:
    spec = job(tmp_path, MODELS["mlp"], optimizer="adamw", accumulation=accumulation)
    first = Run(spec, tmp_path / "run")
    plan = first.settings.plan
    with first.blocks() as built:
        for one in built:
            one.block.cut_at(3)
        first.train(built, 0, plan.gradients_before(3) + 1)
    first.commit(3)
    second = Run(spec, tmp_path / "run", life=2, cut=3)
    with second.blocks() as built:
        assert [len(one) for block in built for one in block.applied] == [plan.gradients_before(3)] * 3
        for one in built:
            one.block.cut_at(6)
        second.train(built, plan.gradients_before(3), plan.num_microbatches)
    second.commit(6)
    found = verify(spec, second.settings, second.directory, 6)
    assert found.equal, str(found.difference)
    lives = [LogReader(folder).header.life for folder in find_logs(second.directory)]
    assert lives == [1, 1, 2, 2]
    records = [one.event for one in LogReader(find_logs(second.directory)[-1]).records]
    assert next(one.version for one in records if isinstance(one, RestoreEvent)) == 3
    assert [one.version for one in records if isinstance(one, CutEvent)][-1] == 6


@pytest.mark.parametrize("cut", [3, 4])
def test_after_a_rollback_rates_are_halved_and_moments_forgotten_at_the_cut_gone_back_to(
    tmp_path: Path, cut: int
) -> None:
    spec = job(tmp_path, MODELS["mlp"], optimizer="adamw")
    first = Run(spec, tmp_path / "run")
    plan = first.settings.plan
    with first.blocks() as built:
        for one in built:
            one.block.cut_at(cut)
        first.train(built, 0, plan.gradients_before(cut + 1))
        usual = [layer.ledger.learning_rate for one in built for layer in one.block.layers]
    first.commit(cut)
    course = Course(version=3, rate_factor=0.5, synchronous_until=5)
    second = Run(spec, tmp_path / "run", life=2, cut=cut, course=course)
    rollback = {
        "time": 0.0,
        "version": 3,
        "reached": 4,
        "why": "it diverged",
        "rate_factor": 0.5,
        "synchronous_until": 5,
    }
    second.rollbacks_json = json.dumps([rollback])
    with second.blocks() as built:
        assert rollbacks_in(second.directory) == (rollback,)
        assert [bool(layer.moments()) for one in built for layer in one.block.layers] == [cut != 3] * 3
        second.train(built, plan.gradients_before(cut), plan.gradients_before(cut + 1))
        halved = [layer.ledger.learning_rate for one in built for layer in one.block.layers]
    assert [rate / 2 for rate in usual if rate is not None] == halved
    header = LogReader(find_logs(second.directory)[-1]).header
    assert (header.rate_factor, header.synchronous_until, header.moments_forgotten) == (0.5, 5, cut == 3)


def test_verify_reports_the_first_difference(tmp_path: Path) -> None:
    run = trained(job(tmp_path, MODELS["mlp"]), tmp_path / "run")
    state = cut_state(run.directory, 6)
    other = {name: tensor.clone() for name, tensor in state.items()}
    name = list(other)[3]
    other[name].view(-1)[0] += 0.5
    found = first_difference(state, other)
    assert found is not None
    assert f"{found.kind}:{found.name}" == name
    assert (found.num_different, found.largest) == (1, pytest.approx(0.5, rel=1e-3))
    del other[name]
    assert first_difference(state, other) == Difference(
        kind=found.kind, name=found.name, what="the run has it, the plain loop does not"
    )
    negative = {"parameter:0.x": torch.tensor([-0.0])}
    assert first_difference(negative, {"parameter:0.x": torch.tensor([0.0])}) is not None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"ledger": {"dropped": [{}, {}]}}, "2 microbatches were dropped"),
        ({"rollbacks": [{}]}, "training was rolled back"),
    ],
)
def test_verify_refuses_what_is_not_the_plain_loop_s_computation(
    tmp_path: Path, what: dict[str, Any], said: str
) -> None:
    spec = job(tmp_path, MODELS["mlp"])
    settings = resolve(spec, 100, 1)
    (tmp_path / "cuts").mkdir()
    commit_manifest(tmp_path, 1, json.dumps({"version": 1, "files": [], **what}), life=1)
    with pytest.raises(ConfigError, match=said):
        verify(spec, settings, tmp_path, 1)


def test_verify_refuses_a_window_above_one(tmp_path: Path) -> None:
    spec = parse_job({"name": "built", "model": MODELS["mlp"], "data": {"name": "digits", "batch": 8}})
    with pytest.raises(ConfigError, match=r"async\.window: got 2, expected 1"):
        verify(spec, resolve(spec, 100, 2), tmp_path, 1)


def test_detached_blocks_built_from_an_assignment_give_the_same_run(tmp_path: Path) -> None:
    spec = job(tmp_path, MODELS["cnn"], cluster={"backward": {"attached": False, "detached": 2}})
    run = Run(spec, tmp_path / "run")
    with run.blocks() as built:
        workers = [build_detached(run.assignment(block), device=CPU) for block in range(2)]
        for one in built:
            one.block.cut_at(6)
        for index in range(run.settings.plan.num_microbatches):
            attempt = Attempt(run.settings.plan.microbatch(index))
            values, targets = run.samples(index)
            for position, one in enumerate(built):
                task = ForwardTask(
                    attempt=attempt,
                    number=index,
                    inputs=values,
                    targets=targets,
                    keep=True,
                    input_gradient=position > 0,
                )
                values = run_to_end(one.block.forward(task)).outputs or values
            gradients: Tensors | None = None
            for one, worker in zip(reversed(built), reversed(workers), strict=True):
                back = BackwardTask(attempt=attempt, number=index, gradients=gradients)
                for answer in worker.run(one.block.detach(back, "job", 1, worker.have)):
                    if isinstance(answer, PushGradient):
                        run_to_end(one.block.apply(ApplyTask(worker="w", push=answer)))
                    elif isinstance(answer, TaskFinished):
                        gradients = answer.gradients
                one.block.release(attempt)
                assert one.block.store_bytes == 0
    run.commit(6)
    found = verify(spec, run.settings, run.directory, 6)
    assert found.equal, str(found.difference)


def test_a_detached_worker_without_a_layers_state_refuses_the_task(tmp_path: Path) -> None:
    spec = job(tmp_path, MODELS["mlp"], cluster={"backward": {"attached": False, "detached": 2}})
    run = Run(spec, tmp_path / "run", num_blocks=1)
    with run.blocks() as (built,):
        block = built.block
        attempt = Attempt(run.settings.plan.microbatch(0))
        values, targets = run.samples(0)
        task = ForwardTask(attempt=attempt, number=0, inputs=values, targets=targets, keep=True, input_gradient=False)
        run_to_end(block.forward(task))
        pretended = tuple(layer.revision() for layer in block.layers)
        detached = block.detach(BackwardTask(attempt=attempt, number=0, gradients=None), "job", 1, pretended)
        with pytest.raises(RejectedError, match=r"it brought no state of layers \[0, 1, 2\] in life 1"):
            list(build_detached(run.assignment(0), device=CPU).run(detached))


def test_a_damaged_cut_is_not_restored(tmp_path: Path) -> None:
    run = trained(job(tmp_path, MODELS["mlp"]), tmp_path / "run")
    path = cut_folder(run.directory, 6) / "layer-001.life-1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    again = Run(run.spec, run.directory, life=2, cut=6)
    with pytest.raises(CorruptError, match=r"layer-001\.life-1\.safetensors has"), again.blocks():
        pass


def test_other_code_than_the_job_was_planned_with_is_refused(tmp_path: Path) -> None:
    run = Run(job(tmp_path, MODELS["mlp"]), tmp_path / "run")
    other = Run(job(tmp_path, {**MODELS["mlp"], "hidden": [20, 16]}), tmp_path / "run")
    run.profile = other.profile
    with pytest.raises(ConfigError, match="the same code must be installed everywhere"), run.blocks():
        pass


def test_imports_must_be_allowed_where_the_block_is_built(tmp_path: Path) -> None:
    run = Run(job(tmp_path, MODELS["mlp"]), tmp_path / "run")
    values = json.loads(run.spec.to_json())
    values["model"] = {"import": "tests.unit.test_probe:misfits"}
    run.spec = parse_job(values)
    with pytest.raises(NotAllowedError, match="--allow-import"), run.blocks():
        pass


@pytest.mark.parametrize(("mode", "slots"), [("synchronous", 1), ("asynchronous", 2)])
def test_a_synchronous_job_computes_one_pass_at_a_time(tmp_path: Path, mode: str, slots: int) -> None:
    run = Run(job(tmp_path, MODELS["mlp"], mode=mode, cluster={"slots": 2}), tmp_path / "run")
    hosted = HostedBlock(
        run.assignment(0),
        device=CPU,
        allowed_imports=(),
        report=lambda task, outcome: None,
        cut_taken=lambda version: None,
        cut_saved=lambda version, files, error: None,
    )
    assert hosted.num_slots == slots
    hosted.close()


def test_a_block_that_cannot_be_built_leaves_no_thread_and_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(job(tmp_path, MODELS["mlp"]), tmp_path / "run")

    def refuse(*_: object) -> None:
        raise NotAllowedError("loss.import: not allowed here")

    monkeypatch.setattr("layerwise.build.job_head", refuse)
    before = set(threading.enumerate())
    with pytest.raises(NotAllowedError):
        build_block(run.assignment(1), device=CPU, cut_events=Noted())
    assert set(threading.enumerate()) <= before
    assert find_logs(run.directory) == []
