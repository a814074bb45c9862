"""Test that two processes end with the weights of one process on the whole batch.

One start makes all comparisons of a file's part: importing the frameworks takes longer than they do.
"""

import contextlib
import importlib.util
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from helpers.drop_in import BATCH, STEPS, assert_same_weights, data, make, train
from helpers.ranks import finish, free_port, start

pytestmark = pytest.mark.processes

WORLD = 2
KINDS = ["names", "indices"]  # CutNetwork, SIDNetwork


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def share(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(WORLD)[dist.get_rank()]


@contextlib.contextmanager
def process_group():
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_share(network, wrapped, *, parts=1, clip=None, factor=1.0) -> None:
    """Do what `train` does with this rank's half of every batch; under DDP only the last micro-batch reduces."""
    optimizer = sgd(network)
    for inputs, targets in zip(*(part.split(BATCH) for part in data()), strict=True):
        optimizer.zero_grad()
        for i, part in enumerate(zip(share(inputs).chunk(parts), share(targets).chunk(parts), strict=True)):
            accumulates = isinstance(wrapped, DistributedDataParallel) and i < parts - 1
            with wrapped.no_sync() if accumulates else contextlib.nullcontext():
                (wrapped(*part).loss * (factor / parts)).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()


def shard(network, kind):
    """Shard every stage: of a SIDNetwork its module, of a CutNetwork its block and its head."""
    mesh = init_device_mesh("cpu", (WORLD,))
    stages = network.stages if kind == "indices" else [*(network.model[i] for i in (0, 2, 4)), *network.heads]
    for stage in stages:
        fully_shard(stage, mesh=mesh)
    return network


def freeze(network, kind):
    """Freeze the whole first stage except its head, and the bias of the second block."""
    blocks = [network.model[i] for i in (0, 2)] if kind == "names" else [stage.body for stage in network.stages]
    blocks[0].requires_grad_(False)
    (blocks[1] if kind == "names" else blocks[1][0]).bias.requires_grad_(False)
    return network


SETTINGS = [{}, {"factor": 0.5}, {"parts": 2}, {"parts": 2, "clip": 0.1}]


def compare_ddp() -> None:
    with process_group():
        for kind in KINDS:
            for settings in SETTINGS:
                compare(kind, DistributedDataParallel, settings)
            network, other = freeze(make(kind), kind), freeze(make(kind), kind)
            train_share(network, DistributedDataParallel(network))
            train(other, sgd(other))
            assert_same_weights(network, other)


def compare_fsdp() -> None:
    with process_group():
        for kind in KINDS:
            for settings in SETTINGS:
                compare(kind, lambda network, kind=kind: shard(network, kind), settings)
            compare_evaluations(kind)
            refuse_unreduced_gradients(kind)


def compare(kind, wrap, settings) -> None:
    network, other = make(kind), make(kind)
    train_share(network, wrap(network), **settings)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    expected = {name: value for name, value in settings.items() if name in ("clip", "parts")}
    train(other, optimizer, call=scaled(other, settings.get("factor", 1.0)), **expected)
    assert_same_weights(network, other)


def scaled(network, factor):
    def call(*batch):
        output = network(*batch)
        return output._replace(loss=output.loss * factor)

    return call


def compare_evaluations(kind) -> None:
    """Check that a pass without targets between two steps changes nothing."""
    network, other = shard(make(kind), kind), make(kind)
    optimizers, (inputs, targets) = [sgd(network), sgd(other)], data()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        network(share(inputs), share(targets)).loss.backward()
        other(inputs, targets).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(network(inputs), other(inputs), rtol=1e-4, atol=1e-6)


def refuse_unreduced_gradients(kind) -> None:
    """Check that unreduced gradients are refused: FSDP would keep them, and the loss's factor would not reach them."""
    network = shard(make(kind), kind)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="set_requires_gradient_sync must be True"):
        network(*data())


@pytest.mark.parametrize("comparison", [compare_ddp, compare_fsdp], ids=["ddp", "fsdp"])
def test_two_processes(comparison):
    assert finish(start([(comparison, ())] * WORLD)) == [0] * WORLD


# ---------------------------------------------------------------- frameworks


def compare_frameworks(folder: str, ports: list[int]) -> None:
    """Make a process group per comparison: on one port, a rank could still connect to the previous store."""
    os.environ["LOCAL_WORLD_SIZE"] = str(WORLD)
    comparisons = [compare_lightning, compare_accelerate, lambda kind: compare_transformers(kind, folder)]
    for (kind, compare), port in zip(itertools.product(KINDS, comparisons), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        compare(kind)


def compare_lightning(kind) -> None:
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make(kind)

        def training_step(self, batch, index):
            return self.network(*batch).loss

        def configure_optimizers(self):
            return sgd(self.network)

    module, other = Module(), make(kind)
    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=WORLD, strategy=strategy, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,  # it would shuffle
    )  # fmt: skip
    rows = TensorDataset(*data())
    sampler = DistributedSampler(rows, WORLD, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(rows, batch_size=BATCH // WORLD, sampler=sampler))
    assert trainer.world_size == WORLD
    train(other, sgd(other))
    assert_same_weights(module.network, other)
    dist.destroy_process_group()


def compare_accelerate(kind) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == WORLD
    network, other = make(kind), make(kind)
    loader = DataLoader(TensorDataset(*data()), batch_size=BATCH // WORLD // 2)
    prepared, optimizer, loader = accelerator.prepare(network, sgd(network), loader)
    for inputs, targets in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(inputs, targets).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    train(other, sgd(other), clip=0.1)
    assert_same_weights(accelerator.unwrap_model(prepared), other)
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def compare_transformers(kind, folder) -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    inputs, targets = data()
    rows = [{"inputs": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(rows)

    network, other = make(kind), make(kind)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH // WORLD // 2, gradient_accumulation_steps=2,
        max_grad_norm=0.1, remove_unused_columns=False, use_cpu=True, ddp_backend="gloo", report_to=[],
        save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    assert arguments.world_size == WORLD
    InOrder(network, arguments, train_dataset=rows, optimizers=(sgd(network), None)).train()
    train(other, sgd(other), clip=0.1)
    assert_same_weights(network, other)
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.slow
def test_frameworks_in_two_processes(tmp_path):
    """Run Lightning's ddp, Accelerate and transformers' Trainer; the latter two with accumulation and clipping."""
    for package in ("lightning", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install -e '.[recipes]'")
    arguments = str(tmp_path), [free_port() for _ in range(3 * len(KINDS))]
    assert finish(start([(compare_frameworks, arguments)] * WORLD)) == [0] * WORLD
