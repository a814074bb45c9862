"""Test that data parallel equals one process on the whole batch within rounding, and the errors of bad combinations."""

import copy
import functools
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.killed import rows_of, sid
from helpers.processes import wait_until
from helpers.ranks import assert_close_runs, finish, printed, ranks, start, start_ranks, trained
from sid_trainer.data.batches import Batches, Labels, pixel_statistics
from sid_trainer.data.datasets import Split
from sid_trainer.distributed.rendezvous import Communicator, is_main_process, leave
from sid_trainer.distributed.state import summarize_times
from sid_trainer.distributed.topology import Topology
from sid_trainer.runs.build import RunConfig, assign_stages, make_data, make_network, make_trainer

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes may have a GPU each")
CPU = torch.device("cpu")
# 13 steps per epoch, the last on 4 images; SGD, because Adam turns a rounded zero into a whole step.
SMALL = "--train-images 100 --batch-size 8 --epochs 2 --crop 1 --seed 3 --optimizer sgd --lr 0.02 --no-fused"
RUNS = {
    "mlp": "--arch mlp --layout stagewise --val 0.1 --alpha 0.8:0.4",
    "shared": "--arch simple_cnn --layout shared --depth 3 --save-every 4 --batch-size 7",
    "two-phase": "--arch simple_cnn --layout shared --depth 2 --schedule two-phase",
    "bp": "--arch mlp --layout stagewise --method bp --batch-size 9",
    "bp-accumulate": "--arch mlp --layout stagewise --method bp-accumulate --batch-size 28",
    "deep-supervision": "--arch simple_cnn --layout stagewise --method deep-supervision --batch-size 13",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run by one process. Each is made once."""

    @functools.cache
    def of(name: str) -> Path:
        out = tmp_path_factory.mktemp(name) / "alone"
        return trained(*SMALL.split(), *RUNS[name].split(), count=1, out=out)

    return of


IN_SHORT = (("data", "mlp"), ("data", "shared"), ("shard", "mlp"))  # the others are slow


@pytest.mark.parametrize(
    ("how", "name"),
    [
        pytest.param(how, name, marks=[] if (how, name) in IN_SHORT else [pytest.mark.slow])
        for how, name in [
            *(("data", name) for name in RUNS),
            ("shard", "mlp"),
            ("shard", "shared"),
            ("shard", "two-phase"),
        ]
    ],
)
def test_two_replicas_are_one_process_on_the_whole_batch(alone, tmp_path, how, name):
    words, serial = [*SMALL.split(), *RUNS[name].split()], alone(name)
    assert_close_runs(serial, trained(*words, "--parallel", how, count=2, out=tmp_path / how))
    assert rows_of(serial)[0]["stage_loss"] != rows_of(serial)[1]["stage_loss"]


def test_a_pipeline_in_two_replicas(alone, tmp_path):
    """Run 4 processes: 2 ranks of stages and 2 shares of every batch; stop them, and continue with 2."""
    words, serial = [*SMALL.split(), *RUNS["mlp"].split()], alone("mlp")
    grid = ["--parallel", "stage", "--replicas", "2", "--stages-per-rank", "2", "2"]
    whole = trained(*words, *grid, count=4, out=tmp_path / "grid")
    assert_close_runs(serial, whole)
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert [rank["stages"] for rank in row["pipeline"]["ranks"]] == [[1, 2], [3, 4]] * 2


def train_by_turns(words: dict, folder: Path) -> None:
    """Delay the first stage's backward in one of two replicas until the other's second stage has begun.

    This happens in the first and in the third step: in the second one, DDP agrees on its buckets again.
    """
    torch.set_num_threads(1)
    trainer = make_trainer(RunConfig(train_images=24, batch_size=8, epochs=1, timeout=300, **words), quiet=True)
    topology, (first, second) = trainer.strategy.topology, trainer.strategy.local_stages[:2]
    replica = topology.replica
    held_up = {0: 1, 2: 0}

    def file(of: int) -> Path:
        return folder / f"rank {topology.stage_rank} of replica {of} in step {trainer.step}"

    def hold_up(stage, inputs, made):
        if made[1].requires_grad and held_up.get(trainer.step) == replica:
            begun = file(1 - replica).exists
            made[1].register_hook(lambda _: wait_until(begun, "the other's second stage") and None)

    def tell(stage, inputs):
        if torch.is_grad_enabled():
            file(replica).touch()

    trainer.network.stages[first].register_forward_hook(hold_up)
    trainer.network.stages[second].register_forward_pre_hook(tell)
    for row in trainer.fit():
        for rank in row["pipeline"]["ranks"]:
            assert rank["reducing"] > 0 and rank["busy"] + rank["reducing"] <= rank["ended"] - rank["begun"]
    leave()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (2, {"arch": "mlp", "layout": "stagewise", "parallel": "data"}),
        (2, {"arch": "resnet18", "layout": "stagewise", "parallel": "data"}),  # with batch-norm's buffers
        (2, {"arch": "simple_cnn", "layout": "shared", "depth": 3, "parallel": "data"}),
        (2, {"arch": "mlp", "layout": "stagewise", "parallel": "data", "schedule": "two-phase"}),
        (4, {"arch": "mlp", "layout": "stagewise", "parallel": "stage", "replicas": 2, "stages_per_rank": (2, 2)}),
    ],
)
def test_a_stage_runs_while_the_gradients_of_the_one_before_are_on_their_way(tmp_path, count, words):
    assert finish(start([(train_by_turns, (words, tmp_path))] * count)) == [0] * count


# ---------------------------------------------------------------- refused


def refused(folder, status, said, message):
    """Check that all processes end with status 2, that one line says what is wrong, and that nothing is written."""
    assert status == [2] * len(status), said
    (line,) = "".join(said).splitlines()
    assert line.startswith("sid train: error: ") and message in line, said
    assert not folder.exists()


TINY = "train --arch mlp --layout stagewise --train-images 40 --batch-size 8 --epochs 1 --timeout 200".split()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "--parallel stage --lr 0.1",
            "--parallel stage --lr 0.2",
            "lr is 0.2 on rank 1 and 0.1 on rank 0: all processes need the same settings",
        ),
        ("--parallel data", "--parallel stage", "parallel is 'stage' on rank 1 and 'data' on rank 0"),
        ("--parallel stage", "--parallel stage --replicas 2", "replicas is 2 on rank 1 and 1 on rank 0"),
        ("--parallel stage", "--parallel stage --in-flight 3", "in_flight is 3 on rank 1 and 2 on rank 0"),
        ("--parallel stage --seed 1", "--parallel stage", "seed is 0 on rank 1 and 1 on rank 0"),
        (
            "--parallel stage --alpha 0.9:0.1",
            "--parallel stage --alpha 0.9",
            "alpha is 0.9 on rank 1 and '0.9:0.1' on rank 0",
        ),
    ],
)
def test_ranks_with_other_settings_are_refused(tmp_path, first, second, message):
    folder = tmp_path / "run"
    each = [[*TINY, *words.split(), "--out", folder] for words in (first, second)]
    status = finish(start_ranks(each, folder))
    refused(folder, status, [printed(folder, rank).read_text() for rank in range(2)], message)


@pytest.mark.parametrize(
    ("words", "count", "message"),
    [
        ("--parallel stage --depth 2", 3, "3 ranks cannot share 2 stages: start at most 2 for each replica"),
        ("--parallel stage --replicas 2", 3, "replicas must be a divisor of 3, the number of processes, not 2"),
        (
            "--parallel stage --stages-per-rank 1 2",
            2,
            "stages_per_rank must be 2 positive numbers whose sum is 4, not (1, 2)",
        ),
        (
            "--parallel stage --stages-per-rank 4 0",
            2,
            "stages_per_rank must be 2 positive numbers whose sum is 4, not (4, 0)",
        ),
        (
            "--parallel data --batch-size 1",
            2,
            "batch_size 1 leaves a train batch of 1 images, but the 2 processes that share it need at least 2",
        ),
        (
            "--parallel data --method bp-accumulate --batch-size 27",
            2,
            "batch_size 27 leaves a train batch of 13 images, but the 2 processes that share it need at least 16",
        ),
        (
            "--parallel data --arch resnet18 --train-images 10 --batch-size 4",
            2,
            "batch_size 4 leaves a process a single image to train on, which is too few for batch-norm",
        ),
        ("--parallel data --train-images 9999", 2, "training images must be 1 to 1437, not 9999"),
        ("", 2, "parallel must be data, shard or stage for 2 processes, not none"),
        ("--parallel stage --method bp", 2, "parallel 'stage' needs method sid or greedy"),
        ("--parallel data --alpha 0.1,0.2", 2, "alpha must be one number or one for each of the 4 stages, not 2"),
        ("--parallel data --device cuda:99", 2, "device 'cuda:99' cannot be used ("),
        pytest.param("--parallel stage --device cuda", 2, "device 'cuda' cannot be used (", marks=NO_GPU),
    ],
)
def test_numbers_of_processes_that_do_not_fit_are_refused(tmp_path, words, count, message):
    folder = tmp_path / "run"
    status, said = ranks(*TINY, *words.split(), "--out", folder, count=count, out=folder)
    refused(folder, status, said, message)


def test_a_device_that_one_rank_lacks_is_told_by_its_rank(tmp_path):
    folder = tmp_path / "run"
    each = [[*TINY, "--parallel", "stage", "--device", device, "--out", folder] for device in ("cpu", "cuda:99")]
    status = finish(start_ranks(each, folder))
    said = [printed(folder, rank).read_text() for rank in range(2)]
    refused(folder, status, said, "rank 1: device 'cuda:99' cannot be used (")


def test_one_process_on_each_machine_says_what_all_find_wrong(monkeypatch):
    said = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        said.append(is_main_process())
    assert said == [True, False, True, False]


def test_without_torchrun_and_with_a_port_in_use(tmp_path):
    folder = tmp_path / "run"
    words = [*TINY, "--parallel", "stage", "--out", folder]
    status, said = sid(*words, out=folder)
    refused(folder, [status], [said], "parallel 'stage' needs torchrun: torchrun --standalone --nproc-per-node=2 -m")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        processes = start_ranks([words, words], folder, port)
        processes[0].join(300)
        status = processes[0].exitcode
        processes[1].kill()  # it cannot know that the program there is no peer; torchrun ends it
        finish(processes)
    refused(
        folder,
        [status],
        [printed(folder, 0).read_text()],
        f"127.0.0.1:{port}: cannot connect to the other processes there (in use by another program)",
    )


def test_a_run_saved_by_another_layout_of_processes(tmp_path):
    """Resume a shared network, which has no pipeline and one optimizer for stages that have one each in replicas."""
    folder = trained(
        *"--arch simple_cnn --depth 3 --train-images 40 --batch-size 8 --epochs 1".split(),
        count=1,
        out=tmp_path / "run",
    )
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    why = {
        "stage": "parallel 'stage' needs layout 'stagewise', not 'shared'; a shared network takes parallel 'data'",
        "data": f"{folder}: saved by a run with fused True, not False",
    }
    for how, message in why.items():
        status, said = ranks("train", "--resume", folder, "--parallel", how, count=2, out=tmp_path / "again")
        (line,) = "".join(said).splitlines()
        assert status == [2, 2] and line == f"sid train: error: {message}"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parallel": "both"}, "parallel must be one of none, data, shard, stage, not 'both'"),
        ({"replicas": 0}, "replicas must be at least 1, not 0"),
        ({"parallel": "stage", "layout": "stagewise", "in_flight": 0}, "in_flight must be at least 1, not 0"),
        ({"parallel": "data", "timeout": 0.5}, "timeout must be at least 1, not 0.5"),
        (
            {"parallel": "data", "replicas": 2},
            "replicas and stages_per_rank are for parallel 'stage', not for 'data'",
        ),
        ({"stages_per_rank": [1, 2]}, "replicas and stages_per_rank are for parallel 'stage', not for 'none'"),
        ({"parallel": "stage", "layout": "stagewise", "method": "deep-supervision"}, "parallel 'stage' needs"),
        ({"parallel": "stage", "layout": "stagewise", "schedule": "two-phase"}, "parallel 'stage' needs"),
        (
            {"parallel": "stage", "layout": "shared"},
            "parallel 'stage' needs layout 'stagewise', not 'shared'; a shared network takes parallel 'data'",
        ),
        (
            {"parallel": "data", "method": "bp-checkpoint"},
            "method 'bp-checkpoint' cannot recompute with parallel 'data'",
        ),
    ],
)
def test_settings_that_mean_nothing_together(given, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        RunConfig(**given)


# ---------------------------------------------------------------- shares of a batch


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("crop", [0, 2])
def test_the_shares_of_every_batch_make_the_whole_one(every, crop):
    images = torch.randint(0, 256, (23, 6, 5, 3), dtype=torch.uint8)
    split = Split(images, torch.arange(23))
    statistics = pixel_statistics(images)

    def both(batches, done):
        return [*batches.shuffle(5, 2, crop, True, done), *batches.in_order()]

    for done in (0, 2):
        whole = both(Batches(split, 6, CPU, *statistics), done)
        for first in range(every):
            share = (first, every)
            of_images = both(Batches(split, 6, CPU, *statistics, share=share), done)
            of_labels = both(Labels(split, 6, CPU, share), done)
            assert len(whole) == len(of_images) == len(of_labels) == 8 - done
            for (inputs, labels), (some, mine), (nothing, same) in zip(whole, of_images, of_labels, strict=True):
                assert torch.equal(some, inputs[first::every]) and torch.equal(mine, labels[first::every])
                assert nothing is None and torch.equal(same, mine)
    assert Labels(split, 6, CPU, (0, every)).sizes() == [6, 6, 6, 5]


def test_how_ranks_spent_their_time():
    ranks = [
        {"begun": 10.0, "ended": 18.0, "busy": 8.0, "trained": 9, "batches": [(10.0, 12.0)]},
        {"begun": 10.5, "ended": 20.0, "busy": 4.0, "trained": 9, "batches": [(12.0, 13.0)]},
    ]
    actual = summarize_times(ranks, 2)
    assert actual["bubble"] == pytest.approx(0.4) and actual["predicted_bubble"] == pytest.approx(0.1)
    assert actual["imbalance"] == pytest.approx(0.25) and actual["span"] == 10.0
    assert actual["ranks"][1]["ended"] == 10.0 and actual["ranks"][1]["batches"] == [(2.0, 3.0)]


def test_stages_are_balanced_with_what_loading_costs_the_first_rank(monkeypatch):
    """Balance stages of 1 second each on a clock of the test; long loading leaves rank 0 one stage."""
    run = RunConfig(arch="mlp", layout="stagewise", depth=8, train_images=100, batch_size=50)
    data = make_data(run)
    network = make_network(run, len(data.classes), data.in_channels, data.image_size)
    before, clock = copy.deepcopy(network.state_dict()), [0.0]
    monkeypatch.setattr("sid_trainer.distributed.balance.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    communicator, shuffled = Communicator(Topology(0, 2)), Batches.shuffle
    monkeypatch.setattr(communicator, "gather", lambda value: [value])
    for stage in network.stages:
        stage.register_forward_hook(lambda *_: take(clock, 1.0))
    for loading, few in ((0.0, 4), (100.0, 1)):
        monkeypatch.setattr(Batches, "shuffle", functools.partialmethod(slowly, shuffled, clock, loading))
        first, second = assign_stages(run, network, data, communicator)
        assert [*first, *second] == list(range(8)) and len(first) == few
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def take(clock, seconds):
    clock[0] += seconds


def slowly(self, shuffled, clock, seconds, *arguments):
    for batch in shuffled(self, *arguments):
        clock[0] += seconds
        yield batch
