"""Test `--network MODULE:FUNCTION`: a model cut by names is trained, resumed, measured, exported and reported."""

import json
import sys

import pytest
import torch

from sid_trainer import CutNetwork
from sid_trainer.cli import main
from sid_trainer.data.datasets import load_digits
from sid_trainer.runs.build import load_network

MODULE = """
import torch
from torch import nn
from sid_trainer import build_network, cut

class Residual(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.block1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.block2(x + self.block1(x)).mean((2, 3)))

def make(num_classes, in_channels, image_size):
    model = Residual(in_channels, num_classes)
    return cut(model, ["block1", "block2"], num_classes, torch.zeros(2, in_channels, *image_size))

def make_mlp(num_classes, in_channels, image_size):
    return build_network("mlp", "stagewise", num_classes=num_classes, in_channels=in_channels, image_size=image_size)

def make_model(num_classes, in_channels, image_size):
    return Residual(in_channels, num_classes)

def make_two(num_classes, in_channels, image_size):
    return make(2, in_channels, image_size)

def make_backwards(num_classes, in_channels, image_size):
    model = Residual(in_channels, num_classes)
    return cut(model, ["block2", "block1"], num_classes, torch.zeros(2, in_channels, *image_size))

def make_any(classes):
    return None
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with the module `own_models` the current one."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_models.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        yield folder


@pytest.fixture(scope="module")
def run(folder, blank_pictures):
    assert main(["train", "--network", "own_models:make", "--epochs", "4", "--out", "run"]) == 0
    return folder / "run"


def test_it_learns_and_is_reported(run, capsys):
    config = json.loads((run / "config.json").read_text())
    assert (config["arch"], config["layout"], config["depth"]) == ("own_models:make", "own", 2)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"] > 0.9
    assert (run / "stages.png").exists()
    assert main(["report", str(run), "--out", str(run.parent / "report")]) == 0
    assert "own_models:make" in (run.parent / "report" / "report.html").read_text()


def test_it_is_measured_and_exported(run, capsys):
    assert main(["eval", str(run)]) == 0
    accuracy = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["stage_accuracy"]
    assert f"{accuracy[-1]:.2%}" in capsys.readouterr().out
    assert main(["export", str(run)]) == 0
    network, _, metadata = load_network(run)
    assert isinstance(network, CutNetwork)
    mean, std = (torch.tensor(metadata[f"pixel_{name}"]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = load_digits().test.images[:20].permute(0, 3, 1, 2).float()
    program = torch.export.load(run / "network.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(pixels / 255), network((pixels - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("blank_pictures")
def test_a_stopped_run_is_resumed_to_the_same_bits(folder, monkeypatch):
    from sid_trainer.training.trainer import Trainer

    words = ["train", "--network", "own_models:make", "--epochs", "2", "--batch-size", "256", "--save-every", "2"]
    assert main([*words, "--out", "whole"]) == 0
    train_step, steps = Trainer.train_step, iter(range(8))

    def killed(self, *batch):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return train_step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        assert main([*words, "--out", "parts"]) == 130
    assert main(["train", "--resume", "parts"]) == 0
    states = [load_network(folder / name)[0].state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.usefixtures("blank_pictures")
def test_a_function_may_return_a_network_of_stages(folder):
    assert main(["train", "--network", "own_models:make_mlp", "--epochs", "1", "--method", "bp", "--out", "mlp"]) == 0
    assert main(["eval", "mlp"]) == 0


REFUSED = {
    "own_models:nothing": "network must be MODULE:FUNCTION that can be imported, not 'own_models:nothing'",
    "no_such_module:make": "network must be MODULE:FUNCTION that can be imported, not 'no_such_module:make'",
    "own_models": "network must be MODULE:FUNCTION that can be imported, not 'own_models'",
    "own_models:make_any": "network must be a function of num_classes, in_channels, image_size, but",
    "own_models:make_model": "network must be a function that returns what `cut` or `build_network` return, not a Residual",
    "own_models:make_two": "network must have num_classes 10 as the data, not 2",
    "own_models:make --arch resnet18": "arch is for the networks of --arch, not for network 'own_models:make'",
    "own_models:make --head-depth 2": "head_depth is for the networks of --arch, not for network 'own_models:make'",
    "own_models:make_backwards": "at must name modules that run once each, in this order; 'block1' did not",
    "own_models:make --method bp-checkpoint": "method 'bp-checkpoint' is not for networks that are cut by names",
    "own_models:make --parallel data": "network is for one process, not for parallel 'data'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_is_one_line(folder, words, capsys):
    assert main(["train", "--network", *words.split(), "--out", "refused"]) == 2
    error = capsys.readouterr().err.strip()
    assert REFUSED[words] in error and "\n" not in error
    assert not (folder / "refused").exists()
