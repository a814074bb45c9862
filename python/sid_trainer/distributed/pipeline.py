"""A pipeline over processes: each runs consecutive stages and sends features and belief to the next, never a gradient.

Where a step of a language model holds no beliefs (N, V), the last readout of a rank travels instead: what its linear
layer reads, (N, D), and its weight (V, D). Copies of the last stage's weight travel back to shared readouts.

Stage i reads batch t, counted from 0, after exactly t updates of every earlier stage, as in one process. A pipelined
run therefore equals the serial run bit for bit, given one thread per rank and no stage that draws random numbers.
"""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sid_kernels.belief_head.problem import PriorHead

from ..methods.common import autocast
from ..methods.streams import StageHooks
from ..network.language import SharedReadout
from ..network.modules import SIDNetwork
from .rendezvous import Communicator

FEATURES_TAG, BELIEF_TAG, WEIGHT_TAG = 1, 2, 3


@dataclass(frozen=True)
class ActivationLayout:
    """The memory layout of a batch of features. Receivers allocate the same, so that kernels choose the same path."""

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
        """Return a batch with its dimensions in memory order, contiguous as messages must be; copy if necessary."""
        return batch.permute(self.order).contiguous()


@torch.no_grad()
def activation_layouts(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[ActivationLayout]:
    """Return the layout of the features that each stage computes from inputs (B, ...).

    B must be at least 2, because a batch of one does not tell the order of its dimensions. Copies of the bodies run on
    the inputs' device, one at a time; the network is not changed.
    """
    layouts, features = [], inputs
    with autocast(inputs, dtype):
        for stage in network.local_modules[1:]:
            features = copy.deepcopy(stage.get_submodule("body")).to(inputs.device).eval()(features)
            layouts.append(ActivationLayout.of(features))
    return layouts


class StageLink(StageHooks):
    """Hooks that connect a rank's stages with the preceding and the next rank of the pipeline.

    Receives are posted ahead, for at most `in_flight` batches. The sender keeps as many batches that were not received
    yet, and waits before it sends another one. A batch is sent right after the forward pass of the rank's last stage,
    so that the message travels while that stage learns.

    Args:
        stages: Number of stages of this rank.
        classes: C.
        received, sent: Layouts of the features from the preceding and to the next rank; None without such a rank.
        context: Targets of an input; of a text, the tokens in a window.
    """

    def __init__(
        self, communicator: Communicator, stages: int, classes: int, received: ActivationLayout | None,
        sent: ActivationLayout | None, in_flight: int = 2, context: int = 1,
    ):  # fmt: skip
        super().__init__(defer_updates=communicator.topology.replicas > 1)
        self.communicator, self.stages, self.classes = communicator, stages, classes
        self.previous_rank, self.next_rank = communicator.topology.rank - 1, communicator.topology.rank + 1
        self.received, self.sent, self.in_flight, self.context = received, sent, in_flight, context
        self.expected_rows: deque[tuple[int, bool]] = deque()
        self.posted_receives: deque[tuple[Tensor, list[Tensor], Tensor, list]] = deque()
        self.pending_sends: deque[list[tuple]] = deque()
        self.pending_copies: list[tuple] = []
        self.stop = False  # whether the current batch is the last one; sent with it
        self.reset_counters()

    def reset_counters(self) -> None:
        """Reset the seconds of waiting and the bytes sent to zero."""
        self.receiving, self.sending, self.bytes_sent = 0.0, 0.0, 0

    def expect(self, rows: Sequence[int], in_chunks: Callable[[int], bool] = lambda rows: False) -> None:
        """Announce that batches of these sizes will be received, in this order.

        Those for whose number of targets `in_chunks` is true come with a readout instead of a belief.
        """
        if self.received is not None:
            self.expected_rows.extend((count, in_chunks(count * self.context)) for count in rows)
            self.post_receives(self.received)

    def post_receives(self, layout: ActivationLayout) -> None:
        while self.expected_rows and len(self.posted_receives) < self.in_flight:
            rows, readout = self.expected_rows.popleft()
            features, targets, width = layout.empty(rows), rows * self.context, layout.shape[-1]
            shapes = [(targets, width), (self.classes, width)] if readout else [(targets, self.classes)]
            flat = torch.empty(sum(map(math.prod, shapes)) + 1, device=features.device)  # the last entry is `stop`
            parts = flat[:-1].split([*map(math.prod, shapes)])
            prior = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            messages = ((layout.dense(features), FEATURES_TAG), (flat, BELIEF_TAG))
            with self.communicator.watch(f"rank {self.previous_rank}"):
                works = [dist.irecv(tensor, self.previous_rank, tag=tag) for tensor, tag in messages]
            self.posted_receives.append((features, prior, flat[-1], works))

    def recv(self) -> tuple[Tensor, Tensor | PriorHead]:
        """Receive the features (B, ...) and the belief (B, C) or readout of the next batch, and set `stop`."""
        assert self.received is not None
        features, prior, stop, works = self.posted_receives.popleft()
        start = time.perf_counter()
        with self.communicator.watch(f"rank {self.previous_rank}"):
            for work in works:
                work.wait()
        self.stop = bool(stop)  # on a GPU this waits
        self.receiving += time.perf_counter() - start
        if not self.stop:
            self.post_receives(self.received)
        return features, prior[0] if len(prior) == 1 else PriorHead(prior[0], prior[1])

    def send(self, features: Tensor, belief: Tensor | PriorHead) -> None:
        """Send features (B, ...) and belief (B, C), or the readout that gives it, to the next rank, if there is one."""
        if self.sent is None:
            return
        self.wait_for_room(self.in_flight - 1)
        features = features.detach()
        parts = [belief] if isinstance(belief, Tensor) else [belief.hidden, belief.weight]
        flat = torch.cat([*(part.flatten() for part in parts), parts[0].new_full((1,), float(self.stop))])
        messages = ((self.sent.dense(features), FEATURES_TAG), (flat, BELIEF_TAG))
        with self.communicator.watch(f"rank {self.next_rank}"):
            self.pending_sends.append([(dist.isend(x, self.next_rank, tag=tag), x) for x, tag in messages])
        self.bytes_sent += features.nbytes + flat.nbytes

    def wait_for_room(self, pending: int = 0) -> None:
        """Wait until the next rank has received all but the last `pending` batches."""
        start = time.perf_counter()
        while len(self.pending_sends) > pending:
            with self.communicator.watch(f"rank {self.next_rank}"):
                for work, _ in self.pending_sends.popleft():
                    work.wait()
        self.sending += time.perf_counter() - start

    def send_back(self, weight: Tensor) -> None:
        """Send the last stage's weight (V, D) to all ranks before this one, on the CPU.

        The ranks exchange it before they start a step that needs it: another queue on a GPU would wait for that step.
        """
        self.wait_for_copies()
        topology, copied = self.communicator.topology, weight.detach().cpu().clone()
        for rank in range(topology.rank - topology.stage_rank, topology.rank):
            with self.communicator.watch(f"rank {rank}"):
                work = dist.isend(copied, rank, group=self.communicator.control_group, tag=WEIGHT_TAG)
            self.pending_copies.append((work, copied))
            self.bytes_sent += copied.nbytes

    def recv_back(self, readouts: Sequence[SharedReadout]) -> None:
        """Receive the last stage's weight (V, D) into shared readouts."""
        topology = self.communicator.topology
        last, start = topology.rank - topology.stage_rank + topology.stage_ranks - 1, time.perf_counter()
        received = torch.empty(readouts[0].weight.shape)
        with self.communicator.watch(f"rank {last}"):
            dist.recv(received, last, group=self.communicator.control_group, tag=WEIGHT_TAG)
        self.receiving += time.perf_counter() - start
        for readout in readouts:
            readout.weight.copy_(received)

    def wait_for_copies(self) -> None:
        """Wait until all ranks have received the copies of the last stage's weight."""
        with self.communicator.watch():
            for work, _ in self.pending_copies:
                work.wait()
        self.pending_copies = []

    def step_started(self) -> None:
        self.stages_done = 0

    def outputs_ready(self, features: Tensor, belief: Tensor | PriorHead) -> None:
        self.stages_done += 1
        if self.stages_done == self.stages:
            self.send(features, belief)
