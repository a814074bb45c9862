"""A pipeline of stages over processes: each owns consecutive stages and sends features and belief on, never a gradient.

Stage i processes batch t after exactly t updates of every earlier stage, as in one process, and reads the same numbers.
So a pipelined run equals the serial one bit for bit (one thread per rank; stages that draw random numbers draw others).
"""

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..methods.common import autocast
from ..methods.streams import StageHooks
from ..network.modules import SIDNetwork
from .rendezvous import Communicator

FEATURES_TAG, BELIEF_TAG = 1, 2


@dataclass(frozen=True)
class ActivationLayout:
    """How a batch of features lies in memory: receivers allocate the same, so that kernels choose the same path."""

    shape: tuple[int, ...]  # of one example
    order: tuple[int, ...]  # the dimensions of a batch, outermost first
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, batch: Tensor) -> "ActivationLayout":
        """Return the layout of a batch (B, ...)."""
        order = sorted(range(batch.dim()), key=batch.stride, reverse=True)
        return cls(tuple(batch.shape[1:]), tuple(order), batch.dtype, batch.device)

    def empty(self, rows: int) -> Tensor:
        """Return an uninitialized batch of this layout."""
        sizes = rows, *self.shape
        dense = torch.empty([sizes[d] for d in self.order], dtype=self.dtype, device=self.device)
        return dense.permute([self.order.index(d) for d in range(len(sizes))])

    def dense(self, batch: Tensor) -> Tensor:
        """Return the batch as a contiguous tensor in memory order, as messages must be; a copy only if it differs."""
        return batch.permute(self.order).contiguous()


@torch.no_grad()
def activation_layouts(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[ActivationLayout]:
    """Return the layout of each stage's features, from inputs (2 or more, ...).

    The stages run on copies on the inputs' device, one at a time; the network stays as it is.
    """
    layouts, features, prior = [], inputs, network.uniform(inputs)
    with autocast(inputs, dtype):
        for stage in network.local_modules[1:]:
            features, _ = copy.deepcopy(stage).to(inputs.device).eval()(features, prior)
            layouts.append(ActivationLayout.of(features))
    return layouts


class StageLink(StageHooks):
    """The link between a rank's stages and its neighbors: receives are posted ahead, sends wait only for room.

    At most `in_flight` batches are on their way to a rank, and as many are kept by their sender, which then waits. As
    the step's hooks it sends right after the forward pass of the rank's last stage, so that the message travels while
    that stage learns.

    Args:
        stages: Number of stages of this rank.
        classes: C.
        received, sent: Layouts of the features from the rank before and to the rank after; None at the ends.
    """

    def __init__(
        self, communicator: Communicator, stages: int, classes: int, received: ActivationLayout | None,
        sent: ActivationLayout | None, in_flight: int = 2,
    ):  # fmt: skip
        super().__init__(defer_updates=communicator.topology.replicas > 1)
        self.communicator, self.stages, self.classes = communicator, stages, classes
        self.before, self.after = communicator.topology.rank - 1, communicator.topology.rank + 1
        self.received, self.sent, self.in_flight = received, sent, in_flight
        self.expected_rows: deque[int] = deque()
        self.coming: deque[tuple[Tensor, Tensor, list]] = deque()
        self.going: deque[list[tuple]] = deque()
        self.stop = False  # whether the current batch is the last one; sent on with it
        self.reset_counters()

    def reset_counters(self) -> None:
        """Set the seconds of waiting and the bytes sent to zero."""
        self.receiving, self.sending, self.bytes_sent = 0.0, 0.0, 0

    def expect(self, rows: Sequence[int]) -> None:
        """Announce that batches of these sizes will be received, in this order."""
        if self.received is not None:
            self.expected_rows.extend(rows)
            self.post_receives(self.received)

    def post_receives(self, layout: ActivationLayout) -> None:
        while self.expected_rows and len(self.coming) < self.in_flight:
            rows = self.expected_rows.popleft()
            features = layout.empty(rows)
            belief = torch.empty(rows * self.classes + 1, device=features.device)  # and `stop`
            messages = ((layout.dense(features), FEATURES_TAG), (belief, BELIEF_TAG))
            with self.communicator.watch(f"rank {self.before}"):
                works = [dist.irecv(tensor, self.before, tag=tag) for tensor, tag in messages]
            self.coming.append((features, belief, works))

    def recv(self) -> tuple[Tensor, Tensor]:
        """Return the features and the belief (B, C) of the next batch, and set `stop`."""
        assert self.received is not None
        features, belief, works = self.coming.popleft()
        start = time.perf_counter()
        with self.communicator.watch(f"rank {self.before}"):
            for work in works:
                work.wait()
        self.stop = bool(belief[-1])  # on a GPU this waits
        self.receiving += time.perf_counter() - start
        if not self.stop:
            self.post_receives(self.received)
        return features, belief[:-1].view(-1, self.classes)

    def send(self, features: Tensor, belief: Tensor) -> None:
        """Send features and belief (B, C) to the rank after, if there is one."""
        if self.sent is None:
            return
        self.wait_for_room(self.in_flight - 1)
        features = features.detach()
        flat = torch.cat((belief.flatten(), belief.new_full((1,), float(self.stop))))
        messages = ((self.sent.dense(features), FEATURES_TAG), (flat, BELIEF_TAG))
        with self.communicator.watch(f"rank {self.after}"):
            self.going.append([(dist.isend(tensor, self.after, tag=tag), tensor) for tensor, tag in messages])
        self.bytes_sent += features.nbytes + flat.nbytes

    def wait_for_room(self, left: int = 0) -> None:
        """Wait until the rank after has received all but the last `left` batches."""
        start = time.perf_counter()
        while len(self.going) > left:
            with self.communicator.watch(f"rank {self.after}"):
                for work, _ in self.going.popleft():
                    work.wait()
        self.sending += time.perf_counter() - start

    def step_started(self) -> None:
        self.stages_done = 0

    def outputs_ready(self, features: Tensor, belief: Tensor) -> None:
        self.stages_done += 1
        if self.stages_done == self.stages:
            self.send(features, belief)
