from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerwise.data_info import DataInfo
from layerwise.errors import ConfigError, MalformedMessageError, NotAllowedError
from layerwise.models import build_model, check_layers, layer_names, load_weights, model_tensors, shared_tensors
from layerwise.section import Import
from layerwise.sections import Cnn, Mlp, ModelSpec, Resnet, TransformerLm


def info(shape: tuple[int, ...], dtype: str = "float32", **other: Any) -> DataInfo:
    values = {"target_shapes": ((),), "target_dtypes": ("int64",), **other}
    return DataInfo(num_train=10, num_validation=2, input_shapes=(shape,), input_dtypes=(dtype,), **values)


DIGITS = info((1, 8, 8), num_classes=10)
IMAGES = info((3, 32, 32), num_classes=10)
TOKENS = info((16,), "int64", vocabulary=256)

CASES: list[tuple[ModelSpec, DataInfo, tuple[int, ...]]] = [
    (Mlp(hidden=(12, 9), dropout=0.1, batchnorm=True, activation="gelu"), DIGITS, (4, 10)),
    (Mlp(hidden=()), info((5,), target_shapes=((3,),), target_dtypes=("float32",)), (4, 3)),
    (Cnn(channels=(4, 6)), DIGITS, (4, 10)),
    (Cnn(channels=(4,), batchnorm=False), IMAGES, (4, 10)),
    (Resnet(width=4, stem="cifar"), IMAGES, (4, 10)),
    (Resnet(width=4, stem="imagenet", depth=34), info((3, 64, 64), num_classes=7), (4, 7)),
    (TransformerLm(layers=2, width=8, heads=2, context=16, dropout=0.1), TOKENS, (4, 16, 256)),
]


def inputs(data: DataInfo) -> Tensor:
    torch.manual_seed(1)
    shape = (4, *data.input_shapes[0])
    return torch.randint(0, 256, shape) if data.vocabulary else torch.randn(shape)


@pytest.mark.parametrize(("model", "data", "shape"), CASES, ids=lambda one: getattr(one, "name", ""))
def test_layers_in_a_row_give_logits_and_every_parameter_a_gradient(
    model: ModelSpec, data: DataInfo, shape: tuple[int, ...]
) -> None:
    layers = build_model(model, 0, data)
    hidden = inputs(data)
    for layer in layers:
        before, kept = hidden, hidden.detach().clone()
        hidden = layer(hidden)
        assert torch.equal(before, kept), "a layer wrote into its input"
    assert hidden.shape == shape
    hidden.square().sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())


