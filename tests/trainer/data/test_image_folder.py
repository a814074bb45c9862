"""Test image folders: hidden entries are skipped, and links add no file twice and none from elsewhere."""

import os
import shutil

import pytest
from PIL import Image

from helpers.image_sets import write_image_folder, write_tiny_imagenet
from sid_trainer.data.datasets import DataError, load_data


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


@pytest.mark.parametrize("target", [".", "..", "../..", "../../test", "../dog", "nowhere", "x", "y"])
def test_links_to_folders_are_not_followed(root, capsys, target):
    (root / "train" / "cat" / "x").symlink_to(target)
    (root / "train" / "cat" / "y").symlink_to("x")
    (root / "train" / "cat" / "z").symlink_to("y")
    data = load(root)
    assert counts(data) == (["cat", "dog"], 12, 12) and data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert all("/x/" not in file for file in data.train.images.files)
    assert ("cat/x: skipped, because it is a link to a folder" in capsys.readouterr().out) == (
        target not in ("nowhere", "x", "y")
    )


def test_sub_folders_of_a_class_count(root):
    (root / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "more" / "a.PNG")
    assert load(root).train.labels.tolist() == [0] * 7 + [1] * 6


@pytest.mark.parametrize("target", [".", "cat", "../test/cat", ".."])
def test_a_class_that_is_a_link_into_the_set_is_refused(root, target):
    for split in ("train", "test"):
        (root / split / "x").symlink_to(target)
    with pytest.raises(
        DataError, match=r"/(train|test)/.*\.png: is also in .*; a file may be in one class and one split"
    ):
        load(root)


def test_a_class_that_is_a_link_to_itself_does_not_count(root):
    for split in ("train", "test"):
        (root / split / "x").symlink_to("x")
    assert counts(load(root)) == (["cat", "dog"], 12, 12)


def test_links_to_files_and_classes_elsewhere_are_followed(root, tmp_path):
    elsewhere = write_image_folder(tmp_path / "elsewhere", classes=("emu",))
    for split in ("train", "test"):
        (root / split / "emu").symlink_to(elsewhere / split / "emu")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (root / "train" / "cat" / "red.png").symlink_to(tmp_path / "red.png")
    data = load(root)
    assert counts(data) == (["cat", "dog", "emu"], 19, 18) and data.train.labels.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    assert data.train.images[[6]][0, 0, 0].tolist() == [255, 0, 0]


def test_a_file_linked_twice_in_its_class_comes_once(root):
    (root / "train" / "cat" / "again.png").symlink_to("0.png")
    assert len(load(root).train.labels) == 12


@pytest.mark.parametrize("target", ["../dog/0.png", "../../test/cat/0.png"])
def test_a_file_in_two_classes_or_splits_is_refused(root, target):
    (root / "train" / "cat" / "x.png").symlink_to(target)
    with pytest.raises(DataError, match="is also in .*set/train/cat|is also in .*set/test/cat"):
        load(root)


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="train: not an image folder .*Permission denied.*dog"):
        load(root)


def test_tiny_imagenet_has_the_same_rules(tmp_path):
    root = write_tiny_imagenet(tmp_path / "set")
    (root / "train" / "n01" / "images" / "x").symlink_to("..")
    (root / "train" / "n01" / "y").symlink_to("../n02")
    (root / "val" / "images" / "x").symlink_to("..")
    (root / "train" / "n02" / "images" / "._a.JPEG").write_bytes(b"no image")
    shutil.copytree(root / "train" / "n02", root / "train" / ".ipynb_checkpoints")
    data = load_data("tiny-imagenet", root, stream=True)
    assert data.classes == ["n01", "n02"] and data.train.labels.tolist() == [0] * 3 + [1] * 3
    table = root / "val" / "val_annotations.txt"
    rows = table.read_text()
    table.write_text(rows + rows.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="line 3 must name a new file of .* and its class"):
        load_data("tiny-imagenet", root, stream=True)
    table.write_text(rows)
    (root / "val" / "images" / "val_0.JPEG").unlink()
    (root / "val" / "images" / "val_0.JPEG").symlink_to(root / "train" / "n01" / "images" / "n01_0.JPEG")
    with pytest.raises(DataError, match="val_0.JPEG: is also in .*train/n01"):
        load_data("tiny-imagenet", root, stream=True)
