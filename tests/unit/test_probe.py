from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import nn

from layerwise.derived_weights import derives_weights
from layerwise.device import HostTransfers
from layerwise.errors import ConfigError, NotAllowedError, OutOfMemoryError
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
    with pytest.raises(OutOfMemoryError, match=r"model: memory ran out when .* on cpu, .* 2\.00 GiB\.$"):
        probe(spec({"import": f"{HERE}:too_large", "where": where}), device=CPU, allowed_imports=[HERE])


HERE_TOO = torch.device("cpu", 0)
"""Another name for the processor, in the place of an accelerator."""


class OtherTransfers(HostTransfers):
    """Notes whether a pass runs in the context that the transfers give for it."""

    device = HERE_TOO
    inside = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        before, OtherTransfers.inside = OtherTransfers.inside, True
        yield
        OtherTransfers.inside = before


def elsewhere(monkeypatch: pytest.MonkeyPatch, function: str, **others: Any) -> Profile:
    """Probed as on an accelerator."""
    monkeypatch.setattr("layerwise.probe.transfers", lambda device: OtherTransfers())
    return probe(spec({"import": f"{HERE}:{function}"}, **others), device=HERE_TOO, allowed_imports=[HERE])


class Placed(nn.Linear):
    """Writes down where it is moved to and when it computes."""

    seen: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, name: str) -> None:
        super().__init__(64, 64)
        self._name = name

    def to(self, *arguments: Any, **options: Any) -> Self:
        self.seen.append((self._name, f"to {arguments[0]}"))
        return super().to(*arguments, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert OtherTransfers.inside
        self.seen.append((self._name, "run"))
        return super().forward(x)


def placed() -> list[nn.Module]:
    return [nn.Flatten(), Placed("first"), Placed("second")]


def test_a_layer_is_on_the_device_only_while_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together may be too large for the device that measures them."""
    Placed.seen.clear()
    elsewhere(monkeypatch, "placed")
    turns = [(name, [what for _, what in turn]) for name, turn in groupby(Placed.seen, key=lambda line: line[0])]
    for _, turn in turns:
        assert turn == [f"to {HERE_TOO}", *["run"] * (len(turn) - 2), "to cpu"]
        assert "run" in turn
    assert [name for name, _ in turns] == ["first", "second"] * (len(turns) // 2)


class Leaves(nn.Linear):
    """Remembers what it put out last."""

    output: ClassVar[weakref.ref[torch.Tensor] | None] = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = super().forward(x)
        Leaves.output = weakref.ref(made)
        return made


class LooksBack(nn.Module):
    """Fails when the layer before still has its graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert Leaves.output is not None
        assert Leaves.output() is None
        return x + 0


def looked_back_at() -> list[nn.Module]:
    return [nn.Flatten(), Leaves(64, 10), LooksBack()]


def test_a_layers_graph_is_gone_when_the_next_one_begins() -> None:
    imported("looked_back_at")


def inside_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    class Watched(torch.Tensor):
        def __float__(self) -> float:
            assert OtherTransfers.inside, "nothing orders this stream and the one that makes the loss"
            return super().__float__()

        def __bool__(self) -> bool:
            assert OtherTransfers.inside, "nothing orders this stream and the one that makes the loss"
            return super().__bool__()

    return outputs.square().mean().as_subclass(Watched)


def test_the_loss_is_looked_at_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, "placed", loss={"import": f"{HERE}:inside_loss"})


class Moved(nn.Linear):
    """Its tensors are others once it was moved, as buffers are that go to a GPU."""

    def to(self, *arguments: Any, **options: Any) -> Self:
        self.weight = nn.Parameter(self.weight.detach().clone())
        return self


def tied_and_moved() -> list[nn.Module]:
    layers = [Moved(64, 64), Moved(64, 64)]
    layers[1].weight = layers[0].weight
    return [nn.Flatten(), *layers, nn.Linear(64, 10)]


def test_what_layers_share_is_seen_before_it_is_parted() -> None:
    assert [one.shares_with for one in imported("tied_and_moved").layers] == [(), (2,), (1,), ()]


def unmade() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(64, 10, device="meta")]


def test_a_layer_that_can_not_be_moved_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model: layer 1 \(1-linear\) can't be moved to cpu: .*meta tensor"):
        imported("unmade")


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class TakesOneTwice(nn.Linear):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert pair[0] is pair[1]
        return super().forward(pair[0])


def given_twice() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(64, 12), Twice(), TakesOneTwice(12, 10)]


def test_a_tensor_that_is_handed_on_twice_is_one_tensor() -> None:
    imported("given_twice")


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
