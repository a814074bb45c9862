"""The data sets: what is read, what is refused and how it is named, the cache, the batches, atomic writes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_sets import write_image_folder, write_mnist
from sid_trainer import data as trainer_data
from sid_trainer.data import Batches, DataError, Split, cropped_and_flipped, load_data, pixel_statistics
from sid_trainer.files import write_atomically


def test_digits():
    data = load_data("digits")
    assert data.train.images.shape == (1437, 8, 8, 1) and data.test.images.shape == (360, 8, 8, 1)
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert (data.crop, data.flip, data.classes) == (0, False, list("0123456789"))
    assert torch.equal(data.test.images, load_data("digits").test.images)


def test_image_folder_with_sorted_classes(tmp_path):
    data = load_data("folder", write_image_folder(tmp_path / "set"), cache=tmp_path / "cache")
    assert data.classes == ["a", "b c"] and (data.crop, data.flip) == (4, True)
    assert data.train.images.shape == (12, 8, 8, 3) and data.train.labels.tolist() == [0] * 6 + [1] * 6
    with Image.open(tmp_path / "set" / "train" / "b c" / "2.png") as image:
        assert np.array_equal(np.asarray(image), data.train.images[8].numpy())


def test_val_stands_in_for_test(tmp_path):
    data = load_data("folder", write_image_folder(tmp_path, splits=("train", "val")), cache=tmp_path / "cache")
    assert len(data.test.labels) == 12


def test_the_cache_is_used_while_it_fits_and_rebuilt_when_not(tmp_path, monkeypatch):
    root, cache = write_image_folder(tmp_path / "set"), tmp_path / "cache"
    decodes, decode = [], trainer_data.decode

    def counted(files, folder):
        decodes.append(folder.name)
        return decode(files, folder)

    monkeypatch.setattr(trainer_data, "decode", counted)

    def load():
        decodes.clear()
        return load_data("folder", root, cache=cache).train.images

    first = load()
    assert decodes == ["train", "test"] and len(list(cache.iterdir())) == 2
    assert torch.equal(load(), first) and decodes == []
    for file in cache.iterdir():  # truncated
        file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(load(), first) and decodes == ["train", "test"]
    for file in cache.iterdir():  # a pickle in its place is not opened
        np.save(file.open("wb"), np.array([print], dtype=object), allow_pickle=True)
    assert torch.equal(load(), first) and decodes == ["train", "test"]
    Image.new("RGB", (8, 8), "blue").save(root / "train" / "a" / "0.png")
    assert not torch.equal(load(), first) and decodes == ["train"]
    assert len(list(cache.iterdir())) == 2  # the outdated array is gone


def test_no_room_for_the_cache_is_not_the_end(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    data = load_data("folder", write_image_folder(tmp_path / "set"), cache=tmp_path / "cache")
    assert len(data.train.labels) == 12
    assert "were not kept" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_png, "test/a/3.png: not a readable image"),
        (other_size, "train/b c/1.png: is 8x9 pixels while 0.png is 8x8"),
        (empty_class, "train: not an image folder .*empty"),
        (extra_class, "class folder 'only here' is in only one of train and test"),
        (no_test, "val: no such folder .the layout is train/<class>"),
        (other_test_size, "differ in size .8x8 and 9x9"),
    ],
)
def test_a_bad_image_folder_is_named_in_one_line(tmp_path, damage, message):
    root = write_image_folder(tmp_path / "set")
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        load_data("folder", root, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_mnist_files(tmp_path):
    data = load_data("mnist", write_mnist(tmp_path))
    assert data.train.images.shape == (64, 28, 28, 1) and data.test.labels.tolist() == [i % 10 for i in range(16)]
    assert (data.crop, data.flip) == (0, False)


def test_bad_mnist_files_are_named_in_one_line(tmp_path):
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    labels = raw / "t10k-labels-idx1-ubyte"
    good = labels.read_bytes()
    for content in (good[:-3], b"", b"nonsense", good[:-1] + b"\x0b"):
        labels.write_bytes(content)
        with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: ") as caught:
            load_data("mnist", tmp_path)
        assert "\n" not in str(caught.value)
    labels.unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: no such file"):
        load_data("mnist", tmp_path)


def test_missing_places_and_names():
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load_data("folder", "nowhere")
    with pytest.raises(DataError, match="'mnist' needs the path"):
        load_data("mnist")
    with pytest.raises(DataError, match="no data set is called 'svhn'; available: digits, mnist, folder"):
        load_data("svhn")


def test_crop_and_flip_against_a_loop():
    images = torch.randint(0, 256, (40, 6, 5, 3), dtype=torch.uint8)
    found = cropped_and_flipped(images, 2, True, torch.Generator().manual_seed(3))
    assert found.shape == images.shape
    mirrored = 0
    for image, result in zip(images.numpy(), found.numpy(), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        windows = [padded[y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
        straight = any(np.array_equal(result, window) for window in windows)
        mirrored += any(np.array_equal(result, window[:, ::-1]) for window in windows) and not straight
        assert straight or any(np.array_equal(result, window[:, ::-1]) for window in windows)
    assert 8 <= mirrored <= 32
    again = cropped_and_flipped(images, 2, True, torch.Generator().manual_seed(3))
    assert torch.equal(found, again)


def test_batches_are_normalised_and_whole():
    images = torch.randint(0, 256, (50, 4, 4, 3), dtype=torch.uint8)
    images[..., 2] = 7  # a constant channel
    split = Split(images, torch.arange(50))
    batches = Batches(split, 16, torch.device("cpu"), *pixel_statistics(images))
    everything = torch.cat([inputs for inputs, _ in batches.in_order()])
    assert len(batches) == 4 and everything.shape == (50, 3, 4, 4)
    assert everything.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything[:, :2].var((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)

    def order(seed):
        return torch.cat([labels for _, labels in batches.shuffled(torch.Generator().manual_seed(seed), 0, False)])

    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))
    assert order(1).sort().values.tolist() == list(range(50))


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
