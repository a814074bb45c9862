"""Your own data for the `Trainer`: data loaders, data sets, or tensors of inputs and classes."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, TensorDataset

from .seeds import ORDER, seeded_generator

Source = DataLoader | Dataset | tuple[Tensor, Tensor]


class OwnData:
    """Training and test examples that the `Trainer` takes as they are, without normalization or augmentation.

    Args:
        train, test, validation: Each a `DataLoader`, a data set whose items are (inputs, class), or a tuple of tensors:
            inputs (N, ...) and classes (N,), int64. A data loader keeps its own batch size and order. Other sources are
            read in batches of the trainer's size, and their training examples are shuffled.
        classes: Names of the classes; None uses their numbers.

    The order of an epoch depends on the trainer's seed and the epoch alone, also that of a data loader whose sampler
    draws from PyTorch's global generator, so that a resumed run continues with the same batches.
    """

    unit = "images"
    crop, flip = 0, False
    in_channels = 0
    image_size: tuple[int, ...] = ()
    train: Any
    test: Any
    validation: Any = None
    classes: list[str] | None

    def __init__(
        self, train: Source, test: Source, *, validation: Source | None = None, classes: Sequence[str] | None = None
    ):
        self.train, self.test, self.validation = train, test, validation
        self.classes = None if classes is None else list(classes)

    def make_batches(self, split: Any, batch_size: int, device: torch.device, shuffle: bool, workers: int = 0) -> Any:
        """Return the batches of a split, with the methods of `Batches`."""
        return LoaderBatches(split, batch_size, device, shuffle, workers)

    def example(self) -> Tensor:
        """Return one training input (1, ...)."""
        inputs, _ = next(self.make_batches(self.train, 2, torch.device("cpu"), False).in_order())
        return inputs[:1]


class LoaderBatches:
    """Batches of a source on `device`, with the methods of `Batches`. Raises ValueError for any other source."""

    def __init__(self, source: Source, batch_size: int, device: torch.device, shuffle: bool, workers: int = 0):
        if isinstance(source, tuple):
            tensors = [torch.as_tensor(part) for part in source]
            if len({len(part) for part in tensors}) != 1:
                raise ValueError(
                    f"data must have as many classes as inputs, not the lengths {[len(part) for part in tensors]}"
                )
            source, workers = TensorDataset(*tensors), 0
        if not isinstance(source, DataLoader) and hasattr(source, "__getitem__"):
            source = DataLoader(source, batch_size, shuffle=shuffle, num_workers=workers)
        batches = getattr(source, "batch_sampler", None)
        if not (
            isinstance(source, DataLoader) and hasattr(source.dataset, "__len__") and isinstance(batches, BatchSampler)
        ):
            raise ValueError(
                "data must be a DataLoader with a batch size and a data set of known length, a data set with"
                f" __getitem__, or (inputs, classes), not {type(source).__name__}"
            )
        self.loader, self.batches, self.device = source, batches, device

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def count(self) -> int:
        """Number of examples in all batches."""
        return sum(self.sizes())

    def sizes(self) -> list[int]:
        """Return the number of examples in each batch."""
        size, examples = self.batches.batch_size, len(self.batches.sampler)  # type: ignore[arg-type]
        return [min(size, examples - size * i) for i in range(len(self.loader))]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over (inputs, classes) of every batch."""
        return map(self.to_device, self.loader)

    def shuffle(self, seed: int, epoch: int, crop: int, flip: bool, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch from batch `start` on; `crop` and `flip` are not used."""
        if hasattr(self.batches.sampler, "set_epoch"):
            self.batches.sampler.set_epoch(epoch)
        random_state = torch.get_rng_state()
        torch.set_rng_state(seeded_generator(seed, ORDER, epoch).get_state())
        batches = iter(self.loader)  # the sampler draws its seed with the first batch
        first = next(batches)
        torch.set_rng_state(random_state)
        for t, batch in enumerate(chain([first], batches)):
            if t >= start:
                yield self.to_device(batch)

    def to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return (inputs, classes) on the device. Raises ValueError for any other batch."""
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)
        if not pair or batch[1].dim() != 1 or batch[1].is_floating_point():
            parts = [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in batch]
            raise ValueError(
                f"data must give batches (inputs, classes (B,) int64), not {parts}; for other inputs and targets call"
                " network(inputs, targets).loss.backward() in your own loop"
            )
        inputs, targets = (x.to(self.device, non_blocking=True) for x in batch)
        return inputs, targets.long()
