"""What is made out of a training split, fixed by a seed: a subset, held-out validation images, wrong labels.

In that order where several are asked for: what is held out before the noise has true labels.
"""

import torch
from torch import Tensor

from .datasets import ImageData
from .image_files import DataError
from .seeds import NOISE, SUBSET, VALIDATION, seeded


def with_subset(data: ImageData, count: int, seed: int = 0) -> ImageData:
    """Keep `count` training images, as many of each class as of any other while they last. Raises DataError."""
    labels = data.train.labels
    if not 1 <= count <= len(labels):
        raise DataError(f"the subset of training images must be 1 to {len(labels)}, not {count}")
    ranks, order = ranks_in_class(labels, seed, SUBSET)
    chosen = order[ranks[order].argsort(stable=True)[:count]]  # the lowest ranks; which class has one more is random
    return data._replace(train=data.train.take(chosen.sort().values))


def with_validation(data: ImageData, share: float, seed: int = 0) -> ImageData:
    """Move that share of each class's training images into `validation`, never all; 0 moves none. Raises DataError."""
    if not 0 <= share < 1:
        raise DataError(f"the validation share must be at least 0 and less than 1, not {share}")
    if share == 0:
        return data
    labels = data.train.labels
    sizes = torch.bincount(labels).tolist()
    held = torch.tensor([min(round(share * size), max(size - 1, 0)) for size in sizes])
    out = ranks_in_class(labels, seed, VALIDATION)[0] < held[labels]  # (N,)
    if not out.any():
        raise DataError(f"a validation share of {share} of {len(labels)} training images holds none out")
    train, validation = (data.train.take(which.nonzero()[:, 0]) for which in (~out, out))
    return data._replace(train=train, validation=validation)


def with_label_noise(data: ImageData, share: float, seed: int = 0) -> ImageData:
    """Replace round(share * N) training labels, drawn at random, by another class each. Raises DataError.

    The noise is symmetric: each of the other classes is equally likely.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of noisy labels must be in [0, 1], not {share}")
    generator, labels, classes = seeded(seed, NOISE), data.train.labels.clone(), len(data.classes)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, classes, wrong.shape, generator=generator)
    labels[wrong] = (labels[wrong] + shift) % classes
    return data._replace(train=data.train._replace(labels=labels))


def ranks_in_class(labels: Tensor, seed: int, purpose: int) -> tuple[Tensor, Tensor]:
    """Return the rank (N,) of each image within its class in a random order (N,) of all images, and that order."""
    order = torch.randperm(len(labels), generator=seeded(seed, purpose))
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    ranks = torch.empty_like(order)
    ranks[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return ranks, order
