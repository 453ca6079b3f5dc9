"""The sections of a job file, one frozen class each. `layerwise.job` puts them together and checks how they fit.

A section that has a kind (model, data, loss, metric, optimizer, schedule) is written as a map with ``name:``, or
as the bare name when nothing else is to be said; where the user's own code may stand,
``import: package.module:function`` takes the place of ``name:`` and the other keys are that function's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from layerwise.section import (
    AutoCount,
    BareName,
    Count,
    Fraction,
    Import,
    NotNegative,
    Positive,
    Section,
    Seed,
    expand_name,
    kind_of,
)
from layerwise.specification import EXPECTED

# Models ---------------------------------------------------------------------------------------------------------------


class Mlp(Section):
    """Linear layers with an activation between them."""

    name: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(default=(128, 128), strict=False)
    activation: Literal["relu", "gelu"] = "relu"
    dropout: Fraction = 0.0
    batchnorm: bool = False
    outputs: Count | None = Field(default=None, description="default: the number of classes in the data")


class Cnn(Section):
    """3x3 convolutions, each followed by 2x2 max pooling while the image is large enough, and a linear head."""

    name: Literal["cnn"] = "cnn"
    channels: tuple[Count, ...] = Field(default=(32, 64), min_length=1, strict=False)
    dropout: Fraction = 0.0
    batchnorm: bool = True
    outputs: Count | None = Field(default=None, description="default: the number of classes in the data")


class Resnet(Section):
    """Residual network with basic blocks; ``stem: cifar`` is one 3x3 convolution without pooling."""

    name: Literal["resnet"] = "resnet"
    depth: Literal[18, 34] = 18
    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: Count = 64
    outputs: Count | None = Field(default=None, description="default: the number of classes in the data")


class TransformerLm(Section):
    """Causal language model with pre-norm blocks; the head is not tied to the embedding."""

    name: Literal["transformer-lm"] = "transformer-lm"
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    context: Count = 128
    expansion: Count = Field(default=4, description="hidden width of the feed-forward part, in widths")
    dropout: Fraction = 0.0
    vocabulary: Annotated[int, Field(ge=2)] | None = Field(default=None, description="default: the data's, or 256")


ModelSpec: TypeAlias = Annotated[
    Annotated[Mlp, Tag("mlp")]
    | Annotated[Cnn, Tag("cnn")]
    | Annotated[Resnet, Tag("resnet")]
    | Annotated[TransformerLm, Tag("transformer-lm")]
    | Annotated[Import, Tag("import")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("mlp", "cnn", "resnet", "transformer-lm"),
]


# Data -----------------------------------------------------------------------------------------------------------------


class DataSection(Section):
    """What every data source takes."""

    batch: Count = Field(default=32, description="samples in one update of a layer")
    validation: Fraction | None = Field(default=None, description="part of the samples kept for validation")
    split_seed: Seed = Field(default=0, description="chooses which samples those are; does not follow train.seed")


class Digits(DataSection):
    """scikit-learn's 8x8 handwritten digits: 1,797 samples of 10 classes."""

    name: Literal["digits"] = "digits"
    layout: Literal["auto", "image", "flat"] = "auto"
    validation: Fraction | None = 0.2


class Text(DataSection):
    """The bytes of a file, or of all files below a folder; ``python-stdlib`` is the running Python's own sources."""

    name: Literal["text"] = "text"
    path: str = Field(default="python-stdlib", min_length=1)
    pattern: str = Field(default="*", min_length=1, description="which files of a folder, as a glob")
    bytes: Count | None = Field(default=None, description="take at most so many bytes")
    context: Count | None = Field(default=None, description="bytes in a sample; default: the model's context")
    validation: Fraction | None = 0.05


class Cifar10(DataSection):
    """The official binary archive, unpacked or as .tar.gz; without ``validation`` the official test set is used."""

    name: Literal["cifar10"] = "cifar10"
    path: str = Field(default="data", min_length=1)


class Cifar100(DataSection):
    """The official binary archive, unpacked or as .tar.gz; without ``validation`` the official test set is used."""

    name: Literal["cifar100"] = "cifar100"
    path: str = Field(default="data", min_length=1)


