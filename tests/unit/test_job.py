from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from layerwise.errors import ConfigError
from layerwise.job import JobSpec, job_schema, parse_job
from layerwise.overrides import read_job
from layerwise.section import Import
from layerwise.sections import Accuracy, Cosine, Muon, Sgd, Text, TransformerLm

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

SKETCH = """
name: stdlib-lm
model: {name: transformer-lm, layers: 8, width: 256, heads: 4, context: 128}
init: null
data:  {name: text, path: python-stdlib, batch: 32, validation: 0.05}
loss:  cross-entropy
train:
  steps: 400
  seed: 1
  optimizer: {name: muon, lr: 2.0e-2}
  schedule: {name: cosine, warmup: 0.1}
  clip: null
  precision: float32
cluster: {shards: 2, forward: 1, backward: auto, slots: auto}
mode: asynchronous
async: {window: auto, accumulation: auto, backward_weights: latest, delay_policy: auto, max_staleness: 8}
checkpoint: {every: 100, keep: 3, path: runs/stdlib-lm}
"""


def job(**sections: Any) -> JobSpec:
    return parse_job({"name": "x", "model": "mlp", "data": "digits", **sections}, source="job.yaml")


def problem(**sections: Any) -> str:
    """What is wrong with a job, without the name of its file; fails when it is more than one line."""
    with pytest.raises(ConfigError) as caught:
        job(**sections)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("job.yaml: ")
    return text.removeprefix("job.yaml: ")


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_the_whole_file_is_read() -> None:
    spec = parse_job(SKETCH)
    assert spec.model == TransformerLm(layers=8, width=256, heads=4, context=128)
    assert spec.train.optimizer == Muon(lr=0.02)
    assert spec.train.schedule == Cosine(warmup=0.1)
    assert (spec.train.steps, spec.train.epochs, spec.train.clip) == (400, None, None)
    assert (spec.cluster.attached, spec.cluster.num_detached) == (True, 0)
    assert (spec.asynchrony.window, spec.asynchrony.max_staleness) == ("auto", 8)
    assert (spec.checkpoint.every, spec.checkpoint_path) == (100, "runs/stdlib-lm")


def test_a_job_needs_no_more_than_name_model_and_data() -> None:
    spec = job()
    assert (spec.train.steps, spec.train.epochs, spec.checkpoint_path) == (None, None, "runs/x")
    assert spec.train.optimizer == Muon()


@pytest.mark.parametrize("text", [SKETCH, *(path.read_text() for path in EXAMPLES)], ids=lambda one: one.split("\n")[0])
def test_json_gives_the_same_job_back(text: str) -> None:
    spec = parse_job(text)
    assert parse_job(spec.to_json()) == spec
    assert parse_job(spec.to_json()).to_json() == spec.to_json()
    assert parse_job(json.loads(spec.to_json())) == spec


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_jobs_and_follow_the_schema(path: Path) -> None:
    read_job(path)
    jsonschema.Draft202012Validator(job_schema()).validate(yaml.safe_load(path.read_text()))


def test_the_schema_refuses_what_the_parser_refuses() -> None:
    validator = jsonschema.Draft202012Validator(job_schema())
    jsonschema.Draft202012Validator.check_schema(job_schema())
    good = {"name": "x", "model": "mlp", "data": {"import": "a.b:c", "anything": [1]}, "async": {"window": 3}}
    assert validator.is_valid(good)
    parse_job(good)
    for bad in ({"modle": "mlp"}, {"model": "vgg"}, {"async": {"window": 0}}, {"train": {"optimizer": {"lr": 1}}}):
        assert not validator.is_valid({**good, **bad})
        with pytest.raises(ConfigError):
            parse_job({**good, **bad})


def test_numbers_may_be_written_as_people_write_them() -> None:
    spec = parse_job("{name: x, model: mlp, data: digits, train: {optimizer: {name: sgd, lr: 1e-1}, epochs: 1_000}}")
    assert spec.train.optimizer == Sgd(lr=0.1)
    assert spec.train.epochs == 1000
    assert job(train={"optimizer": {"name": "sgd", "lr": 1}}).train.optimizer == Sgd(lr=1.0)


