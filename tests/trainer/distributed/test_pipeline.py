"""Test that a pipeline over processes is the serial run, bit for bit: undisturbed, stopped, continued by others."""

import copy
import json
import multiprocessing
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from helpers.killed import assert_same, sid, state_of
from helpers.ranks import STEP, assert_same_run, finish, left, ranks, start, trained
from sid_trainer import Trainer, build_network
from sid_trainer.distributed.pipeline import ActivationLayout, StageLink, activation_layouts
from sid_trainer.distributed.rendezvous import Communicator
from sid_trainer.distributed.replicas import Replicas
from sid_trainer.distributed.strategy import ShardStrategy, StageStrategy
from sid_trainer.distributed.topology import Topology
from sid_trainer.runs.build import make_data
from sid_trainer.training.config import RunConfig, TrainConfig

# 52 steps or more in all, the last batch of an epoch smaller than the others.
SMALL = "--layout stagewise --train-images 100 --batch-size 8 --epochs 4 --crop 1 --seed 3"
RUNS = {
    "mlp": "--arch mlp --train-images 130 --val 0.2 --alpha 0.8:0.4 --save-every 5 --lr-schedule cosine",
    "mlp-reverse": "--arch mlp --divergence reverse --label-smoothing 0.1 --method sid --optimizer sgd --lr 0.05",
    "mlp-greedy": "--arch mlp --method greedy --in-flight 1 --label-smoothing 0.1",
    "cnn": "--arch simple_cnn",
    "cnn-bfloat16": "--arch simple_cnn --dtype bfloat16 --in-flight 3",
    "cnn-contiguous": "--arch simple_cnn --no-channels-last",
    "batch-norm": "--arch resnet18 --train-images 26 --batch-size 12 --epochs 2 --optimizer sgd",
}
PARALLEL = ("--parallel", "stage")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the folder of a run by one process; each is made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = trained(*words_of(name), count=1, out=tmp_path_factory.mktemp(name) / "alone")
        return made[name]

    return of


def words_of(name):
    return [*SMALL.split(), *RUNS[name].split()]


IN_SHORT = (("mlp", 3), ("batch-norm", 2))  # the others are slow


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, count, marks=[] if (name, count) in IN_SHORT else [pytest.mark.slow])
        for name in RUNS
        for count in (2, 3)
    ],
)
def test_the_pipelined_run_has_the_bits_of_the_serial_one(alone, tmp_path, name, count):
    piped = trained(*words_of(name), *PARALLEL, count=count, out=tmp_path / "piped")
    serial = left(alone(name))
    assert serial["rows"][1][-1]["step"] > 50 or name == "batch-norm"
    assert_same(serial, left(piped))
    for line in (piped / "metrics.jsonl").read_text().splitlines():
        pipeline = json.loads(line)["pipeline"]
        depth = len(serial["rows"][1][0]["stage_loss"])
        owned = [rank["stages"] for rank in pipeline["ranks"]]
        assert len(owned) == count and sum(owned, []) == list(range(1, depth + 1))
        assert 0 <= pipeline["bubble"] < 1 and 0 <= pipeline["imbalance"] < 1
        assert all(rank["bytes_sent"] > 0 for rank in pipeline["ranks"][:-1])


