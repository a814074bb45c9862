"""Test the runs behind the tables of accuracy: changed data, heads on trial and the curve of early exit."""

from itertools import accumulate

import pytest
import torch

from bench.training.accuracy import ResidualHead, change_heads, halved, paired, run_cell
from sid_trainer import build_network
from sid_trainer.data.datasets import Split
from sid_trainer.training.operations import exit_operations


def test_each_pair_of_images_has_the_label_of_both():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 2, 3, 1)  # each shows its class
    pairs = paired(Split(images, torch.arange(10)), seed=0)
    assert pairs.images.shape == (10, 2, 6, 1)
    left, right = pairs.images[:, 0, 0, 0].long(), pairs.images[:, 0, 5, 0].long()
    assert pairs.labels.equal(10 * left + right) and sorted(right.tolist()) == list(range(10))


def test_halved_images_hold_the_mean_of_four_pixels():
    images = torch.tensor([[0, 4, 10, 20], [8, 12, 30, 40]], dtype=torch.uint8).view(1, 2, 4, 1)
    assert halved(Split(images, torch.zeros(1)), seed=0).images.flatten().tolist() == [6, 25]


def test_a_residual_head_that_says_nothing_repeats_the_prior():
    prior = torch.tensor([[0.7, 0.3, 0.0]])
    logits = ResidualHead(lambda features, prior: torch.zeros(1, 3))(torch.zeros(1, 2), prior)
    torch.testing.assert_close(logits.softmax(dim=1), prior)


def test_tails_at_half_the_resolution_need_a_quarter_of_the_operations():
    network = build_network("simple_cnn", "stagewise", image_size=(8, 8), norm=True, tail=1)
    full = exit_operations(network, (3, 8, 8))
    change_heads("trial: tails at half the resolution", network)
    fewer = exit_operations(network, (3, 8, 8))
    tails = [32 * 64 * 8 * 8, 64 * 128 * 4 * 4, 128 * 128 * 4 * 4, 0]  # weights by pixels; the last stage has none
    saved = [before - after for before, after in zip(full, fewer, strict=True)]
    assert saved == [0.75 * 2 * 9 * total for total in accumulate(tails)]


@pytest.mark.parametrize("cell", ["sid", "trial: residual beliefs"])
def test_a_run_records_accuracy_against_operations(cell):
    settings = {"dataset": "digits", "arch": "mlp", "layout": "stagewise", "batch_size": 32, "epochs": 4}
    task = {"table": "digits", "cell": cell, "seed": 0, "settings": settings, "evaluations": 1}
    run = run_cell(task | {"machine": {"device": "cpu", "dtype": "float32"}})
    operations = [point["operations"] for point in run["exit"]]
    assert operations == sorted(operations) and operations[0] < operations[-1]
    assert operations[-1] == pytest.approx(run["exit_operations"][-1])  # no image leaves early
    assert run["exit"][-1]["accuracy"] == run["stages"][-1]
