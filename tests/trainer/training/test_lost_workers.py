"""Test that a killed decoding process ends the run with one line and a checkpoint, wherever the run is."""

import re
import signal

import pytest

from helpers.image_sets import write_image_folder
from helpers.killed import assert_same, rows_of, sid, state_of
from sid_trainer.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.processes

# 24 steps per epoch and 24 batches of test images, of which the workers decode at most 4 ahead
WORDS = "train --dataset folder --stream --workers 2 --arch mlp --depth 2 --batch-size 2 --epochs 2 --seed 1".split()
STEP = "sid_trainer.training.trainer.Trainer.train_step"
LOST = (
    r"sid train: error: a process that decodes images died \(DataLoader worker \(pid\(s\) \d+\) exited unexpectedly\)"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = write_image_folder(tmp_path_factory.mktemp("data") / "set", count=24)
    return [*WORDS, "--data", folder]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    status, printed = sid(*words, "--out", out, out=out)
    assert status == 0, printed
    return out


@pytest.mark.parametrize(
    ("place", "number", "where"),
    [
        ((STEP, 3), signal.SIGKILL, 1),  # in a step
        ((STEP, 27), signal.SIGBUS, 2),  # in a step of the second epoch, as when shared memory is full
        pytest.param(
            ("sid_trainer.training.trainer.Trainer.save", 1), signal.SIGKILL, 1, marks=pytest.mark.slow
        ),  # while it saves
        (("sid_trainer.training.strategy.Strategy.stage_logits", 2), signal.SIGKILL, 1),  # in the evaluation
    ],
)
def test_a_killed_worker_is_one_line_and_a_checkpoint(words, alone, tmp_path, place, number, where):
    out = tmp_path / "run"
    saves = ["--save-every", "4"] if place[0].endswith("save") else []
    status, printed = sid(*words, *saves, "--out", out, out=out, kill=place, number=number, worker=True)
    lines = [line for line in printed.splitlines() if not line.startswith(("sid on", "epoch"))]
    assert status == 2 and re.search(rf"{LOST}; [^\n]*; sid train --resume {out} continues it\n\Z", printed), printed
    assert "Traceback" not in printed and "bus error" not in printed and len(lines) <= 4, printed
    state = load_checkpoint(out)
    assert (state["epoch"], state["step"] > 0) == (where, True)
    status, printed = sid("train", "--resume", out, out=out)
    assert status == 0, printed
    if not saves:
        assert_same(state_of(out), state_of(alone))
    assert rows_of(out) == rows_of(alone)