def test_stages_as_asked_for(alone, tmp_path):
    words = [*words_of("mlp"), *PARALLEL, "--stages-per-rank", "3", "1"]
    piped = trained(*words, count=2, out=tmp_path / "piped")
    assert_same_run(piped, alone("mlp"))
    row = json.loads((piped / "metrics.jsonl").read_text().splitlines()[0])
    assert [rank["stages"] for rank in row["pipeline"]["ranks"]] == [[1, 2, 3], [4]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_gone_on_with_by_other_numbers_of_ranks(alone, tmp_path, number):
    """Run 2 ranks, then 1, then 3: each stops after the step in which the first one received the signal."""
    folder = tmp_path / "run"
    words = ["train", *words_of("mlp"), *PARALLEL, "--out", folder]
    status, said = ranks(*words, count=2, out=folder, ends={0: (STEP, 18, number), 1: (STEP, 3, number)})
    assert status == [130, 130], said
    assert "sid train: stopped in epoch 2 after step 5; " in said[1] and "stopped" not in said[0], said
    status, text = sid("train", "--resume", folder, out=folder, kill=(STEP, 13), number=number)
    assert status == 130 and "resumed in epoch 2 after step 5" in text and "stopped in epoch 3 after step 5" in text
    status, said = ranks("train", "--resume", folder, *PARALLEL, count=3, out=folder)
    assert status == [0] * 3 and "resumed in epoch 3 after step 5" in said[2], said
    assert_same_run(folder, alone("mlp"))


def test_what_a_pipeline_saved_is_an_ordinary_run(alone, tmp_path):
    """Check that a checkpoint between two epochs is that of one process at the same step, and can be evaluated."""
    stopped = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        words = ["train", *words_of("cnn"), *(PARALLEL if count > 1 else ()), "--out", folder]
        end = (STEP, 9, signal.SIGTERM)
        if count == 1:
            status, _ = sid(*words, out=folder, kill=end[:2], number=end[2])
            assert status == 130
        else:
            assert ranks(*words, count=count, out=folder, ends={0: end})[0] == [130] * count
        stopped[count] = left(folder)
    assert stopped[1]["step"] == 9 and stopped[1]["sums"]["right"] > 0
    assert_same(stopped[1], stopped[2])
    held = [state_of(tmp_path / str(count))["activation_bytes"] for count in (1, 2)]
    assert held[0] == held[1]  # that of the rank that holds most, not of the logging rank
    assert sid("eval", tmp_path / "2", out=tmp_path / "eval")[0] == 0


# ---------------------------------------------------------------- how features lie in memory


@pytest.mark.parametrize(
    ("batch", "order"),
    [
        (torch.randn(5, 7), (0, 1)),
        (torch.randn(5, 3, 4, 6), (0, 1, 2, 3)),
        (torch.randn(5, 3, 4, 6).to(memory_format=torch.channels_last), (0, 2, 3, 1)),
        (torch.randn(9, 5, 4).transpose(0, 1), (1, 0, 2)),  # tokens first
        (torch.randn(5, 3, 1, 1).to(memory_format=torch.channels_last), None),
        (torch.randn(5, 1, 4, 1), None),
        (torch.randn(1, 3, 4, 6).to(memory_format=torch.channels_last), None),
        (torch.randn(5, 7, dtype=torch.bfloat16).t().contiguous().t(), (1, 0)),
    ],
)
def test_a_message_keeps_the_values_and_how_they_lie(batch, order):
    layout = ActivationLayout.of(batch)
    assert order is None or layout.order == order
    received = layout.empty(len(batch))
    assert (received.shape, received.dtype, received.stride()) == (batch.shape, batch.dtype, batch.stride())
    message = layout.dense(batch)
    assert message.is_contiguous() and message.data_ptr() == batch.data_ptr()  # no copy
    into = layout.dense(received)
    assert into.data_ptr() == received.data_ptr()  # what is received there is received in `received`
    into.copy_(message)
    assert torch.equal(received, batch)
    assert layout.empty(2).shape == (2, *batch.shape[1:])


def test_features_that_lie_otherwise_are_copied_into_order():
    layout = ActivationLayout.of(torch.randn(2, 3, 4, 6).to(memory_format=torch.channels_last))
    batch = torch.randn(5, 3, 4, 6)
    received = layout.empty(5)
    layout.dense(received).copy_(layout.dense(batch))
    assert torch.equal(received, batch) and received.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["mlp", "simple_cnn", "vit_tiny", "vgg11", "resnet18"])
