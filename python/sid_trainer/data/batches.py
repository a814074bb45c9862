"""Batches of a split, normalized and augmented on the training device.

Images in memory and images streamed from files take the same path and give the same bits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .datasets import Split
from .image_files import DataError, ImageFiles
from .seeds import CROPS, ORDER, seeded_generator

STATISTICS_IMAGES = 2048  # images for the pixel statistics; for CIFAR-10 that is 2 million pixels per channel


class Batches:
    """Float32 batches (B, C, H, W) of a split, scaled to mean 0 and standard deviation 1 in each channel.

    Images in memory move to `device` once. A last batch of one image joins the one before it, because batch
    normalization cannot learn from one.

    Args:
        mean, std: Pixel statistics (C,) in 0..255.
        workers: Processes that decode image files; 0 is this process.
        channels_last: Whether batches have the channels-last memory format.
        share: (r, n) gives every n-th image of each batch from the r-th on (from 0), augmented as in the whole batch.

    Raises DataError if the images do not fit on the device, and on iteration if a file cannot be decoded.
    """

    context = 1  # targets of an input; of a text, the tokens in a window

    def __init__(
        self, split: Split, batch_size: int, device: torch.device, mean: Tensor, std: Tensor, workers: int = 0, *,
        channels_last: bool = True, share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        self.batch_size, self.device, self.workers = batch_size, device, workers
        self.channels_last, self.share = channels_last, share
        self.images = split.images
        try:
            if isinstance(self.images, Tensor):
                self.images = self.images.to(device)
        except torch.OutOfMemoryError as error:
            gigabytes = math.prod(self.images.shape) / 1e9
            raise DataError(f"{gigabytes:.1f} GB of images do not fit on {device}; stream image files") from error
        self.labels = split.labels.to(device)
        width = self.images.shape[2]  # on a CPU, factors for a whole row of pixels are 4 times as fast as (C,)
        self.scale, self.shift = ((row / std).repeat(width).to(device) for row in (torch.ones_like(mean), -mean))

    def __len__(self) -> int:
        return len(self.sizes())

    @property
    def count(self) -> int:
        """Number of images in all batches, before they are shared."""
        return len(self.labels)

    def sizes(self) -> list[int]:
        """Return the number of images in each batch, before it is shared."""
        count, size = len(self.labels), self.batch_size
        number = -(-count // size) - (count > size and count % size == 1)
        return [size] * (number - 1) + [count - size * (number - 1)]

    def in_order(self) -> Iterator[tuple[Any, Tensor]]:
        """Iterate over (images, labels) of every batch in the order of the split."""
        return self.load(torch.arange(len(self.labels)))

    def shuffle(self, seed: int, epoch: int, crop: int, flip: bool, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Iterate over the batches of an epoch from batch `start` on, augmented by `crop_and_flip`.

        The order depends on (seed, epoch) alone, and the augmentation of batch t on (seed, epoch, t) alone.
        """
        sizes = self.sizes()

        def augment(images: Tensor, t: int) -> Tensor:
            generator = seeded_generator(seed, CROPS, epoch, t)
            return crop_and_flip(images, crop, flip, generator, sizes[t], self.share)

        order = torch.randperm(len(self.labels), generator=seeded_generator(seed, ORDER, epoch))
        return self.load(order, start, augment if crop or flip else None)

    def load(
        self, order: Tensor, start: int = 0, augment: Callable[[Tensor, int], Tensor] | None = None
    ) -> Iterator[tuple[Any, Tensor]]:
        """Iterate over the batches from `start` on of images in an order (N,); `augment(images, t)` changes batch t."""
        indices = self.local_indices(order, start)
        batches = select(self.images, indices, self.workers, self.device)
        for t, (images, index) in enumerate(zip(batches, indices, strict=True), start):
            yield self.normalize(augment(images, t) if augment else images), self.labels[index]

    def local_indices(self, order: Tensor, start: int) -> Sequence[Tensor]:
        """Return the indices of this process's images, on the device, for each batch from `start` on."""
        offset, stride = self.share
        return [index[offset::stride] for index in order.to(self.device).split(self.sizes())[start:]]

    def normalize(self, images: Tensor) -> Tensor:
        """Return uint8 images (B, H, W, C) as normalized float32 (B, C, H, W)."""
        scaled = images.flatten(2).float().mul_(self.scale).add_(self.shift).view(images.shape).permute(0, 3, 1, 2)
        return scaled if self.channels_last else scaled.contiguous()