@pytest.mark.parametrize(("model", "data", "shape"), CASES, ids=lambda one: getattr(one, "name", ""))
def test_weights_follow_from_the_seed_alone(model: ModelSpec, data: DataInfo, shape: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model_tensors(build_model(model, 3, data))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = model_tensors(build_model(model, 3, data))
    other = model_tensors(build_model(model, 4, data))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_resnet_18_has_the_parameters_of_the_paper() -> None:
    layers = build_model(Resnet(), 0, info((3, 224, 224), num_classes=1000))
    assert len(layers) == 10
    assert sum(parameter.numel() for layer in layers for parameter in layer.parameters()) == 11_689_512


def test_a_language_model_does_not_look_ahead() -> None:
    model = nn.Sequential(*build_model(TransformerLm(layers=2, width=8, heads=2, context=16), 0, TOKENS))
    tokens = inputs(TOKENS)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    same = (model(tokens) == model(changed)).all(dim=(0, 2))
    assert same[:9].all()
    assert not same[9]


def test_embeddings_heads_and_first_convolutions_are_left_to_adam() -> None:
    def marked(model: ModelSpec, data: DataInfo) -> list[str]:
        named = nn.Sequential(*build_model(model, 0, data)).named_parameters()
        return [name for name, one in named if getattr(one, "layerwise_adam", False)]

    assert marked(Mlp(hidden=(8,)), DIGITS) == ["1.linear.weight"]
    assert marked(Cnn(channels=(4, 4)), DIGITS) == ["0.convolution.weight", "2.linear.weight"]
    assert marked(Resnet(width=4), IMAGES) == ["0.convolution.weight", "9.linear.weight"]
    lm = TransformerLm(layers=1, width=8, heads=2, context=16)
    assert marked(lm, TOKENS) == ["0.tokens.weight", "0.positions.weight", "2.linear.weight"]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (TransformerLm(), DIGITS, r"transformer-lm takes rows of tokens, the data has float32\[1, 8, 8\]"),
        (TransformerLm(context=8), TOKENS, "model.context: got 8, expected at least 16"),
        (Mlp(), TOKENS, r"mlp takes floating-point inputs, the data has int64\[16\]"),
        (Cnn(), info((64,), num_classes=10), r"cnn takes images \[channels, height, width\], the data has \[64\]"),
        (Mlp(outputs=5), DIGITS, "model.outputs: got 5, expected at least the number of classes, 10"),
        (Mlp(), info((4,)), "model.outputs: nothing is given"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(model: ModelSpec, data: DataInfo, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(model, 0, data)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (nn.Linear(1, 1), "returned one Linear, expected a list of its layers"),
        (3, "returned a int, expected a list of nn.Module"),
        ([nn.Linear(1, 1), "x"], "returned a str at position 1"),
        ([], "returned no layers"),
    ],
)
def test_an_imported_model_must_be_a_list_of_modules(found: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layers(found, "a.b:c")


def test_a_sequential_counts_as_its_layers() -> None:
    layers = [nn.Linear(1, 1), nn.ReLU()]
    assert check_layers(nn.Sequential(*layers), "a.b:c") == layers


def test_an_imported_model_needs_permission() -> None:
    spec = Import.model_validate({"import": "torch.nn:Sequential"})
    with pytest.raises(NotAllowedError, match=r"--allow-import torch\.nn"):
        build_model(spec, 0, DIGITS)


def test_an_imported_model_is_built_from_the_seed_and_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seeded_net.py").write_text(
        "from torch import nn\ndef build(width, depth=1):\n    return [nn.Linear(width, width) for _ in range(depth)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = Import.model_validate({"import": "seeded_net:build", "width": 3, "depth": 2})
    first, second = (model_tensors(build_model(spec, 7, DIGITS, ["seeded_net"])) for _ in range(2))
    assert len(first) == 4
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tensors_that_layers_share_are_found_with_their_layers() -> None:
    tied = nn.Linear(3, 3, bias=False)
    other = nn.Linear(3, 3, bias=False)
    other.weight = nn.Parameter(tied.weight.data.view(3, 3))
    twice = nn.ReLU()
    found = shared_tensors([tied, twice, nn.Linear(3, 3), other, twice])
    assert [(one.name, one.layers) for one in found] == [("weight", (0, 3))]


def test_layer_names_are_unique_and_say_what_they_are() -> None:
    layers = build_model(TransformerLm(layers=2, width=8, heads=2, context=16), 0, TOKENS)
    assert layer_names(layers) == ["0-lm-embedding", "1-lm-block", "2-lm-block", "3-lm-head"]


def test_initial_weights_come_back_from_a_file(tmp_path: Path) -> None:
    saved = build_model(Cnn(channels=(4,)), 1, DIGITS)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model_tensors(saved).items()}, path)
    layers = build_model(Cnn(channels=(4,)), 2, DIGITS)
    load_weights(layers, path)
    assert all(torch.equal(one, model_tensors(saved)[name]) for name, one in model_tensors(layers).items())
    nn.Sequential(*layers).load_state_dict(model_tensors(saved))


def test_initial_weights_of_another_model_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    layers = build_model(Mlp(hidden=(4,)), 0, DIGITS)
    before = {name: one.clone() for name, one in model_tensors(layers).items()}
    with pytest.raises(ConfigError, match=r"no file at .*model\.safetensors"):
        load_weights(layers, path)
    path.write_bytes(b"no such format")
    with pytest.raises(ConfigError, match="can't be read as safetensors"):
        load_weights(layers, path)
    save_file({**before, "2.linear.bias": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"has beside the model's 1 tensors \(2.linear.bias\)"):
        load_weights(layers, path)
    save_file({**before, "0.linear.bias": torch.zeros(5)}, path)
    with pytest.raises(ConfigError, match=r"0.linear.bias has shape \[5\], expected \[4\]"):
        load_weights(layers, path)
    assert all(torch.equal(one, before[name]) for name, one in model_tensors(layers).items())


def test_what_a_model_needs_to_know_of_its_data_survives_json() -> None:
    assert DataInfo.from_json(TOKENS.to_json()) == TOKENS
    with pytest.raises(MalformedMessageError):
        DataInfo.from_json('{"num_train": 3}')
