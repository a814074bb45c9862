"""Image sets held whole in memory as uint8, and their batches: normalised, cropped and flipped a whole batch at a time.

Names: `digits` (real 8x8 digits that ship inside scikit-learn), `mnist` (its files in torchvision's layout) and
`folder` (`train/<class>/...` and `test/<class>/...` or `val/<class>/...`). A cache is a plain array, never a pickle.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .files import write_atomically

DATASETS = ("digits", "mnist", "folder")


class DataError(ValueError):
    """A data set that cannot be used; the message is one line and names the file or folder."""


class Split(NamedTuple):
    images: Tensor  # (N, H, W, C) uint8
    labels: Tensor  # (N,) int64


class ImageData(NamedTuple):
    train: Split
    test: Split
    classes: list[str]  # sorted; a label is an index into it
    crop: int = 0  # training batches: pixels of zero padding on each side, out of which a crop of the old size is cut
    flip: bool = False  # training batches: mirrored left to right with probability 1/2

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[3]


def load_data(
    name: str, path: str | os.PathLike | None = None, *, cache: str | os.PathLike | None = None, download: bool = False
) -> ImageData:
    """The image set called `name`; `path` is the root of `mnist` (holding `MNIST/raw`) or of `folder`.

    `cache` is the folder decoded images are kept in (default: `sid_trainer` in the user's cache folder). Nothing is
    downloaded unless `download` says so. Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is called {name!r}; available: {', '.join(DATASETS)}")
    if name == "digits":
        return load_digits()
    if path is None:
        raise DataError(f"the data set {name!r} needs the path of its files")
    if not Path(path).is_dir() and not (download and name == "mnist"):
        raise DataError(f"{path}: no such folder")
    if name == "mnist":
        return load_mnist(Path(path), download)
    return load_folder(Path(path), default_cache() if cache is None else Path(cache))


def load_digits() -> ImageData:
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    digits = read_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]  # (1797, 8, 8, 1), pixels 0..16 stretched to 0..240
    parts = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return ImageData(Split(train_x, train_y.long()), Split(test_x, test_y.long()), [str(i) for i in range(10)])


