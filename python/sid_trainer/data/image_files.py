"""Image files as uint8 tensors: decoded once and cached, or decoded by worker processes each time a batch is needed."""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..files import write_atomically

DECODER_VERSION = 3  # part of the names of cached arrays; increase it whenever `read_image` returns other pixels


class DataError(ValueError):
    """Raised if a data set cannot be used; the message is one line and names the file or folder."""

    def __init__(self, message: str):
        super().__init__(printable(message))


@dataclass(frozen=True)
class ImageFiles:
    """RGB images in files, with the length and shape (N, H, W, 3) of the uint8 tensor they decode to.

    With `image_size`, the shorter side of each image is resized to it and the center is cut out.
    """

    files: list[str]
    size: tuple[int, int]  # (H, W) of every image
    image_size: int | None = None

    @classmethod
    def of(cls, files: list[str], image_size: int | None = None) -> "ImageFiles":
        """Return images of the size of the first one. Raises DataError if it cannot be decoded."""
        height, width, _ = read_image(files[0], image_size).shape
        return cls(files, (height, width), image_size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.files), *self.size, 3)

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, index: Tensor) -> "ImageFiles":
        """Return the images at `index` (M,)."""
        return replace(self, files=[self.files[i] for i in index.tolist()])

    def __getitem__(self, index: Sequence[int]) -> Tensor:
        """Decode the images at `index` (B,) to (B, H, W, 3) uint8. Raises DataError."""
        images = np.empty((len(index), *self.size, 3), np.uint8)
        for i, file in enumerate(self.files[j] for j in index):
            image = read_image(file, self.image_size)
            if image.shape != images.shape[1:]:
                size, first_size = ("x".join(map(str, shape[:2])) for shape in (image.shape, self.size))
                raise DataError(f"{file}: is {size} pixels but the first image is {first_size}; set image_size")
            images[i] = image
        return torch.from_numpy(images)

    def batches(self, indices: Sequence[Tensor], workers: int = 0, pin_memory: bool = False) -> Iterator[Tensor]:
        """Decode one batch (B, H, W, 3) uint8 for each index (B,), in `workers` processes, or in this one if 0.

        Raises DataError. PyTorch's global random state stays as it is.
        """
        loader: DataLoader = DataLoader(
            [index.cpu().numpy() for index in indices], batch_size=None, collate_fn=self.decode_or_error,  # type: ignore[arg-type]  # a list is a data set
            num_workers=workers, worker_init_fn=reset_signals, generator=torch.Generator(), pin_memory=pin_memory,
        )  # fmt: skip
        try:
            for batch in start_workers(loader):
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            raise DataError(
                f"a process that decodes images died ({one_line(error)}); fewer workers or a smaller batch need less"
                " memory and shared memory"
            ) from error

    def decode_or_error(self, index: Sequence[int]) -> "Tensor | DataError":
        """Decode the images at `index`, or return the error: PyTorch adds a traceback to one raised in a worker."""
        try:
            return self[index]
        except DataError as error:
            return error


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """Start the worker processes of a loader, and return the iterator over what they load.

    If a worker dies, waiting for the next batch raises RuntimeError. PyTorch's SIGCHLD handler would raise it wherever
    the main thread happens to be, so the previous handler is installed again.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return batches


def reset_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM, which the trainer handles, and let SIGBUS end a worker without another message."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)


def read_image(file: str, image_size: int | None = None) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 as a viewer shows it, resized and cut to `image_size` if given.

    16-bit grey is scaled to 8 bits, the EXIF orientation applied, and transparency composited over white. Raises
    DataError if the file is damaged or the range of its pixel values is unknown.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2 import functional as F

    try:
        with open(file, "rb") as stream:  # given a path, Pillow maps some TIFF files and rotates them wrongly
            image = ImageOps.exif_transpose(Image.open(stream))
        if image.mode == "I;16":
            image = F.to_pil_image(F.to_dtype(F.pil_to_tensor(image), torch.uint8, scale=True))
        if image.mode[0] in "IF":
            raise ValueError(f"mode {image.mode}: the range of its pixels is unknown; save it with 8 bits")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image_size is not None:
            image = F.center_crop(F.resize(image, [image_size]), [image_size])
        return np.asarray(image)
    except Exception as error:  # decoders raise errors of many kinds on a damaged file
        raise DataError(f"{file}: not a readable image ({one_line(error)})") from error


def decode(images: ImageFiles, folder: Path, cache: Path, workers: int = 0) -> Tensor:
    """Decode all images to (N, H, W, 3) uint8, or load them from the cache if it matches the files in `folder`."""
    from tqdm import tqdm

    folder_hash = hashlib.sha256(b"%s %d" % (os.fsencode(folder.resolve()), images.image_size or 0)).hexdigest()[:16]
    files_hash = hashlib.sha256(b"%d\n" % DECODER_VERSION)
    try:
        for file in images.files:
            stat, name = os.stat(file), os.fsencode(os.path.relpath(file, folder))
            files_hash.update(b"%s %d %d\n" % (name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise DataError(f"{file}: not a readable image ({one_line(error)})") from error
    cache_file = cache / f"{folder_hash}-{files_hash.hexdigest()[:16]}.npy"
    try:
        array = np.load(cache_file, allow_pickle=False)
        if array.dtype == np.uint8 and array.shape == images.shape:
            return torch.from_numpy(array)
    except (OSError, ValueError, EOFError):  # missing or damaged: decode again
        pass
    array, indices = np.empty(images.shape, np.uint8), torch.arange(len(images)).split(64)
    decoding = tqdm(indices, desc=f"decoding {folder.name}", unit=" batches", leave=False, disable=None)
    for batch, index in zip(images.batches(indices, workers), decoding, strict=True):
        array[index] = batch
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_file, lambda file: np.save(file, array, allow_pickle=False))
        for stale in set(cache.glob(f"{folder_hash}-*.npy")) - {cache_file}:
            stale.unlink(missing_ok=True)
    except OSError as error:  # on a full or read-only disk, this run still trains, and the next one decodes again
        print(printable(f"{cache_file}: the decoded images were not cached ({one_line(error)})"))
    return torch.from_numpy(array)


def printable(text: str) -> str:
    """Escape line breaks, terminal codes and undecodable bytes of file names."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
