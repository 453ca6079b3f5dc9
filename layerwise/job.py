"""The job file: what a user writes to have a model trained.

`parse_job` turns YAML or JSON into a `JobSpec`, or refuses it with one sentence for each problem. What the
``auto`` values come to is decided by `resolve` once the number of samples and shards is known. No
torch here: the coordinator and the command line read jobs too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from layerwise.errors import ConfigError
from layerwise.section import Import, Section
from layerwise.sections import (
    Accuracy,
    Arrays,
    Asynchrony,
    Checkpoint,
    Cifar10,
    Cifar100,
    Cluster,
    Cnn,
    CrossEntropy,
    DataSpec,
    Digits,
    LossSpec,
    MeanSquaredError,
    MetricSpec,
    Mlp,
    ModelSpec,
    Resnet,
    Text,
    Timeouts,
    Train,
    TransformerLm,
)
from layerwise.settings import ResolvedSettings, resolve
from layerwise.specification import EXPECTED, describe, plain, read_mapping, sentences

__all__ = ["JobSpec", "ResolvedSettings", "job_schema", "parse_job", "resolve"]

DEFAULT_CONTEXT = 128


class JobSpec(Section):
    """A whole job file. `parse_job` makes it; its values are final, ``auto`` included."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        json_schema_extra={EXPECTED: "up to 100 letters, digits, '-', '_' or '.', a letter or digit first"},
    )
    model: ModelSpec
    init: (
        Annotated[
            str, Field(pattern=r"\.safetensors$", json_schema_extra={EXPECTED: "a path that ends in .safetensors"})
        ]
        | None
    ) = Field(default=None, description="a model.safetensors to start from")
    data: DataSpec
    loss: LossSpec = Field(default_factory=CrossEntropy)
    metrics: Annotated[tuple[MetricSpec, ...], Field(strict=False)] | None = Field(
        default=None, description="default: accuracy with cross-entropy"
    )
    train: Train = Field(default_factory=Train)
    cluster: Cluster = Field(default_factory=Cluster)
    mode: Literal["asynchronous", "synchronous"] = "asynchronous"
    asynchrony: Asynchrony = Field(default_factory=Asynchrony, alias="async")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    timeouts: Timeouts = Field(default_factory=Timeouts)

    @property
    def checkpoint_path(self) -> str:
        """Where cuts are kept: ``checkpoint.path``, or a folder of the job's name in ``runs``."""
        return self.checkpoint.path or f"runs/{self.name}"

    @property
    def imports(self) -> tuple[str, ...]:
        """Every ``module:function`` of the user's own that this job would run."""
        sections = (self.model, self.data, self.loss, *(self.metrics or ()))
        return tuple(section.target for section in sections if isinstance(section, Import))

    def to_json(self) -> str:
        """The job in one line of JSON with its keys sorted; `parse_job` gives back an equal job."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))

    def with_absolute_paths(self, folder: Path) -> JobSpec:
        """The same job with its relative paths read from ``folder``, for a process that runs elsewhere.

        ``~`` stands for the home of the user who calls.
        """
        values = self.model_dump(mode="json", by_alias=True)
        values["checkpoint"]["path"] = str(folder / Path(self.checkpoint_path).expanduser())
        if self.init is not None:
            values["init"] = str(folder / Path(self.init).expanduser())
        if isinstance(self.data, (Text, Cifar10, Cifar100, Arrays)):
            for key in ("path", "validation_path"):
                path = values["data"].get(key)
                if path is not None and not (isinstance(self.data, Text) and path == "python-stdlib"):
                    values["data"][key] = str(folder / Path(path).expanduser())
        return parse_job(values, source=f"job {self.name}")

    def with_shards(self, num_shards: int) -> JobSpec:
        """The same job on so many shards; its ``auto`` values stay open. On a single one there is nobody to keep standby copies."""
        values = self.model_dump(mode="json", by_alias=True)
        values["cluster"]["shards"] = num_shards
        values["checkpoint"]["standby"] &= num_shards > 1
        return parse_job(values, source=f"job {self.name} on {num_shards} shards")


def parse_job(job: str | Mapping[str, Any], source: str = "job") -> JobSpec:
    """Check a job given as YAML or JSON text or as a map; ``source`` names it in error messages.

    Raises:
        ConfigError: one line for each problem, with the key's path, the value received and what is allowed.
    """
    raw = read_mapping(job, source) if isinstance(job, str) else plain(job, source)
    try:
        spec = JobSpec.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in sentences(error, raw, JobSpec))) from None
    problems = list(_conflicts(spec))
    if problems:
        raise ConfigError("\n".join(f"{source}: {line}" for line in problems))
    return _complete(spec)


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, for editors."""
    schema = JobSpec.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "layerwise job"
    return schema


