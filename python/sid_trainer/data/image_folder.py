"""Images in files: decoded once into a cached array, or by worker processes each time a batch is asked for.

A cache is a plain array, never a pickle. Whatever a file or folder is called is only its name.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..files import write_atomically


class DataError(ValueError):
    """A data set that cannot be used; the message is one line and names the file or folder."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Listing(NamedTuple):
    folder: Path
    files: list[str]
    labels: list[int]  # indices into classes, one a file
    classes: list[str]


@dataclass(frozen=True)
class ImageFiles(Dataset):
    """RGB images left in their files, with the length and shape (N, H, W, 3) of the uint8 tensor they stand for."""

    files: list[str]
    size: tuple[int, int]  # (H, W) of every image, after the resizing to `image_size`
    image_size: int | None = None  # the shorter side is resized to it and the centre cut out; None: as they are

    @classmethod
    def of(cls, files: list[str], image_size: int | None = None) -> "ImageFiles":
        """Make images of `files`, whose first one fixes the size. Raises DataError if it is not readable."""
        return cls(files, read_image(files[0], image_size).shape[:2], image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.files), *self.size, 3)

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, index: Tensor) -> "ImageFiles":
        return replace(self, files=[self.files[i] for i in index.tolist()])

    def __getitem__(self, index: Sequence[int]) -> Tensor:
        """Decode files `index` into (B, H, W, 3) uint8. Raises DataError."""
        images = np.empty((len(index), *self.size, 3), np.uint8)
        for i, file in enumerate(self.files[j] for j in index):
            image = read_image(file, self.image_size)
            if image.shape != images.shape[1:]:
                found, first = ("x".join(map(str, shape[:2])) for shape in (image.shape, self.size))
                raise DataError(
                    f"{file}: is {found} pixels while the first image is {first}; image_size makes all equal"
                )
            images[i] = image
        return torch.from_numpy(images)

    def batches(self, indices: Sequence[Tensor], workers: int = 0, pin_memory: bool = False) -> Iterator[Tensor]:
        """Yield the images of each index (B,) as (B, H, W, 3) uint8, decoded ahead by `workers` processes.

        With 0 workers they are decoded here. Raises DataError, and leaves PyTorch's own random state alone.
        """
        loader = DataLoader(
            ErrorsAsValues(self), sampler=[index.numpy() for index in indices], batch_size=None, num_workers=workers,
            worker_init_fn=ignore_signals, generator=torch.Generator(), pin_memory=pin_memory,
        )  # fmt: skip
        try:
            for batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except RuntimeError as error:  # a worker was killed, by a lack of memory for instance
            raise DataError(f"the processes that read the images failed ({one_line(error)})") from error


class ErrorsAsValues(Dataset):
    """An error raised in a worker process comes out wrapped in its traceback; one returned comes out as it is."""

    def __init__(self, images: ImageFiles):
        self.images = images

    def __getitem__(self, index: Sequence[int]) -> "Tensor | DataError":
        try:
            return self.images[index]
        except DataError as error:
            return error


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach the whole process group; the trainer alone answers them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_image(file: str, image_size: int | None) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8. Raises DataError."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.v2 import functional as F

    try:
        image = pil_loader(file)
        if image_size is not None:
            image = F.center_crop(F.resize(image, [image_size]), [image_size])
        return np.asarray(image)
    except Exception as error:  # decoders raise errors of many kinds on a damaged file
        raise DataError(f"{file}: not a readable image ({one_line(error)})") from error


def class_folders(folder: Path) -> Listing:
    """List the images below folder/<class>/, sorted by class and name. Raises DataError."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not an image folder ({one_line(error)})") from error
    return Listing(folder, [file for file, _ in found.samples], found.targets, found.classes)


def annotated_images(folder: Path, classes: list[str]) -> Listing:
    """List Tiny-ImageNet's validation images, whose classes are in folder/val_annotations.txt. Raises DataError."""
    table, images = folder / "val_annotations.txt", folder / "images"
    try:
        rows = [line.split("\t")[:2] for line in table.read_text().splitlines()]
        present = set(os.listdir(images))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not Tiny-ImageNet's validation images ({one_line(error)})") from error
    numbers = {name: i for i, name in enumerate(classes)}
    for i, row in enumerate(rows, 1):
        if len(row) < 2 or row[0] not in present or row[1] not in numbers:
            raise DataError(f"{table}: line {i} must name a file of {images} and a class, not {chr(9).join(row)!r}")
    if not rows:
        raise DataError(f"{table}: names no image")
    return Listing(folder, [str(images / name) for name, _ in rows], [numbers[name] for _, name in rows], classes)


def decode(images: ImageFiles, folder: Path, cache: Path, workers: int = 0) -> Tensor:
    """Return all images as one tensor (N, H, W, 3) uint8, from the cache if it still matches the files in `folder`."""
    place = hashlib.sha256(b"%s %d" % (os.fsencode(folder.resolve()), images.image_size or 0)).hexdigest()[:16]
    listing = hashlib.sha256()
    for file in images.files:
        try:
            stat = os.stat(file)
        except OSError as error:
            raise DataError(f"{file}: not a readable image ({one_line(error)})") from error
        name = os.fsencode(os.path.relpath(file, folder))
        listing.update(b"%s %d %d\n" % (name, stat.st_size, stat.st_mtime_ns))
    cached = cache / f"{place}-{listing.hexdigest()[:16]}.npy"
    try:
        array = np.load(cached, allow_pickle=False)
        if array.dtype == np.uint8 and array.shape == images.shape:
            return torch.from_numpy(array)
    except (OSError, ValueError, EOFError):  # not there, or damaged: decoded again
        pass
    array = decode_all(images, folder.name, workers)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lambda file: np.save(file, array, allow_pickle=False))
        for stale in set(cache.glob(f"{place}-*.npy")) - {cached}:
            stale.unlink(missing_ok=True)
    except OSError as error:  # a full or read-only disk costs the next run its decoding, not this one its training
        print(printable(f"{cached}: the decoded images were not kept ({one_line(error)})"))
    return torch.from_numpy(array)


def decode_all(images: ImageFiles, what: str, workers: int) -> np.ndarray:
    from tqdm import tqdm

    array = np.empty(images.shape, np.uint8)
    indices = torch.arange(len(images)).split(64)
    with tqdm(desc=f"decoding {what}", total=len(images), unit=" images", leave=False, disable=None) as bar:
        for index, batch in zip(indices, images.batches(indices, workers), strict=True):
            array[index[0] : index[-1] + 1] = batch.numpy()
            bar.update(len(batch))
    return array


def printable(text: str) -> str:
    """Return `text` with line breaks, terminal codes and undecodable bytes of file names escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
