"""Parameters in shards over replicas (`fully_shard`), for stages too large for one device; whole in checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from .network import SIDNetwork
from .processes import Place


def shard(network: SIDNetwork, place: Place, device: torch.device) -> None:
    """Each stage, and each block of the extractor, keeps a share of its parameters on each rank, gathered to run."""
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(place.data, device.type)
    network.to(memory_format=torch.contiguous_format)  # no other can be cut
    extractor = network.extractor
    for module in (*(extractor if isinstance(extractor, nn.Sequential) else [extractor]), *network.stages):
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)


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
