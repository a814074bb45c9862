"""A training step captured once in a CUDA graph and replayed with new data and new learning rates.

A replay launches all kernels of the step at once, without the Python, dispatch and allocation between them. On a device
without graphs the step runs as it is, after the same checks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class CapturedStep:
    """A training step captured in a CUDA graph, called with batches like the example; `capture` creates it.

    A call returns the step's result, in the same memory every time, and raises ValueError for a batch that differs from
    the example in the number of tensors, their shapes or dtypes.

    Args:
        step: Function that does one whole step on tensors. It reads no number back from the device, and what changes
            between calls is a tensor (alpha, for example). It may run on several streams if it joins them again.
        example_batch: Tensors with the sizes, dtypes and device of every later batch.
        network, optimizers: What the step changes. The runs for warm-up and capture are undone, except for `.grad`.
            The optimizers must be Adam, AdamW or SGD with fused=True, whose updates read the learning rate on the
            device. It becomes a tensor that schedulers fill in place; the next call also applies a number assigned to
            `group["lr"]`. Load an optimizer's state before the capture, not after it.
        warmup: Number of runs before the capture, for code that is compiled, tuned or allocated the first time.

    Raises ValueError for an example without tensors or on more than one device and for an optimizer that cannot be
    captured, and what the step itself raises.
    """

    def __init__(
        self, step: Callable[..., Any], example_batch: Sequence[Tensor], *, network: nn.Module | None = None,
        optimizers: Iterable[Optimizer] = (), warmup: int = 3,
    ):  # fmt: skip
        example, optimizers = tuple(example_batch), tuple(optimizers)
        if not example or not all(isinstance(x, Tensor) for x in example):
            raise ValueError(f"example_batch must be tensors, at least one, not {[type(x).__name__ for x in example]}")
        if len({x.device for x in example}) > 1:
            raise ValueError(f"example_batch must be on one device, not {sorted({str(x.device) for x in example})}")
        for optimizer in optimizers:
            _check_optimizer(optimizer)
        self.step, self.example = step, example
        self.graph: torch.cuda.CUDAGraph | None = None
        self.rates: list[tuple[Optimizer, int, Tensor]] = []
        if example[0].is_cuda:
            self._capture(network, optimizers, warmup)

    def _capture(self, network: nn.Module | None, optimizers: tuple[Optimizer, ...], warmup: int) -> None:
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
            self.graph = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.result = self.step(*self.batch)

    def __call__(self, *batch: Tensor) -> Any:
        if len(batch) != len(self.example):
            raise ValueError(f"batch must be {len(self.example)} tensors like the example's, not {len(batch)}")
        for i, (new, example) in enumerate(zip(batch, self.example, strict=True)):
            if not isinstance(new, Tensor) or new.shape != example.shape or new.dtype != example.dtype:
                given = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(f"batch[{i}] must be {tuple(example.shape)} {example.dtype} as captured, not {given}")
        if self.graph is None:
            return self.step(*batch)
        for captured, new in zip(self.batch, batch, strict=True):
            captured.copy_(new, non_blocking=True)
        for optimizer, i, rate in self.rates:
            group = optimizer.param_groups[i]
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate
        self.graph.replay()
        return self.result


def _check_optimizer(optimizer: Optimizer) -> None:
    """Raise ValueError unless the optimizer's new state is all zeros and no update waits for the device."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) or not all(g["fused"] for g in groups):
        raise ValueError(f"optimizers must be Adam, AdamW or SGD with fused=True; one is {kind.__name__} without it")
    if any(g.get("dampening") for g in groups):
        raise ValueError("optimizers must have dampening 0: a momentum that is undone starts at zero")


class _Snapshot:
    """Copies of parameters, buffers and optimizer states, to restore them in place."""

    def __init__(self, network: nn.Module | None, optimizers: tuple[Optimizer, ...]):
        self.optimizers = optimizers
        tensors = [] if network is None else [*network.parameters(), *network.buffers()]
        tensors += [p for o in optimizers for group in o.param_groups for p in group["params"]]
        self.values = [(t.detach(), t.detach().clone()) for t in tensors]
        self.states = {id(t): t.clone() for t in self._state_tensors()}

    def _state_tensors(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                yield from (x for x in state.values() if isinstance(x, Tensor))

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)
        for tensor in self._state_tensors():
            if id(tensor) in self.states:
                tensor.copy_(self.states[id(tensor)])
            else:  # a new state starts at zero
                tensor.zero_()


capture = CapturedStep  # `capture(step, batch)` reads as what it does
