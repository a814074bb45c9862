"""Test subset, validation split and label noise: their sizes, their classes, and that a seed determines them."""

import pytest
import torch

from helpers.image_sets import write_image_folder
from sid_trainer.data.datasets import DataError, ImageData, Split, load_data
from sid_trainer.data.splits import add_label_noise, split_validation, take_subset


def numbered(sizes):
    """Make sizes[c] images of each class c, in mixed order; the first 2 pixels of an image hold its number."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    numbers = torch.arange(len(labels))
    images = torch.stack([numbers // 256, numbers % 256], dim=1).to(torch.uint8).view(-1, 1, 2, 1)
    return ImageData(Split(images, labels), Split(images[:9], labels[:9]), [str(c) for c in range(len(sizes))])


def numbers(split):
    return (split.images[:, 0, 0, 0].long() * 256 + split.images[:, 0, 1, 0]).tolist()


def check_whole(part, data):
    """Check that every image still has its own label."""
    assert torch.equal(part.labels, data.train.labels[numbers(part)])


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([40, 30, 50], 60, {(20, 15, 25)}),
        ([40, 40, 40], 61, {(21, 20, 20), (20, 21, 20), (20, 20, 21)}),
        ([40, 1, 50], 90, {(39, 1, 50), (40, 1, 49)}),
        ([40, 30, 50], 119, {(39, 30, 50), (40, 29, 50), (40, 30, 49)}),
        ([40, 30, 50], 120, {(40, 30, 50)}),
        ([40, 30, 50], 1, {(1, 0, 0), (0, 1, 0), (0, 0, 1)}),
    ],
)
def test_a_subset_has_the_proportions_of_the_classes(sizes, count, expected):
    data = numbered(sizes)
    actual = take_subset(data, count).train
    check_whole(actual, data)
    assert len(set(numbers(actual))) == count and tuple(torch.bincount(actual.labels, minlength=3).tolist()) in expected
    assert numbers(actual) == sorted(numbers(actual))
    assert numbers(take_subset(data, count).train) == numbers(actual)


def test_another_seed_draws_another_subset_of_the_training_images():
    data = numbered([50, 50])
    actual = [take_subset(data, 20, seed) for seed in (0, 1)]
    assert numbers(actual[0].train) != numbers(actual[1].train)
    assert actual[0].test is data.test and actual[0].classes == data.classes


def test_validation_is_disjoint_and_by_class():
    data = numbered([100, 40, 7])
    actual = split_validation(data, 0.1, seed=3)
    check_whole(actual.train, data), check_whole(actual.validation, data)
    assert torch.bincount(actual.validation.labels).tolist() == [10, 4, 1]
    assert sorted(numbers(actual.train) + numbers(actual.validation)) == list(range(147))
    assert numbers(split_validation(data, 0.1, seed=3).validation) == numbers(actual.validation)
    assert numbers(split_validation(data, 0.1, seed=4).validation) != numbers(actual.validation)
    assert actual.test is data.test
    assert split_validation(data, 0).validation is None


@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.333, 1])
def test_noise_is_exact_and_symmetric_and_of_the_training_labels_alone(share):
    data = split_validation(numbered([1000, 1500, 500]), 0.1)
    noisy = add_label_noise(data, share, seed=2)
    count = len(data.train.labels)
    wrong = noisy.train.labels != data.train.labels
    assert wrong.sum() == round(share * count) and noisy.train.images is data.train.images
    assert noisy.test is data.test and noisy.validation is data.validation
    check_whole(data.train, numbered([1000, 1500, 500]))  # the given labels are unchanged
    assert torch.equal(add_label_noise(data, share, seed=2).train.labels, noisy.train.labels)
    moves = torch.bincount(data.train.labels[wrong] * 3 + noisy.train.labels[wrong], minlength=9).view(3, 3)
    assert moves.diagonal().eq(0).all()
    if share in (0.2, 0.4):
        assert not torch.equal(add_label_noise(data, share, seed=3).train.labels, noisy.train.labels)
        for a, b, c in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):  # each class loses the same share, spread evenly
            lost = moves[a, b] + moves[a, c]
            expected = share * (data.train.labels == a).sum()
            assert abs(lost - expected) < 4 * expected.sqrt() and abs(moves[a, b] - lost / 2) < 2 * lost.sqrt()


def test_streamed_files_are_split_alike(tmp_path):
    root = write_image_folder(tmp_path / "set", count=20)

    def made(**options):
        data = load_data("folder", root, cache=tmp_path / "cache", **options)
        return add_label_noise(split_validation(take_subset(data, 30), 0.2), 0.4)

    kept, streamed = made(), made(stream=True)
    for a, b in ((kept.train, streamed.train), (kept.validation, streamed.validation)):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images[range(len(b.labels))])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: take_subset(data, 0), "must be 1 to 10, not 0"),
        (lambda data: take_subset(data, 11), "must be 1 to 10, not 11"),
        (lambda data: split_validation(data, 1), "at least 0 and less than 1, not 1"),
        (lambda data: split_validation(data, float("nan")), "less than 1, not nan"),
        (lambda data: split_validation(data, 0.01), "0.01 of 10 training images holds out none"),
        (lambda data: split_validation(data, 0.9), "0.9 leaves a class without training images"),
        (lambda data: add_label_noise(data, 1.2), r"in \[0, 1\], not 1.2"),
        (lambda data: add_label_noise(data, -0.1), r"in \[0, 1\], not -0.1"),
    ],
)
def test_impossible_splits_are_errors_on_one_line(call, message):
    with pytest.raises(DataError, match=message) as caught:
        call(numbered([6, 4]))
    assert "\n" not in str(caught.value)
