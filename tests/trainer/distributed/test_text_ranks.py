"""Test that language models train over processes: replicas within rounding of one process, pipelines in equal bits."""

import random
import signal

import pytest

from helpers.killed import _run, rows_of, sid
from helpers.ranks import STEP, assert_close_runs, assert_same_run, finish, printed, ranks, start, trained
from sid_trainer.methods import readouts

# 17 steps per epoch, the last on 4 windows; SGD, because Adam turns a rounded zero into a whole step.
SMALL = "--tokens characters --context 16 --layers 3 --width 16 --attention-heads 2 --batch-size 8 --epochs 2 --seed 3"
SGD = "--optimizer sgd --lr 0.1"
RUNS = {
    "private": "--depth 3 --alpha 1,0.7,0.6 --tail 1",
    "shared": "--depth 3 --readout shared --readout-refresh 3 --save-every 5",
    "bp": "--method bp",
    "bp-accumulate": "--method bp-accumulate --batch-size 52",
    "deep-supervision": "--method deep-supervision --depth 2",
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return the file of a text of random words, so that there is something to learn."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(12)]
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choices(words, k=490)))
    return file


def words_of(text, name, *more):
    return ["--data", text, "--cache", text.parent, *SMALL.split(), *RUNS[name].split(), *more]


def in_chunks(words, out):
    """Run `sid WORDS` such that no step of a language model holds logits of all tokens."""
    readouts.MOST_BYTES = 100
    _run(list(map(str, words)), out, None, 9)


def trained_in_chunks(*words, count, out):
    """Return the folder of a run as `trained` does, by steps that hold no logits of all tokens."""
    calls = [(in_chunks, (("train", *words, "--out", out), printed(out, rank))) for rank in range(count)]
    status = finish(start(calls))
    assert status == [0] * count, [printed(out, rank).read_text() for rank in range(count)]
    return out


@pytest.mark.parametrize(
    "name", [name if name == "shared" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_two_replicas_are_one_process_on_the_whole_batch(text, tmp_path, name):
    words = words_of(text, name, *SGD.split())
    alone = trained(*words, count=1, out=tmp_path / "alone")
    assert_close_runs(alone, trained(*words, "--parallel", "data", count=2, out=tmp_path / "data"))


@pytest.mark.parametrize("name", ["private", pytest.param("shared", marks=pytest.mark.slow)])
def test_two_replicas_that_hold_no_logits_are_one_process_that_does(text, tmp_path, name):
    words = words_of(text, name, *SGD.split())
    alone = trained(*words, count=1, out=tmp_path / "alone")
    assert_close_runs(alone, trained_in_chunks(*words, "--parallel", "data", count=2, out=tmp_path / "data"))


# ---------------------------------------------------------------- pipelines

PARALLEL = ("--parallel", "stage")
PIPELINES = {
    "private": ("private", "--dtype", "bfloat16"),
    "shared": ("shared",),
    "shared-each-step": ("shared", "--readout-refresh", "1", "--in-flight", "1", "--tail", "1"),
}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("private", 2),
        ("shared", 3),
        pytest.param("shared", 2, marks=pytest.mark.slow),
        pytest.param("shared-each-step", 3, marks=pytest.mark.slow),
    ],
)
def test_the_pipelined_run_has_the_bits_of_the_serial_one(text, tmp_path, name, count, chunks):
    train = trained_in_chunks if chunks else trained
    words = words_of(text, *PIPELINES[name])
    alone = train(*words, count=1, out=tmp_path / "alone")
    piped = train(*words, *PARALLEL, count=count, out=tmp_path / "piped")
    assert_same_run(alone, piped)
    row = rows_of(piped)[0]["pipeline"]
    assert sum((rank["stages"] for rank in row["ranks"]), []) == [1, 2, 3]
    assert (row["ranks"][-1]["bytes_sent"] > 0) == name.startswith("shared")


def test_stopped_and_gone_on_with_by_other_numbers_of_ranks(text, tmp_path):
    """Stop 2 ranks between two copies of the readout, then 1 process, and let 3 end the run."""
    alone = trained(*words_of(text, "shared"), count=1, out=tmp_path / "alone")
    folder = tmp_path / "run"
    words = ["train", *words_of(text, "shared"), *PARALLEL, "--out", folder]
    status, said = ranks(*words, count=2, out=folder, ends={0: (STEP, 5, signal.SIGTERM)})
    assert status == [130, 130] and "stopped in epoch 1 after step 5" in said[1], said
    status, printed_text = sid("train", "--resume", folder, out=folder, kill=(STEP, 13), number=signal.SIGTERM)
    assert status == 130, printed_text
    status, said = ranks("train", "--resume", folder, *PARALLEL, count=3, out=folder)
    assert status == [0] * 3, said
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_pipeline_in_two_replicas(text, tmp_path):
    words = words_of(text, "shared", *SGD.split())
    alone = trained(*words, count=1, out=tmp_path / "alone")
    grid = trained(*words, *PARALLEL, "--replicas", "2", count=4, out=tmp_path / "grid")
    assert_close_runs(alone, grid)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parallel shard", "parallel must be none, data or stage for dataset text, not 'shard'"),
        (
            "--parallel data --batch-size 1",
            "batch_size 1 leaves a train batch of 1 windows, but the 2 processes that share it need at least 2",
        ),
    ],
)
def test_refusals(text, tmp_path, words, message):
    folder = tmp_path / "run"
    status, said = ranks("train", *words_of(text, "private"), *words.split(), "--out", folder, count=2, out=folder)
    (line,) = "".join(said).splitlines()
    assert status == [2, 2] and message in line, said
    assert not folder.exists()
