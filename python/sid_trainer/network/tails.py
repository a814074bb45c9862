"""Build tails: new blocks like those that follow a cut, through which the head at the cut reads the features."""

import copy
from collections.abc import Sequence
from itertools import islice

from torch import Tensor, nn

from .cut_network import first_tensor


class TailedHead(nn.Module):
    """A head that reads the features through blocks of its own, called as head(features, prior)."""

    def __init__(self, tail: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.tail, self.head = nn.ModuleList(tail), head

    def forward(self, features: Tensor, prior: Tensor) -> Tensor:
        """Return the logits (B, ..., C) for features (B, ...) and the prior belief (B, ..., C)."""
        for block in self.tail:
            features = first_tensor(block(features))
        return self.head(features, prior)


def new_blocks(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return copies of blocks with new parameters, all of them trained.

    Layers draw their parameters as `reset_parameters` does. Those without that method keep copied values.
    """
    copies = [copy.deepcopy(block) for block in blocks]
    for block in copies:
        for module in reversed([*block.modules()]):  # a module after those in it, as when it was made
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return copies


def following_blocks(model: nn.Module, name: str, count: int) -> list[nn.Module]:
    """Return the modules, at most `count`, that stand after the submodule `name` in the module that holds both."""
    parent, _, child = name.rpartition(".")
    children = iter(model.get_submodule(parent).named_children())
    next(sibling for sibling, _ in children if sibling == child)
    return [module for _, module in islice(children, count)]