class Arrays(DataSection):
    """Tensors in a .safetensors or .npz file, first dimension the sample."""

    name: Literal["arrays"] = "arrays"
    path: str = Field(min_length=1)
    validation_path: str | None = Field(default=None, description="a second file, with the same keys")
    inputs: tuple[str, ...] = Field(default=("inputs",), min_length=1, strict=False)
    targets: tuple[str, ...] = Field(default=("targets",), min_length=1, strict=False)


class ImportData(DataSection, Import):
    """A function that returns a map-style dataset, or a pair of them: training and validation."""


DataSpec: TypeAlias = Annotated[
    Annotated[Digits, Tag("digits")]
    | Annotated[Text, Tag("text")]
    | Annotated[Cifar10, Tag("cifar10")]
    | Annotated[Cifar100, Tag("cifar100")]
    | Annotated[Arrays, Tag("arrays")]
    | Annotated[ImportData, Tag("import")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("digits", "text"),
]


# Loss and metrics -----------------------------------------------------------------------------------------------------


class CrossEntropy(Section):
    """Classes along the last dimension of the output (or the second, as images have them)."""

    name: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: Fraction = 0.0


class MeanSquaredError(Section):
    """Mean of the squared differences."""

    name: Literal["mse"] = "mse"


class Accuracy(Section):
    """Part of the predictions whose ``top`` likeliest classes hold the target."""

    name: Literal["accuracy"] = "accuracy"
    top: Count = 1


class MeanAbsoluteError(Section):
    """Mean of the absolute differences."""

    name: Literal["mae"] = "mae"


LossSpec: TypeAlias = Annotated[
    Annotated[CrossEntropy, Tag("cross-entropy")]
    | Annotated[MeanSquaredError, Tag("mse")]
    | Annotated[Import, Tag("import")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("cross-entropy", "mse"),
]
MetricSpec: TypeAlias = Annotated[
    Annotated[Accuracy, Tag("accuracy")] | Annotated[MeanAbsoluteError, Tag("mae")] | Annotated[Import, Tag("import")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("accuracy", "mae"),
]


# Training -------------------------------------------------------------------------------------------------------------


class Sgd(Section):
    """Stochastic gradient descent, torch's arithmetic."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.05
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0

    @field_validator("nesterov")
    @classmethod
    def _nesterov_needs_momentum(cls, value: bool, info: Any) -> bool:
        if value and not info.data.get("momentum"):
            raise PydanticCustomError("expected", "false, or train.optimizer.momentum above 0 as well")
        return value


class AdamW(Section):
    """Adam with decoupled weight decay, torch's arithmetic."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), strict=False)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01


class Muon(Section):
    """Orthogonalised momentum on hidden matrices, Adam on the other parameters.

    The direction is ``nu * momentum + (1 - nu) * gradient``: below the usual ``nu = momentum`` the fresh gradient
    weighs more, which is what keeps training stable when gradients are stale.
    """

    name: Literal["muon"] = "muon"
    lr: Positive = 2e-2
    momentum: Fraction = 0.95
    nu: Annotated[float, Field(ge=0, le=1)] = 0.7
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    weight_decay: NotNegative = 0.0
    adjust_lr: Literal["original", "match-rms-adamw"] = "original"
    adam_lr: Positive = 3e-3
    adam_betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.99), strict=False)
    adam_eps: Positive = 1e-8
    adam_weight_decay: NotNegative = 0.0


OptimizerSettings: TypeAlias = Annotated[
    Annotated[Sgd, Tag("sgd")] | Annotated[AdamW, Tag("adamw")] | Annotated[Muon, Tag("muon")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("sgd", "adamw", "muon"),
]


class Constant(Section):
    """The same learning rate throughout, after the warm-up."""

    name: Literal["constant"] = "constant"
    warmup: Fraction = Field(default=0.0, description="part of the run's samples over which the rate rises")


class Cosine(Section):
    """Half a cosine from 1 down to ``final``."""

    name: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.1
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class Step(Section):
    """Times ``gamma`` at each milestone, given as a part of the run's samples."""

    name: Literal["step"] = "step"
    warmup: Fraction = 0.0
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.5, 0.75), strict=False)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1


ScheduleSpec: TypeAlias = Annotated[
    Annotated[Constant, Tag("constant")] | Annotated[Cosine, Tag("cosine")] | Annotated[Step, Tag("step")],
    Discriminator(kind_of),
    BeforeValidator(expand_name),
    BareName("constant", "cosine", "step"),
]


