"""A dataset is read whole; one that is not what was written is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnist_dist.data.dataset import dataset_file, fingerprint, load_dataset
from mnist_dist.errors import RequestError
from tests.conftest import NUM_TEST, NUM_TRAIN


def test_the_whole_dataset_is_read(data_dir: Path) -> None:
    dataset = load_dataset("synthetic", data_dir)
    written = load_file(dataset_file("synthetic", data_dir))
    assert (dataset.name, dataset.eval_name) == ("synthetic", "test")
    assert dataset.fingerprint == fingerprint(written)
    assert dataset.identity() == {"name": "synthetic", "fingerprint": dataset.fingerprint}
    assert len(dataset.train.labels) == NUM_TRAIN
    assert len(dataset.eval_split.labels) == NUM_TEST
    for split, part in ((dataset.train, "train"), (dataset.eval_split, "test")):
        assert torch.equal(split.images, written[f"{part}_images"])
        assert torch.equal(split.labels, written[f"{part}_labels"])
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("validation", [1, 150, NUM_TRAIN - 1])
def test_validation_holds_out_the_last_training_images(data_dir: Path, validation: int) -> None:
    whole, dataset = load_dataset("synthetic", data_dir), load_dataset("synthetic", data_dir, validation)
    assert dataset.eval_name == "validation"
    assert len(dataset.eval_split.labels) == validation
    for kept, held_out, all_of_it in zip(dataset.train, dataset.eval_split, whole.train, strict=True):
        assert torch.equal(torch.cat((kept, held_out)), all_of_it)


@pytest.mark.parametrize("validation", [NUM_TRAIN, NUM_TRAIN + 1, 10**12])
def test_validation_must_leave_something_to_train_on(data_dir: Path, validation: int) -> None:
    with pytest.raises(RequestError, match=f"validation={validation} leaves nothing .* {NUM_TRAIN} training images"):
        load_dataset("synthetic", data_dir, validation)


def damage_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def save_other_tensors(path: Path, dtype: torch.dtype) -> None:
    save_file({"weight": torch.zeros(3, dtype=dtype), "nothing": torch.zeros(0, dtype=dtype)}, path)


def swap_labels(path: Path) -> None:
    tensors = load_file(path)
    recorded = fingerprint(tensors)
    tensors["train_labels"] = tensors["train_labels"].flip(0).contiguous()
    save_file(tensors, path, metadata={"name": "synthetic", "fingerprint": recorded})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (damage_a_pixel, "is damaged"),
        (swap_labels, "is damaged"),
        (lambda path: save_other_tensors(path, torch.float32), "is damaged"),
        (lambda path: save_other_tensors(path, torch.bfloat16), "is damaged"),  # numpy has no such numbers
        (cut_short, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_text("<html>404</html>"), "cannot be read"),
        (lambda path: path.write_bytes(bytes(range(256)) * 10), "cannot be read"),
    ],
    ids=["pixel", "labels", "other", "other-bf16", "short", "empty", "html", "binary"],
)
def test_a_damaged_file_is_refused_in_one_sentence(data_dir: Path, tmp_path: Path, damage, sentence: str) -> None:
    path = dataset_file("synthetic", tmp_path)
    path.write_bytes(dataset_file("synthetic", data_dir).read_bytes())
    damage(path)
    with pytest.raises(RequestError) as raised:
        load_dataset("synthetic", tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{path} {sentence}")
    assert text.endswith(f"; delete it and run `mnist-dist fetch dataset=synthetic data_dir={tmp_path}`")
    assert "\n" not in text


def test_a_dataset_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as raised:
        load_dataset("mnist", tmp_path)
    raw = tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz"
    assert str(raised.value) == f"there is no {raw}; run `mnist-dist fetch dataset=mnist data_dir={tmp_path}`"
