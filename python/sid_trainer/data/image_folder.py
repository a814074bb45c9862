"""List the files and labels of image folders: one folder per class, or Tiny-ImageNet's table of annotations.

Hidden files and folders are skipped. Links to folders inside a class are not followed, and no file is listed twice.
"""

import os
from pathlib import Path
from typing import NamedTuple

from .image_files import DataError, one_line, printable

HIDDEN = ("__MACOSX", "@eaDir")  # added by archives and file servers; names that begin with a dot are hidden, too


class Listing(NamedTuple):
    """The image files of a split and the index of each one's class."""

    folder: Path
    files: list[str]
    labels: list[int]
    classes: list[str]


def list_splits(root: Path, tiny_imagenet: bool) -> tuple[Listing, Listing]:
    """List the training and test images of the data set in the folder `root`. Raises DataError."""
    seen: dict[str, Path] = {}
    if tiny_imagenet:  # its test images have no labels
        train = list_classes(root / "train", seen)
        return train, list_annotated(root / "val", train.classes, seen)
    train_folder, test_folder = root / "train", root / ("test" if (root / "test").is_dir() else "val")
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
            files = find_images(folder / name, seen)
            if not files:
                raise DataError(f"{folder / name}: holds no images")
            listing.files.extend(files)
            listing.labels.extend([len(listing.classes)] * len(files))
            listing.classes.append(name)
    except OSError as error:
        raise DataError(f"{folder}: not an image folder ({one_line(error)})") from error
    return listing


def list_annotated(folder: Path, classes: list[str], seen: dict[str, Path]) -> Listing:
    """List Tiny-ImageNet's validation images, whose classes are in folder/val_annotations.txt. Raises DataError."""
    table, images, listing = folder / "val_annotations.txt", folder / "images", Listing(folder, [], [], classes)
    try:
        rows = [line.split("\t")[:2] for line in table.read_text().splitlines()]
        unlisted = set(find_images(images, seen))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{folder}: not Tiny-ImageNet's validation images ({one_line(error)})") from error
    numbers = {name: i for i, name in enumerate(classes)}
    for i, row in enumerate(rows, 1):
        file = str(images / row[0])
        if len(row) < 2 or file not in unlisted or row[1] not in numbers:
            line = "\t".join(row)
            raise DataError(f"{table}: line {i} must name a new file of {images} and its class, not {line!r}")
        unlisted.remove(file)
        listing.files.append(file)
        listing.labels.append(numbers[row[1]])
    if not rows:
        raise DataError(f"{table}: names no image")
    return listing


def find_images(folder: Path, seen: dict[str, Path]) -> list[str]:
    """Return the images below a folder, sorted by folder and name, and add them to `seen`.

    `seen` maps each file, with links resolved, to the folder in which it was found. Raises OSError, and DataError if
    another folder has the same file.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    files: list[str] = []
    errors: list[OSError] = []
    for parent, folders, names in sorted(os.walk(folder, onerror=errors.append)):
        if any(map(is_hidden, Path(parent).relative_to(folder).parts)):
            continue
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
            print(printable(f"{link}: skipped, because it is a link to a folder"))
        resolved_parent = os.path.realpath(parent)
        for name in sorted(names):
            if is_hidden(name) or not has_file_allowed_extension(name, IMG_EXTENSIONS):
                continue
            file = os.path.join(parent, name)
            resolved = os.path.realpath(file) if os.path.islink(file) else os.path.join(resolved_parent, name)
            if resolved not in seen:
                seen[resolved] = folder
                files.append(file)
            elif seen[resolved] != folder:
                raise DataError(f"{file}: is also in {seen[resolved]}; a file may be in one class and one split")
    if errors:
        raise errors[0]
    return files


def is_hidden(name: str) -> bool:
    """Return whether files and folders of that name are skipped."""
    return name.startswith(".") or name in HIDDEN
