"""Measure what a call costs besides time: the peak of its memory, and the operators or kernels that it runs.

Only memory from PyTorch's allocator is counted. Memory that a library or a kernel allocates by itself (the packed
panels of a matrix product, the tile of a thread) is not seen, neither in our kernels nor in others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, autograd
from torch.profiler import ProfilerActivity, profile

from sid_kernels.core import cpu, memory


def allocated_peak(call: Callable[[], Any], device: str = "cpu", warm: bool = True) -> int:
    """Return the peak of PyTorch's allocated bytes during a call, minus those allocated before it.

    The result of the call is counted. warm: make the call once before, so that one-time setup is not counted.
    """
    if warm:
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - start
        del result
        return peak
    # This profiler parses its events only on request; here the raw ones are enough. All outputs come from PyTorch.
    with (
        mock.patch.object(memory, "LEAST_BYTES", sys.maxsize),
        autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled,
    ):
        result = call()
    held = peak = 0
    for event in profiled.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    assert peak > 0, "the profiler saw no allocation"
    return peak


def nbytes(tensors: Any) -> int:
    """Return the bytes of all tensors in nested tuples and lists; a storage that several tensors share counts once."""
    storages = {}

    def visit(x):
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, (tuple, list)):
            for entry in x:
                visit(entry)

    visit(tensors)
    return sum(storages.values())


def operators(call: Callable[[], Any]) -> int:
    """Count the operators that Python or autograd calls on a CPU, without those that operators call themselves.

    Our kernels are called by address, without PyTorch's dispatcher; each such call counts as one operator. Code that
    torch.compile generates is not seen.
    """
    native = mock.MagicMock(wraps=cpu.compiled)
    with (
        mock.patch.object(cpu, "compiled", native),
        profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled,
    ):
        call()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    return sum(not _within_operator(event) for event in events) + len(native.method_calls)


def _within_operator(event) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is not None


def launches(call: Callable[[], Any]) -> int:
    """Count the kernels, copies and fills that a GPU runs. Raises RuntimeError if the profiler sees none."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:  # only the exported trace distinguishes kernels from annotated spans
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    count = sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
    if not count:
        raise RuntimeError("the profiler saw no kernel")
    return count