def load_mnist(root: Path, download: bool) -> ImageData:
    from torchvision.datasets import MNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    if download:
        try:
            MNIST(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{root}: the MNIST files could not be downloaded ({one_line(error)})") from error
    raw = root / "MNIST" / "raw"

    def read(file: Path, reader) -> Tensor:
        if not file.is_file():
            raise DataError(f"{file}: no such file (the MNIST files belong there, unpacked)")
        try:
            return reader(str(file))
        except Exception as error:  # the reader meets a damaged file with whatever it stumbles over
            raise DataError(f"{file}: not a readable MNIST file ({one_line(error)})") from error

    def split(prefix: str) -> Split:
        images = read(raw / f"{prefix}-images-idx3-ubyte", read_image_file)  # (N, H, W)
        labels = read(label_file := raw / f"{prefix}-labels-idx1-ubyte", read_label_file)  # (N,)
        if len(images) != len(labels) or not len(labels) or labels.max() > 9:
            raise DataError(f"{label_file}: must hold one label in 0..9 for each of the {len(images)} images")
        return Split(images[..., None], labels)

    return ImageData(split("train"), split("t10k"), [str(i) for i in range(10)])


def load_folder(root: Path, cache: Path) -> ImageData:
    from torchvision.datasets import ImageFolder

    def split(folder: Path) -> tuple[Split, list[str]]:
        try:
            listing = ImageFolder(str(folder))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not an image folder ({one_line(error)})") from error
        images = decoded([Path(file) for file, _ in listing.samples], folder, cache)
        return Split(torch.from_numpy(images), torch.tensor(listing.targets)), listing.classes

    train_folder = root / "train"
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder (the layout is train/<class>/... and test/<class>/... or val/)")
    (train, classes), (test, test_classes) = split(train_folder), split(test_folder)
    if odd := sorted(set(classes) ^ set(test_classes)):
        raise DataError(f"{root}: the class folder {odd[0]!r} is in only one of train and {test_folder.name}")
    if len(classes) < 2:
        raise DataError(f"{train_folder}: needs at least 2 class folders, has {len(classes)}")
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = " and ".join("x".join(map(str, split.images.shape[1:3])) for split in (train, test))
        raise DataError(f"{root}: training and test images differ in size ({sizes})")
    return ImageData(train, test, classes, crop=4, flip=True)


def decoded(files: list[Path], folder: Path, cache: Path) -> np.ndarray:
    """All images of a split as one array (N, H, W, 3) uint8, from the cache where it still matches the files."""
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    stats = [(os.fsencode(file.relative_to(folder)), file.stat()) for file in files]
    listing = b"\n".join(b"%s %d %d" % (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    cached = cache / f"{place}-{hashlib.sha256(listing).hexdigest()[:16]}.npy"
    try:
        images = np.load(cached, allow_pickle=False)
        if images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(files) and images.shape[3] == 3:
            return images
    except (OSError, ValueError, EOFError):  # not there, or damaged: decoded again
        pass
    images = decode(files, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lambda file: np.save(file, images, allow_pickle=False))
        for stale in set(cache.glob(f"{place}-*.npy")) - {cached}:
            stale.unlink(missing_ok=True)
    except OSError as error:  # a full or read-only disk costs the next run its decoding, not this one its training
        print(f"{cached}: the decoded images were not kept ({one_line(error)})")
    return images


def decode(files: list[Path], folder: Path) -> np.ndarray:
    """Decode into one array (N, H, W, 3) uint8; the first image fixes the size."""
    from torchvision.datasets.folder import pil_loader
    from tqdm import tqdm

    images = None
    for i, file in enumerate(tqdm(files, desc=f"decoding {folder.name}", unit=" images", leave=False, disable=None)):
        try:
            image = np.asarray(pil_loader(str(file)))  # (H, W, 3)
        except Exception as error:  # decoders raise errors of many kinds on a damaged file
            raise DataError(f"{file}: not a readable image ({one_line(error)})") from error
        if images is None:
            images = np.empty((len(files), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            found, first = ("x".join(map(str, shape[:2])) for shape in (image.shape, images.shape[1:]))
            raise DataError(f"{file}: is {found} pixels while {files[0].name} is {first}; all must be the same size")
        images[i] = image
    return images


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sid_trainer"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Batches:
    """Float batches of one split: (B, C, H, W) in channels-last memory, scaled to mean 0 and deviation 1 a channel."""

    def __init__(self, split: Split, batch_size: int, device: torch.device, mean: Tensor, std: Tensor):
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size = batch_size
        self.scale, self.shift = (1 / std).to(device), (-mean / std).to(device)  # (C,)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalised(images), labels

    def shuffled(self, generator: torch.Generator, crop: int, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in an order, with crops and flips, that `generator` (on the CPU) alone decides."""
        for index in torch.randperm(len(self.labels), generator=generator).split(self.batch_size):
            index = index.to(self.labels.device)
            images = self.images[index]
            if crop or flip:
                images = cropped_and_flipped(images, crop, flip, generator)
            yield self.normalised(images), self.labels[index]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, C) -> float32 (B, C, H, W)."""
        return images.float().mul_(self.scale).add_(self.shift).permute(0, 3, 1, 2)


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of uint8 images (N, H, W, C), in pixel units, from exact counts of the 256 values."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(3)]).double()
    weights = counts / counts.sum(dim=1, keepdim=True)  # (C, 256)
    mean = weights @ values
    variance = weights @ values.square() - mean.square()
    return mean.float(), variance.clamp_min(1e-6).sqrt().float()  # a constant channel becomes all zeros


def cropped_and_flipped(images: Tensor, crop: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Zero-pad uint8 images (B, H, W, C) by `crop`, cut an H x W window at random from each, mirror half of them.

    Window and mirror are one gather: the row and column of every output pixel are looked up in the padded batch.
    """
    count, height, width, _ = images.shape
    corner = torch.randint(0, 2 * crop + 1, (2, count, 1), generator=generator)  # top and left, in padded pixels
    mirror = torch.rand(count, 1, generator=generator) < (0.5 if flip else 0)
    rows = torch.arange(height) + corner[0]  # (B, H)
    columns = torch.arange(width)
    columns = torch.where(mirror, columns.flip(0), columns) + corner[1]  # (B, W)
    padded = torch.nn.functional.pad(images, (0, 0, crop, crop, crop, crop))
    which = torch.arange(count)
    which, rows, columns = (t.to(images.device) for t in (which[:, None, None], rows[:, :, None], columns[:, None, :]))
    return padded[which, rows, columns]
