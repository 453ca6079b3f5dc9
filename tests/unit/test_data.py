from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerwise.data import TrainingData, load_dataset
from layerwise.data.text import TextDataset
from layerwise.errors import ConfigError, NotAllowedError
from layerwise.ids import Microbatch
from layerwise.sections import Arrays, Cifar10, Cifar100, DataSpec, Digits, ImportData, Text


def same(one: TrainingData, other: TrainingData) -> bool:
    """Whether both give the same samples in the same parts."""
    for first, second in ((one.train, other.train), (one.validation, other.validation)):
        if len(first) != len(second):
            return False
        left, right = first.batch(range(len(first))), second.batch(range(len(second)))
        if not all(torch.equal(a, b) for a, b in zip(left[0] + left[1], right[0] + right[1], strict=True)):
            return False
    return one.info == other.info


def all_inputs(data: TrainingData) -> Tensor:
    return torch.cat([part.batch(range(len(part)))[0][0] for part in (data.train, data.validation)])


# --- digits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "shape"), [("image", (1, 8, 8)), ("flat", (64,))])
def test_digits_come_normalised_in_the_layout_asked_for(layout: str, shape: tuple[int, ...]) -> None:
    data = load_dataset(Digits.model_validate({"layout": layout}))
    assert (data.info.num_train, data.info.num_validation) == (len(data.train), len(data.validation)) == (1438, 359)
    assert (data.info.input_shapes, data.info.input_dtypes, data.info.num_classes) == ((shape,), ("float32",), 10)
    inputs, targets = data.train.batch([5, 3, 5])
    assert inputs[0].shape == (3, *shape)
    assert inputs[0].is_contiguous()
    assert torch.equal(inputs[0][0], inputs[0][2])
    assert targets[0].dtype == torch.int64
    assert (all_inputs(data).min(), all_inputs(data).max()) == (-1, 1)


def test_the_split_is_fixed_disjoint_and_chosen_by_its_own_seed() -> None:
    first = load_dataset(Digits())
    assert same(first, load_dataset(Digits()))
    assert not same(first, load_dataset(Digits(split_seed=1)))
    whole = load_dataset(Digits(validation=0.0))
    assert len(whole.validation) == 0
    assert sorted(map(tuple, all_inputs(first).flatten(1).tolist())) == sorted(
        map(tuple, all_inputs(whole).flatten(1).tolist())
    )


def test_batches_belong_to_the_caller() -> None:
    data = load_dataset(Digits())
    before = data.train.batch([0])[0][0].clone()
    data.train.batch([0])[0][0].zero_()
    assert torch.equal(data.train.batch([0])[0][0], before)


# --- text -----------------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_targets_are_the_next_bytes() -> None:
    dataset = TextDataset(np.arange(14, dtype=np.uint8), context=4)
    assert len(dataset) == 3
    inputs, targets = dataset.batch([2, 0])
    assert inputs[0].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert targets[0].tolist() == [[9, 10, 11, 12], [1, 2, 3, 4]]
    assert inputs[0].dtype == targets[0].dtype == torch.int64
    assert inputs[0].is_contiguous()
    assert targets[0].is_contiguous()


def test_the_standard_library_is_a_corpus_of_its_own() -> None:
    spec = Text(bytes=300_000, context=64)
    data = load_dataset(spec)
    assert same(data, load_dataset(spec))
    assert (data.info.vocabulary, data.info.input_shapes) == (256, ((64,),))
    part = len(data.validation) / (len(data.train) + len(data.validation))
    assert 0.02 < part <= 0.06


def test_validation_text_is_made_of_whole_files(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([65 + number]) * 100)
    (tmp_path / ".hidden.txt").write_bytes(b"!" * 100)
    data = load_dataset(Text(path=str(tmp_path), context=10, validation=0.2))
    train = set(data.train.batch(range(len(data.train)))[0][0].flatten().tolist())
    kept = set(data.validation.batch(range(len(data.validation)))[0][0].flatten().tolist())
    assert (len(train), len(kept)) == (16, 4)
    assert train.isdisjoint(kept)
    assert ord("!") not in train | kept


def test_one_file_is_validated_on_its_end(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(200)))
    data = load_dataset(Text(path=str(path), context=3, validation=0.1))
    assert data.validation.batch([0])[0][0].tolist() == [[180, 181, 182]]
    assert data.train.batch([len(data.train) - 1])[0][0].max() < 180


def test_a_byte_limit_takes_the_first_files(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / name).write_bytes(name.encode() * 50)
    data = load_dataset(Text(path=str(tmp_path), context=5, bytes=60, validation=0.0))
    assert bytes(data.train.batch(range(11))[0][0].flatten().tolist()) == b"a" * 50 + b"b" * 5


# --- cifar ----------------------------------------------------------------------------------------------------------


def cifar_part(labels: list[list[int]], first_pixel: int) -> bytes:
    images = [bytes([(first_pixel + number) % 256]) + bytes(3071) for number in range(len(labels))]
    return b"".join(bytes(label) + image for label, image in zip(labels, images, strict=True))


