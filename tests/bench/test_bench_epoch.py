"""Test the benchmark of whole epochs on a tiny image folder: its measurements, its files, its errors."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

from bench.training import epoch
from helpers.image_sets import write_image_folder
from helpers.killed import _context
from sid_trainer import build_network

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    root = tmp_path_factory.mktemp("epoch")
    data = write_image_folder(root / "set", count=34)
    return ["--data", str(data), "--cache", str(root / "cache"), "--out", str(root / "epoch.json")]


@pytest.fixture
def forked_contenders(monkeypatch):
    """Fork the contenders' processes from one that has imported what they need."""
    monkeypatch.setattr(epoch.multiprocessing, "get_context", lambda method: _context)


@pytest.mark.usefixtures("forked_contenders")
def test_one_round(where, monkeypatch, capfd):
    words = [*where, "--images", "64", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", [str(BENCH / "training" / "epoch.py"), *words])  # is filed
    assert epoch.main() == 0
    printed = capfd.readouterr().out
    text = Path(where[-1]).read_text()
    filed = json.loads(text)
    assert {"machine", "versions", "commit", "command", "date"} <= filed.keys() and where[1] not in text
    assert filed["settings"] == {"images": 64, "rounds": 2, "workers_of_the_reference": 2}
    assert list(filed["contenders"]) == ["reference", "sid train", "sid train, bfloat16"]
    base = filed["contenders"]["reference"]["images_per_second_by_round"]
    for name, row in filed["contenders"].items():
        speeds = row["images_per_second_by_round"]
        assert len(speeds) == 2 and min(speeds) > 0 and f"{row['times_reference']:.2f}" in printed
        ratios = [a / b for a, b in zip(speeds, base, strict=True)]
        assert row["times_reference"] == pytest.approx(statistics.median(ratios))
        assert row["test_accuracy"] >= 0.5, name  # two classes that differ in color
    lines = [line.split()[2] for line in printed.splitlines() if line.startswith("round 1")]
    assert len(lines) == 3 and lines[0] == "sid"  # each round starts with another contender


def test_the_references_network_and_loop(where, monkeypatch):
    """Check that the reference network computes what ours does, and that its epoch trains on every image."""
    ours = build_network(depth=2, fused=False)
    torch.manual_seed(0)
    theirs = epoch.as_in_the_reference(build_network(depth=2, fused=False))
    assert [type(layer).__name__ for layer in theirs.extractor[1]] == ["Conv2d", "ReLU", "MaxPool2d"]
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(ours.beliefs(images), theirs.beliefs(images))

    monkeypatch.setattr(epoch, "WORKERS", 0)
    steps, real = [], epoch.sid_step

    def step(network, inputs, targets, *arguments, **options):
        assert inputs.is_contiguous() and inputs.abs().max() < 10
        result = real(network, inputs, targets, *arguments, **options)
        steps.append((len(targets), result.stage_loss.sum().item()))
        return result

    monkeypatch.setattr(epoch, "sid_step", step)
    args = epoch.argparse.Namespace(data=where[1], cache=where[3], images=66, rounds=1)
    one_epoch, accuracy = epoch.reference(args)
    losses = [one_epoch() for _ in range(15)]
    assert sum(count for count, _ in steps) == 15 * 66 and losses[0] == pytest.approx(steps[0][1])
    assert losses[-1] < 0.7 * losses[0] and accuracy() > 0.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--images", "69"], "the subset of training images must be 1 to 68, not 69"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(where, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        epoch.main([*where, *words])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.count("\n") == 1, printed


@pytest.mark.usefixtures("forked_contenders")
def test_a_contender_that_fails_is_named():
    args = epoch.argparse.Namespace(data="nowhere", cache=None, images=8, rounds=1)
    with pytest.raises(RuntimeError, match="reference: DataError: nowhere: no such folder"):
        epoch.measure(args)