def _clip(value: object) -> object:
    words = [value, *value.keys(), *value.values()] if isinstance(value, Mapping) else [value]
    if "global" in words:
        raise PydanticCustomError(
            "expected",
            "null or a number > 0, the largest norm of one layer's gradient: the global norm needs the gradients of "
            "all layers at once, and here each layer is updated as soon as its own gradient exists",
        )
    return value


class Train(Section):
    """How long, with what optimizer, how precisely."""

    steps: Count | None = Field(default=None, description="updates of every layer; give this or epochs")
    epochs: Count | None = Field(default=None, description="passes over the training data; default 1")
    seed: Seed = 0
    optimizer: OptimizerSettings = Field(default_factory=Muon)
    schedule: ScheduleSpec = Field(default_factory=Cosine)
    clip: Annotated[Positive | None, BeforeValidator(_clip)] = Field(
        default=None, description="largest norm of one layer's gradient"
    )
    precision: Literal["float32", "bf16"] = "float32"
    evaluate_every: Count | None = Field(default=None, description="updates between evaluations; default: at the end")
    on_bad_sample: Literal["fail", "drop"] = Field(
        default="fail", description="what a sample that can't be loaded, or whose loss is not finite, leads to"
    )
    max_dropped: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="part of an epoch's samples that may be dropped before the job fails"
    )
    on_divergence: Literal["stop", "rollback", "ignore"] = Field(
        default="stop",
        description="what a loss leads to that rises for good, stalls, or is not finite, or such a gradient",
    )

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("steps") is not None:
            raise PydanticCustomError("expected", "either train.steps or train.epochs, not both")
        return value


# Cluster --------------------------------------------------------------------------------------------------------------


class Backward(Section):
    """Who computes backward passes: threads inside the shards, processes of their own, or both."""

    attached: bool = True
    detached: Annotated[int, Field(ge=0)] = 0


class Cluster(Section):
    """How many of each role one job gets."""

    shards: Count = 2
    forward: Count = 1
    backward: Literal["auto", "attached"] | Backward = "auto"
    slots: AutoCount = Field(default="auto", description="passes computed at once on a device; auto: 1")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+)$",
        json_schema_extra={EXPECTED: "auto, cpu, cuda or cuda:N"},
    )

    @property
    def attached(self) -> bool:
        """Whether the shards compute backward passes themselves."""
        return self.backward.attached if isinstance(self.backward, Backward) else True

    @property
    def num_detached(self) -> int:
        """Backward worker processes that stand apart from the shards."""
        return self.backward.detached if isinstance(self.backward, Backward) else 0


class Asynchrony(Section):
    """The knobs that trade speed for staleness; ``auto`` suits most jobs."""

    window: AutoCount = Field(
        default="auto", description="microbatches in flight; auto: as many as shards, up to twice that on slow links"
    )
    accumulation: AutoCount = Field(default="auto", description="microbatches in an update; auto: twice the window")
    backward_weights: Literal["auto", "latest", "stashed", "recompute"] = "auto"
    delay_policy: Literal["auto", "constant", "inverse"] = "auto"
    max_staleness: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="updates; a window that could exceed it is refused"
    )


class Checkpoint(Section):
    """Cuts that are kept on disk."""

    every: AutoCount | None = Field(
        default="auto",
        description="updates between cuts; auto: ten a run and at least one in 1000; null: at the end only",
    )
    keep: Count = 3
    path: str | None = Field(default=None, min_length=1, description="default: runs/ and the job's name")
    standby: bool = Field(
        default=False,
        description="newer states of each block are kept in the memory of another shard, for a block whose shard is lost",
    )
    standby_every: AutoCount = Field(
        default="auto",
        description="updates between these states; auto: a tenth of the updates between cuts, at least 10",
    )


class Timeouts(Section):
    """Seconds until something silent is given up."""

    start: Positive = Field(default=120.0, description="for every role to be there")
    lease: Positive = Field(default=60.0, description="for a leased microbatch to be applied")
    task: Positive = Field(default=60.0, description="for one pass over a block, or one answer of a peer")
    heartbeat: float = Field(
        default=15.0, ge=2.0, description="without a sign of life of a process, which gives one a second"
    )
    drain: Positive = Field(default=60.0, description="for what is in flight when the job stops")