def cifar10_files() -> dict[str, bytes]:
    parts = {f"data_batch_{number}.bin": cifar_part([[number], [0]], 10 * number) for number in range(1, 6)}
    return {**parts, "test_batch.bin": cifar_part([[9], [8], [7]], 200)}


def write_tar(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_cifar10_is_read_alike_from_a_folder_and_from_its_archive(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in cifar10_files().items():
        (folder / name).write_bytes(content)
    write_tar(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", cifar10_files())
    paths = [folder, folder.parent, tmp_path, tmp_path / "cifar-10-binary.tar.gz"]
    first, *others = [load_dataset(Cifar10(path=str(path))) for path in paths]
    assert all(same(first, other) for other in others)
    assert (len(first.train), len(first.validation), first.info.num_classes) == (10, 3, 10)
    inputs, targets = first.train.batch([2, 9])
    assert targets[0].tolist() == [2, 0]
    assert inputs[0].shape == (2, 3, 32, 32)
    assert inputs[0].is_contiguous()
    assert inputs[0][0, 0, 0, 0].item() == pytest.approx((20 / 255 - 0.4914) / 0.2470, rel=1e-5)
    assert inputs[0][0, 2, 5, 5].item() == pytest.approx(-0.4465 / 0.2616, rel=1e-5)


def test_cifar_keeps_a_part_of_the_training_images_when_asked_to(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar-10-binary.tar.gz", "x", cifar10_files())
    data = load_dataset(Cifar10(path=str(tmp_path), validation=0.2))
    assert (len(data.train), len(data.validation)) == (8, 2)


def test_cifar100_counts_the_fine_label(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(cifar_part([[19, 99], [3, 42]], 0))
    (tmp_path / "test.bin").write_bytes(cifar_part([[1, 0]], 0))
    data = load_dataset(Cifar100(path=str(tmp_path)))
    assert data.info.num_classes == 100
    assert data.train.batch([0, 1])[1][0].tolist() == [99, 42]


def test_a_link_or_a_broken_member_of_an_archive_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ConfigError, match=r"has no train\.bin, test\.bin; expected the official binary archive"):
        load_dataset(Cifar100(path=str(path)))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="can't be read as a tar archive"):
        load_dataset(Cifar100(path=str(path)))


# --- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [60, 2000])
def test_a_damaged_compressed_npz_is_named(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.npz"
    noise = np.random.default_rng(1).random((2000, 4), dtype=np.float32)
    np.savez_compressed(path, inputs=noise, targets=np.zeros(2000, np.int64))
    data = bytearray(path.read_bytes())
    data[place : place + 40] = bytes(255 - one for one in data[place : place + 40])
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"data\.path: {path} can't be read as npz"):
        load_dataset(Arrays(path=str(path)))


def test_arrays_are_read_alike_from_npz_and_safetensors(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.float64).reshape(6, 4)
    labels = np.array([0, 2, 1, 0, 1, 2], dtype=np.int64)
    np.savez(tmp_path / "a.npz", inputs=images, targets=labels)
    save_file({"inputs": torch.from_numpy(images), "targets": torch.from_numpy(labels)}, tmp_path / "a.safetensors")
    first, second = (
        load_dataset(Arrays(path=str(tmp_path / f"a.{kind}"), validation=0.5)) for kind in ("npz", "safetensors")
    )
    assert same(first, second)
    assert (first.info.num_classes, first.info.input_dtypes, len(first.validation)) == (3, ("float32",), 3)


def test_several_inputs_dtypes_and_a_second_file_are_kept_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "tokens": torch.arange(6, dtype=torch.uint8).view(3, 2),
        "mask": torch.tensor([True, False, True]),
        "values": torch.ones(3, 2, dtype=torch.bfloat16),
    }
    for name in ("train", "held"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    data = load_dataset(
        Arrays(
            path=str(tmp_path / "train.safetensors"),
            validation_path=str(tmp_path / "held.safetensors"),
            inputs=("tokens", "mask"),
            targets=("values",),
        )
    )
    assert data.info.input_dtypes == ("uint8", "bool")
    assert (data.info.input_shapes, data.info.target_dtypes) == (((2,), ()), ("bfloat16",))
    assert data.info.num_classes is None
    assert len(data.validation) == 3


def test_pickled_objects_in_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.array([{}, {}], dtype=object), targets=np.zeros(2))
    with pytest.raises(ConfigError, match="can't be read as npz of plain numbers"):
        load_dataset(Arrays(path=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2), "targets": np.zeros(2)}, "has no inputs; it has targets, x"),
        ({"inputs": np.zeros((3, 2)), "targets": np.zeros(2)}, r"targets in .* has shape \[2\]"),
        ({"inputs": np.zeros((0, 2)), "targets": np.zeros(0)}, "at least 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ConfigError, match=message):
        load_dataset(Arrays(path=str(tmp_path / "a.npz")))


# --- the user's own ---------------------------------------------------------------------------------------------------

USER_CODE = """
import random
import numpy as np
import torch

class Squares:
    classes = ("even", "odd")
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        return (torch.full((2,), float(index)), np.float64(index * index)), index % 2

def one(size=10):
    return Squares(size)

def pair():
    return Squares(6), Squares(2)

def triples():
    return [(1, 2, 3)]

def uneven():
    return [(torch.zeros(1), 0), (torch.zeros(2), 0)]

def nothing():
    return 3

class Noisy:
    def __init__(self):
        self.base = torch.rand(8) + random.random() + np.random.rand()
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return self.base[index] + torch.rand(1) + random.random() + np.random.rand(), index

def noisy():
    return Noisy()
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_dataset.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_dataset"


def imported(function: str, **keys: Any) -> ImportData:
    return ImportData.model_validate({"import": f"user_dataset:{function}", **keys})


def test_the_users_dataset_is_stacked_and_split(user_code: str) -> None:
    data = load_dataset(imported("one", size=8, validation=0.25), [user_code])
    assert (len(data.train), len(data.validation), data.info.num_classes) == (6, 2, 2)
    assert (data.info.input_shapes, data.info.input_dtypes) == (((2,), ()), ("float32", "float32"))
    inputs, targets = load_dataset(imported("one"), [user_code]).train.batch([3, 1])
    assert inputs[0].tolist() == [[3, 3], [1, 1]]
    assert inputs[1].tolist() == [9, 1]
    assert targets[0].tolist() == [1, 1]


def test_the_user_may_give_a_validation_dataset_too(user_code: str) -> None:
    data = load_dataset(imported("pair"), [user_code])
    assert (len(data.train), len(data.validation)) == (6, 2)
    with pytest.raises(ConfigError, match="returns a validation dataset too"):
        load_dataset(imported("pair", validation=0.1), [user_code])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("triples", "sample 0 of user_dataset:triples is no pair of input and target"),
        ("nothing", "returned a int, expected a dataset with __len__"),
    ],
)
def test_what_is_no_dataset_is_refused(user_code: str, function: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataset(imported(function), [user_code])


def test_samples_of_different_shapes_name_both(user_code: str) -> None:
    data = load_dataset(imported("uneven"), [user_code])
    with pytest.raises(ConfigError, match=r"sample 1 of .* is float32\[2\], sample 0 is float32\[1\]"):
        data.train.batch([0, 1])


def test_what_the_users_dataset_draws_follows_from_the_seed_and_the_microbatch_alone(user_code: str) -> None:
    first, second = (load_dataset(imported("noisy", validation=0.25), [user_code]) for _ in range(2))
    microbatch = Microbatch(2, 0, 3)
    before = first.training_batch(7, microbatch)[0][0]
    first.training_batch(7, Microbatch(1, 3, 6))  # another process has done other things meanwhile
    assert torch.equal(second.training_batch(7, microbatch)[0][0], before)
    assert torch.equal(first.training_batch(7, microbatch)[0][0], before)
    assert torch.equal(first.validation_batch(7, 0, 2)[0][0], second.validation_batch(7, 0, 2)[0][0])

    epochs = [first.training_batch(7, Microbatch(epoch, 0, 6)) for epoch in (0, 1)]
    one, other = (inputs[0][targets[0].argsort()] for inputs, targets in epochs)
    assert (one != other).all(), "each epoch draws anew"


def test_the_users_dataset_needs_permission(user_code: str) -> None:
    with pytest.raises(NotAllowedError):
        load_dataset(imported("one"))


# --- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            Text(path="missing"),
            r"data\.path: nothing at /.*/missing; expected a text file, a folder of them, or python-",
        ),
        (Text(path=".", pattern="*.none"), r"data\.pattern: got '\*\.none', which matches no file below /"),
        (Cifar10(path="missing"), r"data\.path: no data_batch_1\.bin and no cifar-10-binary\.tar\.gz in /.*get https"),
        (Cifar100(path="missing"), r"data\.path: no train\.bin .* get https://.*cifar-100-binary\.tar\.gz"),
        (Arrays(path="missing.npz"), r"data\.path: no file at /.*/missing\.npz"),
        (Arrays(path="text.csv"), r"data\.path: got 'text\.csv', expected a file that ends in"),
        (Text(path="text.csv", context=9), r"data\.path: text\.csv holds 4 bytes, expected more than data\.context"),
    ],
)
def test_missing_data_says_where_it_was_looked_for_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: DataSpec, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.csv").write_text("1,2\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_dataset(spec)
    assert "\n" not in str(caught.value)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        load_dataset(Digits())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, expected a multiple of 3074"),
        (bytes([0, 100]) + bytes(3072), "a label 100, expected at most 99"),
    ],
)
def test_a_damaged_cifar_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_dataset(Cifar100(path=str(tmp_path), validation=0.1))
