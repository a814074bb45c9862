"""Test image folders: hidden entries are skipped, sub-folders and links count."""

import shutil

import pytest
from PIL import Image

from helpers.image_sets import write_image_folder, write_tiny_imagenet
from sid_trainer.data.datasets import load_data


def load(root):
    return load_data("folder", root, stream=True)


def counts(data):
    return data.classes, len(data.train.labels), len(data.test.labels)


@pytest.fixture
def root(tmp_path):
    return write_image_folder(tmp_path / "set", classes=("cat", "dog"))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"])
def test_hidden_folders_are_no_data(root, name):
    whole = counts(load(root))
    for split in ("train", "test"):
        for place in (root / split, root / split / "cat"):
            shutil.copytree(root / split / "dog", place / name)
    assert counts(load(root)) == whole == (["cat", "dog"], 12, 12)


@pytest.mark.parametrize("name", ["._0.png", ".hidden.png", "Thumbs.db", ".DS_Store"])
def test_hidden_files_are_no_data(root, name):
    for place in (root, root / "train", root / "train" / "cat", root / "test" / "dog"):
        (place / name).write_bytes(b"no image")
    data = load(root)
    assert counts(data) == (["cat", "dog"], 12, 12) and data.train.images[range(12)].shape == (12, 8, 8, 3)


def test_a_hidden_folder_above_the_set_is_no_matter(tmp_path):
    assert counts(load(write_image_folder(tmp_path / ".data" / "set")))[1:] == (12, 12)


def test_sub_folders_of_a_class_count(root):
    (root / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "more" / "a.PNG")
    assert load(root).train.labels.tolist() == [0] * 7 + [1] * 6


def test_links_to_files_and_classes_elsewhere_are_followed(root, tmp_path):
    elsewhere = write_image_folder(tmp_path / "elsewhere", classes=("emu",))
    for split in ("train", "test"):
        (root / split / "emu").symlink_to(elsewhere / split / "emu")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (root / "train" / "cat" / "red.png").symlink_to(tmp_path / "red.png")
    data = load(root)
    assert counts(data) == (["cat", "dog", "emu"], 19, 18) and data.train.labels.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    assert data.train.images[[6]][0, 0, 0].tolist() == [255, 0, 0]


def test_tiny_imagenet_has_the_same_rules(tmp_path):
    root = write_tiny_imagenet(tmp_path / "set")
    (root / "train" / "n02" / "images" / "._a.JPEG").write_bytes(b"no image")
    shutil.copytree(root / "train" / "n02", root / "train" / ".ipynb_checkpoints")
    data = load_data("tiny-imagenet", root, stream=True)
    assert data.classes == ["n01", "n02"] and data.train.labels.tolist() == [0] * 3 + [1] * 3
