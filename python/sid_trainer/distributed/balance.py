"""What each stage costs a rank: seconds of forward, backward and update, bytes sent on and held, as measured here.

`measure_stages` times SID's own step. Nothing of the network that is measured changes.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods.common import StepOptions, autocast, clear_gradients
from ..methods.factory import make_optimizers
from ..methods.step import stage_by_stage
from ..methods.streams import StageHooks
from ..network.modules import SIDNetwork, at_least_float32
from ..training.cpu import denormals_as_zero
from ..training.memory import SavedBytes

WARM = 2  # rounds before those that count


@dataclass(frozen=True)
class StageCost:
    """Of one stage on one rank: seconds and bytes for one batch, under backpropagation for one microbatch.

    forward: its local loss included. backward: of which `backward_input` is for the input's gradient, the rest for the
    weights' (zero-bubble schedules part them); None: half. update: of the optimizer, once a batch. sent: bytes to the
    next stage. held: bytes that autograd keeps from the forward to the backward. load: until the batch is there, once a
    batch, where this is the first stage.
    """

    forward: float
    backward: float
    update: float = 0.0
    sent: int = 0
    held: int = 0
    backward_input: float | None = None
    load: float = 0.0

    @property
    def seconds(self) -> float:
        return self.load + self.forward + self.backward + self.update

    @property
    def of_input(self) -> float:
        return self.backward / 2 if self.backward_input is None else min(self.backward_input, self.backward)


def balanced(seconds: Sequence[float], ranks: int) -> list[range]:
    """Stages, counted from 0, for each rank: consecutive, at least one each, the largest sum as small as it can be."""
    stages = len(seconds)
    if not 1 <= ranks <= stages:
        raise ValueError(f"ranks must be 1 to {stages}, the number of stages, not {ranks}")
    total = [0.0]
    for value in seconds:
        total.append(total[-1] + value)
    # least[j]: the smallest possible largest sum of the first j stages on the ranks so far; begins[r][j]: the first
    # stage of the last of them
    least, begins = [0.0] + [math.inf] * stages, []
    for rank in range(1, ranks + 1):
        found, begin = [math.inf] * (stages + 1), [0] * (stages + 1)
        for j in range(rank, stages - (ranks - rank) + 1):
            choices = ((max(least[i], total[j] - total[i]), i) for i in range(rank - 1, j))
            found[j], begin[j] = min(choices)
        least = found
        begins.append(begin)
    parts, end = [], stages
    for begin in reversed(begins):
        parts.append(range(begin[end], end))
        end = begin[end]
    return parts[::-1]


# ---------------------------------------------------------------- measuring


def measure_stages(
    network: SIDNetwork, inputs: Tensor, targets: Tensor, *, alpha: float = 0.5, optimizer: str = "adam",
    lr: float = 1e-3, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32, rounds: int = 10,
    feed: Iterator[tuple[Tensor, Tensor]] | None = None,
) -> list[StageCost]:  # fmt: skip
    """The cost of every stage of a stagewise network in SID's step on inputs (B, ...), targets (B,): means of rounds.
    `feed` gives each round a batch of its own, as training does, and what it takes is the first stage's `load`: between
    two steps it finds no more in the caches than it does there. Without it all take the same.

    What other ranks do to this one's speed (caches, memory, clock) is not in it, unless they work meanwhile. Raises
    ValueError for a network whose stages share an extractor: no rank could own it.
    """
    if not isinstance(network.extractor, nn.Identity):
        raise ValueError("network must be stagewise: the stages of a shared extractor cannot be owned by ranks")
    with measured_copy(network, inputs.device, rounds) as network:
        optimizers = make_optimizers(network, "sid", optimizer=optimizer, lr=lr, weight_decay=weight_decay)
        clock = Clock(inputs.device, len(network.stages))
        options = StepOptions(alpha, dtype=dtype)
        for _ in range(WARM + rounds):
            clock.begin_round()
            for i, one in enumerate(optimizers[1:]):
                clock.time("update", i, clear_gradients, [one])
            batch = (inputs, targets) if feed is None else clock.time("load", 0, next, feed)
            stage_by_stage(network, *batch, options, optimizers, hooks=clock)
        features, prior, costs = inputs, network.uniform(inputs).float(), []
        for i, stage in enumerate(network.stages):
            with SavedBytes(stage.parameters()) as saved, autocast(inputs, dtype):
                seen, logits = stage(features, prior)
            features, prior = seen.detach(), at_least_float32(logits.detach()).softmax(dim=1)
            costs.append(StageCost(**clock.means(i), sent=features.nbytes + prior.nbytes, held=saved.peak))
    return costs


@contextmanager
def measured_copy(network: SIDNetwork, device: torch.device, rounds: int):
    """A copy that may learn, and the random numbers as they were."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    with denormals_as_zero(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield copy.deepcopy(network).train()


class Clock(StageHooks):
    """Seconds of each part of each stage's work in each round; as hooks of the step it times the step itself."""

    def __init__(self, device: torch.device, stages: int):
        super().__init__()
        self.device, self.stages, self.rounds = device, stages, []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def begin_round(self) -> None:
        self.rounds.append([{} for _ in range(self.stages)])

    def add(self, part: str, i: int, seconds: float) -> None:
        parts = self.rounds[-1][i]
        parts[part] = parts.get(part, 0.0) + seconds

    def time(self, part: str, i: int, call: Callable, *arguments):
        start = self.now()
        result = call(*arguments)
        self.add(part, i, self.now() - start)
        return result

    def means(self, i: int) -> dict[str, float]:
        """Not medians: what now and then takes longer is part of what an epoch takes."""
        counted = [stages[i] for stages in self.rounds[WARM:]]
        return {part: statistics.fmean(parts[part] for parts in counted) for part in counted[0]}

    def step_started(self) -> None:
        self.last = self.now()

    @contextmanager
    def run_stage(self, i: int):
        self.at = i  # its forward begins where the stage before it ended
        yield

    def outputs_ready(self, features: Tensor, belief: Tensor) -> None:
        now = self.now()
        self.add("forward", self.at, now - self.last)
        self.last = now

    def update(self, update_stage: Callable[[], None]) -> None:
        self.add("backward", self.at, self.now() - self.last)
        self.time("update", self.at, update_stage)
        self.last = self.now()
