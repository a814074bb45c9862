"""Test ranks that are killed, stopped or silent: the run ends as an undisturbed one, or with one clear line.

SID_KILLS=10 kills ten times where the suite kills twice.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
from functools import partial

import pytest
import torch

from helpers.killed import assert_same, sid, state_of
from helpers.processes import wait_until
from helpers.ranks import (
    STEP,
    assert_same_run,
    finish,
    left,
    printed,
    ranks,
    restart,
    start_ranks,
    torchrun,
    trained,
    workers,
)  # fmt: skip
from sid_trainer.distributed.rendezvous import Communicator, LostRank
from sid_trainer.distributed.topology import Topology
from sid_trainer.training.checkpoint import load_checkpoint

KILLS = int(os.environ.get("SID_KILLS", 2))
SMALL = f"--arch mlp --train-images 130 --batch-size 16 --crop 1 --epochs {12 * KILLS} --save-every 3 --seed 5".split()
RUNS = {
    "stage": ("--layout", "stagewise", "--parallel", "stage"),
    "data": ("--layout", "shared", "--depth", "3", "--parallel", "data"),
}


def own_lines(text):
    return [line for line in text.splitlines() if line.startswith("sid train")]


def restarted(run, gone):
    """Return both ranks, rank -> process id, once neither is one of those that ended; until then None."""
    processes = workers(run.process.pid)
    return processes if len(processes) == 2 and not gone & set(processes.values()) else None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stage", "data"])
def test_ranks_killed_in_turn_at_random_moments(tmp_path, how):
    """Send SIGKILL to rank 0, 1, 0, ...: soon after its start, or some time after it has saved something."""
    words = [*SMALL, *RUNS[how]]
    alone = trained(*words, count=2, out=tmp_path / "alone")
    folder, draw = tmp_path / "killed", random.Random(how)
    last = folder / "last.pt"
    with torchrun(
        "train",
        *words,
        "--out",
        folder,
        count=2,
        out=folder,
        restarts=KILLS,
        meeting=["--standalone"] if how == "stage" else ["--rdzv-id=job"],
    ) as run:
        gone: set[int] = set()
        ended = lambda: run.process.poll() is not None  # noqa: E731  # as it may have, on a slow machine
        for kill in range(KILLS):
            both = wait_until(lambda: ended() or restarted(run, gone), "start")
            if ended():
                break
            gone.update(both.values())
            if draw.random() < 0.75 or kill == 0:
                seen = [last.stat().st_mtime_ns if last.exists() else None]
                saved = lambda seen=seen: last.exists() and last.stat().st_mtime_ns not in seen  # noqa: E731
                wait_until(lambda saved=saved: ended() or saved(), "save")
                time.sleep(draw.uniform(0, 0.3))
            else:
                time.sleep(draw.uniform(0, 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(both[kill % 2], signal.SIGKILL)
        run.process.wait(600)
        text = run.text()
    assert run.process.returncode == 0, text
    assert "Traceback" not in text, text
    assert_same_run(folder, alone)
    assert state_of(folder)["activation_bytes"] == state_of(alone)["activation_bytes"]
    assert not list(folder.glob(".last.pt.*"))


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_ranks_after_the_same_step(tmp_path):
    """Stop all ranks by a signal; then 1 process continues until a signal, and 3 until the end."""
    words = [*SMALL, "--epochs", "8", *RUNS["stage"]]
    alone = trained(*words[: words.index("--parallel")], count=1, out=tmp_path / "alone")
    folder = tmp_path / "stopped"
    with torchrun("train", *words, "--out", folder, count=2, out=folder, stop_at=30) as run:
        run.process.wait(300)
        text = run.text()
    stopped = re.findall(r"^sid train: (stopped in epoch (\d+) after step (\d+)); sid train --resume", text, re.M)
    assert len(stopped) == 1, text  # the rank that saved it says so
    state = state_of(folder)
    assert (state["epoch"], state["step"]) == tuple(map(int, stopped[0][1:])) == (4, 3)
    assert sid("train", "--resume", folder, out=folder, kill=(STEP, 5), number=signal.SIGINT)[0] == 130
    status, said = ranks("train", "--resume", folder, "--parallel", "stage", count=3, out=folder)
    assert status == [0] * 3, said
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_set_time(tmp_path):
    """Run three runs side by side, because all of them mostly wait."""
    timeout, runs = 20, {}
    for how, silent in (("stage", 0), ("stage", 1), ("data", 1)):
        folder = tmp_path / f"{how}{silent}"
        words = ["train", *SMALL, *RUNS[how], "--timeout", timeout, "--out", folder]
        runs[how, silent] = start_ranks([words] * 2, folder, ends={silent: (STEP, 20, signal.SIGSTOP)})
    for (how, silent), processes in runs.items():
        folder, other = tmp_path / f"{how}{silent}", processes[1 - silent]
        other.join(300)
        status = other.exitcode
        processes[silent].kill()
        finish(processes)
        text = printed(folder, 1 - silent).read_text()
        whom = f"rank {silent}" if how == "stage" else "another rank"
        expected = (
            f"sid train: rank {1 - silent}: {whom} sent nothing for {timeout} seconds; the last checkpoint is kept"
        )
        assert status == 1 and own_lines(text) == [expected] and "Traceback" not in text, text
        state = state_of(folder)
        # Of 9 steps per epoch; the next rank learned from what was sent.
        assert (state["epoch"], state["step"]) in ((2, 6), (3, 0))


@pytest.mark.parametrize(
    ("how", "lost"),
    [pytest.param(how, lost, marks=[] if lost else [pytest.mark.slow]) for how in RUNS for lost in (0, 1)],
)
def test_a_rank_that_is_gone_is_noticed_at_once_and_the_run_can_go_on(tmp_path, how, lost):
    folder = tmp_path / "run"
    words = ["train", *SMALL, "--epochs", 3, *RUNS[how], "--out"]
    status, said = ranks(*words, folder, count=2, out=folder, ends={lost: (STEP, 15, signal.SIGKILL)})
    assert status[lost] == -signal.SIGKILL and status[1 - lost] == 1, said
    whom = f"rank {lost}" if how == "stage" else "another rank"
    (line,) = own_lines(said[1 - lost])
    assert line.startswith(f"sid train: rank {1 - lost}: ") and line.endswith(" is gone; the last checkpoint is kept")
    assert (whom in line or how == "data") and "Traceback" not in "".join(said), said
    status, said = ranks("train", "--resume", folder, *RUNS[how][-2:], count=2, out=folder)
    assert status == [0, 0], said
    whole = trained(*words[1:-1], count=2, out=tmp_path / "whole")
    assert_same_run(folder, whole)


def test_an_infinite_loss_names_the_stage_by_its_number_in_the_whole_network(tmp_path):
    folder = tmp_path / "run"
    words = ["train", *SMALL, *RUNS["stage"], "--optimizer", "sgd", "--lr", "1e30", "--out", folder]
    status, said = ranks(*words, count=2, out=folder)
    assert status == [1, 1] and "Traceback" not in "".join(said), said
    assert re.search(
        r"^sid train: the loss of stage [1-4] is (nan|inf) in epoch 1, step [12] ", "\n".join(said), re.M
    ), said


@pytest.mark.parametrize(("count", "meeting"), [(2, ["--standalone"]), (1, ["--rdzv-id=another"])])
@pytest.mark.slow
def test_a_restart_resumes_the_run_of_its_launch_only(tmp_path, count, meeting):
    """Check that a restart of a run that was refused, because the folder holds another, does not resume the other."""
    words = ["train", *SMALL, "--epochs", "1", *(RUNS["stage"] if count > 1 else []), "--out", tmp_path / "run"]
    first = ["--rdzv-id=job"] if count == 1 else meeting
    with torchrun(*words, count=count, out=tmp_path / "first", meeting=first) as run:
        assert run.process.wait(300) == 0, run.text()
    before = left(tmp_path / "run")
    with torchrun(*words, count=count, out=tmp_path / "again", restarts=1, meeting=meeting) as run:
        assert run.process.wait(300) == 1
        text = run.text()
    expected = f"sid train: error: {tmp_path / 'run'}: holds a run already"
    assert [line.partition(";")[0] for line in own_lines(text)] == [expected] * 2, text
    assert_same(left(tmp_path / "run"), before)


@pytest.mark.parametrize("how", ["none", "stage"])
def test_restarts_without_an_id_of_the_launch_are_refused_before_training(tmp_path, how):
    words = ["train", *SMALL, "--layout", "stagewise", "--parallel", how, "--out", tmp_path / "run"]
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "3"}
    status, said = ranks(*words, count=1 if how == "none" else 2, out=tmp_path / "run", of_start=environment)
    (line,) = "".join(said).splitlines()
    assert set(status) == {2} and not (tmp_path / "run").exists()
    assert line.startswith("sid train: error: torchrun --max-restarts needs --standalone or an --rdzv-id")


def test_a_restart_before_anything_was_saved_replaces_the_old_run(tmp_path):
    """Restart with --overwrite and the settings of the old run, and continue from what the new one has saved."""
    folder = tmp_path / "run"
    words = ["train", *SMALL, "--epochs", 1, *RUNS["stage"], "--overwrite", "--out", folder]
    learned = {}
    for of, count in (("first", 0), ("first", 1), ("second", 1), ("second", 0)):
        status, said = ranks(*words, count=2, out=folder, of_start=restart(of, count))
        assert status == [0, 0], said
        learned[of, count] = "train loss" in said[1]
    assert learned == {("first", 0): True, ("first", 1): False, ("second", 1): True, ("second", 0): True}


def test_a_restart_needs_the_run_s_folder_everywhere(tmp_path):
    words = ["train", *SMALL, "--epochs", 1, *RUNS["stage"], "--out"]
    status, said = ranks(*words, tmp_path / "0", count=2, out=tmp_path / "0", of_start=restart("here", 0))
    assert status == [0, 0], said
    before = left(tmp_path / "0")
    each = [[*words, tmp_path / str(rank)] for rank in range(2)]
    status = finish(start_ranks(each, tmp_path / "0", of_start=restart("here")))
    said = [printed(tmp_path / "0", rank).read_text() for rank in range(2)]
    assert status == [2, 2] and "".join(said) == (
        f"sid train: error: rank 1: {tmp_path / '1'}: holds no checkpoint here, but on rank 0: all ranks need the"
        " same folder\n"
    ), said
    assert_same(left(tmp_path / "0"), before)


def without(name, state):
    return state | {"config": state["config"] | {name: None}}


@pytest.mark.parametrize("how", ["stage", pytest.param("shard", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "rank 1: {folder}: holds no checkpoint (last.pt)"),
        (partial(without, "pixel_mean"), "rank 1: {folder}: saved by a run with pixel_mean None, not "),
        (
            lambda state: state | {"epoch": 1, "step": 3},
            "epoch is 1 on rank 1 and 2 on rank 0: all processes need the same settings, data and run",
        ),
    ],
)
def test_a_rank_that_finds_another_run_than_the_others_ends_all_in_one_line(tmp_path, how, change, message):
    folder, other = tmp_path / "run", tmp_path / "other"
    trained(*SMALL, "--epochs", 1, "--layout", "stagewise", "--no-fused", count=1, out=folder)
    other.mkdir()
    if change:
        torch.save(change(load_checkpoint(folder)), other / "last.pt")
    each = [["train", "--resume", place, "--parallel", how, "--timeout", 200] for place in (folder, other)]
    status = finish(start_ranks(each, folder))
    (line,) = "".join(printed(folder, rank).read_text() for rank in range(2)).splitlines()
    assert status == [2, 2] and line.startswith("sid train: error: " + message.format(folder=other)), line


def test_a_damaged_checkpoint_is_set_aside_by_one_rank(tmp_path):
    words = [*SMALL, "--epochs", 2, *RUNS["stage"]]
    alone, folder = (trained(*words, count=2, out=tmp_path / name) for name in ("alone", "run"))
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:999])
    status, said = ranks("train", "--resume", folder, "--parallel", "stage", count=2, out=folder)
    assert status == [2, 2] and len("".join(said).splitlines()) == 1 and "previous.pt" in "".join(said), said
    status, said = ranks("train", "--resume", folder / "previous.pt", "--parallel", "stage", count=2, out=folder)
    assert status == [0, 0] and (folder / "last.pt.replaced").stat().st_size == 999, said
    assert_same_run(folder, alone)


def test_a_shared_trunk_trained_by_replicas_is_gone_on_with_by_one_process(tmp_path):
    folder = trained(*SMALL, "--epochs", 1, *RUNS["data"], count=2, out=tmp_path / "run")
    status, text = sid("train", "--resume", folder, out=folder)
    assert status == 0 and "resumed in epoch 2 after step 0" in text, text
    assert json.loads((folder / "config.json").read_text())["fused"] is False


def test_without_a_checkpoint_none_is_promised():
    communicator = Communicator(Topology(stage_rank=1, stage_ranks=2))
    for has_checkpoint, kept in ((False, "nothing was saved yet"), (True, "the last checkpoint is kept")):
        communicator.has_checkpoint = lambda has_checkpoint=has_checkpoint: has_checkpoint
        with pytest.raises(LostRank, match=f"rank 1: another rank is gone; {kept}"), communicator.watch():
            raise RuntimeError("Connection reset by peer")
