"""Test data sets: what is read, the messages for what cannot be read, the cache, atomic writes."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from helpers.image_sets import write_cifar, write_image_folder, write_mnist, write_tiny_imagenet
from sid_trainer.data import datasets as trainer_data
from sid_trainer.data.datasets import DATASETS, DataError, ImageFiles, load_data
from sid_trainer.files import write_atomically


def refused(match, name, path=None, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_data(name, path, **options)
    assert str(caught.value).isprintable()  # no line break, no terminal code


def test_digits():
    data = load_data("digits")
    assert data.train.images.shape == (1437, 8, 8, 1) and data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert (data.crop, data.flip, data.classes) == (0, False, list("0123456789"))
    assert (data.in_channels, data.image_size, data.validation) == (1, (8, 8), None)
    assert torch.equal(data.test.images, load_data("digits").test.images)


def test_image_folder_with_sorted_classes(tmp_path):
    data = load_data("folder", write_image_folder(tmp_path / "set"), cache=tmp_path / "cache")
    assert data.classes == ["a", "b c"] and (data.crop, data.flip) == (4, True)
    assert data.train.images.shape == (12, 8, 8, 3) and data.train.labels.tolist() == [0] * 6 + [1] * 6
    with Image.open(tmp_path / "set" / "train" / "b c" / "2.png") as image:
        assert np.array_equal(np.asarray(image), data.train.images[8].numpy())


def test_val_is_read_if_there_is_no_test(tmp_path):
    data = load_data("folder", write_image_folder(tmp_path, splits=("train", "val")), cache=tmp_path / "cache")
    assert len(data.test.labels) == 12


def test_an_odd_name_is_only_a_name(tmp_path):
    names = ["<script>", "a;rm -rf", "two\nlines", "\x1b[31mred"]
    root = write_image_folder(tmp_path / "set", count=1, classes=names)
    data = load_data("folder", root, cache=tmp_path / "cache")
    assert data.classes == sorted(names) and len(data.train.labels) == 4
    (root / "train" / "two\nlines" / "0.png").write_bytes(b"")
    refused(r"two\\nlines/0.png: not a readable image", "folder", root, cache=tmp_path / "cache")
    (root / "train" / "\x1b[31mred" / "0.png").unlink()
    refused(
        r"train: not an image folder .Found no valid file for the classes \\x1b\[31mred",
        "folder",
        root,
        cache=tmp_path / "cache",
    )


def test_the_cache_is_used_while_it_matches_the_files(tmp_path, monkeypatch):
    root, cache = write_image_folder(tmp_path / "set"), tmp_path / "cache"
    decodes, batches = [], ImageFiles.batches

    def count(images, *arguments):
        decodes.append(Path(images.files[0]).parts[-3])
        return batches(images, *arguments)

    monkeypatch.setattr(ImageFiles, "batches", count)

    def load(**options):
        decodes.clear()
        return load_data("folder", root, cache=cache, **options).train.images

    first = load()
    assert decodes == ["train", "test"] and len(list(cache.iterdir())) == 2
    assert torch.equal(load(), first) and decodes == []
    for file in cache.iterdir():  # truncated
        file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(load(), first) and decodes == ["train", "test"]
    for file in cache.iterdir():  # a pickle in its place is not opened
        np.save(file.open("wb"), np.array([print], dtype=object), allow_pickle=True)
    assert torch.equal(load(), first) and decodes == ["train", "test"]
    assert load(image_size=4).shape == (12, 4, 4, 3) and decodes == ["train", "test"]
    assert torch.equal(load(), first) and decodes == []  # caches of two sizes coexist
    Image.new("RGB", (8, 8), "blue").save(root / "train" / "a" / "0.png")
    assert not torch.equal(load(), first) and decodes == ["train"]
    assert len(list(cache.iterdir())) == 4  # the outdated array is gone


def test_worker_processes_decode_the_same(tmp_path):
    root = write_image_folder(tmp_path / "set", count=40)
    data = [load_data("folder", root, cache=tmp_path / f"cache {workers}", workers=workers) for workers in (0, 2)]
    assert torch.equal(data[0].train.images, data[1].train.images)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    data = load_data("folder", write_image_folder(tmp_path / "set"), cache=tmp_path / "cache")
    assert len(data.train.labels) == 12
    assert "were not cached" in capsys.readouterr().out


def test_image_size_makes_mixed_sizes_equal(tmp_path):
    root = write_image_folder(tmp_path / "set")
    image = np.zeros((4, 12, 3), np.uint8)  # black, the middle third of its width white
    image[:, 4:8] = 255
    Image.fromarray(image).save(root / "train" / "a" / "0.png")
    data = load_data("folder", root, cache=tmp_path / "cache", image_size=4)
    assert data.image_size == (4, 4) and data.train.images.shape == (12, 4, 4, 3)
    assert data.train.images[0].eq(255).all()  # its height is 4 already, so only the center is cut


def test_files_are_streamed_if_asked_or_too_large(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "set")
    kept = load_data("folder", root, cache=tmp_path / "cache")
    streamed = load_data("folder", root, cache=tmp_path / "nowhere", stream=True)
    assert isinstance(streamed.train.images, ImageFiles) and not (tmp_path / "nowhere").exists()
    assert streamed.train.images.shape == kept.train.images.shape and streamed.image_size == (8, 8)
    assert torch.equal(streamed.train.images[range(12)], kept.train.images)
    monkeypatch.setattr(trainer_data, "physical_memory", lambda: 2 * 24 * 8 * 8 * 3)
    assert isinstance(load_data("folder", root, cache=tmp_path / "cache").train.images, torch.Tensor)
    monkeypatch.setattr(trainer_data, "physical_memory", lambda: 2 * 24 * 8 * 8 * 3 - 1)
    assert isinstance(load_data("folder", root, cache=tmp_path / "cache").test.images, ImageFiles)
    assert isinstance(load_data("folder", root, cache=tmp_path / "cache", stream=False).train.images, torch.Tensor)


def broken_png(root):
    file = root / "test" / "a" / "3.png"
    file.write_bytes(file.read_bytes()[:40])


def other_size(root):
    Image.new("RGB", (9, 8)).save(root / "train" / "b c" / "1.png")


def empty_class(root):
    (root / "train" / "empty").mkdir()


def extra_class(root):
    (root / "test" / "only here").mkdir()
    Image.new("RGB", (8, 8)).save(root / "test" / "only here" / "0.png")


def no_test(root):
    (root / "test").rename(root / "elsewhere")


def other_test_size(root):
    for file in (root / "test").glob("*/*.png"):
        Image.new("RGB", (9, 9)).save(file)


def dead_link(root):
    (root / "train" / "a" / "5.png").unlink()
    (root / "train" / "a" / "5.png").symlink_to("nowhere")


def one_class(root):
    for split in ("train", "test"):
        (root / split / "a").rename(root / f"{split} a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_png, "test/a/3.png: not a readable image"),
        (other_size, "train/b c/1.png: is 8x9 pixels but the first image is 8x8; set image_size"),
        (empty_class, "train: not an image folder .Found no valid file for the classes empty"),
        (extra_class, "class folder 'only here' is in only one of train and test"),
        (no_test, "val: not an image folder .*; the layout is train/<class>"),
        (other_test_size, "differ in size .8x8 and 9x9.; set image_size"),
        (dead_link, "train/a/5.png: not a readable image"),
        (one_class, "train: needs at least 2 class folders, has 1"),
    ],
)
def test_a_bad_image_folder_is_named_in_one_line(tmp_path, damage, message):
    root = write_image_folder(tmp_path / "set")
    damage(root)
    refused(message, "folder", root, cache=tmp_path / "cache")


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, folder):
    data = load_data(name, write_mnist(tmp_path, name=folder))
    assert data.train.images.shape == (64, 28, 28, 1) and data.test.labels.tolist() == [i % 10 for i in range(16)]
    assert (data.crop, data.flip, len(data.classes)) == (0, False, 10)


def test_bad_mnist_files_are_named_in_one_line(tmp_path):
    root = tmp_path / "set"
    labels = write_mnist(root) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    good = labels.read_bytes()
    for content in (good[:-3], b"", b"nonsense"):
        labels.write_bytes(content)
        refused("set: the MNIST files could not be read ", "mnist", root)
    for content in (good[:-1] + b"\x0b", good[:7] + b"\x0f" + good[8:-1]):  # a label of 11; one label too few
        labels.write_bytes(content)
        refused("set: the MNIST files need a label below 10 for each image", "mnist", root)
    labels.unlink()
    refused("set: the MNIST files could not be read .Dataset not found", "mnist", root)
    refused("set: the FashionMNIST files could not be read .Dataset not found", "fashion-mnist", root)


@pytest.mark.parametrize(("name", "kind", "train"), [("cifar10", CIFAR10, 20), ("cifar100", CIFAR100, 4)])
def test_cifar_files_with_the_right_checksums(tmp_path, monkeypatch, name, kind, train):
    for attribute, value in write_cifar(kind, tmp_path).items():
        monkeypatch.setattr(kind, attribute, value)
    data = load_data(name, tmp_path)
    assert data.train.images.shape == (train, 32, 32, 3) and data.train.images.dtype == torch.uint8
    assert data.test.labels.tolist() == [0, 1, 2, 3] and data.test.labels.dtype == torch.int64
    assert data.classes[3] == "class 3" and (data.crop, data.flip) == (4, True)
    planes = pickle.loads((tmp_path / kind.base_folder / kind.test_list[0][0]).read_bytes())["data"]
    assert np.array_equal(data.test.images[2].permute(2, 0, 1).flatten().numpy(), planes[2])


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar_file_with_another_checksum_is_not_opened(tmp_path, monkeypatch, name):
    for attribute, value in write_cifar(CIFAR10, tmp_path).items():
        monkeypatch.setattr(CIFAR10, attribute, value)
    file, mark = tmp_path / CIFAR10.base_folder / name, tmp_path / "code ran"
    file.write_bytes(pickle.dumps(Payload(str(mark))))
    refused("the CIFAR10 files could not be read .* corrupted", "cifar10", tmp_path)
    file.unlink()
    refused("the CIFAR10 files could not be read .Dataset .*not found", "cifar10", tmp_path)
    assert not mark.exists()


def test_cifar10_as_an_image_folder(tmp_path):
    data = load_data("cifar10", write_image_folder(tmp_path / "set"), cache=tmp_path / "cache")
    assert len(data.train.labels) == 12 and (data.crop, data.flip) == (4, True)
    (tmp_path / "empty").mkdir()
    refused("empty: the CIFAR10 files could not be read .Dataset not found", "cifar10", tmp_path / "empty")
    refused("set: the CIFAR100 files could not be read .Dataset not found", "cifar100", tmp_path / "set")


def test_tiny_imagenet_in_its_own_layout(tmp_path):
    root = write_tiny_imagenet(tmp_path / "set", classes=("n03", "n01", "n02"))
    before = sorted(root.rglob("*"))
    data = load_data("tiny-imagenet", root, cache=tmp_path / "cache")
    assert data.classes == ["n01", "n02", "n03"] and (data.crop, data.flip) == (8, True)
    assert data.train.images.shape == (9, 16, 16, 3) and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test.labels.tolist() == [2, 0, 1]
    assert data.test.images[:, 0, 0, 0].tolist() == [120, 0, 60]
    assert sorted(root.rglob("*")) == before
    streamed = load_data("tiny-imagenet", root, stream=True)
    assert torch.equal(streamed.test.images[range(3)], data.test.images)


@pytest.mark.parametrize("line", ["val_0.JPEG\tn09", "val_0.JPEG", "\x1b"])
def test_bad_tiny_imagenet_annotations(tmp_path, line):
    root = write_tiny_imagenet(tmp_path / "set")
    table = root / "val" / "val_annotations.txt"
    table.write_text(table.read_text() + line + "\n")
    message = "val_annotations.txt: must name an image and its class on each line"
    refused(message, "tiny-imagenet", root, cache=tmp_path / "cache")
    table.write_text("val_9.JPEG\tn01\n")
    refused("val_9.JPEG: not a readable image", "tiny-imagenet", root, cache=tmp_path / "cache")
    table.write_text("")
    refused("val_annotations.txt: names no image", "tiny-imagenet", root, cache=tmp_path / "cache")
    table.unlink()
    refused(message, "tiny-imagenet", root, cache=tmp_path / "cache")


def test_wrong_names_and_arguments(tmp_path):
    refused("nowhere: no such folder", "folder", "nowhere")
    for name in DATASETS[1:]:
        refused(f"path must be the folder of the data set '{name}'", name)
    refused("name must be one of digits, mnist, fashion-mnist, .*, not 'svhn'", "svhn")
    refused("path must be None for 'digits', which are part of scikit-learn", "digits", tmp_path)
    refused("download is for mnist, .*, not for 'folder'", "folder", tmp_path, download=True)
    refused("not for 'digits'", "digits", image_size=16)
    refused("not for 'mnist'", "mnist", write_mnist(tmp_path / "mnist"), stream=True)
    root = write_image_folder(tmp_path / "set")
    refused("image_size must be at least 1, not 0", "folder", root, image_size=0)
    refused("workers must be at least 0, not -1", "folder", root, workers=-1)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no\nroute")

    monkeypatch.setattr(CIFAR100, "download", fail)
    refused("set: the CIFAR100 files could not be downloaded .no route", "cifar100", tmp_path / "set", download=True)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_real_mnist():
    root = os.environ.get("SID_DATA", "")
    if not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("SID_DATA names no folder with MNIST/raw in it, so the real MNIST files are not read")
    data = load_data("mnist", root)
    assert len(data.train.labels) == 60000 and len(data.test.labels) == 10000
    assert torch.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
