"""Image data sets by name, as uint8 tensors in memory or, if they are too large, as image files.

`digits` are the 8x8 digits of scikit-learn. `mnist`, `fashion-mnist`, `cifar10` and `cifar100` are torchvision's files,
`tiny-imagenet` has its own layout, and `folder` (also `cifar10` as image files) holds train/<class>/... and either
test/<class>/... or val/<class>/... Reading a data set never runs code from its files.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import nonempty_path
from .image_files import DataError, ImageFiles, decode, one_line
from .image_folder import Listing, list_splits

__all__ = ["DATASETS", "DataError", "ImageData", "ImageFiles", "Split", "load_data"]

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
DATASETS = ("digits", *TORCHVISION, "tiny-imagenet", "folder")


class Split(NamedTuple):
    """Images (N, H, W, C) uint8, in memory or in files, and their labels (N,) int64."""

    images: Tensor | ImageFiles
    labels: Tensor

    def take(self, index: Tensor) -> "Split":
        """Return the images and labels at `index` (M,) int64."""
        images = self.images
        images = images.subset(index) if isinstance(images, ImageFiles) else images.index_select(0, index)
        return Split(images, self.labels[index])


class ImageData(NamedTuple):
    """The splits of a data set, its classes and its augmentation.

    A label is an index into `classes`. Training images are padded with `crop` zeros on each side and cropped at random
    to their size. With `flip` they are also mirrored, with probability 1/2.
    """

    train: Split
    test: Split
    classes: list[str]
    crop: int = 0
    flip: bool = False
    validation: Split | None = None
    unit: str = "images"  # what sizes of batches count

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image."""
        _, height, width, _ = self.train.images.shape
        return height, width


def load_data(
    name: str, path: str | os.PathLike | None = None, *, cache: str | os.PathLike | None = None,
    download: bool = False, image_size: int | None = None, stream: bool | None = None, workers: int = 0,
) -> ImageData:  # fmt: skip
    """Load the data set called `name`, one of DATASETS, from the folder `path`.

    Args:
        cache: The folder for decoded image files; None is `sid_trainer` in the user's cache folder.
        download: Download the missing files of a torchvision data set.
        image_size: Resize the shorter side of image files to this many pixels, and crop the center to a square.
        stream: Decode image files for each batch; None does so if they would fill more than half of the memory.
        workers: Processes that decode image files; 0 is this process.

    Raises DataError for arguments that are not allowed and for files that cannot be used.
    """
    if name not in DATASETS:
        raise DataError(f"name must be one of {', '.join(DATASETS)}, not {name!r}")
    if download and name not in TORCHVISION:
        raise DataError(f"download is for {', '.join(TORCHVISION)}, not for {name!r}")
    for argument, folder in (("path", path), ("cache", cache)):
        if folder is not None:
            nonempty_path(folder, argument)
    if name != "digits" and path is None:
        raise DataError(f"path must be the folder of the data set {name!r}; none was given")
    if name == "digits" and path is not None:
        raise DataError(f"path must be None for 'digits', which are part of scikit-learn, not {os.fspath(path)!r}")
    root = Path(path or "")
    if not root.is_dir() and not download:
        raise DataError(f"{root}: no such folder")
    for argument, value, least in (("image_size", image_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise DataError(f"{argument} must be at least {least}, not {value}")
    if name in ("tiny-imagenet", "folder") or (name == "cifar10" and (root / "train").is_dir()):
        cache = default_cache() if cache is None else Path(cache)
        splits = list_splits(root, tiny_imagenet=name == "tiny-imagenet")
        train, test = load_files(splits, image_size, stream, cache, workers)
        return ImageData(train, test, splits[0].classes, crop=8 if name == "tiny-imagenet" else 4, flip=True)
    if image_size is not None or stream:
        raise DataError(f"image_size and stream are for sets of image files, not for {name!r}")
    return load_digits() if name == "digits" else load_torchvision(name, root, download)


def load_files(
    listings: tuple[Listing, Listing], image_size: int | None, stream: bool | None, cache: Path, workers: int
) -> list[Split]:
    """Decode the listed images, or leave them in their files. Raises DataError."""
    train, test = listings
    if len(train.classes) < 2:
        raise DataError(f"{train.folder}: needs at least 2 class folders, has {len(train.classes)}")
    images = [ImageFiles.of(listing.files, image_size) for listing in listings]
    if images[0].size != images[1].size:
        sizes = " and ".join("x".join(map(str, files.size)) for files in images)
        raise DataError(
            f"{train.folder.parent}: training and test images differ in size ({sizes}); set image_size to resize them"
        )
    if stream is None:
        stream = sum(math.prod(files.shape) for files in images) > physical_memory() / 2
    return [
        Split(files if stream else decode(files, listing.folder, cache, workers), torch.tensor(listing.labels))
        for listing, files in zip(listings, images, strict=True)
    ]


def load_digits() -> ImageData:
    """Load scikit-learn's digits: 1,437 training and 360 test images of 8x8 grey pixels."""
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    images, labels = read_digits(return_X_y=True)
    images = (images * 15).astype(np.uint8).reshape(-1, 8, 8, 1)  # pixels 0..16 become 0..240
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    train, test = Split(train_images, train_labels.long()), Split(test_images, test_labels.long())
    return ImageData(train, test, [str(i) for i in range(10)])


def load_torchvision(name: str, root: Path, download: bool) -> ImageData:
    """Load a data set of torchvision, which unpickles CIFAR's files only if their checksums are right.

    Raises DataError.
    """
    from torchvision import datasets

    kind, is_cifar = getattr(datasets, TORCHVISION[name]), name.startswith("cifar")
    try:
        parts = [kind(str(root), train=train, download=download) for train in (True, False)]
    except Exception as error:  # networks, disks and damaged files fail in many ways
        verb = "downloaded" if download else "read"
        raise DataError(f"{root}: the {kind.__name__} files could not be {verb} ({one_line(error)})") from error
    classes = [str(i) for i in range(10)] if name == "mnist" else list(parts[0].classes)
    splits = []
    for part in parts:
        images, labels = torch.as_tensor(part.data).contiguous(), torch.as_tensor(part.targets)
        if len(images) != len(labels) or not len(labels) or labels.max() >= len(classes):
            raise DataError(f"{root}: the {kind.__name__} files need a label below {len(classes)} for each image")
        splits.append(Split(images if is_cifar else images[..., None], labels))
    return ImageData(splits[0], splits[1], classes, crop=4 if is_cifar else 0, flip=is_cifar)


def physical_memory() -> int:
    """Return the memory of this machine in bytes; unlike the free memory, it is the same for every run."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_cache() -> Path:
    """Return the folder for decoded images in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sid_trainer"
