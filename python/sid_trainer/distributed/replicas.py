"""Replicas that share every batch and sum their gradients, with whole or with sharded parameters (`fully_shard`).

Shards are for stages that are too large for one device. Checkpoints hold whole parameters.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..network.modules import SIDNetwork, Stage
from .topology import Topology


class Replicas:
    """Sum gradients over replicas such that they are those of the mean loss over the whole batch.

    Attributes:
        share: Share of the current batch's images that this process has, in [0, 1].
        wait_seconds: Seconds in which updates have waited for other replicas.
    """

    def __init__(self, topology: Topology, group: Any, device: torch.device):
        self.replicas, self.group, self.device = topology.replicas, group, device
        self.share, self.wait_seconds = 1 / topology.replicas, 0.0

    def wrap(self, network: SIDNetwork, optimizers: Sequence[Optimizer | None]) -> SIDNetwork:
        """Return the network with every module wrapped such that its gradients are reduced over the replicas.

        If each module has an optimizer of its own, that optimizer waits for the reduction instead of the backward pass,
        so the work between the two overlaps it.
        """
        modules = network.local_modules
        optimizers = optimizers if len(optimizers) == len(modules) else [None] * len(modules)
        extractor, *stages = map(self.wrap_module, modules, optimizers)
        return type(network)(extractor, stages, network.num_classes)

    def wrap_module(self, module: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if not any(p.requires_grad and not p.is_meta for p in module.parameters()):
            return module
        wrapped = DistributedDataParallel(
            module, [self.device.index] if self.device.type == "cuda" else None, process_group=self.group,
            gradient_as_bucket_view=True, broadcast_buffers=False,  # no forward pass waits for another replica's
        )  # fmt: skip
        works: list[Any] | None = None
        if optimizer:
            pending = works = []
            optimizer.register_step_pre_hook(lambda *_: self.wait(pending))
        wrapped.register_comm_hook(works, self.reduce)
        return wrapped

    def reduce(self, works: list[Any] | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start to sum a bucket over the replicas, in the gradients' own memory; `works` collects what to wait for."""
        gradients = bucket.buffer().mul_(self.share)
        work = dist.all_reduce(gradients, group=self.group, async_op=True)
        assert work is not None
        if works is None:
            return work.get_future().then(lambda done: done.value()[0])
        works.append(work)
        completed: torch.futures.Future[Tensor] = torch.futures.Future()
        completed.set_result(gradients)
        return completed

    def wait(self, works: list[Any]) -> None:
        """Wait for the reductions of a module."""
        start = time.perf_counter()
        for work in works:
            work.wait()
        works.clear()
        self.wait_seconds += time.perf_counter() - start

    def shard(self, network: SIDNetwork) -> None:
        """Shard every stage and extractor block over the replicas, moving one after the other to the device.

        `fully_shard` takes the mean of the replicas' gradients. With weights for their shares of the batch, that is the
        mean over all images.
        """

        def weight(stage: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
            if outputs[1].requires_grad:
                outputs[1].register_hook(lambda gradient: gradient * (self.share * self.replicas))

        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(self.group, self.device.type)
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # needed to shard it
        stages = network.local_modules[1:]
        for stage in stages:
            stage.register_forward_hook(weight)
        extractor = network.extractor
        blocks = list(extractor) if isinstance(extractor, nn.Sequential) else [extractor]
        # Stages of the shared layout must return the tensor that they were given; a sharded module returns a copy.
        heads = [s.head if isinstance(s, Stage) and isinstance(s.body, nn.Identity) else s for s in stages]
        for module in (*blocks, *heads):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)  # which also moves it to the mesh's device
            else:
                module.to(self.device)


def full_tensors(value: Any) -> Any:
    """Gather the sharded tensors in nested dicts and lists, on the CPU; all replicas must call this together."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, full_tensors(entry)) for key, entry in value.items())
    return [full_tensors(entry) for entry in value] if isinstance(value, list) else value


def shard_state(state: dict, network: nn.Module, optimizers: Sequence[Optimizer | None]) -> dict:
    """Return a checkpoint's state with its tensors sharded like those of the network and its optimizers."""

    def shard_like(value: Any, own: Tensor) -> Any:
        if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
            return value  # a step counter, for example
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)

    def shard_optimizer(saved: dict, optimizer: Optimizer) -> dict:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            i: {name: shard_like(value, parameters[i]) for name, value in entry.items()}
            for i, entry in saved["state"].items()
        }
        return saved | {"state": entries}

    pairs = zip(optimizers, state["optimizers"], strict=True)
    return state | {
        "network": {name: shard_like(state["network"][name], own) for name, own in network.state_dict().items()},
        "optimizers": [shard_optimizer(saved, own) if own else saved for own, saved in pairs],
    }