def test_words_stay_words() -> None:
    """YAML 1.1 would make false of ``no`` and a date of ``2024-01-01``."""
    spec = parse_job("{name: 2024-01-01, model: {import: 'm:f', flag: no, time: 1:30, real: true}, data: digits}")
    assert spec.name == "2024-01-01"
    assert isinstance(spec.model, Import)
    assert spec.model.arguments == {"flag": "no", "time": "1:30", "real": True}


def test_the_users_own_code_is_listed_with_its_arguments() -> None:
    spec = job(
        model={"import": "mine.models:build", "depth": 3, "widths": [1, {"a": None}]},
        data={"import": "mine.data:load", "batch": 4, "split": "train"},
        loss={"import": "mine.losses:huber", "delta": 0.5},
        metrics=["accuracy", {"import": "mine.losses:hits"}],
    )
    assert spec.imports == ("mine.models:build", "mine.data:load", "mine.losses:huber", "mine.losses:hits")
    assert isinstance(spec.model, Import)
    assert spec.model.arguments == {"depth": 3, "widths": [1, {"a": None}]}
    assert isinstance(spec.data, Import)
    assert (spec.data.arguments, spec.data.batch) == ({"split": "train"}, 4)
    assert parse_job(spec.to_json()) == spec


def test_accuracy_is_measured_where_classes_are_learned() -> None:
    assert job().metrics == (Accuracy(),)
    assert job(metrics=[]).metrics == ()
    assert job(loss="mse", data={"name": "arrays", "path": "a.npz"}).metrics == ()


def test_data_follows_the_model_where_nothing_is_said() -> None:
    text = parse_job(SKETCH.replace("context: 128", "context: 64"))
    assert isinstance(text.data, Text)
    assert text.data.context == 64
    assert '"layout":"flat"' in job().to_json()
    assert '"layout":"image"' in job(model="cnn").to_json()


@pytest.mark.parametrize(
    ("backward", "attached", "detached"),
    [
        ("auto", True, 0),
        ("attached", True, 0),
        ({"attached": False, "detached": 2}, False, 2),
        ({"detached": 1}, True, 1),
    ],
)
def test_backward_workers_are_attached_detached_or_both(backward: object, attached: bool, detached: int) -> None:
    cluster = job(cluster={"backward": backward}).cluster
    assert (cluster.attached, cluster.num_detached) == (attached, detached)


def test_paths_are_made_absolute_for_other_processes() -> None:
    spec = job(init="start.safetensors", data={"name": "arrays", "path": "a.npz", "validation_path": "/b.npz"})
    moved = spec.with_absolute_paths(Path("/home/me"))
    assert (moved.init, moved.checkpoint_path) == ("/home/me/start.safetensors", "/home/me/runs/x")
    assert '"path":"/home/me/a.npz"' in moved.to_json()
    assert '"validation_path":"/b.npz"' in moved.to_json()
    assert '"path":"python-stdlib"' in parse_job(SKETCH).with_absolute_paths(Path("/home/me")).to_json()


def test_a_tilde_in_a_path_is_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    data = {"name": "arrays", "path": "~/a.npz"}
    spec = job(init="~/start.safetensors", data=data, checkpoint={"path": "~/runs/x"}).with_absolute_paths(Path("/tmp"))
    assert (spec.init, spec.checkpoint_path) == ("/home/me/start.safetensors", "/home/me/runs/x")
    assert '"path":"/home/me/a.npz"' in spec.to_json()


def test_a_job_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        job().name = "y"


