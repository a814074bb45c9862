"""A training step captured once in a CUDA graph and replayed with new data and new learning rates.

Replaying launches the step's kernels in one go: none of the Python, dispatch and allocation between them is done again.
On a device without graphs the step runs as it is, behind the same checks.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def capture(
    step: Callable[..., Any],
    example_batch: Sequence[Tensor],
    *,
    network: nn.Module | None = None,
    optimizers: Iterable[Optimizer] = (),
    warmup: int = 3,
) -> "CapturedStep":
    """Capture `step(*example_batch)`.

    Args:
        step: does one whole step on tensors alone: no number may be read back, and what changes from call to call comes
            in as a tensor (alpha as one, say). It may run on several streams, if it joins them again.
        example_batch: tensors of the sizes, dtypes and device of every batch to come.
        network, optimizers: what the step changes. They are left as they were: the runs that warm up and capture it are
            undone (`.grad` excepted). The optimizers must be fused Adam, AdamW or SGD, whose updates read the learning
            rate on the device; it becomes a tensor, which schedulers fill in place, and a number assigned to
            `group["lr"]` is taken over at the next call. Load an optimizer's state before, not after.
        warmup: runs before the capture, for code that is compiled, tuned or allocated the first time.

    Returns a CapturedStep. Raises ValueError for an example without tensors or on more than one device and for an
    optimizer that cannot be captured, and what the step itself raises.
    """
    return CapturedStep(step, tuple(example_batch), network, tuple(optimizers), warmup)


class CapturedStep:
    """Call it with a batch like the example; the result is the step's, in the same memory at every call."""

    def __init__(self, step, example, network, optimizers, warmup):
        if not example or not all(isinstance(x, Tensor) for x in example):
            raise ValueError(f"example_batch must be tensors, at least one, not {[type(x).__name__ for x in example]}")
        if len({x.device for x in example}) > 1:
            raise ValueError(f"example_batch must lie on one device, not {sorted({str(x.device) for x in example})}")
        for optimizer in optimizers:
            _check_optimizer(optimizer)
        self.step, self.example, self.graph = step, example, None
        self.rates: list[tuple[Optimizer, int, Tensor]] = []
        if example[0].is_cuda:
            self._capture(network, optimizers, warmup)

    def _capture(self, network, optimizers, warmup):
        device = self.example[0].device
        for optimizer in optimizers:
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
                self.rates.append((optimizer, i, group["lr"]))
                if "capturable" in group:
                    group["capturable"] = True
        self.batch = tuple(x.detach().clone() for x in self.example)
        with torch.cuda.device(device):
            before = _Snapshot(network, optimizers)
            random = torch.get_rng_state(), torch.cuda.get_rng_state(device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(max(1, warmup)):
                        self.step(*self.batch)
            finally:
                torch.cuda.current_stream().wait_stream(stream)
                before.restore()
                torch.set_rng_state(random[0])
                torch.cuda.set_rng_state(random[1], device)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = self.step(*self.batch)

    def __call__(self, *batch: Tensor) -> Any:
        """One step on tensors like the example's. ValueError for a batch that is not."""
        self._check(batch)
        if self.graph is None:
            return self.step(*batch)
        for own, new in zip(self.batch, batch, strict=True):
            own.copy_(new, non_blocking=True)
        for optimizer, i, rate in self.rates:
            group = optimizer.param_groups[i]
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        self.graph.replay()
        return self.result

    def _check(self, batch):
        if len(batch) != len(self.example):
            raise ValueError(f"batch must be {len(self.example)} tensors like the example's, not {len(batch)}")
        for i, (new, example) in enumerate(zip(batch, self.example, strict=True)):
            if not isinstance(new, Tensor) or new.shape != example.shape or new.dtype != example.dtype:
                found = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"batch[{i}] is {found}; it must be like the example's: {tuple(example.shape)} {example.dtype}"
                )


def _check_optimizer(optimizer: Optimizer) -> None:
    """Whether a fresh state is all zeros, which undoing the first steps puts back, and the update waits for nothing."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) or not all(g["fused"] for g in groups):
        raise ValueError(f"optimizers must be Adam, AdamW or SGD with fused=True; one is {kind.__name__} without it")
    if any(g.get("dampening") for g in groups):
        raise ValueError("optimizers must have dampening 0: a momentum that is undone starts at zero")


class _Snapshot:
    """Parameters, buffers and optimizer states as they are, to be put back in place."""

    def __init__(self, network, optimizers):
        self.optimizers = optimizers
        tensors = [] if network is None else [*network.parameters(), *network.buffers()]
        tensors += [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self.values = [(t.detach(), t.detach().clone()) for t in tensors]
        self.states = {id(t): t.clone() for t in self._state_tensors()}

    def _state_tensors(self):
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (x for x in state.values() if isinstance(x, Tensor))

    @torch.no_grad()
    def restore(self):
        for tensor, value in self.values:
            tensor.copy_(value)
        for tensor in self._state_tensors():  # one that was not there yet starts at zero, as it did
            if id(tensor) in self.states:
                tensor.copy_(self.states[id(tensor)])
            else:
                tensor.zero_()
