"""Assign consecutive stages to the ranks of a pipeline, balanced by the seconds that each stage takes on a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..methods.common import StepOptions
from ..methods.factory import make_optimizers
from ..methods.readouts import train_readouts, trains_in_chunks
from ..methods.step import stage_by_stage
from ..methods.streams import StageHooks
from ..methods.updates import clear_gradients
from ..network.language import LanguageModel
from ..network.modules import SIDNetwork
from ..training.cpu import denormals_as_zero

WARMUP, ROUNDS = 2, 3  # steps before the measurement, and measured steps


def balance_stages(seconds: Sequence[float], ranks: int) -> list[range]:
    """Return consecutive stages for each rank, counted from 0, such that the slowest rank takes the least time.

    `seconds` has one number per stage, and every rank gets at least one stage. Raises ValueError unless there are 1 to
    len(seconds) ranks.
    """
    stages = len(seconds)
    if not 1 <= ranks <= stages:
        raise ValueError(f"ranks must be 1 to {stages}, the number of stages, not {ranks}")
    total = [0.0, *accumulate(seconds)]

    @cache
    def best(end: int, count: int) -> tuple[float, tuple[int, ...]]:
        """Split the stages before `end` over `count` ranks: return the slowest rank's seconds and every first stage."""
        if count == 1:
            return total[end], (0,)
        largest, start = min((max(best(i, count - 1)[0], total[end] - total[i]), i) for i in range(count - 1, end))
        return largest, (*best(start, count - 1)[1], start)

    return [range(start, end) for start, end in pairwise((*best(stages, ranks)[1], stages))]


def measure_stage_seconds(
    network: SIDNetwork, batches: Iterator[tuple[Tensor, Tensor]], options: StepOptions, optimizer: str
) -> list[float]:
    """Measure the seconds per batch of each stage; those of the first stage include data loading.

    This trains `network` for a few steps, so pass a copy. `batches` yields inputs (B, ...) and targets (B,). The state
    of the random number generators is restored afterwards.
    """
    optimizers = make_optimizers(network, "sid", optimizer=optimizer)
    device = next(network.parameters()).device
    timer = StageTimer(device, len(network.stages))
    with denormals_as_zero(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for step in range(WARMUP + ROUNDS):
            if step == WARMUP:
                timer.seconds = [0.0] * len(network.stages)
            clear_gradients(optimizers)
            with timer.run_stage(0):
                inputs, targets = next(batches)
            in_chunks = isinstance(network, LanguageModel) and trains_in_chunks(network, len(targets), options)
            train: Callable[..., object] = train_readouts if in_chunks else stage_by_stage
            train(network, inputs, targets, options, optimizers, hooks=timer)
    return [seconds / ROUNDS for seconds in timer.seconds]


class StageTimer(StageHooks):
    """Hooks that add up the seconds of each stage's forward pass, backward pass and update."""

    def __init__(self, device: torch.device, stages: int):
        super().__init__()
        self.device, self.seconds = device, [0.0] * stages

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def run_stage(self, i: int) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[i] += self.now() - start
