"""A pipeline of stages over processes: each owns consecutive stages and sends features and belief on, never a gradient.

Stage i meets batch t after exactly t updates of every stage before it, as in one process, and reads the same numbers:
so the pipelined run equals the serial one bit for bit (one thread a rank; stages that draw random numbers draw others).
"""

import copy
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..methods.common import autocast
from ..methods.streams import StageHooks
from ..network.modules import SIDNetwork, at_least_float32
from .rendezvous import Place, watching

FEATURES, BELIEF = 1, 2  # tags


@dataclass(frozen=True)
class Layout:
    """How a batch of features lies in memory: the receiver allocates the same, so kernels choose the same path."""

    shape: tuple[int, ...]  # of one example
    order: tuple[int, ...]  # the dimensions of a batch, outermost first
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, batch: Tensor) -> "Layout":
        order = sorted(range(batch.dim()), key=lambda d: -batch.stride(d))
        return cls(tuple(batch.shape[1:]), tuple(order), batch.dtype, batch.device)

    def empty(self, rows: int) -> Tensor:
        sizes = rows, *self.shape
        dense = torch.empty([sizes[d] for d in self.order], dtype=self.dtype, device=self.device)
        return dense.permute([self.order.index(d) for d in range(len(sizes))])

    def dense(self, batch: Tensor) -> Tensor:
        """The same values in the order in which they lie here, contiguous, as messages must be: mostly no copy."""
        return batch.permute(self.order).contiguous()


@torch.no_grad()
def layouts(network: SIDNetwork, inputs: Tensor, dtype: torch.dtype) -> list[Layout]:
    """Of the features that each stage hands on, from a few inputs (2 or more, ...), on whose device is a copy of one
    stage at a time; nothing of the network changes."""

    def there(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to(inputs.device).eval()

    found = []
    with autocast(inputs, dtype):
        features = at_least_float32(there(network.extractor)(inputs))
        prior = network.uniform(features)
        for stage in network.stages:
            features, _ = there(stage)(features, prior)
            found.append(Layout.of(features))
    return found


class Link(StageHooks):
    """What lies between a rank's stages and its neighbours': receives are posted ahead, sends wait only for room.

    At most `in_flight` batches are on their way to a rank, and as many are kept by the one that sent them: a rank that
    is further ahead waits. As hooks of the step it sends right after the forward of the rank's last stage, so that
    the message travels while that stage learns.

    Args:
        stages: of this rank. classes: C. received, sent: the layouts of what comes and goes, None at the ends.
    """

    def __init__(
        self, place: Place, stages: int, classes: int, received: Layout | None, sent: Layout | None, in_flight: int = 2
    ):
        super().__init__(defer_updates=place.replicas > 1)
        self.place, self.stages, self.classes = place, stages, classes
        self.received, self.sent, self.in_flight = received, sent, in_flight
        self.rows: deque[int] = deque()
        self.coming: deque[tuple[Tensor, Tensor, list[dist.Work]]] = deque()
        self.going: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self.stop = False  # whether the batch in work is the last one; this goes on with it
        self.forget()

    def forget(self) -> None:
        """Begin to measure anew: seconds of waiting, bytes sent."""
        self.receiving, self.sending, self.bytes_sent = 0.0, 0.0, 0

    def expect(self, rows: Sequence[int]) -> None:
        """Batches of so many rows will come, in this order."""
        if self.received is not None:
            self.rows.extend(rows)
            self.post()

    def post(self) -> None:
        while self.rows and len(self.coming) < self.in_flight:
            rows, source = self.rows.popleft(), self.place.rank - 1
            features = self.received.empty(rows)
            belief = torch.empty(rows * self.classes + 1, device=features.device)  # and whether it is the last batch
            receives = ((self.received.dense(features), FEATURES), (belief, BELIEF))
            with watching(self.place, f"rank {source}"):
                works = [dist.irecv(tensor, source, tag=tag) for tensor, tag in receives]
            self.coming.append((features, belief, works))

    def take(self) -> tuple[Tensor, Tensor]:
        """The features and the belief (B, C) of the next batch, from the rank before."""
        features, belief, works = self.coming.popleft()
        start = time.perf_counter()
        with watching(self.place, f"rank {self.place.rank - 1}"):
            for work in works:
                work.wait()
        self.stop = bool(belief[-1])  # on a GPU it is this that waits
        self.receiving += time.perf_counter() - start
        if not self.stop:
            self.post()
        return features, belief[:-1].view(-1, self.classes)

    def send(self, features: Tensor, belief: Tensor) -> None:
        if self.sent is None:
            return
        self.wait_for_room(self.in_flight - 1)
        features = features.detach()
        flat = torch.cat((belief.flatten(), belief.new_full((1,), float(self.stop))))
        sends = ((self.sent.dense(features), FEATURES), (flat, BELIEF))
        with watching(self.place, f"rank {self.place.rank + 1}"):
            self.going.append([(dist.isend(tensor, self.place.rank + 1, tag=tag), tensor) for tensor, tag in sends])
        self.bytes_sent += features.nbytes + flat.nbytes

    def wait_for_room(self, left: int = 0) -> None:
        """Until at most `left` batches are kept here that the next rank has not taken."""
        start = time.perf_counter()
        while len(self.going) > left:
            with watching(self.place, f"rank {self.place.rank + 1}"):
                for work, _ in self.going.popleft():
                    work.wait()
        self.sending += time.perf_counter() - start

    # ---------------------------------------------------------------- as the step's hooks

    def step_started(self) -> None:
        self.passed = 0

    def outputs_ready(self, features: Tensor, belief: Tensor) -> None:
        self.passed += 1
        if self.passed == self.stages:
            self.send(features, belief)
