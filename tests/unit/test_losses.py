from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from layerwise.errors import ConfigError, NotAllowedError
from layerwise.losses import build_loss, build_metrics
from layerwise.section import Import
from layerwise.sections import Accuracy, CrossEntropy, MeanAbsoluteError, MeanSquaredError


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "targets"),
    [((4, 3), (4,)), ((4, 5, 3), (4, 5)), ((4, 3, 2, 2), (4, 2, 2))],
    ids=["classes", "language model", "image"],
)
def test_cross_entropy_is_the_mean_over_all_predictions(output: tuple[int, ...], targets: tuple[int, ...]) -> None:
    values = scores(*output)
    labels = torch.randint(0, 3, targets, generator=torch.Generator().manual_seed(1))
    second = values if len(output) != 3 else values.movedim(-1, 1)
    expected = functional.cross_entropy(second, labels)
    loss = build_loss(CrossEntropy())
    torch.testing.assert_close(loss(values, labels), expected)
    assert torch.equal(loss(values, [labels]), loss(values, labels))
    assert torch.equal(loss((values,), (labels,)), loss(values, labels))
    assert loss(values, labels).ndim == 0


def test_means_of_parts_weighted_by_samples_are_the_mean_of_the_whole() -> None:
    loss = build_loss(CrossEntropy(label_smoothing=0.1))
    values, labels = scores(6, 4, 5), torch.zeros(6, 4, dtype=torch.uint8)
    parts = (loss(values[:2], labels[:2]) * 2 + loss(values[2:], labels[2:]) * 4) / 6
    torch.testing.assert_close(parts, loss(values, labels))


def test_half_precision_is_summed_in_full() -> None:
    values, labels = scores(4, 3).bfloat16(), torch.zeros(4, dtype=torch.int64)
    assert build_loss(CrossEntropy())(values, labels).dtype == torch.float32
    assert build_loss(MeanSquaredError())(values, values).dtype == torch.float32


def test_a_loss_that_does_not_fit_names_both_shapes() -> None:
    with pytest.raises(ConfigError, match=r"output \[4, 3\] does not fit targets \[5\]"):
        build_loss(CrossEntropy())(scores(4, 3), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"output \[4, 3\] does not fit targets \[4\]"):
        build_loss(MeanSquaredError())(scores(4, 3), torch.zeros(4))


def test_targets_that_are_no_classes_are_refused_and_not_rounded() -> None:
    with pytest.raises(ConfigError, match="cross-entropy takes classes, whole numbers, as targets, and got float32"):
        build_loss(CrossEntropy())(scores(4, 3), torch.tensor([0.0, 1.7, 2.0, 0.3]))


def test_a_single_output_column_fits_targets_without_one() -> None:
    assert build_loss(MeanSquaredError())(torch.ones(4, 1), torch.zeros(4)) == 1


def test_metrics_of_parts_add_up() -> None:
    values = scores(6, 5)
    labels = (values.argmax(dim=-1) + torch.tensor([0, 0, 1, 0, 1, 0])) % 5
    for metric in build_metrics([Accuracy(), Accuracy(top=2)]):
        total, count = metric.measure(values, [labels])
        halves = [metric.measure(values[part], labels[part]) for part in (slice(0, 2), slice(2, 6))]
        assert (total, count) == (sum(one for one, _ in halves), sum(one for _, one in halves))
        assert 4 <= total <= count == 6


def test_accuracy_counts_hits_among_the_likeliest() -> None:
    values = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    labels = torch.tensor([1, 2])
    first, second, third = build_metrics([Accuracy(), Accuracy(top=2), Accuracy(top=9)])
    assert [metric.name for metric in (first, second, third)] == ["accuracy", "accuracy_top_2", "accuracy_top_9"]
    assert [metric.measure(values, labels)[0] for metric in (first, second, third)] == [1, 2, 2]


def test_absolute_error_counts_every_value() -> None:
    (metric,) = build_metrics([MeanAbsoluteError()])
    assert metric.measure(torch.ones(2, 3), torch.zeros(2, 3)) == (6, 6)


USER_CODE = """
def scaled(output, target, factor=1.0):
    return factor * (output - target).abs().mean()

def per_sample(output, target):
    return output - target

def hits(output, target):
    return (output == target).sum(), target.numel()

def mean(output, target):
    return (output == target).float().mean()

def words(output, target):
    return "many"

def loss(output, target):
    return 0.0

version = seconds = samples = number = loss
"""


def user(function: str, **arguments: object) -> Import:
    return Import.model_validate({"import": f"user_losses:{function}", **arguments})


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "user_losses.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["user_losses"]


def test_an_imported_loss_gets_its_arguments(user_code: list[str]) -> None:
    assert build_loss(user("scaled", factor=3), user_code)(torch.ones(2), [torch.zeros(2)]) == 3
    with pytest.raises(NotAllowedError):
        build_loss(user("scaled"))


def test_an_imported_loss_must_be_a_mean(user_code: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"returned \[2\], expected a 0-d tensor"):
        build_loss(user("per_sample"), user_code)(torch.ones(2), torch.zeros(2))


def test_an_imported_metric_gives_sum_and_count_or_a_mean(user_code: list[str]) -> None:
    hits, mean, words = build_metrics([user("hits"), user("mean"), user("words")], user_code)
    assert hits.measure(torch.ones(4), torch.ones(4)) == (4, 4)
    assert mean.measure(torch.ones(4), torch.ones(4)) == (1, 1)
    with pytest.raises(ConfigError, match=r"returned str, expected \(sum, count\)"):
        words.measure(torch.ones(4), torch.ones(4))


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 'accuracy' 2 times"):
        build_metrics([Accuracy(), Accuracy()])


@pytest.mark.parametrize("name", ["loss", "number", "samples", "seconds", "version"])
def test_a_metric_can_not_have_the_name_of_something_else_in_a_result(user_code: list[str], name: str) -> None:
    """It was added to the loss, or took the place of the cut's version."""
    with pytest.raises(
        ConfigError, match=f"got a function called '{name}', expected another name than loss, number, samples"
    ):
        build_metrics([user(name)], user_code)