def test_reading_jobs_does_not_load_torch() -> None:
    modules = "layerwise.job, layerwise.schedules, layerwise.imports, layerwise.data_info"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"modell": 1}, "modell: unknown key; did you mean 'model'?"),
        ({"train": {"stps": 3}}, "train.stps: unknown key; did you mean 'steps'?"),
        ({"train": {"optimizer": {"name": "muon", "nus": 3}}}, "train.optimizer.nus: unknown key; did you mean 'nu'?"),
        (
            {"train": {"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}},
            "train.optimizer.betas: unknown key; allowed here: name, lr, momentum, nesterov, weight_decay",
        ),
        (
            {"train": {"optimizer": {"name": "muon", "lr": "fast"}}},
            "train.optimizer.lr: got 'fast', expected a number > 0",
        ),
        ({"train": {"optimizer": {"name": "muon", "lr": 0}}}, "train.optimizer.lr: got 0, expected a number > 0"),
        (
            {"train": {"optimizer": {"name": "adamw", "betas": [0.9, 1.5]}}},
            "train.optimizer.betas[1]: got 1.5, expected a number >= 0 and < 1",
        ),
        ({"train": {"optimizer": "adam"}}, "train.optimizer: got 'adam', expected 'sgd' or 'adamw' or 'muon'"),
        ({"train": {"optimizer": {"lr": 1}}}, "train.optimizer.name: got null, expected 'sgd' or 'adamw' or 'muon'"),
        ({"train": {"seed": 1.5}}, "train.seed: got 1.5, expected a whole number >= 0 and < 9223372036854775808"),
        ({"train": {"epochs": True}}, "train.epochs: got true, expected a whole number >= 1 or null"),
        ({"train": {"precision": "fp16"}}, "train.precision: got 'fp16', expected 'float32' or 'bf16'"),
        (
            {"train": {"steps": 1, "epochs": 1}},
            "train.epochs: got 1, expected either train.steps or train.epochs, not both",
        ),
        ({"train": None}, "train: got null, expected a map"),
        ({"mode": "sync"}, "mode: got 'sync', expected 'asynchronous' or 'synchronous'"),
        ({"async": {"window": 0}}, "async.window: got 0, expected 'auto' or a whole number >= 1"),
        ({"async": {"max_staleness": "low"}}, "async.max_staleness: got 'low', expected 'auto' or a whole number >= 0"),
        ({"cluster": {"backward": {"detach": 1}}}, "cluster.backward.detach: unknown key; did you mean 'detached'?"),
        ({"cluster": {"backward": "none"}}, "cluster.backward: got 'none', expected 'auto' or 'attached' or a map"),
        ({"cluster": {"device": "gpu"}}, "cluster.device: got 'gpu', expected auto, cpu, cuda or cuda:N"),
        ({"cluster": {"shards": "two"}}, "cluster.shards: got 'two', expected a whole number >= 1"),
        (
            {"name": "a/b"},
            "name: got 'a/b', expected up to 100 letters, digits, '-', '_' or '.', a letter or digit first",
        ),
        ({"init": "model.pt"}, "init: got 'model.pt', expected a path that ends in .safetensors or null"),
        ({"model": {"import": "nothing"}}, "model.import: got 'nothing', expected package.module:function"),
        ({"model": {"name": "mlp", "hidden": [3, "4"]}}, "model.hidden[1]: got '4', expected a whole number >= 1"),
        ({"model": {"name": "resnet", "depth": 50}}, "model.depth: got 50, expected 18 or 34"),
        (
            {"data": {"name": "digits", "validation": 1}},
            "data.validation: got 1, expected a number >= 0 and < 1 or null",
        ),
        ({"metrics": "accuracy"}, "metrics: got 'accuracy', expected a list or null"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep: got 0, expected a whole number >= 1"),
        ({"timeouts": {"task": -1}}, "timeouts.task: got -1, expected a number > 0"),
    ],
    ids=lambda one: one.split(":")[0] if isinstance(one, str) else "",
)
def test_a_bad_value_is_refused_with_its_path_and_what_is_allowed(sections: dict[str, Any], message: str) -> None:
    assert problem(**sections) == message


def test_a_missing_key_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^job: data: nothing is given, expected 'digits' or 'text' or .* or import: "
    ):
        parse_job({"name": "x", "model": "mlp"})


def test_an_unknown_model_gets_the_list_of_models() -> None:
    expected = "'mlp' or 'cnn' or 'resnet' or 'transformer-lm' or import: package.module:function"
    assert problem(model="vgg") == f"model: got 'vgg', expected {expected}"
    assert problem(model={"name": "vgg", "layers": 3}) == f"model.name: got 'vgg', expected {expected}"


