"""Count the operations of networks: multiplications and additions of matrix products and convolutions.

All other operations are a small share. The counts are per image, and made on the CPU before training, on two images of
zeros.
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


def training_operations(network: SIDNetwork, method: str, shape: tuple[int, ...]) -> float:
    """Return the operations per image of a training step, for images of `shape` (channels, height, width)."""
    trial, targets = copy.deepcopy(network).cpu().train(), torch.zeros(IMAGES, dtype=torch.int64)
    step = make_step(method, trial, (), StepOptions([1.0] * trial.depth, fused=False))
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        step(torch.zeros(IMAGES, *shape), targets)
    return counter.get_total_flops() / IMAGES


@torch.no_grad()
def exit_operations(network: SIDNetwork, shape: tuple[int, ...]) -> list[float]:
    """Return the operations per image of all layers and heads up to each stage, at which an image may leave."""
    totals = [0.0]

    def run(module: Callable[..., Any], *inputs: Tensor) -> Any:
        with FlopCounterMode(display=False) as counter:
            outputs = module(*inputs)
        totals.append(totals[-1] + counter.get_total_flops() / IMAGES)
        return outputs

    copy.deepcopy(network).cpu().eval().stage_logits(torch.zeros(IMAGES, *shape), run)
    return totals[-network.depth :]
