"""Replicas share every batch and sum their gradients: of whole parameters, or of shards (`fully_shard`), for stages too
large for one device, which are whole in checkpoints.
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

from ..network.modules import SIDNetwork
from .rendezvous import Place


class Replicas:
    """Makes the gradients of this process those of the mean over the whole batch.

    share: of the images of the batch in work, those that are here. waited: seconds in which updates waited for others.
    """

    def __init__(self, place: Place, device: torch.device):
        self.place, self.device = place, device
        self.share, self.waited = 1 / place.replicas, 0.0

    def wrap(self, network: SIDNetwork, optimizers: Sequence[Optimizer | None]) -> SIDNetwork:
        """Reduced module by module. Where each has an optimizer of its own, it is this that waits, not the backward:
        what runs in between overlaps the reduction."""
        modules = network.extractor, *network.stages
        optimizers = optimizers if len(optimizers) == len(modules) else [None] * len(modules)
        extractor, *stages = map(self.wrap_module, modules, optimizers)
        return SIDNetwork(extractor, stages, network.num_classes)

    def wrap_module(self, module: nn.Module, optimizer: Optimizer | None) -> nn.Module:
        if not any(p.requires_grad and not p.is_meta for p in module.parameters()):
            return module
        wrapped = DistributedDataParallel(
            module, [self.device.index] if self.device.type == "cuda" else None, process_group=self.place.data,
            gradient_as_bucket_view=True, broadcast_buffers=False,  # no forward waits for another's
        )  # fmt: skip
        works: list[dist.Work] | None = None
        if optimizer:
            works = []
            optimizer.register_step_pre_hook(lambda *_: self.wait(works))
        wrapped.register_comm_hook(works, self.reduce)
        return wrapped

    def reduce(self, works: list[dist.Work] | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The buckets are the gradients' own memory, so DDP has nothing left to do once they are on their way."""
        gradients = bucket.buffer().mul_(self.share)
        work = dist.all_reduce(gradients, group=self.place.data, async_op=True)
        if works is None:
            return work.get_future().then(lambda done: done.value()[0])
        works.append(work)
        begun = torch.futures.Future()
        begun.set_result(gradients)
        return begun

    def wait(self, works: list[dist.Work]) -> None:
        start = time.perf_counter()
        for work in works:
            work.wait()
        works.clear()
        self.waited += time.perf_counter() - start

    def shard(self, network: SIDNetwork) -> None:
        """Each stage, and each block of the extractor, keeps a share of its parameters on each rank, gathered to run;
        one after the other goes to the device. The mean over replicas that `fully_shard` takes is that over all images,
        if each weighs what it has of them."""

        def weigh(stage: nn.Module, inputs: tuple, made: tuple[Tensor, Tensor]) -> None:
            if made[1].requires_grad:
                made[1].register_hook(lambda gradient: gradient * (self.share * self.place.replicas))

        mesh = torch.distributed.device_mesh.DeviceMesh.from_group(self.place.data, self.device.type)
        network.to(memory_format=torch.contiguous_format)  # no other can be cut
        for stage in network.stages:
            stage.register_forward_hook(weigh)
        extractor = network.extractor
        blocks = extractor if isinstance(extractor, nn.Sequential) else [extractor]
        # What fully_shard wraps hands on copies; by features that are the very same the step knows the shared layout.
        stages = [s.head if isinstance(getattr(s, "body", None), nn.Identity) else s for s in network.stages]
        for module in (*blocks, *stages):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)  # takes them to the mesh's device
            else:
                module.to(self.device)


def whole(value: Any) -> Any:
    """The same with every tensor in shards made whole; all replicas must ask for it together."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, whole(one)) for key, one in value.items())
    return [whole(one) for one in value] if isinstance(value, list) else value


def load_network(network: nn.Module, state: dict[str, Tensor]) -> None:
    network.load_state_dict({name: like(state[name], own) for name, own in network.state_dict().items()})


def load_optimizer(optimizer: Optimizer, state: dict) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        i: {name: like(value, parameters[i]) if is_of(value, parameters[i]) else value for name, value in of.items()}
        for i, of in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": shards})


def is_of(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def like(value: Tensor, own: Tensor) -> Tensor:
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
