"""Test order, crops and pixels of batches, from memory and from files, also when resumed within an epoch."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from helpers.image_sets import write_image_folder
from helpers.processes import forked
from sid_trainer.data import batches as trainer_batches
from sid_trainer.data.batches import Batches, crop_and_flip, pixel_statistics
from sid_trainer.data.datasets import DataError, Split, load_data
from sid_trainer.data.seeds import seeded_generator

CPU = torch.device("cpu")


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "set", count=13, size=(6, 8))


def in_memory_and_streamed(folder, workers):
    kept = load_data("folder", folder, cache=folder.parent / "cache").train
    streamed = load_data("folder", folder, stream=True).train
    statistics = pixel_statistics(kept.images)
    return Batches(kept, 4, CPU, *statistics), Batches(streamed, 4, CPU, *statistics, workers=workers)


def test_crop_and_flip_against_a_loop():
    images = torch.randint(0, 256, (40, 6, 5, 3), dtype=torch.uint8)
    actual = crop_and_flip(images, 2, True, torch.Generator().manual_seed(3))
    assert actual.shape == images.shape
    mirrored = 0
    for image, result in zip(images.numpy(), actual.numpy(), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        windows = [padded[y : y + 6, x : x + 5] for y in range(5) for x in range(5)]
        straight = any(np.array_equal(result, window) for window in windows)
        mirrored += any(np.array_equal(result, window[:, ::-1]) for window in windows) and not straight
        assert straight or any(np.array_equal(result, window[:, ::-1]) for window in windows)
    assert 8 <= mirrored <= 32
    again = crop_and_flip(images, 2, True, torch.Generator().manual_seed(3))
    assert torch.equal(actual, again)


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_alone_and_crop_alone(channels):
    images = torch.randint(0, 256, (64, 5, 7, channels), dtype=torch.uint8)
    flipped = crop_and_flip(images, 0, True, seeded_generator(0))
    mirrored = (flipped == images.flip(2)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all() and 16 < mirrored.sum() < 48
    corners = torch.zeros(500, 1, 1, channels, dtype=torch.uint8) + 9  # one pixel; a crop by 1 keeps it in 1 of 9 cases
    assert 25 < crop_and_flip(corners, 1, False, seeded_generator(0)).eq(9).all(3).sum() < 90


def test_batches_are_normalized_and_complete():
    images = torch.randint(0, 256, (50, 4, 4, 3), dtype=torch.uint8)
    images[..., 2] = 7  # a constant channel
    split = Split(images, torch.arange(50))
    batches = Batches(split, 16, CPU, *pixel_statistics(images))
    everything = torch.cat([inputs for inputs, _ in batches.in_order()])
    assert len(batches) == 4 and everything.shape == (50, 3, 4, 4)
    assert everything.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything[:, :2].var((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert torch.equal(torch.cat([labels for _, labels in batches.in_order()]), torch.arange(50))

    def order(seed, epoch):
        return torch.cat([labels for _, labels in batches.shuffle(seed, epoch, 0, False)])

    assert torch.equal(order(1, 3), order(1, 3))
    assert not torch.equal(order(1, 3), order(2, 3)) and not torch.equal(order(1, 3), order(1, 4))
    assert order(1, 3).sort().values.tolist() == list(range(50))
    for inputs, labels in batches.shuffle(1, 3, 0, False):
        assert torch.equal(inputs, everything[labels])


@pytest.mark.parametrize(("count", "size", "expected"), [
    (9, 4, [4, 5]), (10, 4, [4, 4, 2]), (5, 4, [5]), (3, 2, [3]), (1, 4, [1]), (3, 1, [1, 1, 1]),
])  # fmt: skip
def test_a_single_image_left_over_joins_the_batch_before(count, size, expected):
    images = torch.randint(0, 256, (count, 2, 2, 1), dtype=torch.uint8)
    batches = Batches(Split(images, torch.arange(count)), size, CPU, *pixel_statistics(images))
    actual = list(batches.shuffle(0, 1, 1, True))
    assert [len(labels) for _, labels in actual] == expected and len(batches) == len(expected)
    assert sorted(torch.cat([labels for _, labels in actual]).tolist()) == list(range(count))
    assert same(actual[1:], list(batches.shuffle(0, 1, 1, True, start=1)))


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_an_epoch_resumes_at_any_batch_with_the_same_bits(folder, start):
    for batches in in_memory_and_streamed(folder, workers=0):
        whole = list(batches.shuffle(7, 2, 3, True))
        assert len(whole) == 7 and same(whole[start:], list(batches.shuffle(7, 2, 3, True, start=start)))


def test_the_crops_of_a_batch_differ_from_epoch_to_epoch_and_batch_to_batch():
    split = Split(torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8, 1).repeat(8, 1, 1, 1), torch.zeros(8).long())
    batches = Batches(split, 4, CPU, torch.zeros(1), torch.ones(1))
    actual = [inputs for seed in (0, 1) for epoch in (0, 1) for inputs, _ in batches.shuffle(seed, epoch, 4, True)]
    assert len({inputs.numpy().tobytes() for inputs in actual}) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_equal_those_in_memory(folder, workers):
    kept, streamed = in_memory_and_streamed(folder, workers)
    state = torch.get_rng_state()
    assert same(list(kept.in_order()), list(streamed.in_order()))
    assert same(list(kept.shuffle(3, 1, 2, True)), list(streamed.shuffle(3, 1, 2, True)))
    assert torch.equal(torch.get_rng_state(), state)  # so dropout draws the same numbers


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["broken", "gone", "other size"])
def test_an_unreadable_streamed_image_is_named_in_one_line(folder, workers, damage):
    file = folder / "train" / "b c" / "3.png"
    _, streamed = in_memory_and_streamed(folder, workers)
    if damage == "other size":
        file.write_bytes(next(write_image_folder(folder.parent / "other").rglob("*.png")).read_bytes())
    else:
        file.write_bytes(file.read_bytes()[:50]) if damage == "broken" else file.unlink()
    with pytest.raises(DataError, match=r"set/train/b c/3\.png: (not a readable image|is 8x8 pixels)") as caught:
        list(streamed.shuffle(0, 0, 0, False))
    assert str(caught.value).isprintable()


def test_workers_ignore_signals_to_the_process_group(folder):
    _, streamed = in_memory_and_streamed(folder, workers=1)
    batches = streamed.shuffle(0, 0, 0, False)
    actual = [next(batches)]  # the worker has been initialized
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    actual += batches
    assert len(actual) == 7


KILLED_WORKER = """
import multiprocessing, os, signal, sys
from sid_trainer.data import image_files
from sid_trainer.data.datasets import DataError, load_data

