"""The backward link that the shared layout cannot do without: the gradient its extractor gets from stages elsewhere.

The sum runs along the ranks in stage order, so it has the bits of one process, and the last rank sends it to the first.
The extractor waits for it before its next batch; with `stale` it waits only for those older than the newest k, holds so
many graphs more, and learns from gradients of the weights it had then. Saving and evaluating wait for all of them, so
with `stale` the numbers depend on how often a run is saved.
"""

import time
import warnings
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from ..methods.common import autocast
from ..network.modules import at_least_float32
from .pipeline import Layout, Link
from .rendezvous import watching

PARTIAL, TOTAL = 3, 4  # tags


class Feedback:
    """extractor, optimizer: of the first rank, elsewhere unused. layout: of the features all stages read. link: counts
    the waiting and the bytes."""

    def __init__(self, link: Link, extractor: nn.Module, optimizer: Optimizer | None, layout: Layout, stale: int):
        self.link, self.place, self.extractor, self.optimizer = link, link.place, extractor, optimizer
        self.layout, self.stale = layout, stale
        self.pending: deque[tuple[Tensor, dict[str, Tensor], Tensor, dist.Work]] = deque()
        self.going: deque[tuple[dist.Work, Tensor]] = deque()
        if stale:  # its learning rate goes on with the batches, before its first update
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def extract(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """On the first rank: the features (B, D), a leaf whose gradient the stages fill."""
        self.then = {}
        with autocast(inputs, dtype):
            if self.stale:  # weights change before these are asked for their gradients
                self.then = {name: p.detach().clone().requires_grad_() for name, p in self.extractor.named_parameters()}
                self.extracted = functional_call(self.extractor, self.then, inputs)
            else:
                self.extracted = self.extractor(inputs)
        return at_least_float32(self.extracted.detach()).requires_grad_()

    def partial(self, features: Tensor) -> None:
        """On a later rank: the sum of the stages before becomes what its own stages add to."""
        features.requires_grad_().grad = self.layout.empty(len(features))
        work = self.receive(features.grad, self.place.rank - 1, PARTIAL)
        self.link.receiving += self.wait(work, self.place.rank - 1)

    def send(self, features: Tensor) -> None:
        """The sum so far goes on, from the last rank to the first, which then learns as far as it must."""
        after, tag = (self.place.rank + 1, PARTIAL) if not self.place.last else (self.first, TOTAL)
        while len(self.going) > 1 + self.stale:
            self.link.sending += self.wait(self.going.popleft()[0], after)
        gradient = self.layout.dense(features.grad)
        with watching(self.place, f"rank {after}"):
            self.going.append((dist.isend(gradient, after, tag=tag), gradient))
        self.link.bytes_sent += gradient.nbytes
        if self.place.first:
            total = self.layout.empty(len(features))
            work = self.receive(total, self.place.rank + self.place.stages - 1, TOTAL)
            self.pending.append((self.extracted, self.then, total, work))
            self.learn(self.stale)

    def learn(self, newest: int = 0) -> None:
        """Update the extractor for all batches but the newest."""
        while len(self.pending) > newest:
            extracted, then, total, work = self.pending.popleft()
            self.link.receiving += self.wait(work, self.place.rank + self.place.stages - 1)
            self.optimizer.zero_grad(set_to_none=True)
            extracted.backward(total.to(extracted.dtype))
            for name, parameter in self.extractor.named_parameters():
                if then:
                    parameter.grad = then[name].grad
            self.optimizer.step()

    @property
    def first(self) -> int:
        return self.place.rank - self.place.stage

    def receive(self, batch: Tensor, source: int, tag: int) -> dist.Work:
        with watching(self.place, f"rank {source}"):
            return dist.irecv(self.layout.dense(batch), source, tag=tag)

    def wait(self, work: dist.Work, whom: int) -> float:
        """Seconds that it took."""
        start = time.perf_counter()
        with watching(self.place, f"rank {whom}"):
            work.wait()
        return time.perf_counter() - start