def test_layouts_are_those_of_the_features_in_training_and_nothing_changes(arch, dtype):
    network = build_network(arch, "stagewise", num_classes=4, in_channels=1, image_size=(8, 8))
    inputs = torch.randn(3, 1, 8, 8).to(memory_format=torch.channels_last)
    network.to(memory_format=torch.channels_last)
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    actual = activation_layouts(network, inputs[:2], dtype)
    assert torch.equal(torch.get_rng_state(), random) and network.training
    assert_same(dict(network.state_dict()), dict(before))
    features, prior = inputs, network.uniform(inputs)
    for stage, layout in zip(network.stages, actual, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            features, logits = stage(features.detach(), prior)
        prior = logits.detach().float().softmax(1)
        assert (layout.shape, layout.dtype) == (features.shape[1:], features.dtype)
        assert layout.empty(3).stride() == features.stride()


# ---------------------------------------------------------------- what goes to a rank's device


@pytest.fixture
def moved(monkeypatch):
    """Record all modules that are moved to a device with memory, each with what it holds."""
    actual, to = [], nn.Module.to

    def noted(module, *where, **options):
        device = torch._C._nn._parse_to(*where, **options)[0]
        if device is not None and device.type != "meta":
            actual.append(module)
        return to(module, *where, **options)

    monkeypatch.setattr(nn.Module, "to", noted)
    return actual


def trainer_of(arch, layout, strategy):
    run = RunConfig(train_images=16)
    network = build_network(
        arch, layout, fused=False, image_size=(8, 8), in_channels=1, depth=None if layout == "stagewise" else 4
    )
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    config = TrainConfig(device="cpu", fused=False)
    return Trainer(network, make_data(run), config, strategy=strategy, quiet=True), weights


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_only_a_rank_s_own_stages_go_to_its_device(moved, rank):
    """Check that others are copied there one at a time, to see the layouts of their features."""
    torch.manual_seed(1)
    parts = [range(0, 1), range(1, 3), range(3, 4)]
    trainer, weights = trainer_of("resnet18", "stagewise", StageStrategy(Communicator(Topology(rank, 3)), parts))
    network = trainer.network
    own = [network.stages[i] for i in parts[rank]]
    modules = [network.extractor, *network.stages]
    largest = max(sum(p.numel() for p in module.parameters()) for module in modules)
    assert all(sum(p.numel() for p in module.parameters()) <= largest for module in moved)
    assert {id(module) for module in moved if module in modules} == {id(module) for module in own}
    held = {name for name, value in network.state_dict().items() if not value.is_meta}
    assert held == {name for module in own for name in names_in(network, module)}
    assert all(torch.equal(network.state_dict()[name], weights[name]) for name in held)
    assert trainer.metadata["num_parameters"] == sum(value.numel() for value in network.parameters())


def names_in(network, module):
    (prefix,) = [name for name, one in network.named_modules() if one is module]
    return [f"{prefix}.{name}" for name in module.state_dict()]


def test_parameters_in_shards_go_to_the_device_as_they_are_cut(moved, monkeypatch):
    """Check that nothing is on the device before `fully_shard` takes it module by module: the network need not fit."""
    monkeypatch.setattr(Replicas, "shard", lambda *_: None)
    trainer_of("simple_cnn", "shared", ShardStrategy(Communicator(Topology(replicas=2))))
    assert not moved


# ---------------------------------------------------------------- messages


def connect(rank, count):
    dist.init_process_group("gloo", rank=rank, world_size=count)
    return Communicator(Topology(rank, count), timeout=300, control_group=dist.new_group(backend="gloo"))


LAYOUT = ActivationLayout((3,), (0, 1), torch.float32, torch.device("cpu"))


def send_batches(sent, taken, in_flight, batches):
    link = StageLink(connect(0, 2), 1, 2, None, LAYOUT, in_flight)
    for t in range(batches):
        link.stop = t == batches - 1
        link.send(torch.full((1 + t % 2, 3), float(t)), torch.full((1 + t % 2, 2), t + 0.5))
        sent.value = t + 1
    link.wait_for_room()
    assert not link.pending_sends and link.bytes_sent == sum(4 * ((1 + t % 2) * 5 + 1) for t in range(batches))


def take_batches(sent, taken, in_flight, batches):
    link = StageLink(connect(1, 2), 1, 2, LAYOUT, None, in_flight)
    link.expect([1 + t % 2 for t in range(batches)])
    for t in range(batches):
        assert len(link.posted_receives) == min(in_flight, batches - t)
        most = min(batches, t + 2 * in_flight)  # on their way, and kept by the sender
        end = time.monotonic() + 200
        while sent.value < most and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)  # long enough for a rank that does not wait to get further ahead
        assert sent.value == most, f"{sent.value} of {most} sent before batch {t} was taken"
        features, belief = link.recv()
        assert features.tolist() == [[t] * 3] * (1 + t % 2) and belief.tolist() == [[t + 0.5] * 2] * (1 + t % 2)
        assert link.stop == (t == batches - 1)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_rank_that_is_further_ahead_waits(in_flight):
    """Check that a sender is never more than 2 x in_flight batches ahead, and gets that far."""
    counts = [multiprocessing.get_context("forkserver").Value("i", 0) for _ in range(2)]
    arguments = (*counts, in_flight, 12)
    assert finish(start([(send_batches, arguments), (take_batches, arguments)])) == [0, 0]


def report(rank, count):
    communicator = connect(rank, count)
    for t in range(3):
        own = {"of": rank, "t": t, "tensor": torch.arange(rank + 2), "none": None, "numbers": [0.1 * rank]}
        actual = communicator.gather_on_logging_rank(own)
        if rank != count - 1:
            assert actual is None
            continue
        for other, there in enumerate(actual):
            assert (there["of"], there["t"], there["none"], there["numbers"]) == (other, t, None, [0.1 * other])
            assert torch.equal(there["tensor"], torch.arange(other + 2))
    communicator.wait_for_sends()
    assert not communicator.pending_sends


def test_the_logging_rank_receives_from_every_rank_in_order():
    assert finish(start([(report, (rank, 3)) for rank in range(3)])) == [0, 0, 0]
