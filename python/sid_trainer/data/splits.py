"""Change the training split by a seed: take a subset, hold out validation images, add label noise.

Apply them in this order: validation images taken before the noise keep their true labels.
"""

import numpy as np
import torch
from torch import Tensor

from .datasets import ImageData
from .image_files import DataError
from .seeds import NOISE, seeded_generator


def take_subset(data: ImageData, count: int, seed: int = 0) -> ImageData:
    """Keep `count` training images, with the classes in the same proportions. Raises DataError."""
    labels = data.train.labels
    if not 1 <= count <= len(labels):
        raise DataError(f"the subset of training images must be 1 to {len(labels)}, not {count}")
    return data._replace(train=data.train.take(draw_by_class(labels, count, seed).nonzero()[:, 0]))


def split_validation(data: ImageData, share: float, seed: int = 0) -> ImageData:
    """Move a share of the training images to `validation`, with the classes in the same proportions.

    A share of 0 moves none. Raises DataError if no image would be moved, or all of a class.
    """
    if not 0 <= share < 1:
        raise DataError(f"the validation share must be at least 0 and less than 1, not {share}")
    if share == 0:
        return data
    labels = data.train.labels
    held_out = draw_by_class(labels, round(share * len(labels)), seed)
    if not held_out.any():
        raise DataError(f"a validation share of {share} of {len(labels)} training images holds out none")
    if len(labels[~held_out].unique()) < len(labels.unique()):
        raise DataError(f"a validation share of {share} leaves a class without training images")
    train, validation = (data.train.take(mask.nonzero()[:, 0]) for mask in (~held_out, held_out))
    return data._replace(train=train, validation=validation)


def add_label_noise(data: ImageData, share: float, seed: int = 0) -> ImageData:
    """Replace round(share * N) training labels, drawn at random, by other classes. Raises DataError.

    The noise is symmetric: each of the other classes is equally likely.
    """
    if not 0 <= share <= 1:
        raise DataError(f"the share of noisy labels must be in [0, 1], not {share}")
    generator, labels, classes = seeded_generator(seed, NOISE), data.train.labels.clone(), len(data.classes)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, classes, wrong.shape, generator=generator)
    labels[wrong] = (labels[wrong] + shift) % classes
    return data._replace(train=data.train._replace(labels=labels))


def draw_by_class(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return a mask (N,) of `count` labels (N,), drawn at random in the proportions of the classes."""
    from sklearn.utils import resample

    mask = torch.zeros(len(labels), dtype=torch.bool)
    if count:
        indices = np.arange(len(labels))
        mask[resample(indices, replace=False, n_samples=count, stratify=labels.numpy(), random_state=seed)] = True
    return mask
