"""On which CUDA stream each stage runs: one a stage, ordered by events, so that a stage's backward and update overlap
the next stage's forward. Elsewhere stages run in turn, through the same calls.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class InTurn:
    """The stages one after the other. `late`: each is updated behind the next one's work, which overlaps what its
    update waits for, its gradients' way through other processes; no stage reads another's weights."""

    def __init__(self, late: bool = False):
        self.late, self.kept = late, None

    def begin(self) -> None:
        """The first stage may start when what was asked for so far is done."""

    def stage(self, i: int) -> AbstractContextManager:
        """Within it runs stage i, after what the stage before it handed on."""
        return nullcontext()

    def hand_on(self, features: Tensor, belief: Tensor) -> None:
        """Called within a stage, before its backward and update: what it made for the next one is complete."""

    def learn(self, update: Callable[[], None]) -> None:
        """Called within a stage, at its end, with what is left to do."""
        if self.late:
            self.kept, update = update, self.kept
        if update:
            update()

    def join(self) -> None:
        """What is asked for from here on comes after all stages."""
        if self.kept:
            self.kept()
            self.kept = None


class StageStreams(InTurn):
    """A stream a stage; autograd runs each backward on the stream of its forward, so whole stages are placed.

    Gradients of features that stages share are added up on the caller's stream, in stage order: autograd adds on the
    stream that was current when the leaf's AccumulateGrad node was made, so the step makes it before the first stage
    and holds it. Each `backward` has that stream wait for the stage's gradient, and the stage's own stream for the sum.

    No memory is reused too early, though tensors pass between streams without `record_stream`: each stage's stream
    takes its next work after `begin` of the next step, which comes after `join`, so a block freed in between is given
    to nobody but the step after.
    """

    def __init__(self, device: torch.device | str, stages: int, backend=torch.cuda):
        super().__init__()
        self.device, self.backend = device, backend
        self.streams = [backend.Stream(device) for _ in range(stages)]

    def begin(self) -> None:
        self.caller = self.backend.current_stream(self.device)
        self.ready = self.caller.record_event()

    def stage(self, i: int) -> AbstractContextManager:
        self.streams[i].wait_event(self.ready)
        return self.backend.stream(self.streams[i])

    def hand_on(self, features: Tensor, belief: Tensor) -> None:
        self.ready = self.backend.current_stream(self.device).record_event()

    def join(self) -> None:
        for stream in self.streams:
            self.caller.wait_stream(stream)


def stage_streams(device: torch.device, stages: int) -> InTurn:
    return StageStreams(device, stages) if device.type == "cuda" else InTurn()