def _conflicts(spec: JobSpec) -> list[str]:
    """Pairs of values that are fine alone and impossible together."""
    problems: list[str] = []
    model, data, options = spec.model, spec.data, spec.asynchrony
    cluster = spec.cluster
    if not cluster.attached and cluster.num_detached < cluster.shards:
        problems.append(
            f"cluster.backward.detached: got {cluster.num_detached}, expected at least {cluster.shards}, the number of "
            "shards, when attached is false: each detached worker serves one block"
        )
    if cluster.num_detached and options.backward_weights in ("latest", "stashed"):
        problems.append(
            f"async.backward_weights: got {describe(options.backward_weights)}, expected 'auto' or 'recompute' with "
            "detached backward workers: they hold no activations, so they always run the block's forward pass again"
        )
    if spec.checkpoint.standby and cluster.shards < 2:
        problems.append(
            "checkpoint.standby: got true, expected at least 2 cluster.shards with it: a copy in the memory of the same "
            "process would be lost with it"
        )
    accumulation = options.accumulation
    if accumulation != "auto" and spec.data.batch % accumulation:
        problems.append(
            f"async.accumulation: got {accumulation}, expected a divisor of data.batch, which is {spec.data.batch}"
        )
    if isinstance(model, TransformerLm):
        if model.width % model.heads:
            problems.append(
                f"model.heads: got {model.heads}, expected a divisor of model.width, which is {model.width}"
            )
        if isinstance(data, (Digits, Cifar10, Cifar100)):
            problems.append(
                f"data.name: got {describe(data.name)}, expected 'text', arrays or an import with transformer-lm"
            )
        if isinstance(data, Text) and data.context is not None and data.context > model.context:
            problems.append(
                f"data.context: got {data.context}, expected at most model.context, which is {model.context}"
            )
        if isinstance(data, Text) and (model.vocabulary or 256) < 256:
            problems.append(f"model.vocabulary: got {model.vocabulary}, expected at least 256: data text is bytes")
    if isinstance(model, (Mlp, Cnn, Resnet)) and isinstance(data, Text):
        problems.append(
            f"model.name: got {describe(model.name)}, expected 'transformer-lm' or an import with data text"
        )
    if isinstance(model, (Cnn, Resnet)) and isinstance(data, Digits) and data.layout == "flat":
        problems.append(
            f"data.layout: got 'flat', expected 'image' or 'auto' with model {model.name}, which needs images"
        )
    if isinstance(spec.loss, MeanSquaredError) and isinstance(data, (Digits, Text, Cifar10, Cifar100)):
        problems.append(
            f"loss: got 'mse', expected 'cross-entropy' or an import: the targets of data {data.name} are classes"
        )
    names = [metric.name for metric in spec.metrics or () if isinstance(metric, Accuracy) and metric.top == 1]
    if len(names) > 1:
        problems.append("metrics: got 'accuracy' twice, expected each metric once")
    if (
        spec.mode == "synchronous"
        and options.window != "auto"
        and accumulation != "auto"
        and options.window > accumulation
    ):
        problems.append(
            f"async.window: got {options.window}, expected at most async.accumulation, which is {accumulation}: in "
            "synchronous mode no microbatch of the next update is admitted before this one is made"
        )
    return problems


def _complete(spec: JobSpec) -> JobSpec:
    """Fill in the defaults that follow from other sections, so that every process reads the same values."""
    updates: dict[str, Any] = {}
    if spec.metrics is None:
        updates["metrics"] = (Accuracy(),) if isinstance(spec.loss, CrossEntropy) else ()
    if isinstance(spec.data, Text) and spec.data.context is None:
        context = spec.model.context if isinstance(spec.model, TransformerLm) else DEFAULT_CONTEXT
        updates["data"] = spec.data.model_copy(update={"context": context})
    if isinstance(spec.data, Digits) and spec.data.layout == "auto":
        layout = "image" if isinstance(spec.model, (Cnn, Resnet)) else "flat"
        updates["data"] = spec.data.model_copy(update={"layout": layout})
    return spec.model_copy(update=updates) if updates else spec
