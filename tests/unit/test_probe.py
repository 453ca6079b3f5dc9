from __future__ import annotations

import gc
import weakref
from itertools import groupby
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn

from layerwise.derived_weights import derives_weights
from layerwise.errors import ConfigError, NotAllowedError
from layerwise.job import JobSpec, parse_job
from layerwise.probe import probe
from layerwise.profile import Profile

CPU = torch.device("cpu")
HERE = "tests.unit.test_probe"


def spec(model: dict[str, Any], **others: Any) -> JobSpec:
    return parse_job(
        {"name": "probed", "model": model, "data": {"name": "digits", "batch": 16}, "train": {"steps": 2}, **others}
    )


def imported(function: str, **others: Any) -> Profile:
    return probe(spec({"import": f"{HERE}:{function}"}, **others), device=CPU, allowed_imports=[HERE])


def misfits() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(64, 10), nn.Linear(12, 10)]


def too_narrow() -> list[nn.Module]:
    return [nn.Linear(63, 10)]


class Dictionary(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x}


def dictionary() -> list[nn.Module]:
    return [nn.Linear(64, 10), Dictionary()]


def lazy() -> list[nn.Module]:
    return [nn.LazyLinear(10)]


def odd() -> list[nn.Module]:
    shared = nn.Linear(64, 64)
    tied = nn.Linear(64, 64)
    tied.weight = shared.weight
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))
    return [shared, nn.ReLU(inplace=True), tied, nn.Linear(64, 64).requires_grad_(False), normed]


def wrong_classes() -> list[nn.Module]:
    return [nn.Linear(64, 3)]


def bare() -> nn.Module:
    return nn.Linear(64, 10)


def test_layers_that_do_not_fit_are_named_with_their_shapes() -> None:
    with pytest.raises(ConfigError) as error:
        imported("misfits")
    text = str(error.value)
    assert "layers 1 (1-linear) and 2 (2-linear) do not fit together" in text
    assert "float32[4, 10]" in text


def test_a_first_layer_that_does_not_take_the_samples_is_named() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 \(0-linear\) does not take the data's samples, float32\[8, 64\]"):
        imported("too_narrow")


