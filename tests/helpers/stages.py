"""One view of a network's parameters, whether its stages are modules or `StackedHeads`."""

import torch

from sid_trainer import StackedHeads


def by_kind(network, of):
    """Return `of(parameter)` by name. Those of `Stage(StageHead)` modules are stacked, under the stacked names."""
    found = {name: of(parameter) for name, parameter in network.named_parameters()}
    if isinstance(network.stages, StackedHeads):
        return found
    found = {name: value for name, value in found.items() if not name.startswith("stages.")}
    for name, source in StackedHeads.SOURCES.items():
        found[f"stages.{name}"] = torch.stack([of(stage.head.get_parameter(source)) for stage in network.stages])
    return found


def values(network):
    return by_kind(network, lambda parameter: parameter.detach().clone())


def gradients(network):
    return by_kind(network, lambda parameter: parameter.grad.clone())
