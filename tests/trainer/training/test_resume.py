"""Test that a run that was killed at any step, or stopped, and resumed ends in the bits of an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

from helpers.killed import assert_same, rows_of, sid, state_of
from sid_trainer import TrainConfig, Trainer, cut
from sid_trainer.data.datasets import ImageData, Split
from sid_trainer.training.checkpoint import load_checkpoint

# 7 steps per epoch, the last on 8 images; saved after steps 2, 4, 6 and 7 of each. One-cycle, for its momentary rate.
COMMON = (
    "--train-images 200 --batch-size 32 --crop 1 --epochs 3 --save-every 2 --lr-schedule one-cycle --seed 3".split()
)
COMMON += ["--hidden-dim", "32"]
NETWORKS = {
    "mlp-stagewise": "--arch mlp --layout stagewise --alpha 0.8:0.4",
    "cnn-shared": "--arch simple_cnn --layout shared --depth 3 --optimizer sgd --lr 0.01",
}
STEP = "sid_trainer.training.trainer.Trainer.train_step"  # its nth call begins step n of the run


@pytest.fixture(scope="module", params=["mlp-stagewise", pytest.param("cnn-shared", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """Return the arguments of a run, and the folder of an undisturbed one."""
    words = ["train", *COMMON, *NETWORKS[request.param].split()]
    out = tmp_path_factory.mktemp(request.param) / "alone"
    status, printed = sid(*words, "--out", out, out=out)
    assert status == 0, printed
    return words, out


def check_same(folder, alone):
    assert not list(folder.glob(".last.pt.*"))  # left by a run that was killed while it saved; the next save removes it
    assert_same(state_of(folder), state_of(alone))
    assert rows_of(folder) == rows_of(alone) and len(rows_of(alone)) == 3


def resume(folder, place=None, **options):
    status, printed = sid("train", "--resume", place or folder, out=folder, **options)
    assert status == 0, printed
    return printed


STRATEGY = "sid_trainer.training.strategy.Strategy"
KILLED = [  # where; the checkpoint's epoch and step; the networks of `make test`
    ((STEP, 4), (1, 2), (*NETWORKS,)),  # in the first epoch, between two saves
    ((STEP, 5), (1, 4), ()),  # just after a save
    ((f"{STRATEGY}.evaluate", 1), (1, 6), ()),  # during the first evaluation
    ((STEP, 8), (2, 0), ()),  # the first step of an epoch
    ((STEP, 12), (2, 4), ()),  # in the middle of the second epoch
    (("sid_trainer.training.logs.Log.add", 2), (3, 0), ()),  # saved, but not yet in metrics.jsonl
    ((f"{STRATEGY}.evaluate", 3), (3, 6), ("mlp-stagewise",)),  # during the last evaluation
    (("sid_trainer.cli.print_end", 1), (4, 0), ("mlp-stagewise",)),  # finished, except for the picture
    (("rename", 3), (1, 4), ("mlp-stagewise",)),  # last.pt has become previous.pt, and the new one is not in its place
]


@pytest.mark.parametrize(
    ("run", "place", "where"),
    [
        pytest.param(name, place, where, marks=() if name in short else pytest.mark.slow)
        for name in NETWORKS
        for place, where, short in KILLED
    ],
    indirect=["run"],
)
def test_a_killed_run_resumes_to_the_same_bits(run, tmp_path, place, where):
    words, alone = run
    folder = tmp_path / "killed"
    status, printed = sid(*words, "--out", folder, out=folder, kill=place)
    assert status == -signal.SIGKILL, printed
    state = load_checkpoint(folder)
    assert (state["epoch"], state["step"]) == where
    assert len(list(folder.glob(".last.pt.*"))) == (place[0] == "rename")
    assert f"resumed in epoch {where[0]} after step {where[1]}" in resume(folder)
    check_same(folder, alone)


def test_killed_again_and_again(run, tmp_path):
    """Kill processes repeatedly: the next one repeats what was done since the last save."""
    words, alone = run
    folder = tmp_path / "killed"
    status, _ = sid(*words, "--out", folder, out=folder, kill=(STEP, 6))
    for _ in range(20):
        if status == 0:
            break
        assert status == -signal.SIGKILL
        status, _ = sid("train", "--resume", folder, out=folder, kill=(STEP, 6))
    check_same(folder, alone)


def test_killed_before_anything_was_saved(run, tmp_path):
    words, alone = run
    folder = tmp_path / "killed"
    sid(*words, "--out", folder, out=folder, kill=(STEP, 2))
    status, printed = sid("train", "--resume", folder, out=folder)
    assert status == 2 and printed == f"sid train: error: {folder}: holds no checkpoint (last.pt)\n"
    status, printed = sid(*words, "--overwrite", "--out", folder, out=folder)
    assert status == 0, printed
    check_same(folder, alone)


IN_SHORT = [("mlp-stagewise", signal.SIGTERM, 14), ("cnn-shared", signal.SIGINT, 14)]  # the others are slow


@pytest.mark.parametrize(
    ("run", "number", "step", "where"),
    [
        pytest.param(name, number, step, where, marks=() if (name, number, step) in IN_SHORT else pytest.mark.slow)
        for name in NETWORKS
        for number in (signal.SIGTERM, signal.SIGINT)
        for step, where in ((3, "epoch 1 after step 3"), (14, "epoch 2 after step 7"))
    ],
    indirect=["run"],
)
def test_a_stopped_run_is_saved_and_resumes_to_the_same_bits(run, tmp_path, number, step, where):
    words, alone = run
    folder = tmp_path / "stopped"
    status, printed = sid(*words, "--out", folder, out=folder, kill=(STEP, step), number=number)
    assert status == 130 and "Traceback" not in printed
    assert printed.endswith(f"sid train: stopped in {where}; sid train --resume {folder} continues it\n")
    assert f"resumed in {where}" in resume(folder)
    check_same(folder, alone)


def test_a_stop_during_evaluation_waits_for_the_next_step_or_the_end(run, tmp_path):
    words, alone = run
    folder, last = tmp_path / "stopped", tmp_path / "last"
    place = "sid_trainer.training.strategy.Strategy.evaluate"
    status, printed = sid(*words, "--out", folder, out=folder, kill=(place, 1), number=signal.SIGTERM)
    assert status == 130 and "stopped in epoch 2 after step 1" in printed
    resume(folder)
    check_same(folder, alone)
    status, printed = sid(*words, "--out", last, out=last, kill=(place, 3), number=signal.SIGTERM)
    assert status == 0, printed  # the run has ended already
    check_same(last, alone)


def test_a_finished_run_resumed_stays_as_it_is(run, tmp_path):
    words, alone = run
    before = {file.name: file.read_bytes() for file in alone.iterdir() if not file.name.startswith("events.")}
    printed = resume(alone, draw=True)
    assert "resumed in epoch 4 after step 0" in printed and "certificate   after epoch 3" in printed
    assert (alone / "stages.png").exists()
    assert all((alone / name).read_bytes() == content for name, content in before.items())


def test_resumed_from_the_checkpoint_before_the_last(run, tmp_path):
    words, alone = run
    folder = tmp_path / "killed"
    sid(*words, "--out", folder, out=folder, kill=(STEP, 12))
    assert "resumed in epoch 2 after step 2" in resume(folder, folder / "previous.pt")
    check_same(folder, alone)


@pytest.mark.slow
def test_a_process_killed_from_outside(run, tmp_path):
    """Kill the command, started as a user does, at whatever step it happens to be in."""
    words, alone = run
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "sid_trainer", *words, "--out", str(folder)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in the other processes: bits depend on their number
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=one_thread) as process:
        end = time.monotonic() + 300
        while not (folder / "previous.pt").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        errors = process.stderr.read().decode()
    assert process.returncode in (-signal.SIGKILL, 0) and (folder / "previous.pt").exists(), errors  # 0: had ended
    resume(folder)
    check_same(folder, alone)


class Dying(Exception):
    pass


def user_network():
    """Return layers that draw random numbers at every step, and one that keeps statistics."""
    torch.manual_seed(0)
    blocks = OrderedDict(
        flat=nn.Flatten(), one=nn.Linear(64, 32), norm=nn.BatchNorm1d(32), relu=nn.ReLU(), dropout=nn.Dropout(0.3),
        two=nn.Linear(32, 32), again=nn.Dropout(0.5), last=nn.ReLU(),
    )  # fmt: skip
    return cut(nn.Sequential(blocks), [5], 3, torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("schedule", ["one-pass", "two-phase", "reference"])
@pytest.mark.parametrize("died", [2, 5, 8])
def test_random_layers_of_a_users_network_draw_what_they_would_have(tmp_path, schedule, died):
    images = torch.randint(0, 256, (20, 8, 8, 1), dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 3)
    data = ImageData(split, split, ["a", "b", "c"], crop=1)
    config = TrainConfig(epochs=3, batch_size=8, channels_last=False, save_every=1, device="cpu", schedule=schedule)

    def trainer(folder):
        return Trainer(user_network(), data, config, tmp_path / folder, quiet=True)

    torch.manual_seed(1)
    alone = trainer("alone")
    torch.manual_seed(1)
    alone.fit()

    dying, steps = trainer("died"), 0
    whole = dying.strategy.step

    def step(*batch):
        nonlocal steps
        steps += 1
        if steps > died:
            raise Dying
        return whole(*batch)

    dying.strategy.step = step
    torch.manual_seed(1)
    with pytest.raises(Dying):
        dying.fit()

    torch.manual_seed(99)  # at a step that another process may have reached
    resumed = trainer("died")
    resumed.resume()
    resumed.fit()
    assert_same(state_of(tmp_path / "died"), state_of(tmp_path / "alone"))
    assert rows_of(tmp_path / "died") == rows_of(tmp_path / "alone")
