"""Hooks around the stages of a step, and the hooks that run each stage on its own CUDA stream."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sid_kernels.belief_head.problem import PriorHead


class StageHooks:
    """Hooks that a step calls around its stages. This base class runs one stage after the other.

    Args:
        defer_updates: Run each stage's update after the next stage's work instead of before it. No stage reads
            another's weights, so the results are the same. The next stage then overlaps what the update waits for,
            for example the reduction of gradients over processes.
    """

    def __init__(self, defer_updates: bool = False):
        self.defer_updates = defer_updates
        self.deferred: Callable[[], None] = lambda: None

    def step_started(self) -> None:
        """Prepare for a step; called before its first stage."""

    def run_stage(self, i: int) -> AbstractContextManager[Any]:
        """Return the context in which stage i runs; it waits for the outputs of stage i - 1."""
        return nullcontext()

    def outputs_ready(self, features: Tensor, belief: Tensor | PriorHead) -> None:
        """Pass on a stage's outputs; called within the stage when they are complete, before its backward and update.

        `belief` is a `PriorHead` if the step holds no beliefs.
        """

    def update(self, update_stage: Callable[[], None]) -> None:
        """Run `update_stage`, or if updates are deferred, that of the stage before; called at the end of a stage."""
        if self.defer_updates:
            update_stage, self.deferred = self.deferred, update_stage
        update_stage()

    def step_finished(self) -> None:
        """Run the deferred update, and let the caller's work wait for all stages; called after the last stage."""
        self.deferred()
        self.deferred = lambda: None


class StageStreams(StageHooks):
    """Hooks that run each stage on its own stream, so that a stage's backward and update overlap the next forward.

    Events order the forward passes. Autograd runs a backward pass on the stream of its forward pass. It sums the
    gradients of shared features on the caller's stream, in stage order, because the step creates their AccumulateGrad
    node there. Each `backward` makes that stream wait for the stage's gradient, and the stage's stream for the sum.

    Tensors pass between streams without `record_stream`. No memory is reused too early, because a stage's stream gets
    its next work after the next `step_started`: memory freed in a step is reused in the next one at the earliest.
    """

    def __init__(self, device: torch.device | str, stages: int, backend: Any = torch.cuda):
        super().__init__()
        self.device, self.backend = device, backend
        self.streams = [backend.Stream(device) for _ in range(stages)]

    def step_started(self) -> None:
        self.caller = self.backend.current_stream(self.device)
        self.ready = self.caller.record_event()

    def run_stage(self, i: int) -> AbstractContextManager[Any]:
        self.streams[i].wait_event(self.ready)
        return self.backend.stream(self.streams[i])

    def outputs_ready(self, features: Tensor, belief: Tensor | PriorHead) -> None:
        self.ready = self.backend.current_stream(self.device).record_event()

    def step_finished(self) -> None:
        for stream in self.streams:
            self.caller.wait_stream(stream)


def stage_streams(device: torch.device, stages: int) -> StageHooks:
    """Return `StageStreams` for a CUDA device and plain `StageHooks` for any other."""
    return StageStreams(device, stages) if device.type == "cuda" else StageHooks()