@pytest.mark.parametrize("clip", ["global", {"norm": "global"}, {"global": 1.0}])
def test_global_norm_clipping_is_refused_with_the_reason(clip: object) -> None:
    text = problem(train={"clip": clip})
    assert text.startswith("train.clip: got ")
    assert "the global norm needs the gradients of all layers at once" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"cluster": {"backward": {"detached": 1}}, "async": {"backward_weights": "latest"}},
            "async.backward_weights: got 'latest', expected 'auto' or 'recompute' with detached backward workers",
        ),
        (
            {"cluster": {"backward": {"attached": False}}},
            "cluster.backward.detached: got 0, expected at least 2, the number of shards, when attached is false",
        ),
        (
            {"cluster": {"shards": 3, "backward": {"attached": False, "detached": 2}}},
            "cluster.backward.detached: got 2, expected at least 3, the number of shards, when attached is false",
        ),
        (
            {"cluster": {"shards": 1}, "checkpoint": {"standby": True}},
            "checkpoint.standby: got true, expected at least 2 cluster.shards with it",
        ),
        (
            {"data": {"name": "digits", "batch": 30}, "async": {"accumulation": 4}},
            "async.accumulation: got 4, expected a divisor of data.batch, which is 30",
        ),
        ({"model": "transformer-lm"}, "data.name: got 'digits', expected 'text'"),
        ({"data": "text"}, "model.name: got 'mlp', expected 'transformer-lm'"),
        (
            {"model": {"name": "transformer-lm", "width": 10, "heads": 4}, "data": "text"},
            "model.heads: got 4, expected a divisor of model.width, which is 10",
        ),
        (
            {"model": {"name": "transformer-lm", "context": 8}, "data": {"name": "text", "context": 9}},
            "data.context: got 9, expected at most model.context, which is 8",
        ),
        (
            {"model": {"name": "transformer-lm", "vocabulary": 100}, "data": "text"},
            "model.vocabulary: got 100, expected at least 256",
        ),
        ({"model": "cnn", "data": {"name": "digits", "layout": "flat"}}, "data.layout: got 'flat', expected 'image'"),
        ({"loss": "mse"}, "loss: got 'mse', expected 'cross-entropy'"),
        (
            {"mode": "synchronous", "async": {"window": 9, "accumulation": 8}},
            "async.window: got 9, expected at most async.accumulation, which is 8",
        ),
        (
            {"train": {"optimizer": {"name": "sgd", "nesterov": True}}},
            "train.optimizer.nesterov: got true, expected false, or train.optimizer.momentum above 0",
        ),
    ],
    ids=lambda one: one.split(":")[0] if isinstance(one, str) else "",
)
def test_values_that_can_not_go_together_are_refused_with_the_reason(sections: dict[str, Any], message: str) -> None:
    assert problem(**sections).startswith(message)


def test_every_problem_has_a_line_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job("{name: x, model: mlp, data: digits, mode: x, train: {seed: -1}}", source="f.yaml")
    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == ["train.seed", "mode"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f.yaml: line 1, column 5: not readable as YAML"),
        ("a: 1\nb: 2\na: 3", "f.yaml: line 3, column 1: not readable as YAML: the key 'a' comes twice"),
        ("- 1", "f.yaml: got [1], expected a map"),
        ("", "f.yaml: got null, expected a map"),
        ("1: 2", "f.yaml: top level: got 1 as a key, expected a string"),
        ("a: !!binary aGk=", "f.yaml: a: got b'hi', expected text, a number"),
        ("a: !!python/name:os.system", "f.yaml: line 1, column 4: not readable as YAML"),
        ("a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n", "f.yaml: a: unknown key"),
    ],
)
def test_text_that_is_no_job_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(text, source="f.yaml")
    assert message in str(caught.value)


def test_a_small_file_that_means_a_huge_one_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="can't be a job file"):
        parse_job("\n".join(lines))
    with pytest.raises(ConfigError, match="can't be a job file"):
        parse_job("a: " + "[" * 60 + "]" * 60)
    with pytest.raises(ConfigError, match="larger than"):
        parse_job("# " + "x" * (1 << 20))


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job file at .*missing\.yaml"):
        read_job(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        read_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml can't be read"):
        read_job(tmp_path / "latin.yaml")