class TooLarge(nn.Linear):
    def __init__(self, where: str) -> None:
        super().__init__(64, 10)
        self._where = where

    def to(self, *arguments: Any, **options: Any) -> Self:
        if self._where == "placed":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().to(*arguments, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand so on")


def too_large(where: str) -> list[nn.Module]:
    return [nn.Flatten(), TooLarge(where)]


@pytest.mark.parametrize("where", ["placed", "run"])
def test_a_model_that_the_device_has_no_memory_for_is_told_apart_from_one_that_does_not_fit_together(
    where: str,
) -> None:
    with pytest.raises(ConfigError, match=r"model: the memory of cpu ran out .* 2\.00 GiB\.$"):
        probe(spec({"import": f"{HERE}:too_large", "where": where}), device=CPU, allowed_imports=[HERE])


class Placed(nn.Linear):
    """Writes down when it is moved and when it computes."""

    seen: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        super().__init__(64, 64)
        self._name = name

    def to(self, *arguments: Any, **options: Any) -> Self:
        self.seen.append(f"{self._name} moved")
        return super().to(*arguments, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(f"{self._name} run")
        return super().forward(x)


def placed() -> list[nn.Module]:
    return [nn.Flatten(), Placed("first"), Placed("second")]


def test_a_layer_is_on_the_device_only_while_it_is_run() -> None:
    """All of them together may be too large for the device that measures them."""
    Placed.seen.clear()
    imported("placed")
    turns = [list(turn) for _, turn in groupby(Placed.seen, key=lambda line: line.split()[0])]
    for turn in turns:
        assert turn[0].endswith("moved")
        assert turn[-1].endswith("moved")
        assert sum(line.endswith("moved") for line in turn) == 2
        assert len(turn) > 2
    assert [turn[0].split()[0] for turn in turns] == ["first", "second"] * (len(turns) // 2)


REMEMBERED: list[weakref.ref[nn.Parameter]] = []


def remembered() -> list[nn.Module]:
    layers = [
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Sequential(nn.Linear(12, 12), nn.Tanh()),
        nn.Linear(12, 10),
    ]
    REMEMBERED.extend(weakref.ref(one) for layer in layers for one in layer.parameters())
    return layers


def test_nothing_of_the_model_stays_in_memory() -> None:
    """Operations such as ReLU keep their own output for the backward pass."""
    REMEMBERED.clear()
    imported("remembered")
    gc.collect()
    assert len(REMEMBERED) == 6
    assert [one() for one in REMEMBERED] == [None] * 6


def test_a_layer_that_returns_no_tensor_is_named() -> None:
    with pytest.raises(ConfigError, match=r"layer 1 \(1-dictionary\) returned a dict"):
        imported("dictionary")


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 0 .* has lazy parameters"):
        imported("lazy")


def test_targets_that_the_loss_does_not_take_are_refused() -> None:
    with pytest.raises(ConfigError, match="loss: "):
        imported("wrong_classes")


def test_code_that_is_not_allowed_is_not_run() -> None:
    with pytest.raises(NotAllowedError, match="--allow-import"):
        probe(spec({"import": f"{HERE}:misfits"}), device=CPU)


def test_a_missing_init_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="init"):
        probe(spec({"name": "mlp"}, init="nowhere/model.safetensors"), device=CPU)


def test_shared_in_place_frozen_and_derived_layers_are_found() -> None:
    found = imported("odd")
    assert [layer.shares_with for layer in found.layers] == [(2,), (), (0,), (), ()]
    assert [layer.clones_input for layer in found.layers] == [False, True, False, False, False]
    assert [layer.derived_weights for layer in found.layers] == [False, False, False, False, True]
    assert [layer.trainable for layer in found.layers][3] == 0
    assert len(found.notes) == 2


def test_a_profile_has_sizes_costs_and_what_a_model_needs_of_the_data() -> None:
    found = probe(spec({"name": "mlp", "hidden": [32], "batchnorm": True}), device=CPU)
    assert Profile.from_json(found.to_json()) == found
    hidden, head = found.layers
    assert hidden.parameters == 64 * 32 + 32 + 2 * 32
    assert head.output_shapes == ((4, 10),)
    assert head.output_bytes == 4 * 10 * 4
    assert hidden.state_bytes > hidden.parameter_bytes * 2
    assert all(layer.forward_seconds > 0 and layer.backward_seconds > 0 for layer in found.layers)
    assert found.microbatch_samples == 4
    assert found.num_train_samples + found.num_validation_samples == 1797
    assert '"num_classes":10' in found.data_json


def test_batch_norm_and_what_it_does_not_take_are_seen() -> None:
    plain, normalised = (
        probe(spec({"name": "mlp", "hidden": [32], "batchnorm": batchnorm}), device=CPU) for batchnorm in (False, True)
    )
    assert [layer.batch_statistics for layer in normalised.layers] == [True, False]
    assert "layer 0 (0-mlp-hidden)" in normalised.single_sample_error
    assert "more than 1 value per channel" in normalised.single_sample_error
    assert not plain.single_sample_error
    assert not any(layer.batch_statistics for layer in plain.layers)


def test_autocast_is_seen_as_derived_weights() -> None:
    found = probe(spec({"name": "mlp", "hidden": [32]}, train={"steps": 2, "precision": "bf16"}), device=CPU)
    assert all(layer.derived_weights for layer in found.layers)


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T * self.temperature.exp()


@pytest.mark.parametrize(
    ("module", "derived"),
    [
        (nn.Linear(4, 4), False),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()), False),
        (nn.MultiheadAttention(4, 2, batch_first=True), False),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), True),
        (Tempered(), True),
    ],
)
def test_graphs_show_whether_weights_are_derived(module: nn.Module, derived: bool) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    output = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)
    assert derives_weights([output], [x]) is derived


def test_an_embedding_of_tokens_is_no_derived_weight() -> None:
    tokens = torch.tensor([[1, 2]])
    embedding = nn.Embedding(4, 3)
    position = nn.Parameter(torch.randn(5, 3))
    assert not derives_weights([nn.functional.gelu(embedding(tokens) + position[:2])], [tokens])
