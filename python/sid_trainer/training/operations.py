"""Operations of networks: multiplications and additions of matrix products and convolutions; all else is a small share.

They are counted on the CPU before training, on two images of zeros, and are numbers per image.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..methods.common import StepOptions
from ..methods.factory import make_step
from ..network.modules import SIDNetwork

IMAGES = 2  # batch-norm trains on two images or more


def count_operations(function: Callable[..., Any], *inputs: Tensor) -> float:
    """Return the operations per image of one call, with those of its backward passes."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / IMAGES


def training_operations(network: SIDNetwork, method: str, shape: tuple[int, ...]) -> float:
    """Return the operations per image of a training step, for images of `shape` (channels, height, width)."""
    trial, targets = copy.deepcopy(network).cpu().train(), torch.zeros(IMAGES, dtype=torch.int64)
    step = make_step(method, trial, (), StepOptions([1.0] * trial.depth, fused=False))
    with torch.random.fork_rng(devices=[]):
        return count_operations(step, torch.zeros(IMAGES, *shape), targets)


@torch.no_grad()
def exit_operations(network: SIDNetwork, shape: tuple[int, ...]) -> list[float]:
    """Return the operations per image of all layers and heads up to each stage, at which an image may leave."""
    network = copy.deepcopy(network).cpu().eval()
    total, outputs = 0.0, torch.zeros(IMAGES, *shape)

    def run(module: Callable[..., Any], *inputs: Tensor) -> Any:
        nonlocal total, outputs
        total += count_operations(lambda: keep(module(*inputs)))
        totals.append(total)
        return outputs

    def keep(found: Any) -> None:
        nonlocal outputs
        outputs = found

    totals: list[float] = []
    network.stage_logits(outputs, run)
    return totals[-network.depth :]