class Labels(Batches):
    """Batches of labels with None as images, for a process that receives its inputs from another one."""

    def __init__(self, split: Split, batch_size: int, device: torch.device, share: tuple[int, int] = (0, 1)):
        self.batch_size, self.device, self.share = batch_size, device, share
        self.labels = split.labels.to(device)

    def load(self, order: Tensor, start: int = 0, augment: object = None) -> Iterator[tuple[Any, Tensor]]:
        for index in self.local_indices(order, start):
            yield None, self.labels[index]


def select(
    images: Tensor | ImageFiles, indices: Sequence[Tensor], workers: int = 0, device: torch.device | None = None
) -> Iterator[Tensor]:
    """Iterate over the uint8 images (B, H, W, C) at each index (B,). Images from files are moved to `device`."""
    if isinstance(images, ImageFiles):
        pin_memory = device is not None and device.type == "cuda"
        for batch in images.batches(indices, workers, pin_memory):
            yield batch.to(device, non_blocking=True)
    else:
        for index in indices:
            yield images.index_select(0, index)


def pixel_statistics(images: Tensor | ImageFiles, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation (C,) of pixels in 0..255, over evenly spaced images.

    Of up to STATISTICS_IMAGES images the 256 values are counted exactly, so it does not matter how they are stored.
    """
    count = min(len(images), STATISTICS_IMAGES)
    counts = torch.zeros(images.shape[3], 256, dtype=torch.int64)
    for batch in select(images, (torch.arange(count) * len(images) // count).split(64), workers):
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in batch.unbind(3)])
    values = torch.arange(256, dtype=torch.float64)
    weights = counts / counts.sum(dim=1, keepdim=True, dtype=torch.float64)  # (C, 256)
    mean = weights @ values
    variance = weights @ values.square() - mean.square()
    return mean.float(), variance.clamp_min(1e-6).sqrt().float()  # a constant channel becomes all zeros


def crop_and_flip(
    images: Tensor, crop: int, flip: bool, generator: torch.Generator, batch_size: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Tensor:  # fmt: skip
    """Pad uint8 images (B, H, W, C) by `crop` zero pixels, crop them at random, and mirror half of them if `flip`.

    Images that are the share (r, n) of a batch of `batch_size` images, as in `Batches`, change as in that batch.
    """
    count, height, width, channels = images.shape
    batch_size, (offset, stride) = count if batch_size is None else batch_size, share
    corners = torch.randint(0, 2 * crop + 1, (2, batch_size, 1), generator=generator)  # top and left, in padded pixels
    mirror = torch.rand(batch_size, generator=generator) < (0.5 if flip else 0)
    top, left = corners[:, offset::stride].to(images.device, non_blocking=True)
    mirrored = mirror[offset::stride].nonzero()[:, 0].to(images.device, non_blocking=True)
    padded = torch.nn.functional.pad(images, (0, 0, crop, crop, crop, crop)).contiguous()
    image, row = (torch.arange(n, device=images.device) for n in (count, height))
    starts = (image[:, None] * padded.shape[1] + row + top) * padded.shape[2] + left  # (B, H), in pixels
    # Gather whole lines by their first pixel: on a CPU 4 times as fast as indexing with rows and columns.
    lines = padded.as_strided((padded.numel() // channels - width + 1, width * channels), (channels, 1))
    cut = lines.index_select(0, starts.flatten()).view(images.shape)
    return cut.index_copy_(0, mirrored, cut.index_select(0, mirrored).flip(2))
