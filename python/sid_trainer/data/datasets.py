"""Image sets by name, as uint8: held whole in memory, or, where they do not fit, left in their image files.

`digits` are the 8x8 digits inside scikit-learn. `mnist`, `fashion-mnist`, `cifar10` and `cifar100` are read from
torchvision's own files, `tiny-imagenet` from its own layout, and `folder` (as `cifar10` may be) from
train/<class>/... and test/<class>/... or val/<class>/... Nothing that is read can run code.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import nonempty_path, write_atomically
from .image_files import DataError, ImageFiles, decode, one_line
from .image_folder import Listing, list_splits

__all__ = ["DATASETS", "DataError", "ImageData", "ImageFiles", "Split", "load_data", "write_atomically"]

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "folder")
DOWNLOADS = ("mnist", "fashion-mnist", "cifar10", "cifar100")


class Split(NamedTuple):
    images: Tensor | ImageFiles  # (N, H, W, C) uint8, or the files they are decoded from when a batch is asked for
    labels: Tensor  # (N,) int64

    def take(self, index: Tensor) -> "Split":
        """Return the images and labels at `index` (M,) int64."""
        images = self.images
        images = images.subset(index) if isinstance(images, ImageFiles) else images.index_select(0, index)
        return Split(images, self.labels[index])


class ImageData(NamedTuple):
    train: Split
    test: Split
    classes: list[str]  # a label is an index into it
    crop: int = 0  # training batches: pixels of zero padding on each side, out of which a crop of the old size is cut
    flip: bool = False  # training batches: mirrored left to right with probability 1/2
    validation: Split | None = None

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        _, height, width, _ = self.train.images.shape
        return height, width


def load_data(
    name: str,
    path: str | os.PathLike | None = None,
    *,
    cache: str | os.PathLike | None = None,
    download: bool = False,
    image_size: int | None = None,
    stream: bool | None = None,
    workers: int = 0,
) -> ImageData:
    """Load the image set called `name`, one of DATASETS, from the folder `path`. Raises DataError.

    `download` fetches one of DOWNLOADS where it is missing; else nothing is. The rest is for image files: `image_size`
    resizes their shorter side to it and cuts out the centre; `stream` leaves them in their files (None: if they would
    fill more than half of the memory when decoded); `cache` is the folder in which decoded images are kept (default:
    `sid_trainer` in the user's cache folder); `workers` processes decode them, 0 means this one.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is called {name!r}; available: {', '.join(DATASETS)}")
    if download and name not in DOWNLOADS:
        raise DataError(f"download is for {', '.join(DOWNLOADS)}, not for {name!r}")
    for argument, folder in (("path", path), ("cache", cache)):
        if folder is not None:
            nonempty_path(folder, argument)
    if name != "digits" and path is None:
        raise DataError(f"the data set {name!r} needs the path of its files")
    if name == "digits" and path is not None:
        raise DataError(f"the data set 'digits' is inside scikit-learn and has no path, not {os.fspath(path)!r}")
    root = Path(path or "")
    if path is not None and not root.is_dir() and not download:
        raise DataError(f"{root}: no such folder")

    in_files = name in ("tiny-imagenet", "folder") or (name == "cifar10" and (root / "train").is_dir())
    if not in_files:
        if image_size is not None or stream:
            raise DataError(f"image_size and stream are for sets of image files, not for {name!r}")
        if name == "digits":
            return load_digits()
        return load_mnist(root, name, download) if "mnist" in name else load_cifar(root, name, download)
    for argument, value, least in (("image_size", image_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise DataError(f"{argument} must be at least {least}, not {value}")
    train, test = list_splits(root, tiny_imagenet=name == "tiny-imagenet")
    if len(train.classes) < 2:
        raise DataError(f"{train.folder}: needs at least 2 class folders, has {len(train.classes)}")
    files = [ImageFiles.of(listing.files, image_size) for listing in (train, test)]
    if files[0].size != files[1].size:
        sizes = " and ".join("x".join(map(str, images.size)) for images in files)
        raise DataError(f"{root}: training and test images differ in size ({sizes}); image_size makes all equal")
    if stream is None:
        stream = sum(math.prod(images.shape) for images in files) > physical_memory() / 2

    def split(listing: Listing, images: ImageFiles) -> Split:
        labels = torch.tensor(listing.labels)
        if stream:
            return Split(images, labels)
        return Split(decode(images, listing.folder, default_cache() if cache is None else Path(cache), workers), labels)

    crop = 8 if name == "tiny-imagenet" else 4
    return ImageData(split(train, files[0]), split(test, files[1]), train.classes, crop, flip=True)


def load_digits() -> ImageData:
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    digits = read_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]  # (1797, 8, 8, 1), pixels 0..16 stretched to 0..240
    parts = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return ImageData(Split(train_x, train_y.long()), Split(test_x, test_y.long()), [str(i) for i in range(10)])


def load_mnist(root: Path, name: str, download: bool) -> ImageData:
    from torchvision.datasets import MNIST, FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    kind = FashionMNIST if name == "fashion-mnist" else MNIST
    if download:
        fetch(kind, root)
    raw = root / kind.__name__ / "raw"

    def read(file: Path, reader: Callable[[str], Tensor]) -> Tensor:
        if not file.is_file():
            raise DataError(f"{file}: no such file (the {kind.__name__} files belong there, unpacked)")
        try:
            return reader(str(file))
        except Exception as error:  # the reader meets a damaged file with whatever it stumbles over
            raise DataError(f"{file}: not a readable {kind.__name__} file ({one_line(error)})") from error

    def split(prefix: str) -> Split:
        images = read(raw / f"{prefix}-images-idx3-ubyte", read_image_file)  # (N, H, W)
        labels = read(label_file := raw / f"{prefix}-labels-idx1-ubyte", read_label_file)  # (N,)
        if len(images) != len(labels) or not len(labels) or labels.max() > 9:
            raise DataError(f"{label_file}: must hold one label in 0..9 for each of the {len(images)} images")
        return Split(images[..., None], labels)

    classes = FashionMNIST.classes if kind is FashionMNIST else [str(i) for i in range(10)]
    return ImageData(split("train"), split("t10k"), list(classes))


def load_cifar(root: Path, name: str, download: bool) -> ImageData:
    """Read CIFAR-10 or CIFAR-100 through torchvision, which opens a pickle only if its checksum is the original's."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    kind = CIFAR100 if name == "cifar100" else CIFAR10
    if download:
        fetch(kind, root)
    folder = root / kind.base_folder
    if not folder.is_dir():
        also = " nor train/<class>/..." if kind is CIFAR10 else ""
        raise DataError(f"{root}: holds no {kind.base_folder} (the {kind.__name__} files, unpacked){also}")
    try:
        parts = [kind(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        sums = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
        for file, checksum in sums.items():
            if not check_integrity(str(folder / file), checksum):
                what = "its checksum is not the original's" if (folder / file).is_file() else "no such file"
                raise DataError(f"{folder / file}: {what}, so no {kind.__name__} file was opened") from error
        raise
    train, test = (Split(torch.from_numpy(part.data.copy()), torch.tensor(part.targets)) for part in parts)
    return ImageData(train, test, list(parts[0].classes), crop=4, flip=True)


def fetch(kind: Any, root: Path) -> None:
    try:
        kind(str(root), download=True)
    except Exception as error:  # networks, disks and archives fail in many ways
        raise DataError(f"{root}: the {kind.__name__} files could not be downloaded ({one_line(error)})") from error


def physical_memory() -> int:
    """Return the machine's memory in bytes, not what is free now, so that a command always does the same."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sid_trainer"