def die(file, image_size):  # in the worker, at its first image: the parent is waiting for its first batch
    os.kill(os.getpid(), signal.SIGKILL)

multiprocessing.set_start_method("fork")  # the worker inherits the patched function
images = load_data("folder", sys.argv[1], stream=True).train.images
image_files.read_image = die
try:
    next(images.batches([image_files.torch.arange(2)], workers=1))
except DataError as error:
    print(error)
"""


def test_a_killed_worker_is_an_error_on_one_line(folder):
    ran = forked(KILLED_WORKER, folder)
    assert ran.stdout.startswith("a process that decodes images died (DataLoader worker"), ran.stderr
    assert ran.returncode == 0 and ran.stdout.count("\n") == 1 and ran.stderr == ""


def test_pixel_statistics_are_those_of_an_evenly_spaced_sample(folder, monkeypatch):
    kept, streamed = (batches.images for batches in in_memory_and_streamed(folder, 0))
    monkeypatch.setattr(trainer_batches, "STATISTICS_IMAGES", 4)
    sample = kept[[0, 6, 13, 19]].double()  # of 26
    for images in (kept, streamed):
        mean, std = pixel_statistics(images)
        torch.testing.assert_close(mean.double(), sample.mean((0, 1, 2)))
        torch.testing.assert_close(std.double(), sample.std((0, 1, 2), correction=0))
