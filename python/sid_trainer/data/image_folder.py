"""Lists of the files and labels in image folders: one folder a class, or Tiny-ImageNet's table of annotations.

Hidden files and folders do not count. No link to a folder inside a class is followed, and no file comes twice.
"""

import os
from pathlib import Path
from typing import NamedTuple

from .image_files import DataError, one_line, printable

HIDDEN = ("__MACOSX", "@eaDir")  # what archives and file servers add, besides names that begin with a dot


class Listing(NamedTuple):
    """The image files of a split and the index of each one's class."""

    folder: Path
    files: list[str]
    labels: list[int]
    classes: list[str]


def list_splits(root: Path, tiny_imagenet: bool) -> tuple[Listing, Listing]:
    """List the training and test images in a folder. Raises DataError."""
    seen: dict[str, Path] = {}  # the class folder of each file, links resolved
    if tiny_imagenet:  # its test images have no labels
        train = list_classes(root / "train", seen)
        return train, list_annotated(root / "val", train.classes, seen)
    train_folder = root / "train"
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder (the layout is train/<class>/... and test/<class>/... or val/)")
    train, test = list_classes(train_folder, seen), list_classes(test_folder, seen)
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(f"{root}: the class folder {odd[0]!r} is in only one of train and {test_folder.name}")
    return train, test


def list_classes(folder: Path, seen: dict[str, Path]) -> Listing:
    """List the images below folder/<class>/, sorted by class, folder and name. Raises DataError."""
    listing = Listing(folder, [], [], [])
    try:
        for name in sorted(name for name in os.listdir(folder) if (folder / name).is_dir() and not is_hidden(name)):
            files = [
                file for file, resolved in find_images(folder / name) if is_new(file, resolved, folder / name, seen)
            ]
            if not files:
                raise DataError(f"{folder / name}: holds no images")
            listing.files.extend(files)
            listing.labels.extend([len(listing.classes)] * len(files))
            listing.classes.append(name)
    except OSError as error:
        raise DataError(f"{folder}: not an image folder ({one_line(error)})") from error
    return listing


def find_images(folder: Path) -> list[tuple[str, str]]:
    """Return the path of each image below a folder, as found and with links resolved, in order. Raises OSError."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    found: list[tuple[str, str]] = []
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for link in (os.path.join(parent, name) for name in folders):
            if os.path.islink(link):
                print(printable(f"{link}: not followed, as it is a link to a folder"))
        found += [(parent, name) for name in names if has_file_allowed_extension(name, IMG_EXTENSIONS)]
    if errors:
        raise errors[0]
    resolved = {parent: os.path.realpath(parent) for parent, _ in found}
    paths = (
        (os.path.join(parent, name), os.path.join(resolved[parent], name))
        for parent, name in sorted(found)
        if not is_hidden(name)
    )
    return [(path, os.path.realpath(path) if os.path.islink(path) else real) for path, real in paths]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is no data."""
    return name.startswith(".") or name in HIDDEN


def is_new(file: str, resolved: str, place: Path, seen: dict[str, Path]) -> bool:
    """Record a file of the class folder `place`. Raises DataError if another class or split has it."""
    if resolved not in seen:
        seen[resolved] = place
        return True
    if seen[resolved] != place:
        raise DataError(f"{file}: is also in {seen[resolved]}; a file may be in one class and one split")
    return False


def list_annotated(folder: Path, classes: list[str], seen: dict[str, Path]) -> Listing:
    """List Tiny-ImageNet's validation images, whose classes are in folder/val_annotations.txt. Raises DataError."""
    table, images = folder / "val_annotations.txt", folder / "images"
    try:
        rows = [line.split("\t")[:2] for line in table.read_text().splitlines()]
        present = dict(find_images(images))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not Tiny-ImageNet's validation images ({one_line(error)})") from error
    listing, numbers = Listing(folder, [], [], classes), {name: i for i, name in enumerate(classes)}
    for i, row in enumerate(rows, 1):
        file = str(images / row[0])
        if (
            len(row) < 2
            or file not in present
            or row[1] not in numbers
            or not is_new(file, present[file], images, seen)
        ):
            found = "\t".join(row)
            raise DataError(f"{table}: line {i} must name a file of {images}, each once, and a class, not {found!r}")
        listing.files.append(file)
        listing.labels.append(numbers[row[1]])
    if not rows:
        raise DataError(f"{table}: names no image")
    return listing
