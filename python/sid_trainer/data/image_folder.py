"""List the files and labels of image folders: one folder per class, or Tiny-ImageNet's table of annotations.

torchvision lists the folders; hidden files and folders are skipped.
"""

import os
from pathlib import Path
from typing import NamedTuple

from .image_files import DataError, one_line

HIDDEN = (".", "__MACOSX", "@eaDir")  # how names begin that systems, archives and file servers add


class Listing(NamedTuple):
    """The image files of a split and the index of each one's class."""

    folder: Path
    files: list[str]
    labels: list[int]
    classes: list[str]


def list_splits(root: Path, tiny_imagenet: bool) -> tuple[Listing, Listing]:
    """List the training and test images of the data set in the folder `root`. Raises DataError."""
    train = list_classes(root / "train")
    if tiny_imagenet:  # its test images have no labels
        return train, list_annotated(root / "val", train.classes)
    test = list_classes(root / ("test" if (root / "test").is_dir() else "val"))
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(f"{root}: the class folder {odd[0]!r} is in only one of train and {test.folder.name}")
    return train, test


def list_classes(folder: Path) -> Listing:
    """List the images below folder/<class>/, sorted by class, folder and name. Raises DataError."""
    from torchvision.datasets.folder import find_classes, is_image_file, make_dataset

    def is_listed(file: str) -> bool:
        names = os.path.relpath(file, folder).split(os.sep)
        return is_image_file(file) and not any(name.startswith(HIDDEN) for name in names)

    try:
        classes = [name for name in find_classes(folder)[0] if not name.startswith(HIDDEN)]
        samples = make_dataset(folder, {name: i for i, name in enumerate(classes)}, is_valid_file=is_listed)
    except (OSError, ValueError) as error:
        layout = "the layout is train/<class>/... and test/<class>/... or val/"
        raise DataError(f"{folder}: not an image folder ({one_line(error)}); {layout}") from error
    return Listing(folder, [file for file, _ in samples], [label for _, label in samples], classes)


def list_annotated(folder: Path, classes: list[str]) -> Listing:
    """List Tiny-ImageNet's validation images, whose classes are in folder/val_annotations.txt. Raises DataError."""
    table = folder / "val_annotations.txt"
    try:
        rows = [line.split("\t")[:2] for line in table.read_text().splitlines()]
        files = [str(folder / "images" / name) for name, _ in rows]
        labels = [classes.index(label) for _, label in rows]
    except (OSError, ValueError) as error:
        raise DataError(f"{table}: must name an image and its class on each line ({one_line(error)})") from error
    if not files:
        raise DataError(f"{table}: names no image")
    return Listing(folder, files, labels, classes)
